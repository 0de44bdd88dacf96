# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Generation: against loops over the forward pass, with and without a KV cache, with padding, from embeddings,
and within the longest input."""

import copy
import itertools
from threading import Thread

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import CompileConfig, DynamicCache, StaticCache, TextIteratorStreamer, pipeline, set_seed

from reformer_hf import ReformerHfByteTokenizer, ReformerHfForCausalLM, ReformerHfForConditionalGeneration

from .helpers import assert_close, assert_refused, random_model, tiny_config

# Prompts of a batch, padded on the left to the longest.
LENGTHS = [33, 5, 20]
NEW = 12

each_beams = pytest.mark.parametrize("num_beams", [1, 3], ids=lambda beams: f"beams{beams}")


def _model(dtype=torch.float64, **fields):
    """
    Weights so large that the next token depends on the prompt. In fp64, since padding changes the last digits: a tie
    that they break is then out of the question. No token ends a sequence unless a test says so.
    """
    torch.manual_seed(0)
    fields = {"initializer_range": 0.5, "axial_norm_std": 0.5, "eos_token_id": None, **fields}
    return ReformerHfForCausalLM(tiny_config(**fields)).to(dtype).eval()


def _ids(length, batch_size=1, vocab_size=60):
    """Without the id of padding, 0."""
    return torch.randint(1, vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(length))


def _padded(prompts):
    """A batch of prompts, each of its own length, and its mask."""
    longest = max(prompt.shape[1] for prompt in prompts)
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - prompt.shape[1] :] = prompt
        attention_mask[row, longest - prompt.shape[1] :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@torch.no_grad()
def _greedy(model, input_ids, num_new=NEW, **options):
    """The most probable token, over and over, from the logits of the whole sequence; and those logits."""
    logits = []
    for _ in range(num_new):
        logits.append(model(input_ids, **options).logits[:, -1])
        input_ids = torch.cat([input_ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return input_ids, torch.stack(logits, dim=1)


def _generate(model, *args, num_new=NEW, **kwargs):
    """New tokens, without the prompt."""
    return model.generate(*args, **{"max_new_tokens": num_new, "do_sample": False, **kwargs})[:, -num_new:]


IN_CHUNKS = {
    "chunk": {"attn_layers": ["lsh", "local"], "lsh_pattern": "chunk"},
    "in-tree": {"lsh_pattern": "chunk", "lsh_across_buckets": True, "wrap_chunks": True},
}
KINDS = {
    "mixed": {},
    "local": {"attn_layers": ["local", "local"]},
    "buckets-of-the-length": {"num_buckets": None},
    "hash-seed": {"hash_seed": 5},
    "tied-learned-in-pieces": {
        "tie_word_embeddings": True,
        "axial_pos_embds": False,
        "chunk_size_lm_head": 5,
        "chunk_size_feed_forward": 7,
    },
}
# With a cache, a new token moves chunks of the sorted order: see docs/generation.md.
WITHOUT_CACHE = {"mixed-without-cache": {}, **IN_CHUNKS}


@pytest.mark.parametrize(
    ("fields", "use_cache"),
    [(fields, True) for fields in KINDS.values()] + [(fields, False) for fields in WITHOUT_CACHE.values()],
    ids=KINDS | WITHOUT_CACHE,
)
def test_greedy_equals_forward_pass(fields, use_cache):
    model, input_ids = _model(torch.float32, **fields), _ids(21, batch_size=3)
    # Of prompt and new tokens: 33 in windows of 16.
    num_buckets = 4 if model.config.num_buckets is None and model.config.lsh_pattern == "window" else None
    expected, _ = _greedy(model, input_ids, num_buckets=num_buckets)
    found = model.generate(input_ids, max_new_tokens=NEW, do_sample=False, use_cache=use_cache)
    assert torch.equal(found, expected)
    # The prompt matters, and the model does not repeat one token.
    new = found[:, 21:]
    assert len(new.unique(dim=0)) == 3 and len(new.unique()) > 5, new


def test_prompt_of_one_token():
    model, prompt = _model(), torch.tensor([[7]])
    options = {"max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), _greedy(model, prompt)[0])
    assert model.generate(prompt, **options, num_beams=3).shape == (1, 1 + NEW)


def test_no_prompt_begins_with_bos():
    model = _model()
    assert torch.equal(model.generate(max_new_tokens=NEW, do_sample=False), _greedy(model, torch.tensor([[2]]))[0])


MODES = {
    "beams": {"num_beams": 3},
    "several-samples": {"do_sample": True, "num_return_sequences": 3},
    "beam-sampling": {"do_sample": True, "num_beams": 2},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}
CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "pieces": {"prefill_chunk_size": 6},
    "static-pieces": {"cache_implementation": "static", "prefill_chunk_size": 6},
}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_cache_changes_nothing(options):
    model = _model()
    assert model.generation_config.use_cache
    batch = _padded([_ids(length) for length in LENGTHS])
    set_seed(0)
    expected = _generate(model, **batch, num_new=40, use_cache=False, **options)
    assert len(expected.unique()) > 15
    for name, cache in CACHES.items():
        set_seed(0)
        assert torch.equal(_generate(model, **batch, num_new=40, **cache, **options), expected), name


@pytest.mark.parametrize("length", [1, 16, 17])
def test_short_prompt_without_num_buckets(length):
    """One bucket, where the prompt is no longer than the window."""
    model, prompt = _model(num_buckets=None), _ids(length, batch_size=2)
    expected = _generate(model, prompt, num_new=60, use_cache=False)
    for cache in CACHES.values():
        assert torch.equal(_generate(model, prompt, num_new=60, **cache), expected), cache


def test_generate_passes_cache(monkeypatch):
    model, seen = _model(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: (seen.append(inputs), forward(**inputs))[1])
    model.generate(_ids(21), max_new_tokens=3, do_sample=False)
    assert [inputs["input_ids"].shape[1] for inputs in seen] == [21, 1, 1]
    assert all(type(inputs["cache"]) is DynamicCache for inputs in seen)
    seen.clear()
    model.generate(_ids(21), max_new_tokens=3, do_sample=False, cache_implementation="static")
    assert all(type(inputs["cache"]) is StaticCache for inputs in seen)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 100},
        {"assistant_model": {"attn_layers": ["local"]}},
        {"assistant_model": {}},
    ],
    ids=["prompt-lookup", "small-assistant", "assistant-that-is-right"],
)
def test_assisted_decoding(options):
    # Drafts may be longer than what is wanted.
    model = _model(max_position_embeddings=512)
    # A prompt that repeats itself, so that looking up finds something.
    prompt = _ids(40).repeat(1, 3)
    expected = _generate(model, prompt, num_new=60, use_cache=False)
    if "assistant_model" in options:
        options = {"assistant_model": _model(max_position_embeddings=512, **options["assistant_model"])}
    assert torch.equal(_generate(model, prompt, num_new=60, **options), expected)


@pytest.mark.parametrize(
    ("num_beams", "use_cache"),
    [(1, {"use_cache": False}), (1, {"cache_implementation": "static"}), (3, {})],
    ids=["greedy-without-cache", "greedy-static", "beams-dynamic"],
)
def test_right_padding(num_beams, use_cache):
    """Transformers warns, and takes the last column for the next token and counts positions from it."""
    model = _model()
    prompts = [_ids(length) for length in LENGTHS]
    input_ids = torch.zeros(3, 33, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, : prompt.shape[1]] = prompt
        attention_mask[row, : prompt.shape[1]] = 1
    expected = _generate(model, **_padded(prompts), num_beams=num_beams)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    assert torch.equal(_generate(model, **batch, num_beams=num_beams, **use_cache), expected)


def test_right_padding_refused_in_pieces():
    model = _model()
    attention_mask = torch.ones(2, 33, dtype=torch.long)
    attention_mask[1, 5:] = 0
    with pytest.raises(ValueError, match="row 1 is only padding, after tokens.*on the left"):
        model.generate(_ids(33, 2), attention_mask=attention_mask, max_new_tokens=3, prefill_chunk_size=10)


def test_continue_from_returned_cache():
    model, prompt = _model(), _ids(21, batch_size=2)
    options = {"do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(prompt, max_new_tokens=60, do_sample=False, use_cache=False)
    first = model.generate(prompt, max_new_tokens=20, **options)
    assert first.cache.get_seq_length() == 40
    kept = copy.deepcopy(first.cache)
    second = model.generate(first.sequences, max_new_tokens=40, cache=first.cache, **options)
    assert torch.equal(second.sequences, whole)
    assert second.cache is first.cache and second.cache.get_seq_length() == 80
    # Back to where the answer began, and on with another one.
    kept.crop(-15)
    other = torch.cat([whole[:, :25], _ids(9, batch_size=2)], dim=1)
    expected = model.generate(other, max_new_tokens=NEW, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(other, max_new_tokens=NEW, do_sample=False, cache=kept), expected)


def test_shared_prefix():
    model, prefix = _model(), _ids(30)
    with torch.no_grad():
        cache = model(prefix, use_cache=True).cache
    cache.batch_repeat_interleave(3)
    prompts = torch.cat([prefix.expand(3, -1), _ids(4, batch_size=3)], dim=1)
    expected = model.generate(prompts, max_new_tokens=NEW, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(prompts, max_new_tokens=NEW, do_sample=False, cache=cache), expected)


def test_buckets_of_planned_length():
    """At every step and in every piece, where the config leaves the number to the length: prompt and new tokens."""
    model, prompt = _model(num_buckets=None, attn_layers=["lsh"] * 2), _ids(40, batch_size=2)
    expected, _ = _greedy(model, prompt, num_new=60, num_buckets=8)
    options = {"max_new_tokens": 60, "do_sample": False}
    for cache in ({"use_cache": False}, *CACHES.values()):
        assert torch.equal(model.generate(prompt, **options, **cache), expected), cache
    more = model.generate(prompt, **options, num_buckets=16)
    assert not torch.equal(more, expected)
    assert torch.equal(model.generate(prompt, **options, num_buckets=16, use_cache=False), more)
    # A dense assistant knows nothing of buckets.
    assert torch.equal(model.generate(prompt[:1], **options, prompt_lookup_num_tokens=5), expected[:1])


def test_continue_keeps_num_buckets():
    """Four buckets of the first planned length, 41 tokens in windows of 16, not eight of the second one."""
    model, prompt = _model(num_buckets=None, attn_layers=["lsh"] * 2), _ids(21, batch_size=2)
    expected, _ = _greedy(model, prompt, num_new=60, num_buckets=4)
    assert not torch.equal(_greedy(model, prompt, num_new=60, num_buckets=8)[0], expected)
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(prompt, max_new_tokens=20, **options)
    second = model.generate(first.sequences, max_new_tokens=40, cache=first.cache, **options)
    assert torch.equal(second.sequences, expected)


def test_sampling():
    model, input_ids = _model(initializer_range=0.1), _ids(21, batch_size=2)
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 4}
    samples = []
    for seed in (0, 0, 1):
        set_seed(seed)
        samples.append(_generate(model, input_ids, **options))
    first, again, other = samples
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (2 * 4, NEW)
    assert first.min() >= 0 and first.max() < 60
    assert len({tuple(row) for row in first.tolist()}) == 8


def test_sampling_frequencies():
    model, input_ids = _model(initializer_range=0.2), _ids(3)
    set_seed(0)
    tokens = _generate(model, input_ids, num_new=1, do_sample=True, top_k=0, num_return_sequences=4000)
    frequencies = tokens.flatten().bincount(minlength=60) / 4000
    with torch.no_grad():
        probabilities = model(input_ids).logits[0, -1].softmax(-1)
    # Samples differ by 0.03 to 0.05 from what they are drawn from, whatever the seed, and by 0.66 from the rolled one.
    assert (frequencies - probabilities).abs().sum() / 2 < 0.08
    assert (frequencies - probabilities.roll(1)).abs().sum() / 2 > 0.5


def test_only_sampling_draws():
    model = _model()
    state = torch.get_rng_state()
    _generate(model, _ids(21))
    _generate(model, _ids(21), num_beams=3)
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_beams_find_best_sequences():
    """With as many beams as there are prefixes none is lost, so that they are the best of all sequences, in order."""
    vocab_size, num_new = 4, 3
    model = _model(vocab_size=vocab_size, bos_token_id=None, pad_token_id=None)
    prompt = _ids(9, vocab_size=vocab_size)
    every = torch.tensor(list(itertools.product(range(vocab_size), repeat=num_new)))
    sequences = torch.cat([prompt.expand(len(every), -1), every], dim=1)
    scores = log_softmax(model(sequences).logits[:, 8:-1], dim=-1).gather(2, every[..., None]).sum((1, 2))
    best = scores.argsort(descending=True)[:5]

    options = {"max_new_tokens": num_new, "do_sample": False, "length_penalty": 0.0}
    found = model.generate(
        prompt,
        **options,
        num_beams=vocab_size ** (num_new - 1),
        num_return_sequences=5,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert torch.equal(found.sequences, sequences[best])
    assert_close(found.sequences_scores, scores[best], 1e-5)

    score = {tuple(row): score for row, score in zip(every.tolist(), scores.tolist(), strict=True)}
    greedy, beams = (_generate(model, prompt, **options, num_new=num_new, num_beams=n)[0] for n in (1, 3))
    assert score[tuple(greedy.tolist())] <= score[tuple(beams.tolist())] <= scores[best[0]]


@torch.no_grad()
def test_beam_scores():
    model, input_ids = _model(), _ids(21, batch_size=2)
    found = model.generate(
        input_ids,
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=3,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert found.sequences.shape == (6, 21 + NEW)
    new = found.sequences[:, 21:]
    logprobs = log_softmax(model(found.sequences).logits[:, 20:-1], dim=-1).gather(2, new[..., None])
    assert_close(found.sequences_scores, logprobs.mean((1, 2)), 1e-5)
    scores = found.sequences_scores.view(2, 3)
    assert torch.equal(scores, scores.sort(descending=True).values)
    greedy, logits = _greedy(model, input_ids)
    greedy_scores = log_softmax(logits, dim=-1).max(-1).values.mean(1)
    assert (scores[:, 0] >= greedy_scores - 1e-6).all()
    assert not torch.equal(found.sequences[::3], greedy)


@pytest.mark.parametrize(
    ("fields", "num_beams"),
    [({}, 3), ({"lsh_pattern": "chunk"}, 1), ({"hash_seed": 5}, 1)],
    ids=["window-beams", "chunk-greedy", "hash-seed-greedy"],
)
def test_padded_batch_equals_each_prompt(fields, num_beams):
    model = _model(**fields)
    prompts = [_ids(length) for length in LENGTHS]
    found = _generate(model, **_padded(prompts), num_beams=num_beams)
    for row, prompt in enumerate(prompts):
        assert torch.equal(found[row], _generate(model, prompt, num_beams=num_beams)[0]), LENGTHS[row]


@each_beams
def test_padded_batch_with_eos(num_beams):
    model = _model()
    prompts = [_ids(length) for length in LENGTHS]
    # Any token that turns up ends sequences in different places.
    eos = _generate(model, prompts[1], num_beams=num_beams)[0, 3].item()
    options = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "num_beams": num_beams,
        "eos_token_id": eos,
        "pad_token_id": 59,
    }
    found = model.generate(**_padded(prompts), **options)[:, max(LENGTHS) :]
    lengths = []
    for row, prompt in enumerate(prompts):
        alone = model.generate(**_padded([prompt]), **options)[0, prompt.shape[1] :]
        assert torch.equal(found[row, : len(alone)], alone)
        assert (found[row, len(alone) :] == 59).all()
        lengths.append(len(alone))
    assert len(set(lengths)) > 1


@each_beams
def test_masked_tokens_change_nothing(num_beams):
    """In the midst of the prompt too, where the mask has grown along with the sequence."""
    model, input_ids = _model(), _ids(33)
    kept = torch.ones(33, dtype=torch.bool)
    kept[:4] = kept[10:17] = False
    expected = _generate(model, input_ids[:, kept], num_beams=num_beams)
    mask = kept.long()[None]
    for junk in (input_ids, torch.where(kept, input_ids, 59 - input_ids)):
        assert torch.equal(_generate(model, junk, attention_mask=mask, num_beams=num_beams), expected)
    assert not torch.equal(_generate(model, input_ids, num_beams=num_beams), expected)


@each_beams
def test_inputs_embeds(num_beams):
    model = _model()
    batch = _padded([_ids(length) for length in LENGTHS])
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": num_beams}
    expected = model.generate(**batch, **options)
    found = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **options)
    assert torch.equal(found, expected[:, max(LENGTHS) :])
    # With the tokens beside them, these come back too.
    assert torch.equal(model.generate(**batch, inputs_embeds=embeds, **options), expected)
    other = model.generate(inputs_embeds=embeds.flip(1), attention_mask=batch["attention_mask"], **options)
    assert not torch.equal(other, expected[:, max(LENGTHS) :])


@pytest.mark.parametrize(
    ("mask", "num_beams"),
    [({}, 1), ({"attention_mask": torch.ones(2, 21).long()}, 3)],
    ids=["no-mask-greedy", "mask-of-ones-beams"],
)
def test_inputs_embeds_mask_of_ones(mask, num_beams):
    model, input_ids = _model(), _ids(21, batch_size=2)
    embeds = model.get_input_embeddings()(input_ids).detach()
    options = {**mask, "max_new_tokens": NEW, "do_sample": False, "num_beams": num_beams}
    expected = model.generate(input_ids, **options)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), expected[:, 21:])
    assert torch.equal(model.generate(input_ids, inputs_embeds=embeds, **options), expected)


def test_stopping():
    model, input_ids = _model(), _ids(21, batch_size=2)
    expected, _ = _greedy(model, input_ids)
    for length in ({"max_new_tokens": 5}, {"max_length": 26}):
        assert torch.equal(model.generate(input_ids, do_sample=False, **length), expected[:, :26])
    new = expected[:, 21:].tolist()
    ends = next(i for i, token in enumerate(new[0]) if i and token not in new[0][:i] and token not in new[1])
    eos, absent = new[0][ends], next(token for token in range(60) if token not in new[0] + new[1])
    # With a mask, since else the prompt's tokens 59 would be taken for padding.
    options = {
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": NEW,
        "do_sample": False,
        "pad_token_id": 59,
    }
    found = model.generate(input_ids, eos_token_id=eos, **options)
    assert found[0, 21:].tolist() == new[0][: ends + 1] + [59] * (NEW - ends - 1)
    assert torch.equal(found[1], expected[1])
    # Any one of several; and by what the config names.
    assert torch.equal(model.generate(input_ids, eos_token_id=[absent, eos], **options), found)
    model.generation_config.eos_token_id = eos
    assert torch.equal(model.generate(input_ids, **options), found)
    options["attention_mask"] = torch.ones(1, 21, dtype=torch.long)
    assert torch.equal(model.generate(input_ids[:1], **options), expected[:1, : 21 + ends + 1])
    longer = model.generate(input_ids[:1], min_new_tokens=ends + 2, **options)
    assert longer.shape[1] > 21 + ends + 1


def test_scores_and_logits():
    model = _model(torch.float32)
    batch = _padded([_ids(length) for length in LENGTHS])
    found = model.generate(
        **batch,
        max_new_tokens=NEW,
        do_sample=False,
        repetition_penalty=1.0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    mask = torch.cat([batch["attention_mask"], torch.ones(3, NEW, dtype=torch.long)], dim=1)
    with torch.no_grad():
        expected = model(found.sequences, attention_mask=mask).logits[:, -NEW - 1 : -1]
    assert_close(torch.stack(found.logits, dim=1), expected, 1e-5)
    assert_close(torch.stack(found.scores, dim=1), expected, 1e-5)


def test_sampling_scores():
    model, input_ids = _model(torch.float32), _ids(21, batch_size=2)
    set_seed(0)
    found = model.generate(
        input_ids,
        max_new_tokens=NEW,
        do_sample=True,
        temperature=0.5,
        top_k=5,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    for scores, logits, tokens in zip(found.scores, found.logits, found.sequences[:, 21:].T, strict=True):
        best = logits.topk(5)
        assert torch.equal(scores.isfinite().sum(-1), torch.tensor([5, 5]))
        assert_close(scores.gather(1, best.indices), 2 * best.values, 1e-6)
        assert (best.indices == tokens[:, None]).any(-1).all()


def test_hidden_states_and_attentions():
    model, input_ids = _model(), _ids(21, batch_size=2)
    found = model.generate(
        input_ids,
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert len(found.hidden_states) == len(found.attentions) == 3
    for step in range(3):
        with torch.no_grad():
            expected = model(found.sequences[:, : 21 + step], output_hidden_states=True, output_attentions=True)
        new = slice(None) if step == 0 else slice(-1, None)
        for each, other in zip(found.hidden_states[step], expected.hidden_states, strict=True):
            assert_close(each, other[:, new], 1e-12)
        for each, other in zip(found.attentions[step], expected.attentions, strict=True):
            # In a step the keys of a token have places of their own.
            assert each.shape[:4] == other[:, :, :, new].shape[:4]
            assert_close(each.sort(-1).values[..., -8:], other[:, :, :, new].sort(-1).values[..., -8:], 1e-12)


def test_num_hashes_of_call():
    model, input_ids = _model(attn_layers=["lsh", "lsh"]), _ids(60, batch_size=2)
    more = _model(attn_layers=["lsh", "lsh"], num_hashes=8)
    found = _generate(model, input_ids, num_hashes=8)
    assert torch.equal(found, _generate(more, input_ids))
    assert not torch.equal(found, _generate(model, input_ids))


def test_num_hashes_of_changed_config():
    """As for a call without cache, the config's current number of hash rounds holds."""
    model, input_ids = _model(attn_layers=["lsh", "lsh"], num_hashes=2), _ids(40)
    model.config.num_hashes = 8
    expected = _generate(_model(attn_layers=["lsh", "lsh"], num_hashes=8), input_ids)
    for use_cache in (True, False):
        assert torch.equal(_generate(model, input_ids, use_cache=use_cache), expected)


def test_refuses_too_many_tokens():
    """The last token is not put in any more."""
    model = _model(torch.float32, max_position_embeddings=32)
    input_ids, cache = _ids(28), DynamicCache(config=model.config)
    said = r"to (33|99) tokens.*1 to 32 \(`max_position_embeddings`\): lower `max_new_tokens`"
    calls = {
        "new tokens": (input_ids, {"max_new_tokens": 6, "do_sample": False}, said),
        "length": (input_ids, {"max_length": 100, "do_sample": False}, said),
        "prompt": (_ids(33), {"max_new_tokens": 1}, said),
        "cache": (input_ids, {"max_new_tokens": 6, "cache": cache}, said),
    }
    for beams in (1, 3):
        assert model.generate(input_ids, max_new_tokens=5, do_sample=False, num_beams=beams).shape == (1, 33)
        assert_refused(
            lambda ids, options, beams=beams: model.generate(ids, **options, num_beams=beams),
            {f"{name}, {beams} beams": call for name, call in calls.items()},
        )
    assert cache.get_seq_length() == 0


def test_fewer_layers():
    """The last layers are deleted, and the config says so."""
    model = _model(attn_layers=["local", "lsh", "local", "lsh"])
    model.reformer.encoder.layers = model.reformer.encoder.layers[:2]
    model.config.attn_layers = model.config.attn_layers[:2]
    ids = _ids(21)
    assert torch.equal(_generate(model, ids), _generate(model, ids, use_cache=False))


def test_assisted_decoding_generates_padding():
    model = _model(max_position_embeddings=512, pad_token_id=0)
    options = {"sequence_bias": [[[0], 100.0]], "num_new": 30}
    found = _generate(model, _ids(21), assistant_model=copy.deepcopy(model), **options)
    assert torch.equal(found, _generate(model, _ids(21), use_cache=False, **options)) and (found[0, 21:] == 0).all()


def test_refused_options():
    model, seq2seq = _model(), random_model(cls=ReformerHfForConditionalGeneration)
    cases = {
        "early exit": (model, {"assistant_early_exit": 1}, "`assistant_early_exit` is 1.*use an `assistant_model`"),
        "prefill": (seq2seq, {"prefill_chunk_size": 2}, "`prefill_chunk_size` is 2.*leave it None"),
    }
    assert_refused(lambda each, options: each.generate(_ids(21), max_new_tokens=3, **options), cases)


def test_empty_prompt():
    with pytest.raises(ValueError, match="input is empty.*`bos_token_id`"):
        _model().generate(_ids(21)[:, :0], max_new_tokens=3)


def test_refuses_dense_cache():
    for cache in (DynamicCache(), DynamicCache(config=_model(attn_layers=["local"]).config)):
        with pytest.raises(ValueError, match="`cache` is a DynamicCache.*`DynamicCache\\(config=model.config\\)`"):
            _model().generate(_ids(21), cache=cache, max_new_tokens=3)
    with pytest.raises(ValueError, match="reformer_hf_lsh"):
        _model().generate(_ids(21), cache_implementation="quantized", max_new_tokens=3)


@pytest.mark.slow
def test_steps_compile_once():
    """A static cache has one shape, in this call of `generate` and in the next."""
    model, prompt = _model(torch.float32), _ids(21, batch_size=2)
    expected = _generate(model, prompt, num_new=60, use_cache=False)
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compile_config}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counters = torch._dynamo.utils.counters["stats"]
    assert torch.equal(_generate(model, prompt, num_new=60, **options), expected)
    compiled = counters["unique_graphs"]
    assert 0 < compiled <= 2
    assert torch.equal(_generate(model, prompt, num_new=60, **options), expected)
    other = _ids(30, batch_size=2)
    assert torch.equal(
        _generate(model, other, num_new=30, **options), _generate(model, other, num_new=30, use_cache=False)
    )
    assert counters["unique_graphs"] == compiled


@pytest.mark.slow
def test_cache_size_is_constant():
    model = _model(
        torch.float32,
        attn_layers=["local", "lsh"],
        num_hashes=1,
        num_buckets=4,
        max_position_embeddings=1 << 17,
        axial_pos_shape=None,
    )
    cache, sizes = DynamicCache(config=model.config), []
    sequence = _ids(100)
    for _ in range(10):
        # Without a mask, the tokens 0 of what was generated would be taken for padding.
        mask = torch.ones_like(sequence)
        sequence = model.generate(sequence, attention_mask=mask, max_new_tokens=10_000, do_sample=True, cache=cache)
        sizes.append(
            sum(
                tensor.nbytes
                for layer in cache.layers
                for tensor in (getattr(layer, name) for name in layer.tensors)
                if tensor is not None
            )
        )
    assert sequence.shape[1] == 100_100 and cache.get_seq_length() == 100_099
    assert len(set(sizes)) == 1, sizes
    # And the cache is right at the end.
    with torch.no_grad():
        cache.crop(-1)
        found = model(sequence[:, -2:-1], cache=cache).logits[:, -1]
        expected = model(sequence[:, :-1], logits_to_keep=1).logits[:, -1]
    assert_close(found, expected, 1e-4)


def test_generate_changes_no_state():
    model, input_ids = _model(hidden_dropout_prob=0.1), _ids(21, batch_size=2)
    model.train()
    for _ in range(2):
        model(input_ids, labels=input_ids).loss.backward()
    model.eval()
    config, generation_config = model.config.to_dict(), model.generation_config.to_dict()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected, _ = _greedy(model, input_ids)
    for options in ({}, {"num_beams": 3}, {"do_sample": True}):
        _generate(model, input_ids, **options)
    assert torch.equal(model.generate(input_ids, max_new_tokens=NEW, do_sample=False), expected)
    assert not model.training
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation_config
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


TEXTS = ["Раскольников", "It was", "On an exceptionally hot evening\n"]


@pytest.fixture(scope="module")
def byte_model():
    return _model(vocab_size=260, bos_token_id=258)


@pytest.fixture
def tokenizer():
    return ReformerHfByteTokenizer(padding_side="left")


def test_text(byte_model, tokenizer):
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    found = byte_model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    for row, text in enumerate(TEXTS):
        alone = byte_model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=NEW, do_sample=False)
        assert torch.equal(found[row, -NEW:], alone[0, -NEW:])
        assert tokenizer.decode(alone[0]).startswith(text)


def test_streamer(byte_model, tokenizer):
    inputs = tokenizer(TEXTS[2], return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {**inputs, "max_new_tokens": 40, "do_sample": False}
    thread = Thread(target=byte_model.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = byte_model.generate(**options)[0, inputs["input_ids"].shape[1] :]
    assert len(set(expected.tolist())) > 5
    assert text == tokenizer.decode(expected)


def test_pipeline(byte_model, tokenizer):
    generator = pipeline("text-generation", model=byte_model, tokenizer=tokenizer)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False}
    expected = []
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt")
        new = _generate(byte_model, **inputs)[0]
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    for batch_size in (1, 3):
        found = generator(TEXTS, batch_size=batch_size, **options)
        assert [each["generated_text"] for (each,) in found] == expected
    (whole,) = generator(TEXTS[0], max_new_tokens=NEW, do_sample=False)
    assert whole["generated_text"] == TEXTS[0] + expected[0]


# Of two, three and four bytes a character, and of one.
UNICODE = "Преступление и наказание — 罪と罰 🙂🙃 crème brûlée\n"


def test_stream_whole_characters(tokenizer):
    """The bytes of a character come one by one, and none is shown before the last."""
    for errors in ({}, {"errors": "ignore"}):
        streamer = TextIteratorStreamer(tokenizer, timeout=60, **errors)
        for token in tokenizer.encode(UNICODE):
            streamer.put(torch.tensor([token]))
        streamer.end()
        pieces = list(streamer)
        assert "".join(pieces) == UNICODE, errors
        assert len(pieces) > 8, errors
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces), errors


def test_decode_ignores_truncated_character(tokenizer):
    token_ids = tokenizer.encode("né 罪🙂")[:-2]
    assert tokenizer.decode(token_ids, errors="ignore") == "né 罪"
    assert tokenizer.decode(token_ids) == "né 罪\N{REPLACEMENT CHARACTER}"
    assert tokenizer.decode(token_ids, errors="replace") == tokenizer.decode(token_ids)
    streamer = TextIteratorStreamer(tokenizer, timeout=60, errors="ignore")
    for token in token_ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(streamer) == "né 罪"


def test_stop_strings(byte_model, tokenizer):
    inputs = tokenizer(TEXTS[2], return_tensors="pt")
    whole = _generate(byte_model, **inputs, num_new=40)[0]
    stop = tokenizer.decode_bytes(whole[10:12]).decode("latin-1")
    if not stop.isascii():
        stop = next(chr(byte) for byte in tokenizer.decode_bytes(whole[5:]) if byte < 128)
    found = byte_model.generate(
        **inputs, max_new_tokens=40, do_sample=False, stop_strings=[stop], tokenizer=tokenizer
    )[0, inputs["input_ids"].shape[1] :]
    ends = next(end for end in range(1, 41) if stop.encode() in tokenizer.decode_bytes(whole[:end]))
    assert found.tolist() == whole[:ends].tolist()


def test_prompt_of_embeddings_is_planned():
    """Its length counts for the number of buckets, as that of ids does, and against the number of positions."""
    model = random_model(num_buckets=None, attn_layers=["lsh"])
    ids = torch.randint(1, 60, (1, 200), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), model.generate(ids, **options)[:, 200:])
    with pytest.raises(ValueError, match=r"process up to 257 tokens.*1 to 256 \(`max_position_embeddings`\)"):
        model.generate(inputs_embeds=embeds, **{**options, "max_new_tokens": 58})
