# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The encoder-decoder: its definition, gradients and memory, generation, training, saving, and what it refuses."""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, log_softmax
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    DynamicCache,
    EncoderDecoderCache,
    EncoderDecoderModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from reformer_hf import (
    ReformerHfByteTokenizer,
    ReformerHfEncoderDecoderConfig,
    ReformerHfEncoderDecoderModel,
    ReformerHfForCausalLM,
    ReformerHfForConditionalGeneration,
    ReformerHfModel,
)
from reformer_hf.activation_memory import kept_activations
from reformer_hf.cross_attention import Context, CrossAttention
from reformer_hf.encoder_decoder import shift_tokens_right
from reformer_hf.reversible import Tape
from reformer_hf.self_attention import AttentionCall

from .helpers import DROPOUT, assert_close, gradients, memory_of, random_model, relative_rms, tiny_config
from .policies import set_policy
from .processes import WITHOUT_PACKAGE, run_python, run_worker
from .reference import cross_attention, full_decoder_layer
from .test_flat_files import FLAT_FILES
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
    x1, x2, context, *upstream = (torch.randn(2, *size, dtype=torch.float64, generator=generator) for size in sizes)
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
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 12, 8, dtype=torch.float64, generator=generator).requires_grad_()
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])

    def function(embeds):
        torch.manual_seed(3)
        return model(inputs_embeds=embeds[:, :7], decoder_inputs_embeds=embeds[:, 7:], attention_mask=mask)[0]

    # Along random directions instead of along each element.
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = lambda x: _FreshBackward.apply(function, x)  # noqa: E731
        assert torch.autograd.gradcheck(fresh, (embeds,), rtol=1e-4, atol=1e-6, fast_mode=True)


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
                alive.append(memory_of(lambda model=model, inputs=inputs: model(**inputs).loss)[0])
            grown[reversible, name] = (alive[1] - alive[0]) / 6 / stream
    # Each branch of a reversible layer keeps a generator state, a dozenth of a stream here.
    assert max(grown[True, name] for name in LAYERS) < 0.3, grown
    assert min(grown[False, name] for name in LAYERS) > 6, grown


def test_kept_activations():
    """The estimate for the decoder, which also counts keys and values of the source, is near what layers keep."""
    alive, estimates = [], []
    for depth in (2, 8):
        model = _model(torch.float32, reversible=False, attn_layers=["local"], decoder_attn_layers=["local"] * depth)
        inputs = {"input_ids": _ids(250, 2), "labels": _ids(130, 2)}
        model.train()(**inputs)
        alive.append(memory_of(lambda model=model, inputs=inputs: model(**inputs).loss)[0])
        estimates.append(kept_activations(model.config.decoder_config, 2 * 130, 2 * 250))
    assert 0.75 < (alive[1] - alive[0]) / (estimates[1] - estimates[0]) < 1.25
    # At the limit, the number of source positions decides.
    model.config.max_kept_activations = model.get_decoder().config.max_kept_activations = estimates[1]
    model.get_decoder().config.reversible = True
    tapes = []
    model.get_decoder().encoder.layers[0].register_forward_pre_hook(lambda module, args: tapes.append(args[3]))
    for length in (250, 251):
        model(_ids(length, 2), labels=_ids(130, 2))
    assert tapes[0] is None and tapes[1] is not None


def _decoder_step(reversible, hook=None, **inputs):
    """Return the gradients of the encoder output and of all parameters of a decoder."""
    fields = {"attn_layers": ["local", "lsh"], "hash_seed": 0, "add_cross_attention": True}
    model = random_model(torch.float64, **fields, reversible=reversible).train()
    source = torch.randn(2, 9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    context = source * 1
    if hook is not None:
        context.register_hook(hook)
    model(_ids(45, 2), labels=_ids(45, 2), encoder_hidden_states=context, **inputs).loss.backward()
    return {"source": source.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}


def test_hook_of_the_encoder_output():
    """It sees the gradient of all layers once."""
    calls = []
    found = _decoder_step(True, lambda grad: calls.append(grad) or 2 * grad)
    assert len(calls) == 1
    _compare_gradients(found, _decoder_step(False, lambda grad: 2 * grad), 1e-9)


@pytest.mark.parametrize("reversible", [True, False])
def test_cross_attention_cache_has_no_gradient(reversible):
    with pytest.raises(RuntimeError, match="computed with a KV cache and have no gradient"):
        _decoder_step(reversible, cross_cache=DynamicCache())


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
    names = [
        name
        for name, module in layer.named_modules()
        if name.startswith("cross_attention") and not isinstance(module, torch.nn.Dropout)
    ]
    for name in names:
        layer.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))
    _step(model.train()).loss.backward()
    assert sorted(fired) == sorted(names)
    fired.clear()
    model.eval().generate(_ids(20), max_new_tokens=3, do_sample=False)
    once = {"cross_attention.attention.key", "cross_attention.attention.value"}
    assert {name: fired.count(name) for name in names} == {name: 1 if name in once else 3 for name in names}


def test_interventions():
    """Hooks and wrappers of decoder layers, and hooks inside cross-attention, give gradients of the plain model."""
    inside = ("cross_attention", "cross_attention.layer_norm", "cross_attention.attention.value")
    interventions = {name: INTERVENTIONS[name] for name in ("wrapper", "undone", "two")}
    interventions |= {name: _inside(name) for name in inside}
    for name, intervene in interventions.items():
        found = []
        for reversible in (True, False):
            layers = {"decoder_attn_layers": ["lsh", "full", "local", "lsh", "full"]}
            model = _model(reversible=reversible, hash_seed=0, **layers, **DROPOUT).train()
            vector = torch.nn.Parameter(torch.linspace(-1, 1, 32, dtype=torch.float64))
            intervene(model.get_decoder().encoder.layers, vector)
            _step(model).logits.square().mean().backward()
            grads = {name: p.grad for name, p in (*model.named_parameters(), ("vector", vector))}
            found.append({key: grad for key, grad in grads.items() if grad is not None and grad.any()})
        assert "vector" in found[0] or name in ("wrapper", "undone")
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
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        for side in SIDES:
            model, sources, decoder_ids = _model(dtype), _sources(side), _ids(40, 3)
            with torch.no_grad():
                expected = model(**sources, decoder_input_ids=decoder_ids).logits
                other = {**sources, "input_ids": sources["input_ids"].flip(1), "attention_mask": None}
                changed = model(**other, decoder_input_ids=decoder_ids).logits
            assert relative_rms(changed, expected) > 1e-2
            found = _logits_of_steps(model, sources, decoder_ids, [9, *([1] * 28), 3])
            assert_close(found, expected, limit, side)


def test_chunk_steps_equal_last_row():
    """In the pattern `chunk`, later tokens change earlier outputs: a step equals the last row of what there was."""
    model, sources, decoder_ids = _model(lsh_pattern="chunk", attn_layers=["lsh"]), _sources(), _ids(25, 3)
    found = _logits_of_steps(model, sources, decoder_ids, 1)
    with torch.no_grad():
        for length in (1, 8, 9, 25):
            expected = model(**sources, decoder_input_ids=decoder_ids[:, :length]).logits[:, -1]
            assert_close(found[:, length - 1], expected, 1e-10)


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
        for name, options in GENERATION.items() if side == "left" else [("greedy", {}), ("beams", {"num_beams": 2})]:
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
    # Evaluation creates a cache, training does not. By default, only evaluation without gradients does.
    for training in (False, True):
        model.train(training)
        output = model(**sources, decoder_input_ids=decoder_ids, use_cache=True)
        assert (output.cache is None) == training
        assert model(**sources, decoder_input_ids=decoder_ids).cache is None
        with torch.no_grad():
            output = model(**sources, decoder_input_ids=decoder_ids)
            assert (output.cache is None) == training
            assert model(**sources, labels=decoder_ids).cache is None


def test_gradients_with_use_cache():
    """Training creates no cache, so gradients are right; in evaluation, what has none says so."""
    found, expected = (_model().train() for _ in range(2))
    _step(found, use_cache=True).loss.backward()
    _step(expected).loss.backward()
    _compare_gradients(gradients(found), gradients(expected), 1e-12)
    # Only the encoder is trained, through a frozen decoder. The LM head is not tied.
    model = _model(tie_word_embeddings=False).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    model.get_encoder().encoder.requires_grad_(True)
    output = _step(model, use_cache=True)
    with pytest.raises(RuntimeError, match="computed with a KV cache.*`use_cache=False`"):
        output.loss.backward()
    output.encoder_last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in model.get_encoder().encoder.parameters())


def test_loss():
    """The cross entropy of labels against the logits of decoder inputs that are the labels, moved by one."""
    model, sources = _model().train(), _sources()
    labels = _ids(27, 3)
    labels[1, -9:] = -100
    decoder_ids = shift_tokens_right(labels, 0, 5)
    assert (decoder_ids[:, 0] == 5).all() and (decoder_ids[1, -8:] == 0).all()
    assert torch.equal(decoder_ids[0, 1:], labels[0, :-1])
    model.config.decoder_start_token_id = 5
    for given in ({}, {"num_items_in_batch": 50}, {"num_items_in_batch": torch.tensor(50)}):
        # Rotations are drawn for each call.
        outputs = []
        for inputs in ({"labels": labels, **given}, {"decoder_input_ids": decoder_ids}):
            torch.manual_seed(2)
            outputs.append(model(**sources, **inputs))
        output, logits = outputs[0], outputs[1].logits
        assert torch.equal(output.logits, logits)
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        assert_close(output.loss, total / (50 if given else (labels != -100).sum()), 1e-6)
    with torch.no_grad():
        decoder_inputs = {"decoder_input_ids": decoder_ids.flip(1), "labels": labels}
        assert relative_rms(model.eval()(**sources, **decoder_inputs).loss, output.loss) > 1e-3


def test_loss_in_chunks():
    """In training, a chunked head gives the same loss and gradients without logits."""
    found = []
    for fields in ({}, {"chunk_size_lm_head": 10}):
        model = _model(torch.float32, hash_seed=0, **fields).train()
        for items in ({}, {"num_items_in_batch": 50}):
            model.zero_grad()
            output = _step(model, **items)
            output.loss.backward()
            assert (output.logits is None) == bool(fields)
            found.append((output.loss, gradients(model)))
        assert _step(model.eval()).logits is not None
    for (loss, grads), (expected, of_whole) in zip(found[2:], found[:2], strict=True):
        assert_close(loss, expected, 1e-6)
        _compare_gradients(grads, of_whole, 1e-5)


def test_tied_embeddings_and_resizing():
    for tied in (False, True):
        model = _model(tie_word_embeddings=tied)
        embeddings = model.get_input_embeddings().weight
        assert model.get_decoder().embeddings.word_embeddings.weight is embeddings
        assert (model.lm_head.decoder.weight is embeddings) == tied
        with torch.no_grad():
            expected = _step(model).logits
            model.resize_token_embeddings(66)
            found = _step(model).logits
        assert found.shape[-1] == 66
        assert_close(found[..., :60], expected, 1e-12)
        assert model.get_decoder().embeddings.word_embeddings.weight is model.get_input_embeddings().weight
        new_tokens = torch.full((3, 9), 65)
        model(new_tokens, labels=new_tokens).loss.backward()
        assert model.get_input_embeddings().weight.grad[65].any()
        configs = (model.config, model.get_encoder().config, model.get_decoder().config)
        assert {config.vocab_size for config in configs} == {66}


WORDS = ["owl", "hyphen", "an evening"]


def _trainer(model, folder, rows, **arguments):
    tokenizer = ReformerHfByteTokenizer()
    defaults = {
        "output_dir": folder,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 2,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "predict_with_generate": True,
        "generation_max_length": 9,
    }
    return Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(**{**defaults, **arguments}),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=lambda found: {"exact": (found.predictions[:, 1:3] == found.label_ids[:, :2]).mean().item()},
    )


def _rows():
    tokenizer = ReformerHfByteTokenizer()
    rows = [tokenizer(word, text_target=word[::-1] + "</s>") for word in WORDS]
    return [{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in rows]


def test_label_smoothing(tmp_path):
    model = _model(torch.float32, vocab_size=260, bos_token_id=258, hash_seed=0).train()
    trainer = _trainer(model, tmp_path, _rows(), label_smoothing_factor=0.1)
    batch = trainer.data_collator(_rows())
    assert torch.equal(batch["decoder_input_ids"], shift_tokens_right(batch["labels"], 0, 0))
    loss = trainer.compute_loss(model, dict(batch))
    labels = batch.pop("labels")
    log_probabilities = log_softmax(model(**batch).logits, -1)[labels != -100]
    nll = -log_probabilities.gather(-1, labels[labels != -100][:, None])
    assert_close(loss, 0.9 * nll.mean() - 0.1 * log_probabilities.mean(), 1e-6)


def test_seq2seq_trainer(tmp_path):
    """It trains, and evaluates and predicts by `generate`."""
    fields = {"vocab_size": 260, "bos_token_id": 258, "eos_token_id": 1, "hash_seed": 0}
    model, rows = _model(torch.float32, **fields, **DROPOUT), _rows()
    trainer = _trainer(model, tmp_path, rows, max_steps=30, learning_rate=1e-2, eval_strategy="steps", eval_steps=30)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 1 and losses[0] < 4
    for options in ({}, {"num_beams": 2}):
        predictions = trainer.predict(rows, **options).predictions
        expected = [
            _generate(model, {"input_ids": torch.tensor([row["input_ids"]])}, max_new_tokens=8, **options)[0]
            for row in rows
        ]
        for prediction, tokens in zip(torch.from_numpy(predictions), expected, strict=True):
            assert torch.equal(prediction[: len(tokens)].clamp(min=0), tokens)


def test_bfloat16():
    """Streams stay in fp32, so that the reversible gradient is the plain one up to the dtype's noise."""
    found = []
    for reversible in (True, False):
        model = _model(torch.bfloat16, reversible=reversible, hash_seed=0).train()
        output = _step(model, output_hidden_states=True)
        states = (*output.encoder_hidden_states, *output.decoder_hidden_states)
        assert {state.dtype for state in states} == {torch.float32}
        assert output.encoder_last_hidden_state.dtype == torch.bfloat16
        output.loss.backward()
        found.append(gradients(model))
    _compare_gradients(*found, 0.05)
    model.eval()
    sources, decoder_ids = _sources(), _ids(9, 3)
    with torch.no_grad():
        expected = model(**sources, decoder_input_ids=decoder_ids).logits
    assert_close(_logits_of_steps(model, sources, decoder_ids, 1), expected, 0.05)


def test_autocast():
    for dtype in (torch.bfloat16, torch.float16):
        found = []
        for reversible in (True, False):
            model = _model(torch.float32, reversible=reversible, hash_seed=0, **DROPOUT).train()
            sources = _sources()
            # A source of padding alone has no token to attend to, and must not spoil the others.
            sources["attention_mask"][2] = 0
            with torch.autocast("cpu", dtype):
                output = _step(model, attention_mask=sources["attention_mask"], output_hidden_states=True)
            assert {state.dtype for state in output.decoder_hidden_states} == {torch.float32}
            output.loss.backward()
            found.append(gradients(model))
        _compare_gradients(*found, 0.05)


def test_lora():
    """With default targets: queries and values of self- and cross-attention in both stacks."""
    peft = pytest.importorskip("peft")
    for lora_dropout in (0.0, 0.3):
        found = []
        for reversible in (True, False):
            model = _model(reversible=reversible, **DROPOUT)
            torch.manual_seed(4)
            config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, init_lora_weights=False, lora_dropout=lora_dropout)
            model = peft.get_peft_model(model, config).double().train()
            if reversible:
                model.enable_input_require_grads()
            _step(model).loss.backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        _compare_gradients(*found, 1e-9)
        adapted = {name.split(".lora_A")[0].partition("layers.")[2] for name in found[0] if "lora_A" in name}
        assert {"0.cross_attention.attention.query", "2.cross_attention.attention.value"} <= adapted
        assert {name.rpartition(".")[2] for name in adapted} == {"query_key", "query", "value"}
    model.eval()
    found = _generate(model, _sources())
    assert torch.equal(found, _generate(model, _sources(), use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(found, _generate(model, _sources()))


def _gradients_of_ranks(folder, wrap, tied=False):
    options = {"head": "ReformerHfForConditionalGeneration", "wrap": wrap, "tied": tied}
    run_worker("gradients", folder, ranks=1 if wrap == "none" else 2, **options)
    return load_file(folder / "gradients.safetensors")


@pytest.mark.slow
def test_ddp_gradients(tmp_path):
    """Of two ranks, each with half of the batch: those of one process."""
    found, expected = (_gradients_of_ranks(tmp_path / wrap, wrap) for wrap in ("ddp", "none"))
    _compare_gradients(found, expected, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("wrap", ["ddp-unused", "fully_shard", "plan"])
def test_sharded_gradients(wrap, tied, tmp_path):
    found, expected = (_gradients_of_ranks(tmp_path / kind, kind, tied) for kind in (wrap, "none"))
    _compare_gradients(found, expected, 1e-6)
    if wrap == "plan":
        cls = ReformerHfForConditionalGeneration
        loaded = [cls.from_pretrained(tmp_path / wrap / name).state_dict() for name in ("saved", "initial")]
        for name, weight in loaded[0].items():
            assert torch.equal(weight, loaded[1][name]), name


@torch.no_grad()
def _outputs(model):
    decoder_ids = _ids(9, 3)
    return model.eval()(**_sources(), decoder_input_ids=decoder_ids)[0]


def test_round_trip(tmp_path):
    """By the class and the Auto class, tied and not; a folder of the base model loads into the head."""
    for tied in (False, True):
        model, folder = _model(tie_word_embeddings=tied), tmp_path / str(tied)
        expected = _outputs(model)
        model.save_pretrained(folder)
        for cls in (ReformerHfForConditionalGeneration, AutoModelForSeq2SeqLM):
            loaded, info = cls.from_pretrained(folder, output_loading_info=True)
            assert type(loaded) is ReformerHfForConditionalGeneration and not any(info.values()), info
            assert loaded.dtype == torch.float64 and torch.equal(_outputs(loaded), expected)
            embeddings = loaded.get_input_embeddings().weight
            assert loaded.get_decoder().get_input_embeddings().weight is embeddings
            assert (loaded.lm_head.decoder.weight is embeddings) == tied
            assert loaded.config.to_diff_dict() == {**model.config.to_diff_dict(), **loaded.config.to_diff_dict()}
        base = AutoModel.from_pretrained(folder)
        assert type(base) is ReformerHfEncoderDecoderModel
        assert torch.equal(_outputs(base), _outputs(model.model))
        base.save_pretrained(folder / "base")
        head, info = AutoModelForSeq2SeqLM.from_pretrained(folder / "base", output_loading_info=True)
        missing = {"lm_head.bias"} if tied else {"lm_head.bias", "lm_head.decoder.weight"}
        assert {name for name in info["missing_keys"] if name != "lm_head.decoder.bias"} == missing
        assert torch.equal(_outputs(head.model), _outputs(model.model))
        copied = copy.deepcopy(model)
        assert torch.equal(_outputs(copied), expected)
        assert copied.get_decoder().get_input_embeddings().weight is copied.get_input_embeddings().weight


def test_from_config():
    config = AutoConfig.for_model("reformer_hf_encoder_decoder", attn_layers=["local"], hidden_size=32)
    assert type(config) is ReformerHfEncoderDecoderConfig
    for auto_class, cls in (
        (AutoModel, ReformerHfEncoderDecoderModel),
        (AutoModelForSeq2SeqLM, ReformerHfForConditionalGeneration),
    ):
        assert type(auto_class.from_config(config)) is cls


LOAD = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

saved, again, results = sys.argv[1:]

def load(folder):
    loaded = [each.from_pretrained(folder, **options) for each in (AutoConfig, AutoModel, AutoModelForSeq2SeqLM)]
    source = {"input_ids": torch.arange(1, 21)[None]}
    with torch.no_grad():
        return loaded[2], {
            "fields": loaded[0].to_diff_dict(),
            "hidden": loaded[1](**source, decoder_input_ids=torch.arange(9)[None]).last_hidden_state,
            "generated": loaded[2].generate(**source, max_new_tokens=5, num_beams=2),
            "modules": [type(each).__module__ for each in loaded],
        }

model, outputs = load(saved)
model.save_pretrained(again)
torch.save([outputs, load(again)[1]], results)
"""


@pytest.mark.slow
def test_process_without_package(tmp_path):
    """The code in the folder is enough to load it, and to save a folder that loads again."""
    saved, again, results = (tmp_path / name for name in ("saved", "again", "results"))
    model = _model(torch.float32)
    model.save_pretrained(saved)
    code = {path.name for path in FLAT_FILES} - {"tokenization_reformer_hf.py"}
    files = {path.name for path in saved.iterdir()}
    assert files - {"config.json", "generation_config.json", "model.safetensors"} == code
    auto_map = json.loads((saved / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_encoder_decoder.ReformerHfEncoderDecoderConfig",
        "AutoModel": "encoder_decoder.ReformerHfEncoderDecoderModel",
        "AutoModelForSeq2SeqLM": "encoder_decoder.ReformerHfForConditionalGeneration",
    }
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_", "PYTHON"))}
    env |= {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run_python(["-I", "-c", WITHOUT_PACKAGE + LOAD, saved, again, results], tmp_path, env)
    source = {"input_ids": torch.arange(1, 21)[None]}
    for outputs, folder in zip(torch.load(results, weights_only=False), ("saved", "again"), strict=True):
        assert all(module.startswith(f"transformers_modules.{folder}.") for module in outputs["modules"])
        with torch.no_grad():
            hidden = model.model(**source, decoder_input_ids=torch.arange(9)[None]).last_hidden_state
        assert torch.equal(outputs["hidden"], hidden)
        assert torch.equal(outputs["generated"], model.generate(**source, max_new_tokens=5, num_beams=2))
        assert outputs["fields"] == model.config.to_diff_dict()
    for path in saved.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_config(tmp_path):
    config = tiny_config(ReformerHfEncoderDecoderConfig, **LAYERS, pad_token_id=3, local_num_chunks_after=2)
    assert (config.decoder_start_token_id, config.is_encoder_decoder, config.num_hidden_layers) == (3, True, 2)
    encoder, decoder = config.encoder_config, config.decoder_config
    assert (encoder.attn_layers, encoder.is_decoder) == (("local", "lsh"), False)
    assert (decoder.attn_layers, decoder.is_decoder) == (("lsh", "full", "local"), True)
    # The decoder sees no chunks after.
    assert (encoder.chunks_after("local"), decoder.chunks_after("local")) == (2, 0)
    assert not encoder.add_cross_attention and decoder.add_cross_attention
    assert ReformerHfEncoderDecoderConfig().decoder_attn_layers == ReformerHfEncoderDecoderConfig().attn_layers
    config.save_pretrained(tmp_path)
    for loaded in (
        ReformerHfEncoderDecoderConfig.from_dict(config.to_dict()),
        AutoConfig.from_pretrained(tmp_path),
        copy.deepcopy(config),
    ):
        assert type(loaded) is ReformerHfEncoderDecoderConfig
        assert loaded.to_diff_dict() == config.to_diff_dict()
        assert loaded.decoder_config.to_diff_dict() == decoder.to_diff_dict()
    changed = AutoConfig.from_pretrained(tmp_path, decoder_attn_layers=["full"], num_hashes=3)
    assert changed.decoder_config.attn_layers == ("full",) and changed.encoder_config.num_hashes == 3
    cache = DynamicCache(config=config)
    assert [layer.layer_type for layer in cache.layers] == decoder.layer_types


def test_bad_configs():
    for fields, said in (
        ({"is_decoder": True}, "`is_decoder` is True.*encoder-decoder needs True, False"),
        ({"is_encoder_decoder": False}, "`is_encoder_decoder` is False"),
        ({"add_cross_attention": True}, "`add_cross_attention` is True"),
        ({"decoder_attn_layers": ["dense"]}, "`decoder_attn_layers` holds 'dense'.*must be one of"),
        ({"decoder_attn_layers": []}, "`decoder_attn_layers` is empty"),
        ({"num_hashes": 0}, "`num_hashes` is 0"),
        ({"decoder_start_token_id": 60}, "`decoder_start_token_id` is 60.*`vocab_size`"),
    ):
        with pytest.raises(ValueError, match=said):
            tiny_config(ReformerHfEncoderDecoderConfig, **fields)
    with pytest.raises(ValueError, match="`add_cross_attention` is True.*`is_decoder=True`"):
        tiny_config(is_decoder=False, add_cross_attention=True)


def test_bad_inputs():
    model, ids = _model(), _ids(20, 2)
    decoder = {"decoder_input_ids": ids}
    hidden = torch.zeros(2, 20, 64, dtype=torch.float64)
    dense = DynamicCache(config=model.config)
    twice = EncoderDecoderCache(dense, DynamicCache(config=model.config))
    used = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    model(ids[:, :7], **decoder, cache=used)
    restarted = torch.arange(20).remainder(10).expand(2, -1)
    for inputs, said in (
        ({"input_ids": ids}, "`decoder_input_ids` is missing.*`labels`"),
        ({"labels": ids}, "Give one of `input_ids` and `inputs_embeds`, not neither"),
        ({"input_ids": ids, "labels": _ids(257, 2)}, "257 tokens long.*at most 256.*`max_position_embeddings`"),
        ({"input_ids": _ids(257, 2), "labels": ids}, "257 tokens long.*at most 256"),
        ({"input_ids": ids, "labels": ids + 59}, "`input_ids` holds .*`vocab_size` is 60"),
        ({"input_ids": ids, **decoder, "labels": ids[:, 1:]}, "`labels` has shape \\(2, 19\\).*\\(2, 20\\)"),
        ({"encoder_outputs": (hidden[..., 1:],), **decoder}, "`encoder_hidden_states` has shape \\(2, 20, 63\\).*64"),
        ({"encoder_outputs": (hidden[:1],), **decoder}, "shape \\(1, 20, 64\\), but must be \\[2, S, 64\\]"),
        ({"input_ids": ids[:1], **decoder}, "shape \\(1, 20, 64\\).*one row for each row of the decoder"),
        (
            {"encoder_outputs": (hidden,), "attention_mask": torch.ones(2, 19), **decoder},
            "`encoder_attention_mask` has shape \\(2, 19\\), but must be \\(2, 20\\)",
        ),
        (
            {"encoder_outputs": (hidden,), "attention_mask": torch.full((2, 20), -1.0), **decoder},
            "`attention_mask` holds -1.0.*1 for tokens and 0 for padding",
        ),
        ({"input_ids": ids, **decoder, "cache": dense}, "`cache` is a DynamicCache.*`EncoderDecoderCache\\("),
        ({"input_ids": ids, **decoder, "cache": twice}, "cross-attention has layers of type .*DynamicCache\\(\\)\\)`"),
        ({"input_ids": ids, **decoder, "cache": used}, "encoder output of shape \\(2, 7\\).*\\(2, 20\\)"),
        ({"input_ids": ids, **decoder, "decoder_position_ids": restarted}, "several documents.*whole encoder output"),
        ({"input_ids": ids, **decoder, "seq_idx": ids}, "`seq_idx` is given.*give each document its own row"),
    ):
        with pytest.raises(ValueError, match=said):
            model(**inputs)
    assert dense.get_seq_length() == 0
    causal = random_model(cls=ReformerHfForCausalLM)
    with pytest.raises(ValueError, match="`encoder_hidden_states` is given.*`add_cross_attention` is False"):
        causal.reformer(ids, encoder_hidden_states=hidden)
    with pytest.raises(ValueError, match="`encoder_hidden_states` is given.*`add_cross_attention` is False"):
        causal(ids, encoder_hidden_states=hidden)
    with pytest.raises(ValueError, match="`encoder_hidden_states` is missing"):
        ReformerHfModel(tiny_config(add_cross_attention=True))(ids)
    with pytest.raises(ValueError, match="up to 300 tokens.*`max_new_tokens`"):
        model.generate(ids, max_new_tokens=300)
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="`decoder_start_token_id` of the config is None.*`decoder_input_ids`"):
        model(ids, labels=ids)


def test_decoder_in_encoder_decoder_model(tmp_path):
    """The class of Transformers that combines any two models, without its cache."""
    random_model(cls=ReformerHfModel, is_decoder=False).save_pretrained(tmp_path / "encoder")
    random_model(pad_token_id=0).save_pretrained(tmp_path / "decoder")
    torch.manual_seed(0)
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "encoder", tmp_path / "decoder")
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    output = model(input_ids=_ids(20, 2), labels=_ids(9, 2), output_attentions=True)
    output.loss.backward()
    assert output.cross_attentions[0].shape == (2, 2, 9, 20)
    assert model.encoder.get_input_embeddings().weight.grad.any()
    options = {"max_new_tokens": 4, "do_sample": False, "decoder_start_token_id": 1, "pad_token_id": 0}
    assert model.generate(_ids(20, 2), use_cache=False, **options).shape == (2, 5)
    with pytest.raises(ValueError, match="`cache` is a EncoderDecoderCache"):
        model.generate(_ids(20, 2), **options)
