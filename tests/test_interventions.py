# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Hooks, wrappers and replaced parameters on a reversible model give the gradients of the plain one."""

import itertools
import random
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

from reformer_hf import ReformerHfForCausalLM

from .helpers import DROPOUT, assert_close, random_model, relative_rms, tiny_config
from .policies import set_policy

LAYERS = ["local", "lsh", "full", "local", "lsh"]


class _Steered(nn.Module):
    """A layer after which a trainable vector is added to the second stream."""

    def __init__(self, layer, vector):
        super().__init__()
        self.layer, self.vector = layer, nn.Parameter(vector.data)

    def forward(self, *args):
        y1, y2, weights = self.layer(*args)
        return y1, y2 + self.vector, weights


class _Skipped(nn.Module):
    def forward(self, x1, x2, *args):
        return x1, x2, None


def _add_to_output(layers, vector):
    layers[2].register_forward_hook(lambda module, args, out: (out[0], out[1] + vector, out[2]))


def _add_to_input(layers, vector):
    layers[2].register_forward_pre_hook(lambda module, args: (args[0] + vector, *args[1:]))


def _wrap(layers, vector):
    layers[2] = _Steered(layers[2], vector)


def _skip(layers, vector):
    layers[2] = _Skipped()


def _undo(layers, vector):
    """The layer runs, and its output is thrown away."""
    layers[2].register_forward_hook(lambda module, args, out: (*args[:2], out[2]))


def _two(layers, vector):
    _add_to_output(layers, vector)
    layers[3].register_forward_pre_hook(lambda module, args: (args[0], args[1] * vector.exp(), *args[2:]))


def _after_the_last(layers, vector):
    layers[4].register_forward_hook(lambda module, args, out: (out[0] + vector, *out[1:]))


def _inside(name):
    def intervene(layers, vector):
        """A trainable vector inside the layer, which is none of its parameters."""

        def hook(module, args, out):
            return (out[0] + vector[: out[0].shape[-1]], *out[1:]) if isinstance(out, tuple) else out + vector

        layers[1].get_submodule(name).register_forward_hook(hook)

    return intervene


class _Scaled(nn.Module):
    """A module whose output is scaled."""

    def __init__(self, module, vector):
        super().__init__()
        self.module, self.vector = module, nn.Parameter(vector.data)

    def forward(self, *args):
        return _scaled(self.module(*args), self.vector)


def _scaled(out, vector):
    return (_scaled(out[0], vector), *out[1:]) if isinstance(out, tuple) else out * vector[0]


def _patch(name):
    def intervene(layers, vector):
        """Another `forward`, with a vector that is none of the layer's parameters."""
        module = layers[1].get_submodule(name)
        forward = module.forward
        module.forward = lambda *args: _scaled(forward(*args), vector)

    return intervene


def _replace(name):
    def intervene(layers, vector):
        layers[1].set_submodule(name, _Scaled(layers[1].get_submodule(name), vector))

    return intervene


MODULES = (
    "attention",
    "attention.self_attention",
    "attention.self_attention.value",
    "attention.layer_norm",
    "attention.output",
    "attention.output.dense",
    "feed_forward",
    "feed_forward.dense",
    "feed_forward.output",
)


def _normalize(layers, vector):
    """Spectral normalization changes two buffers in each call."""
    for module in [each for each in layers.modules() if isinstance(each, nn.Linear)]:
        nn.utils.parametrizations.spectral_norm(module)


INTERVENTIONS = {
    "output": _add_to_output,
    "input": _add_to_input,
    "wrapper": _wrap,
    "skipped": _skip,
    "undone": _undo,
    "two": _two,
    "last": _after_the_last,
    "spectral-norm": _normalize,
    **{f"patched-{name}": _patch(name) for name in MODULES},
    **{f"replaced-{name}": _replace(name) for name in MODULES},
    **{
        name: _inside(name)
        for name in (
            "attention",
            "attention.self_attention",
            "attention.layer_norm",
            "attention.output",
            "feed_forward",
            "feed_forward.output.dense",
        )
    },
}


def _step(intervene, reversible, between=lambda model: None, dtype=torch.float64, **fields):
    """Return the loss and all gradients of a model under an intervention."""
    fields = {"attn_layers": LAYERS, "hash_seed": 0, **DROPOUT, **fields}
    model = random_model(dtype, reversible=reversible, **fields).train()
    vector = nn.Parameter(0.5 * torch.randn(32, dtype=dtype, generator=torch.Generator().manual_seed(3)))
    intervene(model.reformer.encoder.layers, vector)
    torch.manual_seed(1)
    input_ids = torch.randint(0, 60, (2, 77))
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    loss = model(input_ids, labels=input_ids).loss
    between(model)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in [*model.named_parameters(), ("vector", vector)]}
    return loss, {name: grad for name, grad in grads.items() if grad is not None and grad.any()}


def _assert_same(found, expected, limit=1e-10):
    (loss, grads), (plain_loss, plain_grads) = found, expected
    assert_close(loss, plain_loss, 1e-6)
    assert grads.keys() == plain_grads.keys()
    for name, grad in grads.items():
        assert_close(grad, plain_grads[name], limit, name)


# Each way to intervene, and each module in one of the ways.
QUICK = {
    *("output", "input", "wrapper", "skipped", "undone", "two", "last", "spectral-norm"),
    *(f"patched-{name}" for name in MODULES[::2]),
    *(f"replaced-{name}" for name in MODULES[1::2]),
    *("attention", "attention.layer_norm", "feed_forward.output.dense"),
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in INTERVENTIONS]
)
def test_intervention(name):
    _assert_same(*(_step(INTERVENTIONS[name], reversible) for reversible in (True, False)))


def _clamp(layers, vector):
    """As many clip gradients: a hook on each parameter."""
    for parameter in layers.parameters():
        parameter.register_hook(lambda grad: grad.clamp(-1e-4, 1e-4))


class _Shifted(nn.Module):
    """A parametrization whose input and parameter have the same gradient, in one tensor."""

    def __init__(self, weight):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight):
        return weight + self.shift


def _shift(layers, vector):
    for layer in layers:
        dense = layer.feed_forward.dense.dense
        nn.utils.parametrize.register_parametrization(dense, "weight", _Shifted(dense.weight))


class _Noisy(nn.Linear):
    """It draws random numbers in any mode and from any generator, and keeps its output."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.torch_generator = torch.Generator().manual_seed(0)
        self.numpy_generator, self.python_generator = np.random.default_rng(0), random.Random(0)
        self.outputs = [torch.zeros(2)]

    def forward(self, hidden_states):
        drawn = torch.rand((), generator=self.torch_generator).item(), self.numpy_generator.random()
        factor = sum(drawn) + self.python_generator.random() + random.random() + np.random.rand()
        out = factor * nn.functional.dropout(super().forward(hidden_states), 0.3, training=True)
        self.outputs = [out.detach()]
        return out


def _add_noise(layers, vector):
    for layer in layers.eval():
        dense = layer.feed_forward.dense.dense
        layer.feed_forward.dense.dense = noisy = _Noisy(*dense.weight.shape[::-1], dtype=dense.weight.dtype)
        noisy.load_state_dict(dense.state_dict())
        noisy.eval()


@pytest.mark.parametrize("kept", [0, None], ids=["recomputed", "kept"])
@pytest.mark.parametrize("intervene", [_clamp, _shift, _add_noise])
def test_in_chunks(intervene, kept):
    """Hooks of parameters see whole gradients, gradients in one tensor are not added twice, and noise is replayed."""
    # Random numbers that are drawn in chunks are others.
    without = dict.fromkeys(DROPOUT, 0.0)
    chunks = {} if intervene is _add_noise else {"chunk_size_feed_forward": 7}
    found = _step(intervene, True, max_kept_activations=kept, **without, **chunks)
    _assert_same(found, _step(intervene, False, **without))


def test_global_hook():
    """A hook of all modules, which reads a tensor that is none of their parameters."""

    def intervene(layers, vector):
        denses = {layer.feed_forward.dense.dense for layer in layers}

        def hook(module, args, out):
            return out * vector[0] if module in denses else None

        handles.append(register_module_forward_hook(hook))

    handles, steps = [], []
    for reversible in (True, False):
        steps.append(_step(intervene, reversible, chunk_size_feed_forward=7))
        handles.pop().remove()
    _assert_same(*steps)
    assert "vector" in steps[0][1]


class _Gated(nn.Module):
    """Scale by a tensor that is shared, and so in a list instead of a parameter."""

    def __init__(self, module, gate):
        super().__init__()
        self.module, self.gate = module, [gate]

    def forward(self, hidden_states):
        return self.module(hidden_states) * self.gate[0]


def test_tensors_of_nobody_are_refused():
    """Their gradients would be lost in a recomputation, without a word."""
    names = "feed_forward.dense.dense", "attention.self_attention.query_key", "attention.output.dense"
    for name, is_leaf, chunk_size in itertools.product(names, (True, False), (0, 7)):
        # Without recomputation, only the feed-forward layer is computed in chunks.
        model = random_model(attn_layers=LAYERS, reversible=not chunk_size, chunk_size_feed_forward=chunk_size).train()
        gate = nn.Parameter(torch.ones(()))
        layer = model.reformer.encoder.layers[1]
        layer.set_submodule(name, _Gated(layer.get_submodule(name), gate if is_leaf else gate + 1))
        loss = model(torch.arange(40)[None], labels=torch.arange(40)[None]).loss
        if chunk_size and "attention" in name:
            loss.backward()
            assert gate.grad, name
        else:
            with pytest.raises(RuntimeError, match="is not one of its parameters.*register it as a parameter"):
                loss.backward()


def test_replicas(monkeypatch):
    """`nn.DataParallel`: the weights of its replicas, here all on the CPU, are none of their parameters."""
    replication = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(replication, "_get_device_index", lambda device, optional=False: 0)

    def copies(tensors, devices, detach=False):
        return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(replication, "_broadcast_coalesced_reshape", copies)
    grads = []
    input_ids = torch.randint(0, 60, (2, 45), generator=torch.Generator().manual_seed(0))
    fields = {"attn_layers": LAYERS, "hash_seed": 0}
    chunks = {"chunk_size_feed_forward": 7, "chunk_size_lm_head": 7}
    for options in ({"reversible": False}, {}, chunks, {"max_kept_activations": None, **chunks}):
        model = random_model(torch.float64, **fields, **options).train()
        replicas = replication.replicate(model, [0, 1])
        rows = zip(replicas, input_ids[:, None], strict=True)
        sum(replica(row, labels=row).loss for replica, row in rows).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for found in grads[1:]:
        for name, grad in found.items():
            # The loss is in fp32.
            assert_close(grad, grads[0][name], 1e-6, name)


def test_dropout_is_that_of_any_path(monkeypatch):
    """Equal random states give equal outputs with and without gradients, in chunks and as a whole (GradCache)."""
    set_policy(monkeypatch, chunk_positions=32)
    input_ids = torch.randint(0, 60, (2, 77), generator=torch.Generator().manual_seed(0))
    outputs = []
    for options in ({"reversible": False}, {"max_kept_activations": 0}, {"max_kept_activations": None}):
        model = random_model(torch.float64, attn_layers=LAYERS, hidden_dropout_prob=0.3, **options).train()
        for enabled in (True, False):
            torch.manual_seed(0)
            with torch.set_grad_enabled(enabled):
                outputs.append(model(input_ids, use_cache=False).logits)
    for output in outputs[1:]:
        assert_close(output, outputs[0], 1e-12)


@pytest.mark.parametrize("reversible", [True, False])
def test_rates_of_dropout_modules(reversible):
    """Rates and modes are set as in other models, by a search for `nn.Dropout` (`disable_dropout` of TRL)."""
    model = random_model(reversible=reversible, attn_layers=LAYERS, hash_seed=0, **DROPOUT)
    input_ids = torch.arange(40)[None]
    expected = model(input_ids, use_cache=False).logits
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for module in dropouts:
        module.train()
    assert relative_rms(model(input_ids, use_cache=False).logits, expected) > 0.01
    for module in dropouts:
        module.p = 0.0
    assert torch.equal(model.train()(input_ids, use_cache=False).logits, expected)


def _adapted(reversible, *names):
    """A model with random adapters."""
    model = random_model(torch.float64, reversible=reversible, attn_layers=LAYERS, hash_seed=0).train()
    torch.manual_seed(0)
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["query_key", "query", "value"])
    wrapped = get_peft_model(model, lora, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, lora)
    return wrapped


def test_adapters_change_before_backward():
    """Two adapters in one loss, as `set_adapter` leaves them: the other one is frozen and inactive by then."""
    grads = []
    input_ids = torch.arange(40)[None]
    for reversible in (True, False):
        wrapped = _adapted(reversible, "first", "second")
        wrapped.get_input_embeddings().weight.requires_grad_(True)
        losses = []
        for name in ("first", "second"):
            wrapped.set_adapter(name)
            losses.append(wrapped(input_ids, labels=input_ids).loss)
        (losses[0] - losses[1] ** 2).backward()
        grads.append({name: each.grad for name, each in wrapped.named_parameters() if each.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any(".second." in name for name in grads[0])
    for name, grad in grads[0].items():
        assert_close(grad, grads[1][name], 1e-6, name)


def test_scale_of_adapters_changes_before_backward():
    grads = []
    input_ids = torch.arange(40)[None]
    for reversible in (True, False):
        wrapped = _adapted(reversible, "default")
        with rescale_adapter_scale(wrapped, 0.25):
            loss = wrapped(input_ids, labels=input_ids).loss
        loss.backward()
        grads.append({name: each.grad for name, each in wrapped.named_parameters() if each.grad is not None})
    for name, grad in grads[0].items():
        assert_close(grad, grads[1][name], 1e-6, name)


def _step_with_cached_weights(reversible):
    def normalize(layers, vector):
        for module in [each for each in layers.modules() if isinstance(each, nn.Linear)]:
            nn.utils.parametrizations.weight_norm(module)

    with nn.utils.parametrize.cached():
        return _step(normalize, reversible)


def test_cached_parametrizations():
    _assert_same(_step_with_cached_weights(True), _step_with_cached_weights(False))


def test_observing_hook_begins_no_segment():
    """Neither a hook that returns nothing nor an identity function between layers costs memory."""
    tapes = []

    def observe(layers, vector):
        layers[1].register_forward_hook(lambda module, args, out: None)
        layers[2].register_forward_pre_hook(lambda module, args: (args[0].view_as(args[0]), *args[1:]))
        layers[4].register_forward_pre_hook(lambda module, args: tapes.append((args[3], args[3]._segment)))
        layers[4].register_forward_hook(lambda module, args, out: tapes.append((args[3], args[3]._segment)))

    _step(observe, reversible=True)
    (tape, before), (_, after) = tapes
    assert before is after and len(LAYERS) >= 5


def test_in_place_hook_is_refused():
    def intervene(layers, vector):
        layers[2].register_forward_hook(lambda module, args, out: (out[1].add_(vector.detach()), None)[1])

    with pytest.raises(RuntimeError, match="changed in place.*return a changed copy.*reversible=False"):
        _step(intervene, reversible=True)


def test_hooks_inside_a_layer_fire_once():
    """In a parallel pass, in training, and in each step of decoding, with what the module returns."""
    model = random_model(attn_layers=["lsh", "local"])
    fired, names = [], set()
    for name, module in model.reformer.encoder.layers[0].named_modules():
        if name and not isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, args, out, name=name: fired.append(name))
            names.add(name)
    input_ids = torch.randint(0, 60, (1, 20))
    for call in (
        lambda: model(input_ids),
        lambda: model.train()(input_ids, labels=input_ids).loss.backward(),
        lambda: model.eval().generate(input_ids, max_new_tokens=2, do_sample=False, eos_token_id=None),
    ):
        fired.clear()
        call()
        times = {name: fired.count(name) for name in names}
        assert set(times.values()) in ({1}, {2}), times


def _hook_head(head, vector):
    head.register_forward_hook(lambda module, args, out: out * vector.exp())


def _hook_decoder(head, vector):
    _hook_head(head.decoder, vector)


def _patch_decoder(head, vector):
    forward = head.decoder.forward
    head.decoder.forward = lambda states: forward(states) * vector.exp()


def _prune_decoder(head, vector):
    prune.l1_unstructured(head.decoder, "weight", 0.5)


@pytest.mark.parametrize("intervene", [_hook_head, _hook_decoder, _patch_decoder, _prune_decoder])
def test_lm_head_in_chunks(intervene):
    """With an intervention in the head, training steps compute logits, and one autograd graph of all of them."""
    results = []
    for chunk_size in (0, 8):
        model = random_model(torch.float64, chunk_size_lm_head=chunk_size).train()
        vector = nn.Parameter(torch.linspace(0, 1, 60, dtype=torch.float64))
        intervene(model.lm_head, vector)
        # A weight that pruning computed once would not follow the second step.
        for _ in range(2):
            loss = model(torch.arange(40)[None], labels=torch.arange(40)[None]).loss
            loss.backward()
            with torch.no_grad():
                model.lm_head.bias.sub_(0.1)
        results.append((loss, {"vector": vector.grad, **{n: p.grad for n, p in model.named_parameters()}}))
    (loss, grads), (expected_loss, expected) = results
    assert_close(loss, expected_loss, 1e-10)
    for name, grad in grads.items():
        assert (grad is None) == (expected[name] is None), name
        if grad is not None:
            assert_close(grad, expected[name], 1e-10, name)


def test_buffers_change_once():
    """The recomputation of batch statistics does not count again."""
    counts = []
    for reversible in (True, False):

        def count(model):
            counts.append(model.reformer.encoder.layers[1].feed_forward.layer_norm)

        def normalize(layers, vector):
            class OfRows(nn.BatchNorm1d):
                def forward(self, rows):
                    return super().forward(rows.flatten(0, 1)).view(rows.shape)

            layers[1].feed_forward.layer_norm = OfRows(32, dtype=torch.float64)

        _step(normalize, reversible, count)
    assert [int(norm.num_batches_tracked) for norm in counts] == [1, 1]
    assert_close(counts[0].running_mean, counts[1].running_mean, 1e-10)


@pytest.mark.parametrize("name", ["", "attention", "attention.self_attention"])
def test_generate_with_wrapped_modules(name):
    """As control vectors do it: the cache works with modules that only have a `forward`."""
    sequences = []
    for use_cache in (True, False):
        model = random_model(attn_layers=LAYERS)
        layer, vector = model.reformer.encoder.layers[1], torch.full((32,), 1.5)
        if name:
            layer.set_submodule(name, _Scaled(layer.get_submodule(name), vector))
        else:
            model.reformer.encoder.layers[1] = _Steered(layer, vector)
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "use_cache": use_cache}
        sequences.append(model.generate(torch.arange(40).view(2, 20), **options))
    assert torch.equal(*sequences)


def _switch_mode(model):
    model.eval()


@pytest.mark.parametrize(
    ("reversible", "chunk_size"),
    [(True, 0), (True, 10), (False, 10)],
    ids=["reversible-whole", "reversible-chunks", "plain-chunks"],
)
def test_eval_before_backward(reversible, chunk_size):
    """The mode is part of what is recomputed."""
    fields = {"chunk_size_feed_forward": chunk_size, "chunk_size_lm_head": chunk_size}
    results = [
        _step(lambda layers, vector: None, reversible, between, **fields)
        for between in (_switch_mode, lambda model: None)
    ]
    _assert_same(*results, limit=1e-12)


def test_replaced_parameters():
    """`functional_call` replaces parameters during the forward pass only."""
    grads = []
    for reversible in (True, False):
        model = random_model(torch.float64, attn_layers=LAYERS, hash_seed=0, reversible=reversible, **DROPOUT).train()
        scale = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
        replaced = {name: (scale * parameter.detach()) for name, parameter in model.named_parameters()}
        input_ids = torch.arange(40)[None]
        torch.manual_seed(2)
        output = torch.func.functional_call(model, replaced, kwargs={"input_ids": input_ids, "labels": input_ids})
        grads.append(torch.autograd.grad(output.loss, [scale, *replaced.values()], materialize_grads=True))
        assert all(parameter.grad is None for parameter in model.parameters())
    for name, grad, expected in zip(["scale", *replaced], *grads, strict=True):
        assert expected.any(), name
        assert_close(grad, expected, 1e-10, name)


def test_changed_parameters_are_refused():
    """As in any other model: an optimizer step between forward and backward pass."""

    def step(model):
        with torch.no_grad():
            model.reformer.encoder.layers[0].attention.output.dense.weight.mul_(2)

    for reversible in (True, False):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            _step(lambda layers, vector: None, reversible, step)


def test_short_inputs_keep_activations():
    """By default. The limit is a number of bytes, and 0 always recomputes."""
    graphs = []
    for fields in ({"max_kept_activations": None}, {"max_kept_activations": 0}):
        torch.manual_seed(0)
        model = ReformerHfForCausalLM(tiny_config(**fields)).train()
        loss = model(torch.arange(40)[None], labels=torch.arange(40)[None]).loss
        nodes, names = [loss.grad_fn], set()
        while nodes:
            node = nodes.pop()
            names.add(type(node).__name__)
            nodes += [after for after, _ in node.next_functions if after is not None]
        graphs.append("_ReversibleLayerBackward" in names)
    assert graphs == [False, True]
