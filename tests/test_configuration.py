# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The configuration: defaults, derived fields, what is refused and how, round trips, and in-tree files."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, ReformerConfig

from reformer_hf import ReformerHfConfig, ReformerHfModel

from .helpers import tiny_config

IN_TREE_BEHAVIOUR = {
    "lsh_pattern": "chunk",
    "lsh_across_buckets": True,
    "lsh_deduplicate_keys": False,
    "wrap_chunks": True,
}


def test_defaults():
    config = ReformerHfConfig()
    assert config.model_type == "reformer_hf"
    assert config.vocab_size == 260
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, 258)
    assert config.attn_layers == ("local", "lsh") * 3
    assert config.num_hidden_layers == 6
    assert (config.num_attention_heads, config.attention_head_size) == (4, 64)
    assert config.axial_pos_shape == (64, 64)
    assert config.axial_pos_embds_dim == (64, 192)
    assert config.lsh_pattern == "window"
    assert config.reversible
    assert not (config.is_decoder or config.lsh_across_buckets or config.wrap_chunks or config.tie_word_embeddings)
    assert config.num_buckets is None
    assert config.hash_seed is None


def test_number_of_layers():
    config = ReformerHfConfig(attn_layers=["full", "lsh"], num_hidden_layers=2)
    assert config.num_hidden_layers == 2
    assert config.attn_layers == ("full", "lsh")
    assert ReformerHfConfig.from_dict(config.to_dict(), attn_layers=["lsh"]).num_hidden_layers == 1
    in_tree = ReformerConfig(num_hidden_layers=2).to_dict()
    assert ReformerHfConfig.from_dict(in_tree, attn_layers=["lsh"]).num_hidden_layers == 1
    with pytest.raises(ValueError, match="`num_hidden_layers` is 12, but `attn_layers` has 2 entries"):
        ReformerHfConfig.from_dict(config.to_dict(), num_hidden_layers=12)
    config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="`num_hidden_layers` is 1, but `attn_layers` has 2 entries"):
        config.num_hidden_layers = 1


def test_names_of_other_configs():
    config = ReformerHfConfig(intermediate_size=48)
    assert config.feed_forward_size == config.intermediate_size == 48
    assert "intermediate_size" not in config.to_dict()
    assert ReformerHfConfig.from_dict(config.to_dict(), feed_forward_size=32).intermediate_size == 32
    with pytest.raises(ValueError, match="`rope_theta` is not a field of this config: use `local_rope_theta`"):
        ReformerHfConfig(rope_theta=5e5)
    # Tools add fields to saved configs, and in-tree ones may hold anything.
    assert ReformerHfConfig.from_dict({**config.to_dict(), "head_dim": 64}).feed_forward_size == 48
    assert ReformerHfConfig.from_dict({**ReformerConfig().to_dict(), "head_dim": 64}).attention_head_size == 64


def test_derived_head_size():
    assert ReformerHfConfig(hidden_size=96, num_attention_heads=6, attention_head_size=None).attention_head_size == 16


@given(st.integers(1, 1 << 20))
def test_derived_axes(length):
    rows, columns = ReformerHfConfig(max_position_embeddings=length).axial_pos_shape
    assert rows * columns >= length
    assert (rows - 1) * columns < length
    assert columns & (columns - 1) == 0
    assert rows <= columns <= 2 * math.isqrt(4 * length)


def test_derived_axial_widths():
    for shape, hidden_size, dims in (
        ((64, 64), 256, (64, 192)),
        ((4096,), 256, (256,)),
        ((16, 16, 16), 256, (86, 85, 85)),
        ((64, 64), 30, (7, 23)),
    ):
        config = ReformerHfConfig(axial_pos_shape=shape, hidden_size=hidden_size)
        assert config.axial_pos_embds_dim == dims, shape


def test_three_axes():
    config = tiny_config(axial_pos_shape=[5, 4, 3], axial_pos_embds_dim=[12, 12, 8], max_position_embeddings=60)
    model = ReformerHfModel(config)
    shapes = [tuple(weight.shape) for weight in model.get_position_embeddings().weights]
    assert shapes == [(5, 1, 1, 12), (1, 4, 1, 12), (1, 1, 3, 8)]
    assert model(torch.zeros(1, 60, dtype=torch.long)).last_hidden_state.shape == (1, 60, 64)


def test_learned_positions_ignore_axes():
    config = tiny_config(
        axial_pos_embds=False, axial_pos_shape=(2, 2), axial_pos_embds_dim=(1, 1), max_position_embeddings=70
    )
    assert ReformerHfModel(config).get_position_embeddings().weight.shape == (70, 32)


BAD_FIELDS = [
    # Fields, and what the message must say: the field, its value, and what to do.
    (
        {"axial_pos_shape": (8, 8), "max_position_embeddings": 65},
        ["`axial_pos_shape`", "(8, 8)", "64", "65", "first axis", "(9, 8)"],
    ),
    (
        {"axial_pos_shape": (4, 4, 4), "max_position_embeddings": 65},
        ["`axial_pos_shape`", "64", "65", "first axis", "(5, 4, 4)"],
    ),
    ({"num_hidden_layers": 12}, ["`num_hidden_layers`", "12", "`attn_layers` has 6", "* 6", "leave"]),
    ({"axial_pos_shape": (8, 8, 2)}, ["`axial_pos_shape`", "128", "`max_position_embeddings`", "4096", "enlarge"]),
    ({"axial_pos_embds_dim": (64, 64)}, ["`axial_pos_embds_dim`", "(64, 64)", "128", "`hidden_size`", "256", "None"]),
    ({"axial_pos_shape": (64, 8, 8), "axial_pos_embds_dim": (64, 192)}, ["(64, 8, 8)", "(64, 192)", "same number"]),
    ({"axial_pos_shape": ()}, ["`axial_pos_shape`", "()", "None"]),
    ({"axial_pos_shape": (-64, -64)}, ["`axial_pos_shape`", "(-64, -64)", "at least 1"]),
    ({"axial_pos_embds_dim": (0, 256)}, ["`axial_pos_embds_dim`", "(0, 256)", "at least 1"]),
    ({"attn_layers": []}, ["`attn_layers`", "empty", "'local', 'lsh', 'full'"]),
    ({"attn_layers": ["lsh", "sparse"]}, ["`attn_layers`", "'sparse'", "'local', 'lsh', 'full'"]),
    (
        {"attention_head_size": None, "hidden_size": 256, "num_attention_heads": 3},
        ["`attention_head_size`", "`hidden_size`", "256", "`num_attention_heads`", "3", "change one"],
    ),
    ({"attention_head_size": None, "num_attention_heads": 0}, ["`num_attention_heads`", "0"]),
    ({"num_buckets": 7}, ["`num_buckets`", "7", "even", "None"]),
    ({"num_buckets": 0}, ["`num_buckets`", "0", "even", "None"]),
    ({"num_buckets": -2}, ["`num_buckets`", "-2", "even", "None"]),
    ({"num_buckets": [4, 3]}, ["`num_buckets`", "[4, 3]", "even", "None"]),
    ({"num_buckets": [1, 4]}, ["`num_buckets`", "[1, 4]", "even", "None"]),
    ({"num_buckets": []}, ["`num_buckets`", "[]", "even", "None"]),
    (
        {"is_decoder": True, "local_num_chunks_after": 1},
        ["`local_num_chunks_after`", "1", "causal", "set it to None or 0"],
    ),
    (
        {"is_decoder": True, "lsh_num_chunks_after": 2},
        ["`lsh_num_chunks_after`", "2", "causal", "set it to None or 0"],
    ),
    ({"local_num_chunks_before": -1}, ["`local_num_chunks_before`", "-1", "at least 0"]),
    ({"lsh_num_chunks_after": -1}, ["`lsh_num_chunks_after`", "-1", "at least 0"]),
    ({"local_attn_chunk_length": 0}, ["`local_attn_chunk_length`", "0", "at least 1"]),
    ({"lsh_attn_chunk_length": None}, ["`lsh_attn_chunk_length`", "None", "at least 1"]),
    ({"lsh_pattern": "windows"}, ["`lsh_pattern`", "'windows'", "'chunk', 'window'"]),
    ({"lsh_across_buckets": True}, ["`lsh_across_buckets=False`", "True", "`lsh_pattern='chunk'`"]),
    (
        {"lsh_across_buckets": True, "wrap_chunks": True},
        ["'window'", "`lsh_across_buckets` is True and `wrap_chunks` is True", "`lsh_across_buckets=False`, `wrap_ch"],
    ),
    ({"lsh_num_chunks_before": 0}, ["`lsh_num_chunks_before`", "0", "'window'", "at least 1"]),
    ({"wrap_chunks": True}, ["`wrap_chunks`", "True", "'window'", "`wrap_chunks=False`"]),
    ({"wrap_chunks": True, "lsh_pattern": "chunk"}, ["`wrap_chunks`", "`lsh_across_buckets=True`", "set it to False"]),
    (
        {"wrap_chunks": True, "lsh_pattern": "chunk", "lsh_across_buckets": True, "lsh_deduplicate_keys": True},
        ["`wrap_chunks`", "`lsh_deduplicate_keys=False`", "set it to False"],
    ),
    ({"hidden_dropout_prob": 1.0}, ["`hidden_dropout_prob`", "1.0", "[0, 1)"]),
    ({"local_attention_probs_dropout_prob": -0.1}, ["`local_attention_probs_dropout_prob`", "-0.1", "[0, 1)"]),
    ({"lsh_attention_probs_dropout_prob": 2}, ["`lsh_attention_probs_dropout_prob`", "2", "[0, 1)"]),
    ({"layer_norm_eps": 0.0}, ["`layer_norm_eps`", "0.0", "above 0"]),
    ({"hidden_act": "rleu"}, ["`hidden_act`", "'rleu'", "'relu'"]),
    ({"hidden_dropout_prob": float("nan")}, ["`hidden_dropout_prob`", "nan", "finite"]),
    ({"num_hashes": 0}, ["`num_hashes`", "0", "at least 1"]),
    ({"vocab_size": 0}, ["`vocab_size`", "0", "at least 1"]),
    ({"hidden_size": 0}, ["`hidden_size`", "0", "at least 1"]),
    ({"attention_head_size": 0}, ["`attention_head_size`", "0", "at least 1"]),
    ({"feed_forward_size": 0}, ["`feed_forward_size`", "0", "at least 1"]),
    ({"max_position_embeddings": 0}, ["`max_position_embeddings`", "0", "at least 1"]),
    ({"max_position_embeddings": -5}, ["`max_position_embeddings`", "-5", "at least 1"]),
    ({"chunk_size_feed_forward": -1}, ["`chunk_size_feed_forward`", "-1", "0 for all"]),
    ({"num_parallel_heads": 0}, ["`num_parallel_heads`", "0", "at least 1"]),
    ({"chunk_size_lm_head": -3}, ["`chunk_size_lm_head`", "-3", "0 for all"]),
]


def test_bad_fields():
    """Refused with the field, its value and the remedy."""
    failed = []
    for fields, said in BAD_FIELDS:
        try:
            ReformerHfConfig(**fields)
            failed.append((fields, "was accepted"))
        except ValueError as error:
            failed += [(fields, f"{part!r} is not in {error}") for part in said if part not in str(error)]
    assert not failed


ACCEPTED = [
    {"num_buckets": 1},
    {"num_buckets": 2},
    {"num_buckets": (4, 8)},
    {"num_buckets": [64]},
    {"attn_layers": ["full"], "lsh_num_chunks_after": 3, "is_decoder": True},
    {"attn_layers": ["local"], "lsh_attn_chunk_length": None},
    {"attn_layers": ["local"], "lsh_num_chunks_before": 0},
    {"lsh_num_chunks_after": 1, "local_num_chunks_after": 2},
    {"lsh_pattern": "chunk", "lsh_num_chunks_before": 0},
    {"lsh_pattern": "chunk", "lsh_across_buckets": True, "wrap_chunks": True},
    {"lsh_attention_probs_dropout_prob": None},
    {"hidden_dropout_prob": 0},
]


def test_accepted_fields():
    for fields in ACCEPTED:
        config = ReformerHfConfig(**fields)
        for name, value in fields.items():
            found = getattr(config, name)
            assert (list(found) if isinstance(value, list | tuple) else found) == (
                list(value) if isinstance(value, list | tuple) else value
            ), fields


def test_field_set_later():
    config = tiny_config()
    config.num_buckets = 7
    with pytest.raises(ValueError, match="`num_buckets` is 7"):
        ReformerHfModel(config)


FIELDS = [
    {},
    {"attn_layers": ["full", "local"], "max_position_embeddings": 1000, "hidden_size": 30},
    {"num_buckets": [4, 8], "is_decoder": True, "hash_seed": 3, "lsh_deduplicate_keys": True},
    {"axial_pos_shape": (16, 16, 16), "lsh_pattern": "chunk", "lsh_across_buckets": True, "wrap_chunks": True},
    {
        "axial_pos_embds": False,
        "reversible": False,
        "tie_word_embeddings": True,
        "chunk_size_lm_head": 7,
        "num_parallel_heads": 3,
    },
]


def test_round_trip(tmp_path):
    for number, fields in enumerate(FIELDS):
        folder = tmp_path / str(number)
        config = ReformerHfConfig(**fields)
        config.save_pretrained(folder)
        for other in (
            ReformerHfConfig.from_pretrained(folder),
            AutoConfig.from_pretrained(folder),
            ReformerHfConfig.from_dict(config.to_dict()),
            ReformerHfConfig.from_json_file(folder / "config.json"),
            copy.deepcopy(config),
        ):
            assert isinstance(other, ReformerHfConfig)
            for name in ReformerHfConfig.__dataclass_fields__:
                if name != "transformers_version":
                    assert getattr(other, name) == getattr(config, name), (name, fields)
        other = ReformerHfConfig.from_pretrained(folder)
        other.save_pretrained(folder / "again")
        first, again = (json.loads((each / "config.json").read_text()) for each in (folder, folder / "again"))
        assert first == again, fields


def _in_tree_folder(tmp_path, **fields):
    ReformerConfig(**fields).save_pretrained(tmp_path)
    return tmp_path


IN_TREE_FIELDS = [
    {},
    {"attn_layers": ["lsh"], "num_buckets": [64, 32], "num_hashes": 4, "hash_seed": 1, "is_decoder": True},
    {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32], "hidden_size": 64, "lsh_num_chunks_after": 1},
    {"axial_pos_embds": False, "max_position_embeddings": 100, "bos_token_id": 5, "vocab_size": 258},
]


def test_in_tree_config(tmp_path):
    for number, fields in enumerate(IN_TREE_FIELDS):
        _assert_equals_in_tree_config(fields, tmp_path / str(number))


def _assert_equals_in_tree_config(fields, tmp_path):
    in_tree = ReformerConfig(**fields)
    folder = _in_tree_folder(tmp_path, **fields)
    for config in (ReformerHfConfig.from_pretrained(folder), ReformerHfConfig.from_dict(in_tree.to_dict())):
        assert config.model_type == "reformer_hf"
        assert config.to_dict()["model_type"] == "reformer_hf"
        for name, value in IN_TREE_BEHAVIOUR.items():
            assert getattr(config, name) == value, (name, fields)
        for name in ReformerConfig.__dataclass_fields__:
            # The last two are names of fields, and of modules for sharding.
            own = ("model_type", "transformers_version", "max_position_embeddings", "attribute_map")
            own += ("base_model_fsdp_plan",)
            if name.startswith("_") or name in own:
                continue
            found, expected = getattr(config, name), getattr(in_tree, name)
            assert (list(found) if isinstance(found, tuple) else found) == (
                list(expected) if isinstance(expected, tuple) else expected
            ), (name, fields)
        held = math.prod(in_tree.axial_pos_shape) if in_tree.axial_pos_embds else in_tree.max_position_embeddings
        assert config.max_position_embeddings == min(in_tree.max_position_embeddings, held), fields


def test_sparse_in_tree_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "reformer"}))
    config, in_tree = ReformerHfConfig.from_pretrained(tmp_path), ReformerConfig()
    for name in ("vocab_size", "num_attention_heads", "axial_pos_shape", "axial_pos_embds_dim", "eos_token_id"):
        assert getattr(config, name) == getattr(in_tree, name), name
    assert config.bos_token_id is None


def test_our_fields_in_in_tree_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "reformer", "wrap_chunks": False}))
    config = ReformerHfConfig.from_pretrained(tmp_path)
    assert not config.wrap_chunks
    assert config.lsh_across_buckets


def test_from_dict_copies():
    for given_dict in (ReformerConfig().to_dict(), ReformerHfConfig().to_dict()):
        kept = copy.deepcopy(given_dict)
        ReformerHfConfig.from_dict(given_dict, num_hashes=4)
        assert given_dict == kept


def test_overrides(tmp_path):
    for cls in (ReformerHfConfig, ReformerConfig):
        cls().save_pretrained(tmp_path / cls.__name__)
        overrides = {"num_hashes": 4, "num_buckets": [8, 8], "is_decoder": True}
        config = ReformerHfConfig.from_pretrained(tmp_path / cls.__name__, **overrides)
        assert {name: getattr(config, name) for name in overrides} == overrides, cls


def test_overrides_come_first(tmp_path):
    ReformerHfConfig().save_pretrained(tmp_path)
    config = ReformerHfConfig.from_pretrained(
        tmp_path, max_position_embeddings=65536, axial_pos_shape=None, hidden_size=512, axial_pos_embds_dim=None
    )
    assert config.axial_pos_shape == (256, 256)
    assert config.axial_pos_embds_dim == (128, 384)
    with pytest.raises(ValueError, match="`axial_pos_shape`.*holds 4096 positions"):
        ReformerHfConfig.from_pretrained(tmp_path, max_position_embeddings=65536)
    with pytest.raises(ValueError, match="`num_buckets` is 3"):
        ReformerHfConfig.from_pretrained(tmp_path, num_buckets=3)


def test_overrides_of_in_tree_behaviour(tmp_path):
    """The pattern of an in-tree file is changed together with what belongs to it, or not at all."""
    folder = _in_tree_folder(tmp_path)
    with pytest.raises(ValueError, match="`lsh_across_buckets=False`, `wrap_chunks=False`"):
        ReformerHfConfig.from_pretrained(folder, lsh_pattern="window")
    config = ReformerHfConfig.from_pretrained(
        folder, lsh_pattern="window", lsh_across_buckets=False, wrap_chunks=False
    )
    assert config.lsh_pattern == "window"


def test_unused_arguments(tmp_path):
    ReformerHfConfig().save_pretrained(tmp_path)
    config, unused = ReformerHfConfig.from_pretrained(tmp_path, num_hashes=2, not_a_field=5, return_unused_kwargs=True)
    assert config.num_hashes == 2
    assert unused == {"not_a_field": 5}


def test_dtype(tmp_path):
    ReformerHfConfig(dtype="bfloat16").save_pretrained(tmp_path)
    assert ReformerHfConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert ReformerHfConfig.from_pretrained(tmp_path, dtype=torch.float16).dtype == torch.float16


def test_padded_length():
    for layers, length, padded in (
        (["local", "lsh"], 3, 3),
        (["local", "lsh"], 4, 4),
        (["local", "lsh"], 5, 12),
        (["local", "lsh"], 12, 12),
        (["local", "lsh"], 13, 24),
        (["lsh"], 7, 12),
        (["local"], 7, 8),
        (["full"], 7, 7),
        (["full", "local"], 7, 8),
    ):
        config = ReformerHfConfig(attn_layers=layers, local_attn_chunk_length=4, lsh_attn_chunk_length=6)
        assert config.padded_length(length) == padded, (layers, length)


def test_chunks_before_of_pattern():
    for pattern, chunks in (("window", 2), ("chunk", 1)):
        config = ReformerHfConfig(lsh_pattern=pattern)
        assert config.lsh_num_chunks_before == chunks, pattern
        assert ReformerHfConfig.from_dict(config.to_dict()).lsh_num_chunks_before == chunks, pattern
        assert ReformerHfConfig(lsh_pattern=pattern, lsh_num_chunks_before=3).lsh_num_chunks_before == 3, pattern
