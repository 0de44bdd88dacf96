# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The trial of fused kernels: it takes place once, and what fails it is not used."""

import pytest
import torch

from reformer_hf import attention_kernels
from reformer_hf.attention_kernels import MASKED, attend, attend_backward

from .helpers import assert_close


def _tile():
    torch.manual_seed(0)
    query, key, value, grad = (torch.randn(1, 3, n, 16) for n in (32, 96, 96, 32))
    return (query, key, value, MASKED * (torch.rand(1, 3, 32, 96) < 0.5)), grad


def _results():
    inputs, grad = _tile()
    out, lse = attend(*inputs, None)
    return out, lse, *attend_backward(grad, *inputs, out, lse, None)


def _lacks_operator(*inputs):
    raise AttributeError("'_OpNamespace' 'aten' object has no attribute 'fused'")


def _has_other_arguments(*inputs):
    raise TypeError("unexpected keyword argument 'scale'")


def _forgets_mask(query, key, value, mask):
    return attention_kernels._attend_plainly(query, key, value, torch.zeros_like(mask))


@pytest.fixture
def log(monkeypatch):
    """Warnings; all kernels are tried anew, then and afterwards."""
    attention_kernels._passes_trial.cache_clear()
    warnings = []
    monkeypatch.setattr(attention_kernels.logger, "warning_once", warnings.append)
    yield warnings
    attention_kernels._passes_trial.cache_clear()


def test_cpu_kernel_passes_trial(log):
    """Else attention would be slow on this machine, and nobody would see it."""
    large = ((32, 96, 64), (32, 160, 64), (64, 128, 64), (64, 192, 64))
    small = ((5, 5, 16), (3, 3, 64), (2, 2, 16), (1, 1, 16))
    for sizes in (*large, *small):
        trial = (torch.device("cpu"), torch.float32, *sizes, sizes[-1])
        assert attention_kernels._is_trusted("cpu_flash", *trial), sizes
        assert not log, sizes


def test_trial_takes_place_once(log, monkeypatch):
    compare, shapes = attention_kernels._is_close, []

    def is_close(found, grad_out, inputs, **limit):
        shapes.append([tuple(x.shape[2:]) for x in inputs])
        return compare(found, grad_out, inputs, **limit)

    monkeypatch.setattr(attention_kernels, "_is_close", is_close)
    _results()
    _results()
    assert shapes == [[(32, 16), (96, 16), (96, 16), (32, 96)]]


def test_trial_leaves_global_generator(log):
    before = torch.get_rng_state()
    assert attention_kernels._is_trusted("cpu_flash", torch.device("cpu"), torch.float32, 32, 96, 16, 16)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("broken", [_lacks_operator, _has_other_arguments, _forgets_mask])
def test_broken_kernel_is_replaced(broken, log, monkeypatch):
    expected = _results()
    attention_kernels._passes_trial.cache_clear()
    monkeypatch.setattr(attention_kernels._CpuKernel, "attend", staticmethod(broken))
    for found, tensor in zip(_results(), expected, strict=True):
        assert_close(found, tensor, 1e-5)
    (warning,) = log
    assert torch.__version__ in warning
    assert "install a version of torch" in warning
