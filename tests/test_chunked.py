# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Functions in chunks of positions against the same function on the whole: outputs, gradients, what is kept."""

import pytest
import torch
from torch import nn

from reformer_hf.chunked import apply_chunked, vjp_chunks

from .helpers import assert_close

CHUNKS = [1, 5, 7, 16, 17, 100]


def _module(dropout=0.0):
    torch.manual_seed(0)
    layers = nn.Linear(6, 20), nn.ReLU(), nn.Dropout(dropout), nn.Linear(20, 4), nn.Dropout(dropout)
    return nn.Sequential(*layers).double().train()


def _hidden_states(length=17):
    torch.manual_seed(1)
    return torch.randn(3, length, 6, dtype=torch.float64, requires_grad=True)


def _results(out, hidden_states, module):
    """Output and gradients by name; no gradient is an error."""
    torch.manual_seed(2)
    weight = torch.randn(out.shape, dtype=out.dtype)
    tensors = {"hidden states": hidden_states, **dict(module.named_parameters())}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    grads = torch.autograd.grad((out * weight).sum(), list(tensors.values()))
    return {"output": out.detach(), **dict(zip(tensors, grads, strict=True))}


def _assert_equal_results(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], 1e-13, name)


def test_equals_whole():
    module, hidden_states = _module(), _hidden_states()
    expected = _results(module(hidden_states), hidden_states, module)
    for chunk_size in (0, *CHUNKS):
        chunked = apply_chunked(module, hidden_states, chunk_size, module)
        _assert_equal_results(_results(chunked, hidden_states, module), expected)


def test_dropout_is_replayed():
    module, hidden_states = _module(dropout=0.3), _hidden_states()
    for chunk_size in CHUNKS:
        torch.manual_seed(7)
        expected = torch.cat([module(chunk) for chunk in hidden_states.split(chunk_size, dim=1)], dim=1)
        torch.manual_seed(7)
        chunked = apply_chunked(module, hidden_states, chunk_size, module)
        assert (chunked == 0).any()
        _assert_equal_results(_results(chunked, hidden_states, module), _results(expected, hidden_states, module))


def test_global_generator():
    module, hidden_states = _module(dropout=0.3), _hidden_states()
    out = apply_chunked(module, hidden_states, 5, module)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_frozen_parameters():
    module, hidden_states = _module(), _hidden_states()
    module[0].requires_grad_(False)
    chunked = apply_chunked(module, hidden_states, 5, module)
    expected = _results(module(hidden_states), hidden_states, module)
    _assert_equal_results(_results(chunked, hidden_states, module), expected)
    assert set(expected) == {"output", "hidden states", "3.weight", "3.bias"}
    apply_chunked(module, hidden_states, 5, module).sum().backward()
    assert module[0].weight.grad is None
    assert module[3].weight.grad.any()


def test_frozen_input():
    module, hidden_states = _module(), _hidden_states().detach()
    chunked = apply_chunked(module, hidden_states, 5, module)
    _assert_equal_results(
        _results(chunked, hidden_states, module), _results(module(hidden_states), hidden_states, module)
    )


def test_all_frozen():
    module, hidden_states = _module().requires_grad_(False), _hidden_states().detach()
    assert apply_chunked(module, hidden_states, 5, module).grad_fn is None


def test_unused_parameters_are_left_out():
    module, hidden_states = _module(), _hidden_states()
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    whole = nn.ModuleList([module, nn.ParameterList([unused])])
    apply_chunked(module, hidden_states, 5, whole).sum().backward()
    assert unused.grad is None
    assert module[0].weight.grad.any()


def test_function_without_input():
    bias = nn.Parameter(torch.ones(4, dtype=torch.float64))
    hidden_states = _hidden_states()
    function, module = lambda x: bias.expand(*x.shape[:2], 4), nn.ParameterList([bias])
    apply_chunked(function, hidden_states, 5, module).sum().backward()
    assert torch.equal(hidden_states.grad, torch.zeros_like(hidden_states))
    assert torch.equal(bias.grad, torch.full_like(bias, 3 * 17))


def test_keeps_input_alone():
    module, hidden_states = _module(dropout=0.3), _hidden_states()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        out = apply_chunked(module, hidden_states, 5, module)
    assert out.grad_fn.saved_tensors
    assert [x.data_ptr() for x in packed] == [x.data_ptr() for x in (hidden_states, *module.parameters())]


def test_graph_of_one_chunk():
    """Neither forward nor backward keeps activations of a chunk once the next one begins."""
    module, hidden_states = _module(), _hidden_states()
    alive, chunks = set(), []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.size = x.shape[1]
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            alive.discard(ctx.size)
            return grad

    def function(chunk):
        if torch.is_grad_enabled():
            assert not alive
            alive.add(chunk.shape[1])
            chunks.append(chunk.shape[1])
        return Probe.apply(module(chunk))

    apply_chunked(function, hidden_states, 5, module).sum().backward()
    assert chunks == [5, 5, 5, 2]


def test_second_derivative():
    module, hidden_states = _module(), _hidden_states()
    out = apply_chunked(module, hidden_states, 5, module)
    with pytest.raises(RuntimeError, match="create_graph=True.*first derivatives alone"):
        torch.autograd.grad(out.sum(), hidden_states, create_graph=True)


def test_backward_twice():
    module, hidden_states = _module(dropout=0.3), _hidden_states()
    out = apply_chunked(module, hidden_states, 5, module)
    first, second = (torch.autograd.grad(out.sum(), hidden_states, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_vjp_equals_autograd():
    for chunk_size in (0, *CHUNKS):
        _assert_vjp_equals_autograd(chunk_size)


def _assert_vjp_equals_autograd(chunk_size):
    module, hidden_states = _module(), _hidden_states()
    parameters = list(module.parameters())
    out = module(hidden_states)
    torch.manual_seed(2)
    grad_out = torch.randn_like(out)
    expected = out, *torch.autograd.grad(out, [hidden_states, *parameters], grad_out)
    grad_parameters = [None] * len(parameters)
    chunks = list(
        vjp_chunks(module, hidden_states, lambda at: (grad_out[:, at],), chunk_size, parameters, grad_parameters)
    )
    assert [i for positions, *_ in chunks for i in range(*positions.indices(17))] == list(range(17))
    found = torch.cat([result for _, (result,), _ in chunks], dim=1)
    grad = torch.cat([grad for *_, grad in chunks], dim=1)
    assert not found.requires_grad
    for name, a, b in zip(
        ("output", "hidden states", *dict(module.named_parameters())),
        (found, grad, *grad_parameters),
        expected,
        strict=True,
    ):
        assert_close(a, b, 1e-13, name)


def test_autocast_is_replayed():
    """The backward pass computes chunks in the dtype in which the forward pass did."""
    module, hidden_states = _module().float(), _hidden_states().detach().float().requires_grad_()
    dtypes = []

    def function(chunk):
        out = module(chunk)
        dtypes.append(out.dtype)
        return out

    with torch.autocast("cpu", torch.bfloat16):
        out = apply_chunked(function, hidden_states, 5, module)
    out.float().sum().backward()
    assert dtypes == [torch.bfloat16] * 8
