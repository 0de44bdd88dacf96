# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Configs of hostile files are refused with a `ValueError` before memory is allocated, or build a model."""

import json
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, ReformerConfig

import reformer_hf
from reformer_hf import ReformerHfConfig, ReformerHfEncoderDecoderConfig
from reformer_hf.config_checks import MAX_LABELS, MAX_LAYERS, MAX_NUMBER, MAX_WEIGHT_ELEMENTS

from .helpers import tiny_config

PATH = "../../../etc/passwd"
NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 8, 64, 2**31 - 1, 2**31, 2**40, 2**63, 10**400)
FLOATS = (-1.0, 0.0, 0.5, 1.0, 1e308, float("nan"), float("inf"), float("-inf"))
STRINGS = ("", "1", "lsh", "local", "gelu", "chunk", "float16", "Infinity", PATH, "user/kernel", "a" * 5000, "\0")
# What Python reads from JSON, which includes NaN and Infinity.
SCALARS = st.none() | st.booleans() | st.sampled_from(NUMBERS + FLOATS + STRINGS)
VALUES = SCALARS | st.lists(SCALARS, max_size=4) | st.dictionaries(st.sampled_from(STRINGS), SCALARS, max_size=2)

# Names in a file that are no fields: of Transformers, of methods and properties, and of Python.
OTHERS = [
    *("num_hidden_layers", "num_labels", "model_type", "auto_map", "torch_dtype", "quantization_config"),
    *(
        "attn_implementation",
        "_attn_implementation",
        "experts_implementation",
        "per_layer_config",
        "rope_scaling",
        "rope_theta",
    ),
    *("name_or_path", "_name_or_path", "output_attentions", "attribute_map", "sub_configs_defaults", "_commit_hash"),
    *("output_size", "layer_types", "ring", "validate_reformer", "to_dict", "from_dict", "base_model_tp_plan"),
    *("__class__", "__dict__", "__init__", "encoder_config", "anything", PATH),
]
HEADS = {
    ReformerHfConfig: [
        "ReformerHfForCausalLM",
        "ReformerHfForSequenceClassification",
        "ReformerHfForQuestionAnswering",
    ],
    ReformerHfEncoderDecoderConfig: ["ReformerHfForConditionalGeneration"],
}


def _fields(cls):
    return json.loads(tiny_config(cls).to_json_string(use_diff=False))


FIELDS = {cls: _fields(cls) for cls in HEADS}


@st.composite
def hostile_files(draw):
    """A config class and the fields of a file: those of a good config, some with other values."""
    cls = draw(st.sampled_from(list(HEADS)))
    names = st.sampled_from([*FIELDS[cls], *OTHERS])
    return cls, {**FIELDS[cls], **draw(st.dictionaries(names, VALUES, min_size=1, max_size=3))}


@given(hostile_files())
@example((ReformerHfConfig, {**FIELDS[ReformerHfConfig], "hidden_size": True}))
@example((ReformerHfConfig, {**FIELDS[ReformerHfConfig], "model_type": "reformer", "axial_pos_shape": 5}))
@example((ReformerHfConfig, {"model_type": "reformer", "attn_layers": 5}))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_hostile_file(file):
    """The model is built on the device `meta`, where it takes no memory."""
    cls, fields = file
    try:
        config = cls.from_dict(fields)
    except ValueError as error:
        assert any(f"`{name}" in str(error) for name in fields) or "weight of size" in str(error), error
        return
    for name in HEADS[cls]:
        try:
            with torch.device("meta"):
                model = getattr(reformer_hf, name)(config)
        except ValueError as error:
            # A head that this config does not fit.
            assert "`" in str(error)
        else:
            assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    json.dumps(config.to_dict(), default=str)


REFUSED = {
    "vocab_size": [2**31, "300", True, 3.0, None],
    "hidden_size": [10**400, [32], {}],
    "max_position_embeddings": [2**31, 10**400, float("nan")],
    "axial_pos_shape": [[2**31, 1], 256, "16", [16.0, 16], [PATH]],
    "attn_layers": [["local"] * (MAX_LAYERS + 1), 5, "lsh", [PATH], [["lsh"]], {"lsh": 1}],
    "num_buckets": [2**40, [2**20, 2**20], "8"],
    "num_labels": [0, -1, MAX_LABELS + 1, 10**12, None, True, "2"],
    "id2label": [["a"], {PATH: "a"}, {"-1": "a"}, 5],
    "hash_seed": [2**63, 1.5],
    "initializer_range": [-0.1, float("nan"), float("inf")],
    "axial_norm_std": [-1, float("inf")],
    "layer_norm_eps": [float("inf"), float("nan")],
    "chunk_size_feed_forward": [None, 1.5, 2**31],
    "dtype": [PATH, "Tensor", "float33", 32, ["float32"]],
    "torch_dtype": ["os", 1],
    "hidden_act": [PATH, 1],
    "problem_type": [PATH],
    "attn_implementation": ["user/kernel", PATH, {"": "user/kernel"}, 1],
    "_attn_implementation": ["user/kernel@main:f"],
    "auto_map": [PATH, 5],
    "quantization_config": [5, "4bit"],
    "per_layer_config": [{"0": {}}],
    "rope_scaling": [True, {"rope_type": "linear"}],
    "model_type": [5],
    "to_dict": [None, 5],
    "validate_reformer": ["x"],
    "output_size": [64],
    "layer_types": [["full_attention"]],
    "attribute_map": [{"hidden_size": "vocab_size"}],
    "__class__": ["x"],
    "base_model_tp_plan": [{"layers.*": "rowwise"}],
}


@pytest.mark.parametrize("cls", HEADS)
def test_refused_values(cls):
    """Also by the constructor, with the name of the field and a short message."""
    for name, values in REFUSED.items():
        for value in values:
            for build in (cls.from_dict, lambda fields: cls(**fields)):
                with pytest.raises(ValueError, match=rf"`{name}") as refused:
                    build({**FIELDS[cls], name: value})
                assert len(str(refused.value)) < 600


def test_large_weights():
    """Whose sizes are allowed one by one."""
    for sizes in (
        {"hidden_size": 2**25, "vocab_size": 2**25},
        {"hidden_size": 2**20, "num_attention_heads": 2**20, "attention_head_size": 2**20},
        {"hidden_size": 2**30, "feed_forward_size": 2},
        {"hidden_size": 2**30, "axial_pos_embds": False, "max_position_embeddings": 2**30},
        {"hidden_size": 2**24, "axial_pos_shape": [2**30], "axial_pos_embds_dim": [2**24]},
    ):
        with pytest.raises(ValueError, match=f"has more than {MAX_WEIGHT_ELEMENTS} elements"):
            ReformerHfConfig(**sizes)


def test_limits_are_out_of_reach():
    """A model of ten trillion parameters, a billion tokens long, is no hostile file."""
    config = ReformerHfConfig(
        hidden_size=65536,
        vocab_size=10_000_000,
        feed_forward_size=2_097_152,
        num_attention_heads=512,
        attention_head_size=128,
        attn_layers=["local", "lsh"] * 500,
        max_position_embeddings=2**30,
        num_buckets=[2**10, 2**10],
    )
    assert config.max_position_embeddings < MAX_NUMBER


def test_refused_before_memory_is_allocated(tmp_path):
    file = tmp_path / "config.json"
    for fields in (
        {"num_labels": 10**12},
        {"vocab_size": 10**12},
        {"hidden_size": 2**31 - 4, "vocab_size": 2**31 - 1},
        {"model_type": "reformer", "axial_pos_shape": [2**40, 2**40]},
    ):
        file.write_text(json.dumps({"model_type": "reformer_hf", **fields}))
        tracemalloc.start()
        for load in (ReformerHfConfig.from_pretrained, reformer_hf.ReformerHfForCausalLM.from_pretrained):
            with pytest.raises(ValueError):
                load(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**22, (fields, peak)


def test_good_files_are_read(tmp_path):
    """What Transformers itself writes, with labels, a dtype and fields of the user."""
    given = {
        "dtype": torch.bfloat16,
        "id2label": {0: "no", 1: "yes"},
        "label2id": {"no": 0, "yes": 1},
        "my_field": [PATH],
    }
    for cls in HEADS:
        tiny_config(cls, **given, attn_implementation="eager").save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert {name: getattr(config, name) for name in given} == given
    ReformerConfig(num_labels=3).save_pretrained(tmp_path)
    assert ReformerHfConfig.from_pretrained(tmp_path).num_labels == 3
