# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""More and fewer positions: which vectors stay, where the others come from, and that config and checkpoint follow."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, ReformerConfig, ReformerModelWithLMHead

import reformer_hf
from examples.byte_data import load_corpus
from reformer_hf import (
    ReformerHfConfig,
    ReformerHfEncoderDecoderConfig,
    ReformerHfForCausalLM,
    ReformerHfForConditionalGeneration,
    ReformerHfModel,
)
from reformer_hf.embeddings import ReformerHfEmbeddings, resize_positions

from .helpers import assert_close, assert_refused, random_model, tiny_config

KINDS = {
    "plain": {"axial_pos_embds": False},
    "axial": {},
    "three-axes": {"axial_pos_shape": (4, 8, 8), "axial_pos_embds_dim": (8, 8, 16)},
}
each_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)


def _embeddings(axes, num_positions):
    """Random embeddings of that many positions; plain ones without `axes`."""
    if axes:
        # At least one for each axis, and 32 together.
        fields = {"axial_pos_shape": axes, "axial_pos_embds_dim": (4,) * (len(axes) - 1) + (36 - 4 * len(axes),)}
    else:
        fields = {"axial_pos_embds": False}
    torch.manual_seed(0)
    embeddings = ReformerHfEmbeddings(tiny_config(max_position_embeddings=num_positions, **fields))
    for parameter in embeddings.parameters():
        torch.nn.init.normal_(parameter)
    return embeddings


def _vectors(embeddings, num_positions):
    return embeddings.position_embeddings(torch.arange(num_positions)[None])[0].detach()


def _ids(length, batch_size=2):
    return torch.randint(3, 60, (batch_size, length), generator=torch.Generator().manual_seed(0))


@given(old=st.integers(1, 70), new=st.integers(1, 200))
def test_plain(old, new):
    embeddings = _embeddings((), old)
    expected = _vectors(embeddings, old)[torch.arange(new) % old]
    resize_positions(embeddings, old, new)
    assert torch.equal(_vectors(embeddings, new), expected)
    assert embeddings.position_embeddings.embedding.num_embeddings == new


@given(axes=st.lists(st.integers(1, 6), min_size=1, max_size=3), data=st.data())
def test_axial(axes, data):
    """Old vectors stay; new rows repeat complete old rows; no entry stems from one that no old position used."""
    row, held = math.prod(axes[1:]), math.prod(axes)
    old, new = data.draw(st.integers(1, held)), data.draw(st.integers(1, 3 * held))
    embeddings = _embeddings(tuple(axes), old)
    # Not a number, so that it would be found wherever it is copied to.
    used = torch.stack(torch.meshgrid(*map(torch.arange, axes), indexing="ij"), -1).view(held, -1)[:old]
    for axis, weight in enumerate(embeddings.position_embeddings.weights):
        unused = [i for i in range(axes[axis]) if i not in used[:, axis]]
        weight.data.flatten(0, -2)[unused] = torch.nan
    before = _vectors(embeddings, old)
    resize_positions(embeddings, old, new)
    after, num_rows = _vectors(embeddings, new), math.ceil(new / row)
    assert torch.equal(after[:old], before[:new])
    assert not after.isnan().any()
    if new != old:
        assert embeddings.position_embeddings.axes == (num_rows if new < old else max(axes[0], num_rows), *axes[1:])
    first_new = math.ceil(old / row) * row
    if old >= row and new > first_new:
        assert torch.equal(after[first_new:], before[torch.arange(first_new, new) % (old // row * row)])


def test_rest_of_incomplete_row():
    """Its coordinates already have vectors."""
    embeddings = _embeddings((6, 10), 42)
    rest = _vectors(embeddings, 50)[42:]
    resize_positions(embeddings, 42, 70)
    after = _vectors(embeddings, 70)
    assert torch.equal(after[42:50], rest)
    assert torch.equal(after[50:], torch.cat([after[10:20], after[20:30]]))


def test_unused_rows_are_replaced():
    """Rows that the shape holds beyond the maximum start as copies too. The parameters stay the same objects."""
    embeddings = _embeddings((8, 10), 30)
    weights = list(embeddings.position_embeddings.weights)
    resize_positions(embeddings, 30, 70)
    assert all(new is old for new, old in zip(embeddings.position_embeddings.weights, weights, strict=True))
    after = _vectors(embeddings, 70)
    assert torch.equal(after[30:], after[torch.arange(30, 70) % 30])


def test_dtype_and_requires_grad():
    for kind, fields in KINDS.items():
        for dtype, requires_grad in itertools.product((torch.float64, torch.bfloat16), (True, False)):
            model = random_model(dtype, **fields)
            model.requires_grad_(requires_grad)
            model.resize_position_embeddings(600)
            assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(dtype, requires_grad)}, kind
        with torch.device("meta"):
            model = ReformerHfForCausalLM(tiny_config(**fields))
        model.resize_position_embeddings(600)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}, kind


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (ReformerHfModel, KINDS["plain"]),
        (ReformerHfForCausalLM, KINDS["axial"]),
        (ReformerHfForCausalLM, KINDS["three-axes"]),
    ],
    ids=["base-plain", "causal-lm-axial", "causal-lm-three-axes"],
)
def test_outputs(cls, fields):
    """Old positions give the same bits, and a text at new ones the same as at the positions that they start from."""
    for num_buckets in (8, None):
        model = random_model(cls=cls, num_buckets=num_buckets, **fields)
        ids = {length: _ids(length) for length in (1, 9, 130, 256)}
        positions = torch.arange(100, 230)[None]
        with torch.no_grad():
            expected = {length: model(input_ids=x)[0] for length, x in ids.items()}
            expected_later = model(input_ids=ids[130], position_ids=positions)[0]
            model.resize_position_embeddings(512)
            for length, x in ids.items():
                assert torch.equal(model(input_ids=x)[0], expected[length]), length
            # Rotary position embeddings depend on distances, up to rounding.
            assert_close(model(input_ids=ids[130], position_ids=positions + 256)[0], expected_later, 1e-5)
            assert model(input_ids=_ids(512))[0].isfinite().all()
        with pytest.raises(ValueError, match=r"513 tokens.*at most 512.*`model.resize_position_embeddings`"):
            model(input_ids=_ids(513))


@each_kind
def test_config_and_checkpoint(fields, tmp_path):
    model = random_model(num_buckets=None, **fields)
    config, row = model.config, 16 if not fields else 64
    for num_positions in (1000, 100):
        model.resize_position_embeddings(num_positions)
        assert config.max_position_embeddings == num_positions
        if config.axial_pos_embds:
            assert config.axial_pos_shape == (math.ceil(num_positions / row), *config.axial_pos_shape[1:])
        assert all(getattr(module, "config", config) is config for module in model.modules())
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.max_position_embeddings == num_positions
        assert list(loaded.config.axial_pos_shape) == list(config.axial_pos_shape)
        ids = _ids(num_positions)
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            assert torch.equal(loaded.eval()(input_ids=ids).logits, expected)
            base = ReformerHfModel.from_pretrained(tmp_path).eval()
            assert torch.equal(base(input_ids=ids)[0], model.reformer(input_ids=ids)[0])


@pytest.mark.parametrize("head", ["MaskedLM", "MultipleChoice"])
def test_heads(head, tmp_path):
    cls = getattr(reformer_hf, f"ReformerHfFor{head}")
    model, ids = random_model(cls=cls, is_decoder=False), _ids(300)
    model.resize_position_embeddings(300)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path).eval()
    ids = ids[:, None] if head == "MultipleChoice" else ids
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids)[0], model(input_ids=ids)[0])


@pytest.mark.parametrize("axial", [True, False], ids=["axial", "plain"])
def test_encoder_decoder(axial, tmp_path):
    """Both stacks have the new number of positions."""
    fields = tiny_config(
        axial_pos_embds=axial, is_decoder=False, num_buckets=None, max_position_embeddings=64
    ).to_dict()
    torch.manual_seed(0)
    model = ReformerHfForConditionalGeneration(
        ReformerHfEncoderDecoderConfig.from_dict({**fields, "is_encoder_decoder": True})
    ).eval()
    ids = _ids(64)
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids).logits
        model.resize_position_embeddings(72)
        assert torch.equal(model(input_ids=ids, decoder_input_ids=ids).logits, expected)
        model.save_pretrained(tmp_path)
        loaded = ReformerHfForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert loaded.config.max_position_embeddings == 72
        assert len(loaded.get_position_embeddings()) == 2
        ids = _ids(72)
        expected = model(input_ids=ids, decoder_input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids, decoder_input_ids=ids).logits, expected)
        options = {"max_new_tokens": 70, "min_new_tokens": 70, "do_sample": False, "use_cache": True}
        assert loaded.generate(input_ids=ids, **options).shape[1] == 71


def test_getter():
    assert random_model(axial_pos_embds=False).get_position_embeddings().weight.shape == (256, 32)
    model = random_model()
    assert model.get_position_embeddings() is model.reformer.embeddings.position_embeddings
    assert model.reformer.get_position_embeddings() is model.get_position_embeddings()


def test_same_number():
    for kind, fields in KINDS.items():
        model = random_model(**fields)
        before, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
        config = model.config.to_dict()
        model.resize_position_embeddings(256)
        assert all(parameter is before[name] for name, parameter in model.named_parameters()), kind
        assert all(torch.equal(values[name], value) for name, value in model.state_dict().items()), kind
        assert model.config.to_dict() == config, kind


def test_fewer():
    for kind, fields in KINDS.items():
        model = random_model(**fields)
        ids, num_parameters = _ids(70), model.num_parameters()
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            model.resize_position_embeddings(70)
            assert model.num_parameters() < num_parameters, kind
            assert torch.equal(model(input_ids=ids).logits, expected), kind
        assert_refused(lambda ids, model=model: model(input_ids=ids), {kind: (_ids(71), "at most 70")})
        model.resize_position_embeddings(256)
        assert torch.equal(model(input_ids=ids).logits, expected), kind


def test_wrong_number():
    model = random_model()
    before = copy.deepcopy(model.state_dict())
    said = "`new_num_position_embeddings` is {!r}, but must be an `int` of at least 1: give"
    wrong = {repr(number): (number, said.format(number)) for number in (0, -3, 2.5, True, "16", None)}
    assert_refused(model.resize_position_embeddings, wrong)
    assert model.config.max_position_embeddings == 256
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("fields", [KINDS["plain"], KINDS["axial"]], ids=["plain", "axial"])
def test_generate(fields):
    model = random_model(num_buckets=None, eos_token_id=None, **fields)
    prompt = _ids(250)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with pytest.raises(ValueError, match=r"261 tokens.*1 to 256.*`model.resize_position_embeddings`"):
        model.generate(input_ids=prompt, **options)
    # A cache that was filled before can be continued.
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prompt, cache=cache, num_buckets=8)
    model.resize_position_embeddings(300)
    expected = model.generate(input_ids=prompt, use_cache=False, **options)
    assert expected.shape[1] == 262
    assert torch.equal(model.generate(input_ids=prompt, **options), expected)
    with torch.no_grad():
        found = model(input_ids=_ids(20), cache=cache).logits
        whole = model(input_ids=torch.cat([prompt, _ids(20)], 1), num_buckets=8).logits
    assert_close(found, whole[:, 250:], 1e-5)


def test_training_separates_positions():
    for kind, fields in KINDS.items():
        model = random_model(**fields).train()
        model.resize_position_embeddings(512)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(input_ids=_ids(512), labels=_ids(512)).loss.backward()
        optimizer.step()
        embeddings = model.reformer.embeddings.position_embeddings
        old, new = embeddings(torch.arange(512)[None])[0].split(256)
        assert ((old != new).any(-1)).all(), kind


def test_number_given_while_loading(tmp_path):
    """What one would try first never gives untrained positions in silence."""
    random_model().save_pretrained(tmp_path / "axial")
    random_model(axial_pos_embds=False).save_pretrained(tmp_path / "plain")
    random_model(axial_pos_shape=(64, 16)).save_pretrained(tmp_path / "unused rows")
    for cls in (AutoModelForCausalLM, ReformerHfForCausalLM):
        for name, fields in (("axial", {}), ("unused rows", {}), ("unused rows", {"axial_pos_shape": (64, 16)})):
            with pytest.raises(ValueError, match=r"`model.resize_position_embeddings\(1024\)`"):
                cls.from_pretrained(tmp_path / name, max_position_embeddings=1024, **fields)
        for name, fields in (("plain", {}), ("axial", {"axial_pos_shape": (64, 16)})):
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                cls.from_pretrained(tmp_path / name, max_position_embeddings=1024, **fields)
    # Fewer positions need no other tables.
    assert ReformerHfForCausalLM.from_pretrained(tmp_path / "axial", max_position_embeddings=100).num_parameters()


def test_in_tree_positions(tmp_path):
    """In-tree training uses all positions of the axes, whatever the maximum says, so none of them is replaced."""
    torch.manual_seed(0)
    in_tree = ReformerModelWithLMHead(
        ReformerConfig(
            attn_layers=["local", "lsh"],
            axial_pos_shape=(16, 16),
            axial_pos_embds_dim=(8, 24),
            hidden_size=32,
            num_attention_heads=2,
            attention_head_size=16,
            feed_forward_size=32,
            max_position_embeddings=64,
            num_buckets=4,
            hash_seed=0,
            is_decoder=True,
        )
    ).eval()
    in_tree.save_pretrained(tmp_path)
    model = ReformerHfForCausalLM.from_pretrained(tmp_path).eval()
    assert model.config.max_position_embeddings == 256
    before = _vectors(model.reformer.embeddings, 256)
    model.resize_position_embeddings(500)
    assert torch.equal(_vectors(model.reformer.embeddings, 256), before)
    # The number of buckets of an in-tree model that never saw an input depends on the maximum.
    in_tree.config.num_buckets = None
    assert ReformerHfConfig.from_dict(in_tree.config.to_dict()).max_position_embeddings == 64


def test_wrapped_by_peft():
    """Copies of the embeddings would not follow, so they are refused; an adapter of other modules is not affected."""
    peft = pytest.importorskip("peft")
    for fields, options in (
        ({}, {"modules_to_save": ["position_embeddings"]}),
        ({}, {"modules_to_save": ["embeddings"]}),
        ({"axial_pos_embds": False}, {"target_modules": ["value", "embedding"]}),
    ):
        model = random_model(**fields)
        peft_model = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
        with pytest.raises(ValueError, match="wrapped or replaced by a .*before `get_peft_model`"):
            peft_model.resize_position_embeddings(512)
        assert model.config.max_position_embeddings == 256


def test_adapter(tmp_path):
    """A saved adapter does not hold the positions: its base model is resized again, with the same result."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(random_model(), peft.LoraConfig(r=2, init_lora_weights=False)).eval()
    adapted.resize_position_embeddings(512)
    adapted.save_pretrained(tmp_path)
    base = random_model()
    base.resize_position_embeddings(512)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=_ids(512)).logits, adapted(input_ids=_ids(512)).logits)


def _train(model, batches, peak):
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=len(batches) + 1, pct_start=0.05)
    for ids in batches:
        model.train()(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _continued_losses(seed, old=4096, new=16384):
    """
    Train a model at `old` tokens, and continue it for 8 steps at `new` tokens.

    Returns:
        The losses on held-out text before and after these steps: of the resized model, of one whose new rows are
        random, and of one whose tables are random.
    """
    corpus = load_corpus(max_bytes=8 << 20)
    stream = torch.from_numpy(corpus.train.astype("int64"))
    held_out = torch.from_numpy(corpus.held_out[: 2 * new].astype("int64")).view(2, new)
    generator = torch.Generator().manual_seed(seed)
    batches = [
        [
            stream[None, start : start + length]
            for start in torch.randint(len(stream) - length, (steps,), generator=generator)
        ]
        for steps, length in ((900, old), (8, new))
    ]
    config = ReformerHfConfig(
        is_decoder=True,
        max_position_embeddings=old,
        attn_layers=["local", "lsh"],
        hidden_size=64,
        num_attention_heads=2,
        attention_head_size=32,
        feed_forward_size=128,
        hidden_dropout_prob=0.0,
        # Short chunks and large weights, with which so small a model learns to use positions in a minute.
        local_attn_chunk_length=16,
        lsh_attn_chunk_length=16,
        initializer_range=0.1,
        axial_norm_std=0.3,
    )
    torch.manual_seed(seed)
    model = ReformerHfForCausalLM(config)
    _train(model, batches[0], 5e-3)
    model.resize_position_embeddings(new)
    models = {"resized": model, "random rows": copy.deepcopy(model), "random tables": copy.deepcopy(model)}
    torch.nn.init.normal_(
        models["random rows"].get_position_embeddings().weights[0].data[64:], std=config.axial_norm_std
    )
    for weight in models["random tables"].get_position_embeddings().weights:
        torch.nn.init.normal_(weight, std=config.axial_norm_std)
    losses = {}
    for name, model in models.items():
        with torch.no_grad():
            before = model.eval()(input_ids=held_out, labels=held_out).loss.item()
        _train(model, batches[1], 1e-3)
        with torch.no_grad():
            losses[name] = before, model.eval()(input_ids=held_out, labels=held_out).loss.item()
    return losses


@pytest.mark.slow
def test_continued_training():
    """Positions that continue the learned ones are better than random ones, before training and after some steps."""
    losses = _continued_losses(seed=0)
    for name in ("random rows", "random tables"):
        assert all(own < other for own, other in zip(losses["resized"], losses[name], strict=True)), losses
