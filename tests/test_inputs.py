# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""What an output depends on: no later token, no padding, only the inputs given; and inputs that are refused."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ReformerConfig, ReformerForMaskedLM, ReformerForSequenceClassification

from reformer_hf import ReformerHfForCausalLM, ReformerHfModel
from reformer_hf.hashing import bucket_factors

from .helpers import assert_close, assert_refused, relative_rms, tiny_config

CHUNK = {"lsh_pattern": "chunk"}
ACROSS = {"lsh_pattern": "chunk", "lsh_across_buckets": True}
DEDUPLICATE = {"lsh_deduplicate_keys": True}
LAYERS = {
    "lsh": ["lsh"],
    "mixed": ["local", "lsh", "full"],
    "deep": ["full", "lsh", "local", "lsh", "lsh", "local"],
}

RULES = {"duplicates": {}, "deduplicated": DEDUPLICATE}

each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
each_layers = pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)


def _model(dtype=torch.float64, cls=ReformerHfModel, **fields):
    """Weights so large that the hashes of tokens vary."""
    torch.manual_seed(0)
    config = tiny_config(**{"initializer_range": 0.5, "axial_norm_std": 0.5, **fields})
    return cls(config).to(dtype).eval()


def _random_ids(batch_size, length):
    return torch.randint(0, 60, (batch_size, length), generator=torch.Generator().manual_seed(length))


def _with_other_ends(input_ids, cuts):
    """Row b with other tokens from position `cuts[b]` on, and what is left as it was, `[B, L]`."""
    same = torch.arange(input_ids.shape[1]) < torch.tensor(cuts)[:, None]
    return torch.where(same, input_ids, (input_ids + 1 + _random_ids(*input_ids.shape) % 59) % 60), same


@torch.no_grad()
def _assert_causal(length, rule, num_hashes, layers):
    """
    A query sees the very same keys. Their sum is the same up to its last digits, since later tokens move the slots
    of earlier ones and so the order of the summands: hence fp64.
    """
    model = _model(attn_layers=layers, num_hashes=num_hashes, **rule)
    input_ids = _random_ids(4, length)
    other_ids, same = _with_other_ends(input_ids, [1, max(length // 3, 1), max(length // 2, 1), length - 1])
    outputs, others = (model(ids, output_attentions=True) for ids in (input_ids, other_ids))
    assert_close(others[0][same], outputs[0][same], 1e-14)
    assert relative_rms(others[0][~same], outputs[0][~same]) > 0.01
    for seen, others_seen in zip(outputs.attention_positions, others.attention_positions, strict=True):
        # [B, L, H, R, W], the keys of a query in order.
        seen, others_seen = (x.sort(-1).values.permute(0, 3, 1, 2, 4) for x in (seen, others_seen))
        assert torch.equal(others_seen[same], seen[same])
        assert (seen <= torch.arange(length)[:, None, None, None]).all()


@pytest.mark.parametrize(
    ("layers", "rule"),
    [("lsh", "deduplicated"), ("mixed", "duplicates"), ("deep", "duplicates"), ("deep", "deduplicated")],
)
def test_later_tokens_change_nothing(layers, rule):
    for length, num_hashes in ((2, 2), (7, 4), (33, 1), (64, 2), (101, 4), (200, 2)):
        _assert_causal(length, RULES[rule], num_hashes, LAYERS[layers])


@given(
    st.integers(2, 200), st.sampled_from([{}, DEDUPLICATE]), st.integers(1, 4), st.sampled_from(list(LAYERS.values()))
)
@settings(max_examples=settings().max_examples // 4)
def test_later_tokens_change_nothing_at_any_length(length, rule, num_hashes, layers):
    _assert_causal(length, rule, num_hashes, layers)


@pytest.mark.slow
@each_layers
@pytest.mark.parametrize("num_hashes", [1, 2, 4], ids=lambda rounds: f"R{rounds}")
@each_rule
@pytest.mark.parametrize("length", [2, 7, 33, 64, 101, 200], ids=lambda length: f"L{length}")
def test_later_tokens_grid(length, rule, num_hashes, layers):
    _assert_causal(length, rule, num_hashes, layers)


@torch.no_grad()
def test_prefix():
    input_ids = _random_ids(2, 101)
    for rule in ({}, DEDUPLICATE):
        model = _model(attn_layers=LAYERS["deep"], **rule)
        whole = model(input_ids)[0]
        for length in (1, 2, 8, 9, 50, 100):
            assert_close(model(input_ids[:, :length])[0], whole[:, :length], 1e-14, f"prefix of {length}, {rule}")


# By 1, 2 and 4 rounds.
LEAKS = {
    "bucket": (CHUNK, (0.13, 0.07, 0.07)),
    "across": (ACROSS, (0.31, 0.22, 0.14)),
    "ring": ({**ACROSS, "wrap_chunks": True}, (0.32, 0.23, 0.15)),
}


@torch.no_grad()
def test_chunk_pattern_leaks():
    """
    Later tokens move the borders of chunks, and with them what earlier queries see: other tokens in the second half
    change the first by this much (relative root mean square). The ring is the in-tree pattern.
    """
    input_ids = _random_ids(32, 128)
    other_ids, same = _with_other_ends(input_ids, [64] * 32)
    for name, (fields, leaks) in LEAKS.items():
        for num_hashes, expected in zip((1, 2, 4), leaks, strict=True):
            model = _model(attn_layers=["lsh"], num_hashes=num_hashes, **fields)
            leak = relative_rms(model(other_ids)[0][same], model(input_ids)[0][same])
            assert leak == pytest.approx(expected, rel=0.15), (name, num_hashes)


@torch.no_grad()
def test_deduplicate_keys():
    for name, fields in PATTERNS.items():
        model = _model(attn_layers=["lsh"], num_hashes=4, **fields)
        (positions,) = model(_random_ids(2, 101), output_attentions=True).attention_positions
        # [B, H, L, R * W], the keys of a query in order.
        positions = positions.transpose(2, 3).flatten(3).sort(-1).values
        twice = (positions[..., 1:] == positions[..., :-1]) & (positions[..., 1:] >= 0)
        assert bool(twice.any()) == (DEDUPLICATE.items().isdisjoint(fields.items())), name


PATTERNS = {
    "window": {},
    "window-deduplicated": DEDUPLICATE,
    "bucket": CHUNK,
    "bucket-deduplicated": {**CHUNK, **DEDUPLICATE},
    "across": ACROSS,
    "across-deduplicated": {**ACROSS, **DEDUPLICATE},
}
BIDIRECTIONAL = {"is_decoder": False, "lsh_num_chunks_after": 1, "local_num_chunks_after": 1}


def _mask(side):
    """Of three rows of 50 tokens, the second and third are padded, by 5 and by 33."""
    attention_mask = torch.ones(3, 50, dtype=torch.long)
    for row, count in ((1, 5), (2, 33)):
        first = {"left": 0, "middle": 10, "right": 50 - count}[side]
        attention_mask[row, first : first + count] = 0
    return attention_mask


PADDED = [
    ("deep", "window"),
    ("deep", "window-deduplicated"),
    ("lsh", "bucket"),
    ("deep", "bucket-deduplicated"),
    ("deep", "across"),
    ("lsh", "across-deduplicated"),
]


@torch.no_grad()
def test_padding_changes_nothing():
    """Given `num_buckets`. Chunks that close to a ring are another matter: in-tree, padding has a place in it."""
    input_ids = _random_ids(3, 50)
    for (layers, pattern), direction in itertools.product(PADDED, ({}, BIDIRECTIONAL)):
        model = _model(attn_layers=LAYERS[layers], **direction, **PATTERNS[pattern])
        for side in ("left", "middle", "right"):
            attention_mask = _mask(side)
            found = model(input_ids, attention_mask=attention_mask)[0]
            for row, real in enumerate(attention_mask.bool()):
                expected = model(input_ids[row : row + 1, real])[0][0]
                assert_close(
                    found[row, real], expected, 1e-12, f"row {row}, padding {side}, {layers}, {pattern}, {direction}"
                )


@torch.no_grad()
def test_mask_of_ones():
    for direction in ({}, BIDIRECTIONAL):
        model, input_ids = _model(torch.float32, **direction), _random_ids(2, 50)
        expected = model(input_ids)[0]
        for dtype in (torch.long, torch.bool, torch.float32):
            found = model(input_ids, attention_mask=torch.ones(2, 50, dtype=dtype))[0]
            assert torch.equal(found, expected), (direction, dtype)


@pytest.mark.parametrize("pattern", ["window-deduplicated", "bucket", "across-deduplicated"])
def test_row_of_padding_finite(pattern):
    attention_mask = torch.ones(2, 50)
    attention_mask[0] = 0
    for direction in ({}, BIDIRECTIONAL):
        fields = {"attn_layers": LAYERS["deep"], "hidden_dropout_prob": 0.1, **direction, **PATTERNS[pattern]}
        model = _model(torch.float32, **fields).train()
        outputs = model(_random_ids(2, 50), attention_mask=attention_mask, output_attentions=True)
        assert outputs[0].isfinite().all()
        assert all(weights.isfinite().all() for weights in outputs.attentions)
        outputs[0][1].square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_num_buckets_of_padded_length():
    model = _model(attn_layers=["lsh"], num_buckets=None)
    input_ids = torch.zeros(2, 128, dtype=torch.long)
    input_ids[:, :64] = _random_ids(2, 64)
    attention_mask = torch.zeros(2, 128)
    attention_mask[:, :64] = 1

    def given(num_buckets):
        return _model(attn_layers=["lsh"], num_buckets=num_buckets)

    assert (bucket_factors(None, 64, 8, 256, 16), bucket_factors(None, 128, 8, 256, 16)) == ([4], [8])
    short = model(input_ids[:, :64])[0]
    padded = model(input_ids, attention_mask=attention_mask)[0][:, :64]
    assert torch.equal(short, given(4)(input_ids[:, :64])[0])
    assert torch.equal(padded, given(8)(input_ids, attention_mask=attention_mask)[0][:, :64])
    assert relative_rms(padded, short) > 0.1


@torch.no_grad()
def test_inputs_embeds():
    model, input_ids = _model(torch.float32, ReformerHfForCausalLM), _random_ids(2, 50)
    embeds = model.get_input_embeddings()(input_ids)
    for attention_mask in (None, _mask("left")[1:]):
        expected = model(input_ids, attention_mask=attention_mask, labels=input_ids)
        found = model(inputs_embeds=embeds, attention_mask=attention_mask, labels=input_ids)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.loss, expected.loss)


@torch.no_grad()
def test_position_ids():
    model, input_ids = _model(torch.float32), _random_ids(2, 50)
    expected, positions = model(input_ids)[0], torch.arange(50)[None]
    for position_ids in (positions, positions.expand(2, 50), positions.int()):
        assert torch.equal(model(input_ids, position_ids=position_ids)[0], expected)
    shifted = model(input_ids, position_ids=positions + 100)[0]
    assert relative_rms(shifted, expected) > 0.1
    assert torch.equal(model(input_ids, position_ids=(positions + 100).expand(2, 50))[0], shifted)
    each_row = model(input_ids, position_ids=positions + torch.tensor([[0], [100]]))[0]
    assert_close(each_row, torch.stack([expected[0], shifted[1]]), 1e-5)


@torch.no_grad()
def test_positions_without_padding():
    model, input_ids, attention_mask = _model(torch.float32), _random_ids(3, 50), _mask("left")
    position_ids = torch.zeros(3, 50, dtype=torch.long)
    for row, count in enumerate((0, 5, 33)):
        position_ids[row, count:] = torch.arange(50 - count)
    found = model(input_ids, attention_mask=attention_mask)[0]
    assert torch.equal(found, model(input_ids, attention_mask=attention_mask, position_ids=position_ids)[0])


IDS = torch.ones(2, 5, dtype=torch.long)
BAD_INPUTS = {
    "id-too-large": (
        {"input_ids": torch.tensor([[1, 60]])},
        r"`input_ids` holds 60.*\[0, 59\] \(`vocab_size` is 60\).*resize_token_embeddings",
    ),
    "id-negative": ({"input_ids": torch.tensor([[1, -1]])}, r"`input_ids` holds -1.*\[0, 59\].*use the tokenizer"),
    "too-long": (
        {"input_ids": torch.ones(1, 257, dtype=torch.long)},
        r"257 tokens long.*at most 256 \(`max_position_embeddings`\): truncate the input",
    ),
    "embeds-too-long": ({"inputs_embeds": torch.ones(1, 257, 32)}, r"257 tokens long.*`max_position_embeddings`"),
    "empty": ({"input_ids": IDS[:, :0]}, "input is empty.*at least one token.*`bos_token_id`"),
    "ids-of-one-axis": ({"input_ids": IDS[0]}, r"`input_ids` has shape \(5,\).*must be \[B, L\]"),
    "mask-too-short": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 4)},
        r"`attention_mask` has shape \(2, 4\).*must be \(2, 5\), one entry for each token",
    ),
    "mask-of-four-axes": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 5, 5)},
        r"`attention_mask` has shape \(2, 1, 5, 5\).*must be \(2, 5\)",
    ),
    "mask-additive": (
        {"input_ids": IDS, "attention_mask": torch.tensor([[0.0] * 4 + [-torch.inf]] * 2)},
        "`attention_mask` holds -inf, but must be 1 for tokens and 0 for padding",
    ),
    "mask-of-documents": ({"input_ids": IDS, "attention_mask": 2 * IDS}, "`attention_mask` holds 2"),
    "positions-too-many": (
        {"input_ids": IDS, "position_ids": torch.arange(6)[None]},
        r"`position_ids` has shape \(1, 6\).*must be \(2, 5\) or \(1, 5\)",
    ),
    "positions-of-one-axis": ({"input_ids": IDS, "position_ids": torch.arange(5)}, r"`position_ids` has shape \(5,\)"),
    "position-too-large": (
        {"input_ids": IDS, "position_ids": torch.arange(252, 257)[None]},
        r"`position_ids` holds 256.*\[0, 255\] \(`max_position_embeddings` is 256\)",
    ),
    "position-negative": ({"input_ids": IDS, "position_ids": -IDS}, r"`position_ids` holds -1.*\[0, 255\]"),
    "both": (
        {"input_ids": IDS, "inputs_embeds": torch.ones(2, 5, 32)},
        "Give one of `input_ids` and `inputs_embeds`, not both",
    ),
    "neither": ({}, "Give one of `input_ids` and `inputs_embeds`, not neither"),
    "embeds-too-narrow": (
        {"inputs_embeds": torch.ones(2, 5, 31)},
        r"`inputs_embeds` has shape \(2, 5, 31\).*\[B, L, 32\] \(`hidden_size`\)",
    ),
    "embeds-of-two-axes": ({"inputs_embeds": torch.ones(2, 32)}, r"`inputs_embeds` has shape \(2, 32\)"),
    "no-rounds": ({"input_ids": IDS, "num_hashes": 0}, "`num_hashes` is 0.*at least 1: leave it None"),
    "cache": (
        {"input_ids": IDS, "past_key_values": ()},
        r"`cache` is a tuple.*create it with `DynamicCache\(config=model.config\)`",
    ),
    "document-too-long": (
        {"input_ids": torch.ones(1, 257, dtype=torch.long), "seq_idx": torch.zeros(1, 257)},
        r"257 tokens long.*at most 256 \(`max_position_embeddings`\)",
    ),
    "shifted-label-too-large": (
        {"input_ids": IDS, "shift_labels": 60 * IDS},
        r"`shift_labels` holds 60.*\[0, 59\] \(`vocab_size` is 60\)",
    ),
    "shifted-labels-too-few": (
        {"input_ids": IDS, "shift_labels": IDS[:, 1:]},
        r"`shift_labels` has shape \(2, 4\), but must be \(2, 5\)",
    ),
    "in-tree-cache": (
        {"input_ids": IDS, "past_buckets_states": [(None, None)]},
        r"`past_buckets_states` is.*pass `cache=DynamicCache\(config=model.config\)`",
    ),
}


def test_bad_inputs():
    """Refused with what was given, what is allowed and what to change."""
    model = ReformerHfForCausalLM(tiny_config())
    assert_refused(lambda inputs: model(**inputs), BAD_INPUTS)


def test_unknown_names():
    """Ignored, as by Llama; the cache of the in-tree model is not, by either class."""
    model = _model(torch.float32, ReformerHfForCausalLM)
    expected = model(IDS).logits
    assert torch.equal(model(IDS, past_buckets_states=None, token_type_ids=IDS).logits, expected)
    with pytest.raises(ValueError, match="`past_buckets_states`"):
        model.reformer(IDS, past_buckets_states=[(None, None)])


def test_bidirectional_checkpoint(tmp_path):
    fields = {"attn_layers": ["lsh"], "hidden_size": 16, "num_attention_heads": 1, "attention_head_size": 8}
    fields |= {"axial_pos_embds_dim": (4, 12), "feed_forward_size": 8, "num_buckets": 2}
    refused = {}
    for cls in (ReformerForMaskedLM, ReformerForSequenceClassification):
        name = cls.__name__
        cls(ReformerConfig(**fields)).save_pretrained(tmp_path / name)
        refused[name] = (tmp_path / name, rf"{name}.*both directions.*with `ReformerHfModel`")
        assert not ReformerHfModel.from_pretrained(tmp_path / name).config.is_decoder, name
    assert_refused(ReformerHfForCausalLM.from_pretrained, refused)


def test_function_transforms():
    def total(parameters, model):
        return torch.func.functional_call(model, parameters, (IDS,))[0].square().sum()

    refused = {}
    for reversible in (True, False):
        model = _model(torch.float32, reversible=reversible)
        parameters = dict(model.named_parameters())
        total(parameters, model).backward()
        refused[f"reversible {reversible}"] = (parameters, model, "`torch.func`.*are not supported")
    assert_refused(torch.func.grad(total), refused)
    embedded = model.get_input_embeddings()(IDS).detach()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(ValueError, match="forward-mode differentiation are"),
    ):
        model(inputs_embeds=torch.autograd.forward_ad.make_dual(embedded, embedded))


def test_bad_models():
    with pytest.raises(ValueError, match="`is_decoder` is False.*set `is_decoder=True`"):
        ReformerHfForCausalLM(tiny_config(is_decoder=False))
    config = tiny_config()
    config.lsh_num_chunks_after = 1
    for cls in (ReformerHfModel, ReformerHfForCausalLM):
        with pytest.raises(
            ValueError, match="`lsh_num_chunks_after` is 1.*set it to None or 0, or `is_decoder=False`"
        ):
            cls(config)
