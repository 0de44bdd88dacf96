# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Models whose LSH attention is replaced: what is computed, and that nothing stays behind."""

import pytest
import torch

from reformer_hf import ReformerHfForCausalLM, ReformerHfForConditionalGeneration, ReformerHfForMaskedLM
from reformer_hf.diagnostics import attention_coverage, replace_lsh
from reformer_hf.diagnostics.replacement import shuffle_buckets
from reformer_hf.documents import Documents
from reformer_hf.hashing import sort_by_bucket, unpack_order
from reformer_hf.self_attention import AttentionCall

from ..helpers import assert_close, assert_refused, gradients, random_model, relative_rms, tiny_config

LAYERS = ["local", "lsh", "full", "lsh"]
REPLACEMENTS = ["random", "skip", "full"]
IDS = torch.randint(3, 60, (2, 70), generator=torch.Generator().manual_seed(0))


def _model(dtype=torch.float64, **fields):
    return random_model(dtype, **{"attn_layers": LAYERS, **fields})


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits


def _sizes_and_members(order, documents, padding):
    """Of each round: (document, tokens) of each bucket in order."""
    positions, starts = unpack_order(order)
    index = documents.index[0].masked_fill(padding[0], -1)
    rounds = []
    for of_round, starts_of_round in zip(positions[0, 0], starts[0, 0], strict=True):
        firsts = starts_of_round.nonzero()[:, 0].tolist()
        buckets = [of_round[a:b].tolist() for a, b in zip(firsts, [*firsts[1:], len(of_round)], strict=True)]
        assert all(bucket == sorted(bucket) for bucket in buckets)
        rounds.append([({int(index[position]) for position in bucket}, bucket) for bucket in buckets])
    return rounds


def test_shuffled_buckets():
    """Buckets keep their sizes and documents, members are others, and padding stays last."""
    length = 60
    starts, padding = torch.zeros(2, 1, length, dtype=torch.bool)
    starts[0, [0, 25]], padding[0, [3, 4, 58, 59]] = True, True
    documents = Documents.of(starts, padding)
    generator = torch.Generator().manual_seed(1)
    # Buckets of the second document are numbered after those of the first.
    buckets = torch.randint(4, (1, 1, 3, length), generator=generator) + 4 * documents.index
    order = sort_by_bucket(buckets.int(), padding)
    call = AttentionCall(1, length, torch.float32, order.device, padding=padding, documents=documents)
    random = torch.rand(order.shape, generator=generator, dtype=torch.float64)
    shuffled = shuffle_buckets(order, random, call)
    for before, after in zip(*(_sizes_and_members(x, documents, padding) for x in (order, shuffled)), strict=True):
        assert [len(bucket) for _, bucket in before] == [len(bucket) for _, bucket in after]
        assert [where for where, _ in before] == [where for where, _ in after]
        assert all(one != other for (_, one), (_, other) in zip(before[:-1], after[:-1], strict=True))
        assert before[-1] == after[-1] == ({-1}, [3, 4, 58, 59])


def test_random_buckets():
    """They are others in each layer and round, the same in each call, and do not depend on how heads are grouped."""
    model = _model()
    intact = _logits(model)
    with replace_lsh(model, "random"):
        found, again = _logits(model), _logits(model)
        covered = attention_coverage(model, IDS, num_hashes=(1, 2))
    assert torch.equal(found, again) and relative_rms(found, intact) > 0.05
    with replace_lsh(model, "random", seed=1):
        assert relative_rms(_logits(model), found) > 0.05
    model.config.num_parallel_heads = 1
    with replace_lsh(model, "random"):
        assert_close(_logits(model), found, 1e-12)
    # Hashing the same hidden states gives buckets of the same sizes that cover more.
    hashed = attention_coverage(model, IDS, num_hashes=(1, 2))
    assert torch.equal(covered.bucket_entropy[0], hashed.bucket_entropy[0])
    assert covered.coverage[0].mean() < 0.9 * hashed.coverage[0].mean()
    assert (covered.coverage[:, 1] > 1.2 * covered.coverage[:, 0]).all()


def test_skip_adds_nothing():
    model, other = _model(), _model()
    for layer_idx in (1, 3):
        other.reformer.encoder.layers[layer_idx].attention.output.dense.weight.data.zero_()
    with replace_lsh(model, "skip"):
        assert_close(_logits(model), _logits(other), 1e-12)
        sequences = [model.generate(IDS[:, :9], max_new_tokens=9, do_sample=False, use_cache=x) for x in (True, False)]
    assert torch.equal(*sequences)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_full_is_full_attention(causal):
    cls = ReformerHfForCausalLM if causal else ReformerHfForMaskedLM
    model = random_model(torch.float64, cls, attn_layers=LAYERS, is_decoder=causal)
    other = cls(tiny_config(attn_layers=["local", "full", "full", "full"], is_decoder=causal)).double().eval()
    other.load_state_dict(model.state_dict())
    with replace_lsh(model, "full"):
        assert_close(_logits(model), _logits(other), 1e-12)


def test_some_layers():
    """By index and by name."""
    model = _model()
    for replacement in REPLACEMENTS:
        both, first, named = (
            _replaced(model, replacement, layers) for layers in (None, [1], ["reformer.encoder.layers.1"])
        )
        assert torch.equal(first, named), replacement
        assert min(relative_rms(x, y) for x, y in ((first, both), (first, _logits(model)))) > 0.01, replacement


def _replaced(model, replacement, layers=None):
    with replace_lsh(model, replacement, layers):
        return _logits(model)


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_restored(replacement):
    """Also after an error. Weights, names, config and the global generator are the same all the time."""
    model = _model()
    names = list(model.state_dict())
    modules, weights = list(model.modules()), [weight.data_ptr() for weight in model.parameters()]
    intact, config, state = _logits(model), model.config.to_dict(), torch.get_rng_state()
    with pytest.raises(KeyError), replace_lsh(model, replacement):
        assert relative_rms(_logits(model), intact) > 0.01
        assert list(model.state_dict()) == names and model.config.to_dict() == config
        assert [weight.data_ptr() for weight in model.parameters()] == weights
        model.train()
        raise KeyError
    assert all(module.training for module in model.modules())
    model.eval()
    assert torch.equal(_logits(model), intact) and torch.equal(torch.get_rng_state(), state)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True)) and list(model.state_dict()) == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_gradients(replacement):
    """A training step recomputes the same attention."""
    grads = []
    for reversible in (True, False):
        model = _model(reversible=reversible, hash_seed=0).train()
        with replace_lsh(model, replacement):
            model(IDS, labels=IDS).loss.backward()
        if replacement == "skip":
            for layer_idx in (1, 3):
                for parameter in model.reformer.encoder.layers[layer_idx].attention.parameters():
                    assert parameter.grad is None or not parameter.grad.any()
                    parameter.grad = torch.zeros_like(parameter)
        grads.append(gradients(model))
    for name, grad in grads[0].items():
        assert_close(grad, grads[1][name], 1e-10, name)


def test_encoder_decoder():
    model = random_model(cls=ReformerHfForConditionalGeneration, attn_layers=["lsh"], decoder_attn_layers=["lsh"])
    for replacement in REPLACEMENTS:
        losses = []
        for layers in ((), [0], ["model.encoder.encoder.layers.0"]):
            with torch.no_grad(), replace_lsh(model, replacement, layers):
                losses.append(model(IDS, labels=IDS).loss.item())
        assert len(set(losses)) == 3, replacement


def test_refused():
    names = r"\['full', 'random', 'skip'\]"
    not_lsh = "Layer 0 is not an LSH layer of the model, which has .*layers.1': 1"
    cases = {
        "replacement": ({"replacement": "local"}, f"`replacement` is 'local', but must be one of {names}"),
        "layer": ({"replacement": "skip", "layers": [0]}, not_lsh),
    }

    def call(options):
        with replace_lsh(_model(), **options):
            pass

    assert_refused(call, cases)


@pytest.mark.parametrize("replacement", ["random", "full"])
def test_cache_is_refused(replacement):
    model = _model()
    intact = model(IDS, use_cache=True)
    with replace_lsh(model, replacement):
        with pytest.raises(ValueError, match="KV cache keeps the keys of LSH attention"):
            model.generate(IDS, max_new_tokens=2)
        with pytest.raises(ValueError, match="without `cache` and with `use_cache=False`"):
            model(IDS[:, :1], cache=intact.cache)
        streams = torch.zeros(2, 1, model.config.hidden_size)
        with pytest.raises(ValueError, match="without `cache`"):
            model.reformer.encoder.layers[1](streams, streams, AttentionCall.on(streams), cache=intact.cache)
        model.generate(IDS, max_new_tokens=2, use_cache=False)
