# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The estimate of a training step's memory against the tensors that are really alive."""

import pytest
import torch

from reformer_hf import ReformerHfConfig, ReformerHfEncoderDecoderConfig, ReformerHfForCausalLM
from reformer_hf.encoder_decoder import ReformerHfForConditionalGeneration
from reformer_hf.training import estimate_training_memory

from ..helpers import memory_of


def _peak(config, length, batch_size, dtype=torch.float32) -> int:
    """Bytes of all tensors at the fullest moment of a step, those that were there before left out."""
    torch.manual_seed(0)
    model = ReformerHfForCausalLM(config).to(dtype).train()
    ids = torch.randint(0, config.vocab_size, (batch_size, length))
    model(ids[:, :100], labels=ids[:, :100]).loss.backward()
    model.zero_grad()
    return memory_of(lambda: model(ids, labels=ids).loss.backward())[1]


SIZES = {
    "is_decoder": True,
    "max_position_embeddings": 8192,
    # Activations are recomputed at any length.
    "max_kept_activations": 0,
    "hidden_dropout_prob": 0.0,
}
CONFIGS = {
    "lsh": {"attn_layers": ["lsh"] * 2, "num_hashes": 4},
    "local": {"attn_layers": ["local"] * 2},
    "deep": {"attn_layers": ["local", "lsh"] * 6},
    "wide": {"attn_layers": ["lsh"] * 2, "feed_forward_size": 8192},
    "wide-chunked": {"attn_layers": ["lsh"] * 2, "feed_forward_size": 8192, "chunk_size_feed_forward": 64},
    "vocabulary": {"attn_layers": ["lsh"] * 2, "vocab_size": 4000},
    "vocabulary-chunked": {"attn_layers": ["lsh"] * 2, "vocab_size": 4000, "chunk_size_lm_head": 256},
    "one-head": {"attn_layers": ["lsh"] * 2, "num_parallel_heads": 1},
}


def _assert_near(name, batch_size, length):
    config = ReformerHfConfig(**CONFIGS[name], **SIZES)
    estimate = estimate_training_memory(config, length, batch_size, optimizer_bytes=0)
    peak = _peak(config, length, batch_size)
    assert 0.8 < peak / (estimate.total - estimate.parameters) < 1.1, estimate


@pytest.mark.parametrize("name", ["lsh", "local", "vocabulary-chunked"])
def test_estimate_is_near(name):
    """The estimate is of what grows with the length: at this one, little else counts for these configs."""
    _assert_near(name, 2, 1000)


def test_kept_activations():
    """Short steps keep activations by default. The estimate is then an upper bound."""
    config = ReformerHfConfig(**{**CONFIGS["deep"], **SIZES, "max_kept_activations": None})
    estimate = estimate_training_memory(config, 1000, 2, optimizer_bytes=0)
    assert 0.7 < _peak(config, 1000, 2) / (estimate.total - estimate.parameters) < 1
    assert estimate_training_memory(config, 8192).activations == 0


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "length"), [(1, 8192), (2, 3000)], ids=["B1", "B2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_estimate_is_near_grid(name, batch_size, length):
    _assert_near(name, batch_size, length)


@pytest.mark.slow
def test_depth_adds_gradients_alone():
    """At a length so short that gradients outweigh streams and sort orders, of which the first layer has its own."""
    peaks, gradients = [], []
    for depth in (12, 36):
        config = ReformerHfConfig(**SIZES, attn_layers=["lsh"] * depth, num_hashes=4)
        peaks.append(_peak(config, 2048, 1))
        gradients.append(estimate_training_memory(config, 2048).gradients)
    assert abs((peaks[1] - peaks[0]) - (gradients[1] - gradients[0])) < 0.01 * peaks[0], (peaks, gradients)


SEQ2SEQ_CONFIGS = {
    "shallow-decoder": {"attn_layers": ["lsh", "local"], "decoder_attn_layers": ["lsh"]},
    "deep": {"attn_layers": ["local", "lsh"] * 3},
    "vocabulary": {"attn_layers": ["lsh"] * 2, "vocab_size": 4000},
}


@pytest.mark.parametrize(
    ("name", "batch_size", "length", "target_length"),
    [
        ("shallow-decoder", 2, 1500, 200),
        # Longer targets, where the backward pass of the decoder needs most.
        ("vocabulary", 1, 1000, 1500),
        pytest.param("shallow-decoder", 1, 8192, 256, marks=pytest.mark.slow),
        pytest.param("shallow-decoder", 1, 1024, 8192, marks=pytest.mark.slow),
        pytest.param("deep", 1, 8192, 512, marks=pytest.mark.slow),
    ],
)
def test_encoder_decoder_estimate_is_near(name, batch_size, length, target_length):
    config = ReformerHfEncoderDecoderConfig(**SEQ2SEQ_CONFIGS[name], **(SIZES | {"is_decoder": False}))
    model = ReformerHfForConditionalGeneration(config).train()
    ids, labels = (torch.randint(3, 259, (batch_size, size)) for size in (length, target_length))
    model(ids[:, :100], labels=labels[:, :50]).loss.backward()
    model.zero_grad()
    peak = memory_of(lambda: model(ids, labels=labels).loss.backward())[1]
    estimate = estimate_training_memory(model, length, batch_size, optimizer_bytes=0, target_length=target_length)
    assert estimate.encoder.parameters + estimate.decoder.parameters == 4 * model.num_parameters()
    assert 0.8 < peak / (estimate.total - 4 * model.num_parameters()) < 1.15, estimate
    assert estimate == estimate_training_memory(config, length, batch_size, None, None, 0, target_length=target_length)


def test_config_or_model():
    """A model of the dtype gives what its config does; frozen weights take no gradients and optimizer state."""
    config = ReformerHfConfig(**SIZES, attn_layers=["lsh"])
    model = ReformerHfForCausalLM(config).to(torch.bfloat16)
    expected = estimate_training_memory(config, 1024, dtype=torch.bfloat16)
    assert estimate_training_memory(model, 1024) == expected
    assert estimate_training_memory(config, 1024, dtype="bfloat16") == expected
    assert estimate_training_memory(config, 1024).parameters == 2 * expected.parameters
    model.reformer.requires_grad_(False)
    frozen = estimate_training_memory(model, 1024)
    head = sum(parameter.numel() for parameter in model.lm_head.parameters())
    assert (frozen.parameters, frozen.gradients, frozen.optimizer) == (expected.parameters, 2 * head, 8 * head)


def test_bad_arguments():
    for arguments, said in (
        ({"length": 0}, "`length` is 0.*at least 1"),
        ({"length": 8193}, "`length` is 8193.*at most 8192.*`max_position_embeddings`"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"num_hashes": 0}, "`num_hashes` is 0"),
        ({"dtype": "bf16"}, "`dtype` is 'bf16'.*'bfloat16'"),
        ({"config": {}}, "`config` is a dict.*`ReformerHfConfig`"),
    ):
        with pytest.raises(ValueError, match=said):
            estimate_training_memory(**{"config": ReformerHfConfig(**SIZES), "length": 1024, **arguments})


def test_uncovered_models():
    with pytest.raises(ValueError, match="`target_length` is None.*an encoder-decoder needs it"):
        estimate_training_memory(ReformerHfEncoderDecoderConfig(), 1024)
    with pytest.raises(ValueError, match="`target_length` is 8.*only an encoder-decoder has one"):
        estimate_training_memory(ReformerHfConfig(is_decoder=True), 1024, target_length=8)
    with pytest.raises(ValueError, match="`target_length` is 8192.*at most 4096"):
        estimate_training_memory(ReformerHfEncoderDecoderConfig(), 1024, target_length=8192)
    for fields in ({"reversible": False}, {"attn_layers": ["full"]}):
        with pytest.raises(ValueError, match="reversible models of local and LSH layers"):
            estimate_training_memory(ReformerHfConfig(**fields, is_decoder=True), 1024)
