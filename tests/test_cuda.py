# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""On a GPU (`make gpu`): the fused kernel is used, the model gives what it gives on the CPU, the host never waits."""

import copy

import pytest
import torch

from reformer_hf import attention_kernels
from reformer_hf.hashing import hash_vectors, random_rotations, sort_by_bucket

from .helpers import assert_close, gradients, random_model
from .operators import logits_of

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LAYERS = ["local", "lsh"]
# Of a length that the fused kernel takes.
CHUNKS = {"lsh_attn_chunk_length": 32, "local_attn_chunk_length": 32}

patterns = pytest.mark.parametrize("lsh_pattern", ["window", "chunk"])
paddings = pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])


def _inputs(padded, length=251):
    ids = torch.randint(1, 60, (2, length), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids}
    if padded:
        inputs["attention_mask"] = (torch.arange(length) >= torch.tensor([[0], [70]])).long()
    return inputs


def test_kernel_passes_trial():
    for dtype in (torch.float32, torch.bfloat16):
        for sizes in ((32, 96, 64), (64, 128, 64), (64, 192, 64), (128, 256, 96), (256, 512, 96)):
            trial = torch.device("cuda"), dtype, *sizes, sizes[-1]
            assert attention_kernels._is_trusted("cuda_efficient", *trial), trial


@patterns
@paddings
def test_step_equals_cpu(padded, lsh_pattern):
    """In fp64, where rounding takes no vector into another bucket; the loss of all logits would be in fp32."""
    fields = {"lsh_pattern": lsh_pattern, "chunk_size_lm_head": 64, **CHUNKS}
    model = random_model(torch.float64, attn_layers=LAYERS, hash_seed=0, **fields).train()
    results = {}
    for device in ("cpu", "cuda"):
        moved = copy.deepcopy(model).to(device)
        output = moved(**{name: x.to(device) for name, x in _inputs(padded).items()})
        output.loss.backward()
        results[device] = {"loss": output.loss.detach()[None], **gradients(moved)}
    for name, expected in results["cpu"].items():
        assert_close(results["cuda"][name].cpu(), expected, 1e-9, name)


@patterns
@paddings
def test_host_never_waits(padded, lsh_pattern):
    """The layers and the head, forward and backward, with dropout of what attention adds."""
    fields = {"lsh_pattern": lsh_pattern, "hidden_dropout_prob": 0.1, **CHUNKS}
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(dtype, attn_layers=LAYERS, **fields).cuda().train()
        hidden_states = torch.randn(2, 251, model.config.hidden_size, device="cuda", requires_grad=True)
        padding = (_inputs(True)["attention_mask"] == 0).cuda() if padded else None
        # The trial of the kernel, and what CUDA sets up.
        logits_of(model, hidden_states, padding).sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits_of(model, hidden_states, padding).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_buckets_equal_cpu():
    vectors = torch.randn(2, 1000, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotations = random_rotations(0, 3, 16, 4, [4, 8])
    expected = hash_vectors(vectors, rotations, [4, 8])
    buckets = hash_vectors(vectors.cuda(), rotations, [4, 8])
    assert torch.equal(buckets.cpu(), expected)
    assert torch.equal(sort_by_bucket(buckets).cpu(), sort_by_bucket(expected))
