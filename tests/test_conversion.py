# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Folders of the in-tree classes and of ours, converted to each other: exact to the last bit, or refused by name."""

import argparse
import json
import os
import textwrap
from contextlib import nullcontext
from email import message

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    ReformerConfig,
    ReformerForMaskedLM,
    ReformerForSequenceClassification,
    ReformerModelWithLMHead,
    ReformerTokenizer,
)
from transformers.convert_slow_tokenizer import generate_merges

from reformer_hf import (
    ReformerHfByteTokenizer,
    ReformerHfForCausalLM,
    ReformerHfForMaskedLM,
    ReformerHfForSequenceClassification,
    ReformerHfForTokenClassification,
    ReformerHfModel,
    replace_in_tree,
)
from reformer_hf.conversion import from_in_tree, main, to_in_tree

from .helpers import assert_close, random_model, tiny_config
from .in_tree import CLASSES, in_tree_head, in_tree_model, random_inputs
from .processes import run_python

# What the in-tree model computes, apart from sizes.
IN_TREE = {
    "attn_layers": ["local", "lsh"],
    "lsh_pattern": "chunk",
    "lsh_across_buckets": True,
    "wrap_chunks": True,
    "feed_forward_dropout_prob": None,
    "local_rope_theta": None,
}


def _json(path):
    return json.loads(path.read_text())


def _save_as_bin(model, folder, weights=None):
    """Save a model as Transformers did before safetensors."""
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict() if weights is None else weights, folder / "pytorch_model.bin")


def _weights_of(folder):
    return {name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}


def _assert_loads(cls, folder, weights):
    """A folder with exactly these weights, in which the class misses none and finds none too many."""
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    found = _weights_of(folder)
    # Tensors with two names are written once.
    assert found.keys() <= weights.keys() == model.state_dict().keys()
    assert weights.keys() - found.keys() <= {"lm_head.decoder.bias"}
    for name, weight in found.items():
        assert weight.dtype == weights[name].dtype
        assert torch.equal(weight, weights[name]), name
    return model


@pytest.mark.parametrize(
    ("cls", "kind"),
    list(zip(CLASSES, ("safetensors", "bin", "safetensors", "bin", "safetensors"), strict=True)),
    ids=lambda value: value if isinstance(value, str) else value.__name__.removeprefix("Reformer"),
)
def test_round_trip(tmp_path, cls, kind):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        folder = tmp_path / str(dtype)
        in_tree = in_tree_head(cls, hidden_dropout_prob=0.1, num_buckets=[2, 4]).to(dtype)
        in_tree.config.dtype = dtype
        if kind == "bin":
            _save_as_bin(in_tree, folder / "source")
        else:
            in_tree.save_pretrained(folder / "source", max_shard_size="20kB")
        from_in_tree(folder / "source", folder / "ours")
        to_in_tree(folder / "ours", folder / "back")
        weights = in_tree.state_dict()
        if "lm_head.bias" in weights:
            # The in-tree model does not use it, and ours has one bias.
            assert not torch.equal(weights["lm_head.bias"], weights["lm_head.decoder.bias"])
            weights["lm_head.bias"] = weights["lm_head.decoder.bias"]
        _assert_loads(CLASSES[cls], folder / "ours", weights)
        back = _assert_loads(cls, folder / "back", weights)
        expected = in_tree.config.to_dict()
        added = {"_name_or_path": str(folder / "back"), "tokenizer_class": "ReformerTokenizer"}
        assert {**expected, **added}.items() == back.config.to_dict().items()


def test_exact(tmp_path, rotations_of_fp32):
    """Ours, with fields whose default depends on others, and the in-tree model that it becomes."""
    cases = [
        (ReformerHfForCausalLM, {}),
        (ReformerHfForMaskedLM, {"is_decoder": False, "hash_seed": 2}),
        (ReformerHfForSequenceClassification, {"is_decoder": False, "attn_layers": ["lsh"], "num_labels": 3}),
        (ReformerHfModel, {"axial_pos_embds": False, "attn_layers": ["local"], "local_attn_chunk_length": 16}),
        (ReformerHfModel, {"axial_pos_shape": (15, 18), "num_buckets": [2, 4], "local_attn_chunk_length": 3}),
    ]
    for index, (cls, fields) in enumerate(cases):
        ours = random_model(torch.float64, cls, **{**IN_TREE, "hash_seed": 0, **fields})
        ours.save_pretrained(tmp_path / f"ours-{index}")
        to_in_tree(tmp_path / f"ours-{index}", tmp_path / f"in-tree-{index}")
        (in_tree_cls,) = (key for key, value in CLASSES.items() if value is cls)
        for length in (7, 100, 255, 256):
            folder = tmp_path / f"in-tree-{index}"
            # `from_pretrained` rounds the axial position embeddings of in-tree models to fp32.
            in_tree = in_tree_cls(ReformerConfig.from_pretrained(folder)).double().eval()
            in_tree.load_state_dict(_weights_of(folder))
            inputs = random_inputs(length, padded=True)
            with torch.no_grad():
                found, expected = in_tree(**inputs)[0], ours(**inputs)[0]
            if found.shape[1] == length:
                real = inputs["attention_mask"].bool()
                found, expected = found[real], expected[real]
            assert_close(found, expected, 1e-9, f"{cls.__name__}, {fields}, {length}")


# Fields of ours, and what the message says of each field that stands in the way.
REFUSED = [
    (ReformerHfForCausalLM, {"attn_layers": ["local", "full"]}, ["`attn_layers` is ['local', 'full'],"]),
    (
        ReformerHfForCausalLM,
        {"lsh_pattern": "window", "lsh_across_buckets": False, "wrap_chunks": False},
        ["`lsh_pattern` is 'window',", "`lsh_across_buckets` is False,", "`wrap_chunks` is False,"],
    ),
    (
        ReformerHfModel,
        {"lsh_across_buckets": False, "wrap_chunks": False},
        ["`lsh_across_buckets` is False,", "`wrap_chunks` is False,"],
    ),
    (
        ReformerHfModel,
        {"lsh_deduplicate_keys": True, "wrap_chunks": False},
        ["`lsh_deduplicate_keys` is True,", "`wrap_chunks` is False,"],
    ),
    (
        ReformerHfForCausalLM,
        {"attn_layers": ["local"], "lsh_pattern": "window", "lsh_across_buckets": False, "wrap_chunks": False},
        ["`wrap_chunks` is False,"],
    ),
    (ReformerHfForCausalLM, {"local_rope_theta": 100.0}, ["`local_rope_theta` is 100.0,"]),
    (ReformerHfForCausalLM, {"num_buckets": 1}, ["`num_buckets` is 1,"]),
    (ReformerHfForCausalLM, {"feed_forward_dropout_prob": 0.1}, ["`feed_forward_dropout_prob` is 0.1,"]),
    (ReformerHfForCausalLM, {"lsh_num_chunks_before": 3}, ["`lsh_num_chunks_before` is 3,"]),
    (ReformerHfModel, {"is_decoder": False, "local_num_chunks_after": 4}, ["`local_num_chunks_after` is 4,"]),
    (ReformerHfForCausalLM, {"add_cross_attention": True}, ["`add_cross_attention` is True,"]),
    (ReformerHfForCausalLM, {"tie_word_embeddings": True}, ["`tie_word_embeddings` is True,"]),
    (ReformerHfForCausalLM, {"axial_pos_shape": (4, 8, 8)}, ["`axial_pos_shape` is (4, 8, 8),"]),
    (
        ReformerHfModel,
        {"max_position_embeddings": 250, "axial_pos_embds": False},
        ["`max_position_embeddings` is 250,"],
    ),
    (
        ReformerHfModel,
        {"max_position_embeddings": 250, "axial_pos_shape": (25, 10)},
        ["`max_position_embeddings` is 250,"],
    ),
    (ReformerHfForSequenceClassification, {"pooling": "mean", "is_decoder": False}, ["`pooling` is 'mean',"]),
    (ReformerHfForSequenceClassification, {}, ["`pooling` is None, which reads the last token"]),
]


def test_refused_to_in_tree(tmp_path):
    """Each field that stands in the way is named with its value, and no other; nothing is written."""
    for index, (cls, fields, expected) in enumerate(REFUSED):
        source = tmp_path / str(index) / "source"
        cls(tiny_config(**{**IN_TREE, **fields})).save_pretrained(source)
        with pytest.raises(ValueError, match="has no exact in-tree equivalent") as error:
            to_in_tree(source, source.with_name("target"))
        lines = str(error.value).splitlines()[1:]
        assert len(lines) == len(expected), (fields, lines)
        for line, text in zip(lines, expected, strict=True):
            assert line.startswith(f"- {text}"), fields
        assert [path.name for path in source.parent.iterdir()] == ["source"]
    ReformerHfForTokenClassification(tiny_config(is_decoder=False, **IN_TREE)).save_pretrained(tmp_path / "tokens")
    with pytest.raises(ValueError, match="`architectures` of .* is .'ReformerHfForTokenClassification'.,"):
        to_in_tree(tmp_path / "tokens", tmp_path / "target")


def test_largest_length_that_is_kept(tmp_path):
    """The message names it: with it, the conversion succeeds."""
    for fields in ({"axial_pos_shape": (25, 10)}, {"local_attn_chunk_length": 6, "axial_pos_shape": (5, 50)}):
        folder = tmp_path / str(len(fields))
        random_model(**{**IN_TREE, **fields, "max_position_embeddings": 250}).save_pretrained(folder / "a")
        with pytest.raises(ValueError, match="set it to") as error:
            to_in_tree(folder / "a", folder / "b")
        largest = int(str(error.value).rpartition("set it to ")[2].rstrip("."))
        config = _json(folder / "a" / "config.json")
        (folder / "a" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": largest}))
        to_in_tree(folder / "a", folder / "b")
        in_tree = ReformerModelWithLMHead.from_pretrained(folder / "b").eval()
        assert in_tree(torch.ones((1, largest), dtype=torch.long)).logits.isfinite().all()


def test_refused_from_in_tree(tmp_path):
    in_tree = in_tree_model(True, cls=ReformerForSequenceClassification)
    in_tree.save_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match="`is_decoder` of .* is True, but in-tree sequence classification"):
        from_in_tree(tmp_path / "causal", tmp_path / "target")
    in_tree_model(True).save_pretrained(tmp_path / "lm")
    path = tmp_path / "lm" / "config.json"
    config = _json(path)
    for changed, match in (
        ({"architectures": ["ReformerForTokenClassification"]}, "`architectures`"),
        ({"architectures": None}, "`architectures` of .* is None"),
        ({"model_type": "reformer_hf"}, "`model_type` of .* is 'reformer_hf', but .* needs 'reformer'"),
        ({"num_hashes": 0}, "`num_hashes` is 0"),
        ({"feed_forward_size": 49}, "other shapes.*feed_forward.dense.dense.bias"),
        ({"attn_layers": ["local"] * 5}, "are missing.*layers.4"),
        ({"attn_layers": ["local", "lsh", "local"]}, "are unknown.*layers.3"),
    ):
        path.write_text(json.dumps({**config, **changed}))
        with pytest.raises(ValueError, match=match):
            from_in_tree(tmp_path / "lm", tmp_path / "target")
    with pytest.raises(ValueError, match="no folder with a `config.json`"):
        from_in_tree(tmp_path / "nowhere", tmp_path / "target")
    assert {path.name for path in tmp_path.iterdir()} == {"causal", "lm"}


@pytest.mark.parametrize("cls", [ReformerModelWithLMHead, ReformerForMaskedLM])
def test_biases_of_old_checkpoints(tmp_path, cls):
    """Whichever name of the head's bias there is gives the bias; of both, the one that the in-tree model adds."""
    in_tree = in_tree_head(cls)
    weights = in_tree.state_dict()
    # Old checkpoints have these constants too.
    attention = "reformer.encoder.layers.1.attention.self_attention."
    for name in ("self_mask_value_float16", "self_mask_value_float32", "mask_value_float16", "mask_value_float32"):
        weights[attention + name] = torch.tensor(-1e4)
    both = {"lm_head.bias": weights.pop("lm_head.bias"), "lm_head.decoder.bias": weights.pop("lm_head.decoder.bias")}
    assert not torch.equal(*both.values())
    for names in (["lm_head.bias"], ["lm_head.decoder.bias"], list(both)):
        source, target = tmp_path / "-".join(names), tmp_path / "-".join([*names, "ours"])
        _save_as_bin(in_tree, source, {**weights, **{name: both[name] for name in names}})
        from_in_tree(source, target)
        for folder in (source, target):
            ours, info = CLASSES[cls].from_pretrained(folder, output_loading_info=True)
            assert not any(info.values()), info
            assert ours.lm_head.bias is ours.lm_head.decoder.bias
            assert torch.equal(ours.lm_head.bias, both[names[-1]]), names


class _WritesFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_bin_runs_no_code(tmp_path, capsys):
    marker = tmp_path / "marker"
    in_tree = in_tree_model(True)
    _save_as_bin(in_tree, tmp_path / "source", {**in_tree.state_dict(), "code": _WritesFile(marker)})
    with pytest.raises(SystemExit) as exit:
        main(["from-in-tree", str(tmp_path / "source"), str(tmp_path / "target")])
    assert exit.value.code == 1
    assert "mkdir" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_command_line(tmp_path, monkeypatch, capsys):
    in_tree_model(True).save_pretrained(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    main(["from-in-tree", "source", "ours"])
    (tmp_path / "empty").mkdir()
    main(["to-in-tree", "ours", "empty"])
    assert type(AutoModelForCausalLM.from_pretrained("empty")) is ReformerModelWithLMHead
    # The permissions of a folder that is made.
    assert (tmp_path / "empty").stat().st_mode == (tmp_path / "source").stat().st_mode
    for arguments, text in (
        (["to-in-tree", "ours", "source"], "exists and is not an empty folder"),
        (["to-in-tree", "ours", "ours"], "exists and is not an empty folder"),
        (["to-in-tree", "ours", "source/config.json"], "exists and is not an empty folder"),
        (["from-in-tree", "ours", "other"], "`model_type`"),
        (["to-in-tree", "nowhere", "other"], "nowhere is no folder"),
    ):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 1
        assert text in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main(["sideways", "ours", "other"])
    assert exit.value.code == 2
    assert {path.name for path in tmp_path.iterdir()} == {"source", "ours", "empty"}


@pytest.mark.slow
def test_in_a_process(tmp_path):
    """As a user runs it: without warnings of Python, and with the reason of a refusal as the last lines."""
    random_model().save_pretrained(tmp_path / "ours")
    arguments = ["-W", "error::RuntimeWarning", "-m", "reformer_hf.conversion", "to-in-tree"]
    done = run_python([*arguments, tmp_path / "ours", tmp_path / "target"], tmp_path, dict(os.environ), check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "has no exact in-tree equivalent:\n- `attn_layers` is ['local', 'lsh', 'full']" in done.stderr
    assert not (tmp_path / "target").exists()


def test_disk_error_leaves_nothing(tmp_path, monkeypatch):
    in_tree_model(True).save_pretrained(tmp_path / "source")

    def fails(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(ReformerHfForCausalLM, "save_pretrained", fails)
    with pytest.raises(SystemExit):
        main(["from-in-tree", str(tmp_path / "source"), str(tmp_path / "target")])
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_tokenizer_and_generation_config(tmp_path):
    """Our own tokenizer, with its code, next to an in-tree model; and back."""
    model = random_model(vocab_size=260, **IN_TREE)
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, top_k=5)
    model.save_pretrained(tmp_path / "ours")
    ReformerHfByteTokenizer(padding_side="left").save_pretrained(tmp_path / "ours")
    to_in_tree(tmp_path / "ours", tmp_path / "in-tree")
    from_in_tree(tmp_path / "in-tree", tmp_path / "back")
    for folder in ("in-tree", "back"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert type(tokenizer) is ReformerHfByteTokenizer and tokenizer.padding_side == "left"
        generation_config = AutoModelForCausalLM.from_pretrained(tmp_path / folder).generation_config
        assert (generation_config.max_new_tokens, generation_config.top_k) == (7, 5)
        assert (tmp_path / folder / "tokenization_reformer_hf.py").is_file()
    assert _json(tmp_path / "in-tree" / "config.json")["model_type"] == "reformer"
    assert not (tmp_path / "in-tree" / "modeling_reformer_hf.py").exists()


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A SentencePiece model with the 320 pieces of google/reformer-crime-and-punishment."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [line for module in (argparse, textwrap, message) for line in open(module.__file__) if line.strip()]
    prefix = tmp_path_factory.mktemp("spiece") / "spiece"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(prefix), vocab_size=320, model_type="bpe", minloglevel=2
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model"), prefix.with_suffix(".model")


SENTENCE = "Return the parser that an argument group belongs to, if there is one."


@pytest.mark.parametrize("file", ["tokenizer.json", "spiece.model"])
def test_sentencepiece_tokenizer(tmp_path, spiece, file):
    """
    It loads through `AutoTokenizer` next to our model, in each of the ways in which our model loads.

    Old folders have `spiece.model` and no `tokenizer_config.json`. Transformers reads this file with protobuf.
    """
    processor, path = spiece
    in_tree = in_tree_model(True, vocab_size=320)
    in_tree.save_pretrained(tmp_path / "in-tree")
    if file == "spiece.model":
        pytest.importorskip("google.protobuf")
        (tmp_path / "in-tree" / file).write_bytes(path.read_bytes())
    else:
        vocab = {processor.id_to_piece(index): index for index in range(len(processor))}
        ReformerTokenizer(vocab=vocab, merges=generate_merges(vocab)).save_pretrained(tmp_path / "in-tree")
        (tmp_path / "in-tree" / "tokenizer_config.json").unlink()
    from_in_tree(tmp_path / "in-tree", tmp_path / "ours")
    to_in_tree(tmp_path / "ours", tmp_path / "back")
    texts = []
    for folder, replaced in (("in-tree", False), ("in-tree", True), ("ours", False), ("back", False)):
        with replace_in_tree() if replaced else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert type(tokenizer) is ReformerTokenizer
        inputs = tokenizer(SENTENCE, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == processor.encode(SENTENCE)
        assert tokenizer.decode(inputs["input_ids"][0]) == SENTENCE
        model = ReformerHfForCausalLM.from_pretrained(tmp_path / ("ours" if folder == "ours" else "in-tree"))
        new = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(new))
    assert texts[0] and len(set(texts)) == 1
