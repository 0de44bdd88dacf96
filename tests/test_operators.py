# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
What a GPU would be asked to do, by the policy of CUDA on a machine that has none: the host never waits for the device,
and a layer is a bounded number of kernels.

On the CPU the model computes, with its fused kernel in the place of CUDA's. On the device `meta` there are no numbers
at all, so that nothing can be read, whichever way; there CUDA's own kernel says which shapes it takes and gives.
"""

from contextlib import nullcontext

import pytest
import torch

from reformer_hf import ReformerHfForCausalLM, attention_kernels
from reformer_hf.device_policy import CUDA, POLICIES

from .helpers import DROPOUT, tiny_config
from .operators import OperatorLog, logits_of
from .policies import CUDA_ON_CPU, set_policy

LONG, SHORT = 16384, 1024
LAYERS = ["lsh", "local", "lsh", "local"]

# Kernels of one layer in a training step and in a forward pass without gradient, whatever the length: about a fifth
# more than there are.
MOST_KERNELS = {"lsh": (320, 130), "local": (320, 95)}

patterns = pytest.mark.parametrize("lsh_pattern", ["window", "chunk"])


def _model(layers, length, **fields) -> ReformerHfForCausalLM:
    """Of 64-long chunks, the default, so that CUDA's kernel takes them."""
    rows = 1 << (length.bit_length() // 2)
    sizes = {
        "attn_layers": layers,
        "num_hashes": 4,
        "num_buckets": None,
        "lsh_attn_chunk_length": 64,
        "local_attn_chunk_length": 64,
        "max_position_embeddings": length,
        "axial_pos_shape": (rows, length // rows),
    }
    return ReformerHfForCausalLM(tiny_config(**sizes, **fields))


def _inputs(model, length, padded) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings and padding, on the device of the model."""
    torch.manual_seed(0)
    hidden_states = torch.randn(1, length, model.config.hidden_size).to(model.device).requires_grad_()
    return hidden_states, (torch.arange(length) < 100).to(model.device)[None] if padded else None


def _training_step(model, hidden_states, padding) -> OperatorLog:
    with OperatorLog() as log:
        logits_of(model, hidden_states, padding).sum().backward()
    return log


def _forward_pass(model, hidden_states, padding) -> OperatorLog:
    with OperatorLog() as log, torch.no_grad():
        logits_of(model, hidden_states, padding)
    return log


RUNS = {"step": _training_step, "forward": _forward_pass}


@pytest.fixture
def cuda_policy(monkeypatch):
    set_policy(monkeypatch, CUDA_ON_CPU)


@pytest.fixture
def meta_as_cuda(monkeypatch):
    """The device `meta` follows the policy of CUDA, its kernel trusted; it has no autocast to be left."""
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setitem(POLICIES, "meta", CUDA)
    monkeypatch.setattr(attention_kernels, "_is_trusted", lambda *trial: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *args, **kw: nullcontext() if kind == "meta" else autocast(kind, *args, **kw)
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and is_enabled(kind))


PASSES = [
    (SHORT, False, "window", "step"),
    (SHORT, True, "chunk", "forward"),
    (LONG, False, "chunk", "forward"),
    (LONG, True, "window", "forward"),
    (LONG, True, "chunk", "step"),
]


def test_host_never_waits(cuda_policy):
    for length, padded, lsh_pattern, run in PASSES:
        model = _model(LAYERS, length, lsh_pattern=lsh_pattern).train(run == "step")
        # The trial of the kernel, which reads its results; it depends on the sizes of chunks alone.
        _forward_pass(model, *_inputs(model, SHORT, padded))
        log = RUNS[run](model, *_inputs(model, length, padded))
        assert not log.waits, (length, padded, lsh_pattern, run)
        most = sum(MOST_KERNELS[layer][run == "forward"] for layer in LAYERS)
        assert log.num_kernels < most, log.kernels.most_common()


@patterns
def test_host_never_waits_for_options(lsh_pattern, cuda_policy):
    """Dropout, and keys of several rounds that count once."""
    model = _model(LAYERS, SHORT, lsh_pattern=lsh_pattern, lsh_deduplicate_keys=True, **DROPOUT).train()
    log = _training_step(model, *_inputs(model, SHORT, padded=True))
    assert not log.waits
    assert log.kernels["random_"]


PASSES_WITHOUT_NUMBERS = [
    (1000, False, "window", "step"),
    (1000, True, "chunk", "forward"),
    (LONG, False, "chunk", "forward"),
    (LONG, True, "window", "step"),
    (1 << 20, True, "window", "forward"),
    (1 << 20, True, "chunk", "step"),
]


def test_device_without_numbers(meta_as_cuda):
    """In evaluation, for `meta` has no generator."""
    for length, padded, lsh_pattern, run in PASSES_WITHOUT_NUMBERS:
        layers = LAYERS if length <= LONG else LAYERS[:2]
        model = _model(layers, 1 << 20, lsh_pattern=lsh_pattern).to("meta").eval()
        log = RUNS[run](model, *_inputs(model, length, padded))
        assert not log.waits, (length, padded, lsh_pattern, run)
        assert log.kernels["_scaled_dot_product_efficient_attention"]
        assert not log.kernels["_scaled_dot_product_flash_attention_for_cpu"]


PASSES_OF_A_LAYER = [
    (SHORT, "lsh", False, "step"),
    (SHORT, "local", True, "forward"),
    (LONG, "local", False, "forward"),
    (LONG, "lsh", True, "forward"),
    (LONG, "local", True, "step"),
]


def test_kernels_of_a_layer(meta_as_cuda):
    """What one more layer adds."""
    for length, kind, padded, run in PASSES_OF_A_LAYER:
        counts = []
        for depth in (1, 2):
            model = _model([kind] * depth, length).to("meta").eval()
            counts.append(RUNS[run](model, *_inputs(model, length, padded)).num_kernels)
        assert counts[1] - counts[0] < MOST_KERNELS[kind][run == "forward"], (length, kind, padded, run)


def test_log_names_waits():
    """The test of the tests."""
    reads = {
        "item": lambda x: x.sum().item(),
        "bool": lambda x: bool(x.any()),
        "int": lambda x: int(x.argmax()),
        "mask": lambda x: x[x > 0],
        "nonzero": lambda x: x.nonzero(),
        "masked_select": lambda x: x.masked_select(x > 0),
        "unique": lambda x: x.unique(),
        "index_put": lambda x: x.index_put_((x > 0,), torch.zeros(())),
    }
    for name, read in reads.items():
        with OperatorLog() as log:
            read(torch.randn(5))
        assert log.waits, name
