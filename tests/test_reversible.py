# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Reversible layers against the same function computed plainly: gradients, memory, and what is refused."""

import pytest
import torch

from reformer_hf import ReformerHfForCausalLM, ReformerHfModel, reformer_encoder
from reformer_hf.reversible import Tape

from .helpers import DROPOUT, assert_close, gradients, tiny_config
from .policies import set_policy

DEEP = ["local", "lsh", "full"] * 4


def _pair(dtype=torch.float32, **fields):
    """The same weights in a reversible and in a plain model, both in training."""
    torch.manual_seed(0)
    reversible = ReformerHfForCausalLM(tiny_config(**fields)).to(dtype).train()
    plain = ReformerHfForCausalLM(tiny_config(**fields, reversible=False)).to(dtype).train()
    plain.load_state_dict(reversible.state_dict())
    return reversible, plain


def _loss(model, length=77, **inputs):
    torch.manual_seed(1)
    input_ids = torch.randint(0, model.config.vocab_size, (2, length))
    torch.manual_seed(2)
    return model(input_ids, labels=input_ids, **inputs)


@pytest.mark.parametrize(
    ("dtype", "limit", "padded", "chunk_size"),
    [
        (torch.float32, 1e-5, False, 0),
        (torch.float32, 1e-5, True, 10),
        (torch.float64, 1e-12, True, 0),
        (torch.float64, 1e-12, False, 10),
    ],
    ids=["fp32-whole", "fp32-padded-ff-chunks", "fp64-padded", "fp64-whole-ff-chunks"],
)
def test_gradients_equal_plain(dtype, limit, padded, chunk_size):
    reversible, plain = _pair(dtype, attn_layers=DEEP, chunk_size_feed_forward=chunk_size, **DROPOUT)
    inputs = {}
    if padded:
        inputs["attention_mask"] = torch.ones(2, 77, dtype=torch.long)
        inputs["attention_mask"][0, :30] = 0
    outputs = [_loss(model, **inputs) for model in (reversible, plain)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    expected = gradients(plain)
    for name, grad in gradients(reversible).items():
        assert_close(grad, expected[name], limit, name)


class _FreshBackward(torch.autograd.Function):
    """Runs the forward pass anew for each backward pass: `gradcheck` goes backward many times from one output."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx, grad_out):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.function(x)
        return None, torch.autograd.grad(out, x, grad_out)[0]


def test_gradcheck_of_the_stack(monkeypatch):
    """With dropout everywhere, groups of heads, and chunks of positions."""
    set_policy(monkeypatch, chunk_positions=4)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "attention_head_size": 4, "feed_forward_size": 8, "vocab_size": 11}
    model = ReformerHfModel(tiny_config(**sizes, **DROPOUT, hash_seed=1, num_parallel_heads=1)).double().train()
    # Well above the noise of a numerical derivative.
    for name, parameter in model.named_parameters():
        if "layer_norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5)

    def function(x):
        torch.manual_seed(5)
        return model(inputs_embeds=x).last_hidden_state

    embeds = torch.randn(1, 11, 8, dtype=torch.float64, requires_grad=True)
    # A step small enough not to move a vector into another bucket.
    assert torch.autograd.gradcheck(
        lambda x: _FreshBackward.apply(function, x), (embeds,), eps=1e-7, atol=1e-6, rtol=1e-5, fast_mode=True
    )


def _saved_elements(model) -> int:
    """Elements of activations that the graph of a training step keeps, parameters apart."""
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    sizes = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters and tensor.is_floating_point():
            sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _loss(model).loss
    assert loss.requires_grad
    return sum(sizes.values())


def test_saved_activations_do_not_grow_with_depth():
    shallow, deep = (_pair(attn_layers=["local", "lsh", "full"] * n, **DROPOUT) for n in (1, 4))
    assert _saved_elements(shallow[0]) == _saved_elements(deep[0])
    assert _saved_elements(deep[1]) > 3 * _saved_elements(shallow[1])


def test_last_streams_exist_once(monkeypatch):
    """The tape refers to the concatenated streams, which the layer norm saves as well."""
    tapes = []
    monkeypatch.setattr(reformer_encoder, "Tape", lambda: tapes.append(Tape()) or tapes[0])
    output = _loss(_pair()[0], output_hidden_states=True)
    _, (y1, y2), _ = tapes[0]._segment.rewind(2)
    assert torch.equal(y2, output.hidden_states[-1])
    assert y1.untyped_storage().data_ptr() == y2.untyped_storage().data_ptr()


def test_nothing_is_kept_without_gradient():
    model, _ = _pair(attn_layers=DEEP)
    with torch.no_grad():
        assert _loss(model).logits.grad_fn is None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert _loss(model).logits.grad_fn is None


@pytest.mark.parametrize("layer", [0, 5, 12])
def test_loss_on_an_inner_hidden_state(layer):
    """Layers after it have no backward pass of their own and must be inverted on the way."""
    reversible, plain = _pair(torch.float64, attn_layers=DEEP, **DROPOUT)
    for model in (reversible, plain):
        _loss(model, output_hidden_states=True).hidden_states[layer].square().sum().backward()
    _assert_same_gradients(reversible, plain)


def _assert_same_gradients(reversible, plain):
    """Of some parameters; the others have none, or zeros."""
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in reversible.named_parameters() if p.grad is not None and p.grad.any()}
    assert set(found) == {name for name, grad in expected.items() if grad.any()}
    for name, grad in found.items():
        assert_close(grad, expected[name], 1e-11, name)


def test_frozen_embeddings_leave_every_encoder_gradient():
    reversible, plain = _pair(**DROPOUT)
    for model in (reversible, plain):
        model.reformer.embeddings.requires_grad_(False)
        _loss(model).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in reversible.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, expected[name], 1e-5, name)
        else:
            assert parameter.grad is None


def test_some_layers_frozen():
    reversible, plain = _pair(attn_layers=DEEP)
    for model in (reversible, plain):
        model.requires_grad_(False)
        model.reformer.encoder.layers[4].attention.self_attention.query_key.requires_grad_(True)
        _loss(model).loss.backward()
    name = "reformer.encoder.layers.4.attention.self_attention.query_key.weight"
    found, expected = (dict(model.named_parameters())[name].grad for model in (reversible, plain))
    assert_close(found, expected, 1e-5, name)


def test_gradient_of_inputs_embeds():
    grads = []
    for model in _pair():
        embeds = torch.randn(2, 33, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
        torch.manual_seed(2)
        model(inputs_embeds=embeds).logits.square().sum().backward()
        grads.append(embeds.grad)
    assert_close(*grads, 1e-5)


def test_backward_twice_is_refused():
    model, _ = _pair()
    loss = _loss(model).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by an earlier backward pass.*reversible=False"):
        loss.backward()


def test_backward_twice_to_inner_state():
    """The layers above the state are used up; those below it are not, and stay exact after the refusal."""
    reversible, plain = _pair(torch.float64, attn_layers=DEEP, **DROPOUT)
    for model in (reversible, plain):
        output = _loss(model, output_hidden_states=True)
        grads = torch.autograd.grad(output.loss, output.hidden_states[5], retain_graph=True)
        assert grads[0].any()
        if model is reversible:
            with pytest.raises(RuntimeError, match="used up by an earlier backward pass"):
                torch.autograd.grad(output.loss, output.hidden_states[5], retain_graph=True)
        output.hidden_states[3].square().sum().backward()
    _assert_same_gradients(reversible, plain)


def test_second_derivative_is_refused():
    for model in _pair():
        with pytest.raises(RuntimeError, match="create_graph=True.*first derivatives alone"):
            _loss(model).loss.backward(create_graph=True)


def test_two_forward_passes_before_backward():
    """As in gradient accumulation by hand: each pass has a tape of its own."""
    reversible, plain = _pair(torch.float64, **DROPOUT)
    for model in (reversible, plain):
        first, second = _loss(model).loss, _loss(model, length=50).loss
        (first + 2 * second).backward()
    expected = gradients(plain)
    for name, grad in gradients(reversible).items():
        assert_close(grad, expected[name], 1e-12, name)


def test_streams_stay_in_fp32_under_autocast():
    """Recomputed under the same autocast, the reversible gradient is the plain one up to the dtype's noise."""
    reversible, plain = _pair(attn_layers=DEEP, **DROPOUT)
    for model in (reversible, plain):
        with torch.autocast("cpu", torch.bfloat16):
            output = _loss(model, output_hidden_states=True)
        assert {state.dtype for state in output.hidden_states} == {torch.float32}
        output.loss.backward()
    expected = gradients(plain)
    for name, grad in gradients(reversible).items():
        assert_close(grad, expected[name], 0.05, name)
