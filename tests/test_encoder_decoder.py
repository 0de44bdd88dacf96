# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The encoder-decoder: its definition, gradients and memory, generation, training, saving, and what it refuses."""

import copy
import json
import os

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    DynamicCache,
    EncoderDecoderCache,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from reformer_hf import (
    ReformerHfByteTokenizer,
    ReformerHfConfig,
    ReformerHfEncoderDecoderConfig,
    ReformerHfEncoderDecoderModel,
    ReformerHfForCausalLM,
    ReformerHfForConditionalGeneration,
    ReformerHfModel,
)
from reformer_hf.cross_attention import Context, CrossAttention
from reformer_hf.encoder_decoder import shift_tokens_right
from reformer_hf.reversible import Tape
from reformer_hf.self_attention import AttentionCall

from .helpers import DROPOUT, assert_close, gradients, memory_of, random_model, relative_rms, tiny_config
from .policies import set_policy
from .processes import run_python
from .reference import cross_attention, full_decoder_layer
from .test_flat_files import FLAT_FILES
from .test_hub import WITHOUT_PACKAGE
from .test_interventions import INTERVENTIONS, _inside
from .test_reversible import _FreshBackward

LAYERS = {"attn_layers": ["local", "lsh"], "decoder_attn_layers": ["lsh", "full", "local"]}
LENGTHS = (33, 5, 20)
SIDES = ("left", "right")


def _model(dtype=torch.float64, cls=ReformerHfForConditionalGeneration, **fields):
    return random_model(dtype, cls, **{**LAYERS, "pad_token_id": 0, "eos_token_id": None, **fields})


def _ids(length, batch_size=1, seed=0, vocab_size=60):
    """Without the id of padding, 0."""
    generator = torch.Generator().manual_seed(100 * length + seed)
    return torch.randint(1, vocab_size, (batch_size, length), generator=generator)


def _padded(rows, side, length=0):
    """A batch of sequences with padding on a side."""
    length = max(length, *(row.shape[1] for row in rows))
    input_ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(length - row.shape[1], length) if side == "left" else slice(0, row.shape[1])
        input_ids[i, at], mask[i, at] = row, 1
    return {"input_ids": input_ids, "attention_mask": mask}


def _sources(side="left", length=0):
    return _padded([_ids(length) for length in LENGTHS], side, length)


def _step(model, side="left", target_length=27, **inputs):
    """The output of a training step with padding on a side of the sources and on the right of the targets."""
    labels = _ids(target_length, len(LENGTHS))
    labels[1, -9:] = -100
    torch.manual_seed(2)
    return model(**{**_sources(side), "labels": labels, **inputs})


def _compare_gradients(found, expected, limit):
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert_close(grad, expected[name], limit, name)
        assert grad.any(), name


def _padding(side, length):
    return torch.stack([_padded([_ids(n)], side, length)["attention_mask"][0] == 0 for n in (length, 9)])


def test_cross_attention_equals_reference():
    """Output and all gradients, at odd lengths."""
    torch.manual_seed(0)
    attention = CrossAttention(tiny_config(attn_layers=["full"])).double()
    hidden, context = (torch.randn(2, n, width, dtype=torch.float64) for n, width in ((31, 32), (23, 64)))
    inputs = [x.requires_grad_() for x in (hidden, context, *attention.parameters())]
    weights = dict(attention.named_parameters())
    upstream = torch.randn(2, 31, 32, dtype=torch.float64)
    for padding in (torch.zeros(2, 23, dtype=torch.bool), *(_padding(side, 23) for side in SIDES)):
        bias = Context.of(context, ~padding).bias
        key, value = attention.keys_and_values(context)
        out = attention(hidden, key, value, bias)
        expected = cross_attention(hidden, context, weights, 2, padding)
        assert_close(out, expected, 1e-12)
        found = torch.autograd.grad(out, inputs, upstream)
        for grad, of_reference in zip(found, torch.autograd.grad(expected, inputs, upstream), strict=True):
            assert_close(grad, of_reference, 1e-12)
        seen = attention.weights(hidden, key, bias)
        assert_close(seen.sum(-1), torch.ones(2, 2, 31), 1e-12)
        assert not seen.masked_select(padding[:, None, None]).any()


def test_decoder_layer_equals_reference():
    """The three half-steps, reversible and plain: both streams, and the gradients of all inputs and parameters."""
    layer = _model(decoder_attn_layers=["full"]).get_decoder().encoder.layers[0].train()
    generator = torch.Generator().manual_seed(0)
    sizes = ((31, 32), (31, 32), (23, 64), (31, 32), (31, 32))
    x1, x2, context, *upstream = (
        torch.randn(2, *size, dtype=torch.float64, generator=generator) for size in sizes
    )
    weights = dict(layer.named_parameters())
    inputs = [x.requires_grad_() for x in (x1, x2, context, *weights.values())]
    for side in SIDES:
        padding = _padding(side, 23)
        expected = full_decoder_layer(x1, x2, context, weights, 2, padding)
        grads = torch.autograd.grad(expected, inputs, upstream)
        call = AttentionCall.on(x1, context=Context.of(context, ~padding))
        for tape in (Tape(), None):
            streams = layer(x1, x2, call, tape)[:2]
            for stream, of_reference in zip(streams, expected, strict=True):
                assert_close(stream, of_reference, 1e-12)
            names = ("x1", "x2", "context", *weights)
            for name, *both in zip(names, torch.autograd.grad(streams, inputs, upstream), grads, strict=True):
                assert_close(*both, 1e-11, name)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
def test_gradients_equal_plain(dtype, limit):
    """With dropout everywhere, that of cross-attention weights included."""
    # The loss is computed in fp32.
    loss_of = lambda output: output.logits.square().mean() if dtype == torch.float64 else output.loss  # noqa: E731
    for side in SIDES:
        found = []
        for reversible in (True, False):
            model = _model(dtype, reversible=reversible, **DROPOUT).train()
            output = _step(model, side)
            loss_of(output).backward()
            found.append((output.logits, gradients(model)))
        assert_close(found[0][0], found[1][0], 1e-6)
        _compare_gradients(found[0][1], found[1][1], limit)


def test_chunks_of_positions_equal_plain(monkeypatch):
    """Targets longer than a chunk of a branch."""
    plain = _model(reversible=False).train()
    _step(plain).logits.square().mean().backward()
    for chunk_positions in (3, 15, 30):
        set_policy(monkeypatch, chunk_positions=chunk_positions)
        model = _model().train()
        _step(model).logits.square().mean().backward()
        _compare_gradients(gradients(model), gradients(plain), 1e-9)


def test_gradcheck(monkeypatch):
    """Of the inputs of both stacks, with dropout everywhere and chunks of positions."""
    set_policy(monkeypatch, chunk_positions=4)
    sizes = {"hidden_size": 8, "attention_head_size": 4, "feed_forward_size": 8, "vocab_size": 11}
    cls = ReformerHfEncoderDecoderModel
    model = _model(cls=cls, **{**sizes, **DROPOUT, "hash_seed": 1, "hidden_act": "gelu"}).train()
    # As in `test_reversible`, the rotations do not change with the input.
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 12, 8, dtype=torch.float64, generator=generator).requires_grad_()
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])

    def function(embeds):
        torch.manual_seed(3)
        return model(inputs_embeds=embeds[:, :7], decoder_inputs_embeds=embeds[:, 7:], attention_mask=mask)[0]

    assert torch.autograd.gradcheck(lambda x: _FreshBackward.apply(function, x), (embeds,), rtol=1e-4, atol=1e-6)


def test_memory_does_not_grow_with_either_depth():
    """Between forward and backward pass; the encoder output is kept once, however many layers read it."""
    grown = {}
    stream = 2 * 256 * 32 * 4
    for reversible in (True, False):
        for name in LAYERS:
            alive = []
            for depth in (2, 8):
                both = {**dict.fromkeys(LAYERS, ["local"]), name: ["local"] * depth}
                model = _model(torch.float32, reversible=reversible, **both, **DROPOUT).train()
                inputs = {"input_ids": _ids(256, 2), "labels": _ids(256, 2)}
                model(**inputs)
                alive.append(memory_of(lambda: model(**inputs).loss)[0])
            grown[reversible, name] = (alive[1] - alive[0]) / 6 / stream
    # Each branch of a reversible layer keeps a generator state, a dozenth of a stream here.
    assert max(grown[True, name] for name in LAYERS) < 0.3, grown
    assert min(grown[False, name] for name in LAYERS) > 6, grown


def test_loss_on_encoder_and_decoder_states():
    """Layers without a backward pass of their own are inverted on the way, and hidden states of both stacks differ."""
    found = []
    for reversible in (True, False):
        model = _model(reversible=reversible, **DROPOUT).train()
        output = _step(model, output_hidden_states=True)
        states = (output.encoder_hidden_states[1], output.decoder_hidden_states[2], output.encoder_last_hidden_state)
        sum(state.square().mean() for state in states).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        found.append(grads)
    _compare_gradients(*found, 1e-9)


def test_frozen_stacks():
    """One stack frozen: the other has the gradients that it has without that."""
    whole = _model().train()
    _step(whole).loss.backward()
    for frozen in ("encoder", "decoder"):
        model = _model().train()
        getattr(model.model, frozen).requires_grad_(False)
        _step(model).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "word_embeddings" not in name:
                assert_close(parameter.grad, whole.get_parameter(name).grad, 1e-5, name)
            elif not parameter.requires_grad:
                assert parameter.grad is None, name


def test_hooks_fire_once():
    """On each module of cross-attention, in training and in a step of decoding; keys and values only once."""
    model = _model()
    fired = []
    layer = model.get_decoder().encoder.layers[0]
    names = [name for name, _ in layer.named_modules() if name.startswith("cross_attention")]
    for name in names:
        layer.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))
    _step(model.train()).loss.backward()
    assert sorted(fired) == sorted(names)
    fired.clear()
    model.eval().generate(_ids(20), max_new_tokens=3, do_sample=False)
    once = {"cross_attention.attention.key", "cross_attention.attention.value"}
    assert {name: fired.count(name) for name in names} == {name: 1 if name in once else 3 for name in names}


def test_interventions():
    """Hooks and wrappers of decoder layers, and hooks inside cross-attention, give the gradients of the plain model."""
    inside = ("cross_attention", "cross_attention.layer_norm", "cross_attention.attention", "cross_attention.output")
    interventions = {name: INTERVENTIONS[name] for name in ("output", "input", "wrapper", "skipped", "undone", "two")}
    interventions |= {name: _inside(name) for name in (*inside, "cross_attention.attention.key")}
    for name, intervene in interventions.items():
        found = []
        for reversible in (True, False):
            layers = {"decoder_attn_layers": ["lsh", "full", "local", "lsh", "full"]}
            model = _model(reversible=reversible, hash_seed=0, **layers, **DROPOUT).train()
            vector = torch.linspace(-1, 1, 32, dtype=torch.float64).requires_grad_()
            vector = torch.nn.Parameter(vector.detach())
            intervene(model.get_decoder().encoder.layers, vector)
            _step(model).logits.square().mean().backward()
            grads = {name: p.grad for name, p in (*model.named_parameters(), ("vector", vector))}
            found.append({key: grad for key, grad in grads.items() if grad is not None and grad.any()})
        assert name == "skipped" or name in ("wrapper", "undone") or "vector" in found[0], name
        _compare_gradients(*found, 1e-9)


def _logits_of_steps(model, sources, decoder_ids, sizes, cache=None, **inputs):
    """Logits of decoder tokens that are given a few at a time, with a cache."""
    cache = cache or EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    with torch.no_grad():
        encoder_outputs = model.get_encoder()(**sources)
        logits = [
            model(
                encoder_outputs=encoder_outputs,
                attention_mask=sources["attention_mask"],
                decoder_input_ids=piece,
                cache=cache,
                **inputs,
            ).logits
            for piece in decoder_ids.split(sizes, dim=1)
        ]
    return torch.cat(logits, dim=1)


def test_steps_equal_parallel_pass():
    """Each step's logits, in a batch of three padded sources."""
    patterns = ({}, {"lsh_deduplicate_keys": True}, {"lsh_pattern": "chunk"})
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        for side, fields in zip((*SIDES, "left"), patterns, strict=True):
            model, sources, decoder_ids = _model(dtype, **fields), _sources(side), _ids(40, 3)
            with torch.no_grad():
                expected = model(**sources, decoder_input_ids=decoder_ids).logits
                other = {**sources, "input_ids": sources["input_ids"].flip(1), "attention_mask": None}
                changed = model(**other, decoder_input_ids=decoder_ids).logits
            assert relative_rms(changed, expected) > 1e-2
            # The pattern `chunk` is only exact for steps, not for a first piece that is hashed by itself.
            sizes = [1] * 40 if fields.get("lsh_pattern") else [9, *([1] * 28), 3]
            assert_close(_logits_of_steps(model, sources, decoder_ids, sizes), expected, limit, str(fields))


@torch.no_grad()
def _greedy(model, sources, num_new, start=0):
    """The most probable token, over and over, from the logits of a whole pass."""
    decoder_ids = torch.full((len(sources["input_ids"]), 1), start)
    for _ in range(num_new):
        logits = model(**sources, decoder_input_ids=decoder_ids).logits[:, -1]
        decoder_ids = torch.cat([decoder_ids, logits.argmax(-1, keepdim=True)], dim=1)
    return decoder_ids


GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
    "beam-sampling": {"num_beams": 3, "do_sample": True},
    "several": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "forced": {"forced_bos_token_id": 7, "forced_eos_token_id": 1},
    "minimum": {"eos_token_id": list(range(1, 40)), "min_new_tokens": 6},
    "penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "static": {"cache_implementation": "static"},
}


def _generate(model, sources, seed=0, **options):
    set_seed(seed)
    return model.generate(**sources, **{"max_new_tokens": 12, "do_sample": False, **options})


def test_generation_equals_uncached():
    model = _model()
    expected = _greedy(model, _sources(), 12)
    for side in SIDES:
        sources = _sources(side)
        for name, options in GENERATION.items():
            found = _generate(model, sources, **options)
            without = {key: value for key, value in options.items() if key != "cache_implementation"}
            assert torch.equal(found, _generate(model, sources, use_cache=False, **without)), name
            if name in ("greedy", "static"):
                assert torch.equal(found, expected)
            if name == "forced":
                assert (found[:, 1] == 7).all() and (found[:, 12] == 1).all() and found.shape[1] == 13
            if name == "minimum":
                assert not torch.isin(found[:, 1:7], torch.arange(1, 40)).any() and found.shape[1] >= 8
    assert len({tuple(row) for row in expected.tolist()}) == 3


def test_assisted_generation():
    """Of two models of one vocabulary: the same tokens as without the assistant."""
    model, assistant = _model(), _model(attn_layers=["local"], decoder_attn_layers=["local"])
    source = {"input_ids": _ids(20)}
    found = _generate(model, source, assistant_model=assistant)
    assert torch.equal(found, _generate(model, source))


def test_source_is_projected_once(monkeypatch):
    """By each layer of the decoder, and encoded once."""
    model, calls = _model(), []
    of_class = CrossAttention.keys_and_values
    monkeypatch.setattr(CrossAttention, "keys_and_values", lambda *args: (calls.append(1), of_class(*args))[1])
    model.get_encoder().register_forward_hook(lambda *_: calls.append("encoder"))
    for options in GENERATION.values():
        calls.clear()
        _generate(model, _sources(), **options)
        assert (calls.count(1), calls.count("encoder")) == (3, 1), options


def test_source_padding_changes_nothing():
    """Neither its side nor its amount."""
    model, decoder_ids = _model(), _ids(15, 3)
    with torch.no_grad():
        alone = [
            model(_ids(length), decoder_input_ids=row[None]) for length, row in zip(LENGTHS, decoder_ids, strict=True)
        ]
        for side in SIDES:
            for length in (33, 50):
                sources = _sources(side, length)
                logits = model(**sources, decoder_input_ids=decoder_ids).logits
                for row, expected in zip(logits, alone, strict=True):
                    assert_close(row, expected.logits[0], 1e-12, f"{side}, {length}")
                generated = _generate(model, sources, num_beams=2)
                for row, n in zip(generated, LENGTHS, strict=True):
                    assert torch.equal(row, _generate(model, {"input_ids": _ids(n)}, num_beams=2)[0])


def test_decoder_prompts():
    """Of different lengths, padded on the left, with and without a cache."""
    model, sources = _model(), _sources()
    prompts = _padded([_ids(n, seed=1) for n in (4, 9, 6)], "left")
    of_decoder = {"decoder_input_ids": prompts["input_ids"], "decoder_attention_mask": prompts["attention_mask"]}
    # A prompt begins with the start token, unless its first token is given as one.
    start = torch.zeros(3, 1, dtype=torch.long)
    of_decoder = {
        "decoder_input_ids": torch.cat([start, of_decoder["decoder_input_ids"]], 1),
        "decoder_attention_mask": torch.cat([start, of_decoder["decoder_attention_mask"]], 1),
    }
    found = _generate(model, {**sources, **of_decoder})
    assert torch.equal(found, _generate(model, {**sources, **of_decoder}, use_cache=False))
    for i, n in enumerate((4, 9, 6)):
        alone = {"input_ids": _ids(LENGTHS[i])}
        decoder_ids = _ids(n, seed=1)
        with torch.no_grad():
            for _ in range(12):
                logits = model(**alone, decoder_input_ids=decoder_ids).logits[:, -1]
                decoder_ids = torch.cat([decoder_ids, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(found[i, -12:], decoder_ids[0, -12:])


def test_encoder_outputs_and_embeddings():
    """Given instead of ids, to a forward pass and to `generate`."""
    model, sources, decoder_ids = _model(), _sources(), _ids(9, 3)
    mask, embeddings = sources["attention_mask"], model.get_input_embeddings()
    with torch.no_grad():
        encoder_outputs = model.get_encoder()(**sources)
        expected = model(**sources, decoder_input_ids=decoder_ids)
        for inputs in (
            {"encoder_outputs": encoder_outputs, "decoder_input_ids": decoder_ids},
            {"encoder_outputs": (encoder_outputs.last_hidden_state,), "decoder_input_ids": decoder_ids},
            {"inputs_embeds": embeddings(sources["input_ids"]), "decoder_inputs_embeds": embeddings(decoder_ids)},
        ):
            found = model(attention_mask=mask, **inputs)
            assert torch.equal(found.logits, expected.logits)
            assert torch.equal(found.encoder_last_hidden_state, expected.encoder_last_hidden_state)
    generated = _generate(model, sources)
    for given in ({"encoder_outputs": encoder_outputs}, {"inputs_embeds": embeddings(sources["input_ids"])}):
        assert torch.equal(_generate(model, {"attention_mask": mask, **given}), generated)


def test_outputs():
    """Hidden states and attention weights of both stacks, by argument and by config, and as a tuple."""
    model, sources, decoder_ids = _model(), _sources(), _ids(9, 3)
    options = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        output = model(**sources, decoder_input_ids=decoder_ids, **options)
        for name, value in options.items():
            setattr(model.config, name, value)
        by_config = model(**sources, decoder_input_ids=decoder_ids)
        as_tuple = model(**sources, decoder_input_ids=decoder_ids, return_dict=False)
    assert output.keys() == by_config.keys() and torch.equal(as_tuple[0], output.logits)
    assert len(output.encoder_hidden_states) == 3 and len(output.decoder_hidden_states) == 4
    assert len(output.encoder_attentions) == 2 and len(output.decoder_attention_positions) == 3
    for weights in output.cross_attentions:
        assert weights.shape == (3, 2, 9, 33)
        assert_close(weights.sum(-1), torch.ones(3, 2, 9), 1e-12)
        assert not weights.masked_select(sources["attention_mask"][:, None, None] == 0).any()
    steps = _logits_of_steps(model, sources, decoder_ids, [4, 5])
    assert_close(steps, output.logits, 1e-10)
