# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Generation: against loops over the forward pass, with padding, from embeddings, and within the longest input."""

import itertools
from threading import Thread

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import DynamicCache, TextIteratorStreamer, pipeline, set_seed

from reformer_hf import ReformerHfByteTokenizer, ReformerHfForCausalLM

from .helpers import assert_close, tiny_config

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
def _greedy(model, input_ids, num_new=NEW):
    """The most probable token, over and over, from the logits of the whole sequence; and those logits."""
    logits = []
    for _ in range(num_new):
        logits.append(model(input_ids).logits[:, -1])
        input_ids = torch.cat([input_ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return input_ids, torch.stack(logits, dim=1)


def _generate(model, *args, num_new=NEW, **kwargs):
    """New tokens, without the prompt."""
    return model.generate(*args, **{"max_new_tokens": num_new, "do_sample": False, **kwargs})[:, -num_new:]


KINDS = {
    "mixed": {},
    "lsh": {"attn_layers": ["lsh", "lsh"]},
    "local": {"attn_layers": ["local", "local"]},
    "full": {"attn_layers": ["full", "full"]},
    "chunk": {"attn_layers": ["lsh", "local"], "lsh_pattern": "chunk"},
    "in-tree": {"lsh_pattern": "chunk", "lsh_across_buckets": True, "wrap_chunks": True},
    "buckets-of-the-length": {"num_buckets": None},
    "hash-seed": {"hash_seed": 5},
    "tied": {"tie_word_embeddings": True},
    "learned": {"axial_pos_embds": False},
    "head-chunks": {"chunk_size_lm_head": 5, "chunk_size_feed_forward": 7},
}


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_greedy_is_the_argmax_of_the_forward_pass(fields):
    model, input_ids = _model(torch.float32, **fields), _ids(21, batch_size=3)
    expected, _ = _greedy(model, input_ids)
    found = model.generate(input_ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, expected)
    # The prompt matters, and the model does not repeat one token.
    new = found[:, 21:]
    assert len(new.unique(dim=0)) == 3 and len(new.unique()) > 5, new


@each_beams
def test_a_prompt_of_one_token(num_beams):
    model = _model()
    found = model.generate(torch.tensor([[7]]), max_new_tokens=NEW, do_sample=False, num_beams=num_beams)
    assert found.shape == (1, 1 + NEW)
    if num_beams == 1:
        assert torch.equal(found, _greedy(model, torch.tensor([[7]]))[0])


def test_without_a_prompt_it_begins_with_bos():
    model = _model()
    assert torch.equal(model.generate(max_new_tokens=NEW, do_sample=False), _greedy(model, torch.tensor([[2]]))[0])


@pytest.mark.parametrize("use_cache", [{}, {"use_cache": True}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=["greedy", "beams", "sampling", "beam-sampling"],
)
def test_use_cache_changes_nothing(options, use_cache):
    """There is no decoding state."""
    model, input_ids = _model(), _ids(21, batch_size=2)
    assert model.generation_config.use_cache
    set_seed(0)
    expected = _generate(model, input_ids, use_cache=False, **options)
    set_seed(0)
    assert torch.equal(_generate(model, input_ids, **use_cache, **options), expected)


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


def test_sampled_tokens_have_their_probabilities():
    model, input_ids = _model(initializer_range=0.2), _ids(21)
    set_seed(0)
    tokens = _generate(model, input_ids, num_new=1, do_sample=True, top_k=0, num_return_sequences=4000)
    frequencies = tokens.flatten().bincount(minlength=60) / 4000
    with torch.no_grad():
        probabilities = model(input_ids).logits[0, -1].softmax(-1)
    # Samples differ by 0.03 to 0.05 from what they are drawn from, whatever the seed, and by 0.79 from the rolled one.
    assert (frequencies - probabilities).abs().sum() / 2 < 0.08
    assert (frequencies - probabilities.roll(1)).abs().sum() / 2 > 0.5


def test_only_sampling_draws():
    model = _model()
    state = torch.get_rng_state()
    _generate(model, _ids(21))
    _generate(model, _ids(21), num_beams=3)
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_beams_find_the_best_sequences():
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
def test_scores_of_beams():
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


@each_beams
@pytest.mark.parametrize(
    "fields", [{}, {"lsh_pattern": "chunk"}, {"hash_seed": 5}], ids=["window", "chunk", "hash-seed"]
)
def test_a_padded_batch_equals_each_prompt_alone(fields, num_beams):
    model = _model(**fields)
    prompts = [_ids(length) for length in LENGTHS]
    found = _generate(model, **_padded(prompts), num_beams=num_beams)
    for row, prompt in enumerate(prompts):
        assert torch.equal(found[row], _generate(model, prompt, num_beams=num_beams)[0]), LENGTHS[row]


@each_beams
def test_a_padded_batch_in_which_sequences_end(num_beams):
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
def test_what_is_masked_changes_nothing_at_any_step(num_beams):
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


@each_beams
@pytest.mark.parametrize("mask", [{}, {"attention_mask": torch.ones(2, 21).long()}], ids=["no-mask", "mask-of-ones"])
def test_inputs_embeds_without_padding(mask, num_beams):
    model, input_ids = _model(), _ids(21, batch_size=2)
    embeds = model.get_input_embeddings()(input_ids).detach()
    options = {**mask, "max_new_tokens": NEW, "do_sample": False, "num_beams": num_beams}
    expected = model.generate(input_ids, **options)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), expected[:, 21:])
    assert torch.equal(model.generate(input_ids, inputs_embeds=embeds, **options), expected)


def test_it_stops_where_it_is_told():
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


def test_scores_and_logits_are_those_of_the_forward_pass():
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
    assert found.get("past_key_values") is None


def test_scores_of_sampling_are_warped_logits():
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


def test_hidden_states_and_attentions_of_each_step():
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
        for name in ("hidden_states", "attentions"):
            for each, other in zip(found[name][step], expected[name], strict=True):
                assert_close(each, other, 1e-12, name)


def test_num_hashes_of_a_call():
    model, input_ids = _model(attn_layers=["lsh", "lsh"]), _ids(60, batch_size=2)
    more = _model(attn_layers=["lsh", "lsh"], num_hashes=8)
    found = _generate(model, input_ids, num_hashes=8)
    assert torch.equal(found, _generate(more, input_ids))
    assert not torch.equal(found, _generate(model, input_ids))


@each_beams
def test_no_longer_than_the_longest_input(num_beams):
    """The last token is not put in any more."""
    model = _model(torch.float32, max_position_embeddings=32)
    input_ids, said = _ids(28), r"33 tokens long.*`max_position_embeddings`"
    assert model.generate(input_ids, max_new_tokens=5, do_sample=False, num_beams=num_beams).shape == (1, 33)
    for options in ({"max_new_tokens": 6}, {"max_length": 100}):
        with pytest.raises(ValueError, match=said):
            model.generate(input_ids, **options, do_sample=False, num_beams=num_beams)
    with pytest.raises(ValueError, match=said):
        model.generate(_ids(33), max_new_tokens=1, num_beams=num_beams)


def test_a_decoding_state_is_refused():
    with pytest.raises(ValueError, match="`(cache|past_key_values)` is a DynamicCache"):
        _model().generate(_ids(21), past_key_values=DynamicCache(), max_new_tokens=3)


def test_it_writes_nothing_and_works_after_training():
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
