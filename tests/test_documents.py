# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Packed documents: each gives the same outputs and gradients as alone."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening, DynamicCache

from reformer_hf import ReformerHfByteTokenizer, ReformerHfModel
from reformer_hf.documents import Documents, starts_by_index, starts_by_length, starts_by_position

from .helpers import assert_close, assert_refused, gradients, random_model

LENGTHS = (23, 7, 1, 40)
CONFIGS = {
    "window": {},
    "window-deduplicated": {"lsh_deduplicate_keys": True, "num_hashes": 3},
    "fixed-buckets-groups-of-heads": {"num_buckets": 4, "num_parallel_heads": 1},
    "chunk": {"lsh_pattern": "chunk"},
    "chunk-across": {"lsh_pattern": "chunk", "lsh_across_buckets": True},
    "chunk-deduplicated": {"lsh_pattern": "chunk", "lsh_deduplicate_keys": True},
    "plain-axial-off": {"reversible": False, "axial_pos_embds": False},
}


def _model(cls=None, **fields):
    options = {} if cls is None else {"cls": cls, "is_decoder": False}
    return random_model(torch.float64, hash_seed=0, **{"num_buckets": None, **options, **fields}).train()


def _documents(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 60, (1, length), generator=generator) for length in lengths]


def _packed(documents):
    return {
        "input_ids": torch.cat(documents, 1),
        "position_ids": torch.cat([torch.arange(x.shape[1]) for x in documents])[None],
    }


def _states_and_grads(model, inputs_of_rows, weight):
    """Concatenated hidden states of several calls, and gradients of their sum weighted by position."""
    states = torch.cat([model(**inputs).last_hidden_state.flatten(0, 1) for inputs in inputs_of_rows])
    model.zero_grad()
    (states * weight[: len(states)]).sum().backward()
    return states, {name: grad.clone() for name, grad in gradients(model).items()}


def _assert_equal_alone(model, packed, alone, is_token=slice(None)):
    weight = torch.randn(200, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    packed_weight = weight.clone()
    if isinstance(is_token, torch.Tensor):
        packed_weight = torch.zeros_like(weight)
        packed_weight[: len(is_token)][is_token] = weight[: int(is_token.sum())]
    states, grads = _states_and_grads(model, [packed], packed_weight)
    expected, expected_grads = _states_and_grads(model, alone, weight)
    assert_close(states[is_token], expected, 1e-12)
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 1e-10, name)


@pytest.mark.parametrize(
    ("name", "causal"),
    [
        ("window", True),
        ("window-deduplicated", False),
        ("fixed-buckets-groups-of-heads", True),
        ("chunk", False),
        ("chunk-across", True),
        ("chunk-deduplicated", False),
        ("plain-axial-off", True),
    ],
)
def test_equals_alone(name, causal):
    model = _model(ReformerHfModel, **{**CONFIGS[name], "is_decoder": causal})
    documents = _documents()
    _assert_equal_alone(model, _packed(documents), [{"input_ids": x} for x in documents])


@pytest.mark.parametrize("name", ["window", "chunk-across"])
def test_padding(name):
    """Padding within and after documents, in two rows."""
    model = _model(ReformerHfModel, is_decoder=True, **CONFIGS[name])
    lengths = [(3, 20), (11, 5)]
    rows, masks, alone = [], [], []
    for row in lengths:
        documents = _documents(row)
        alone += [{"input_ids": x} for x in documents]
        gap = torch.zeros(1, 2, dtype=torch.long)
        rows.append(torch.cat([documents[0], gap, documents[1]], 1)[0])
        masks.append(torch.cat([torch.ones_like(documents[0]), gap, torch.ones_like(documents[1])], 1)[0])
    input_ids, mask = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (rows, masks))
    positions = torch.zeros_like(input_ids)
    for row, (first, second) in enumerate(lengths):
        positions[row, :first] = torch.arange(first)
        positions[row, first + 2 : first + 2 + second] = torch.arange(second)
    packed = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
    _assert_equal_alone(model, packed, alone, mask.bool().flatten())


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), chunk=st.integers(1, 9), causal=st.booleans())
def test_any_lengths(lengths, chunk, causal):
    fields = {"local_attn_chunk_length": chunk, "lsh_attn_chunk_length": chunk, "is_decoder": causal}
    model = _model(ReformerHfModel, attn_layers=["local", "lsh"], **fields).eval()
    documents = _documents(lengths)
    with torch.no_grad():
        states = model(**_packed(documents)).last_hidden_state[0]
        expected = torch.cat([model(x).last_hidden_state[0] for x in documents])
    assert_close(states, expected, 1e-12)


def test_ways_to_say_it():
    """`position_ids`, `seq_idx` and `cu_seq_lens_q` mean the same, and so do the fields of a collator."""
    model = _model().eval()
    documents = _documents()
    packed = _packed(documents)
    expected = model(**packed).logits
    index = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))[None]
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).int()
    for inputs in ({"seq_idx": index}, {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 40}):
        assert torch.equal(model(packed["input_ids"], **inputs).logits, expected)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([{"input_ids": x[0].tolist()} for x in documents])
    output = model(**batch)
    assert torch.equal(output.logits, expected)
    losses = [model(x, labels=x, num_items_in_batch=len(index[0]) - 4).loss for x in documents if x.shape[1] > 1]
    assert_close(output.loss, sum(losses), 1e-6)


def test_maximum_is_per_document():
    model = _model(max_position_embeddings=64).eval()
    documents = _documents((60, 64, 30))
    assert_close(model(**_packed(documents)).logits[:, 60:124], model(documents[1]).logits, 1e-12)
    with pytest.raises(ValueError, match="`position_ids` holds 64"):
        model(**_packed(_documents((60, 65))))
    with pytest.raises(ValueError, match="`position_ids` holds 64"):
        model(torch.cat(_documents((60, 65)), 1), cu_seq_lens_q=torch.tensor([0, 60, 125]))


def test_one_document_takes_the_usual_path(monkeypatch):
    model = _model().eval()
    (document,) = _documents((50,))
    expected = model(document).logits
    monkeypatch.setattr(Documents, "sort", None)
    for inputs in ({"position_ids": torch.arange(50)[None]}, {"seq_idx": torch.zeros(1, 50)}):
        assert torch.equal(model(document, **inputs).logits, expected)


def test_weights_stay_in_a_document():
    model = _model().eval()
    output = model(**_packed(_documents()), output_attentions=True)
    index = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
    for weights, positions in zip(output.attentions, output.attention_positions, strict=True):
        assert torch.allclose(weights.sum((2, 4)), torch.ones(()).double())
        queries = index[None, None, None, :, None].expand(positions.shape)
        assert (index[positions[positions >= 0].long()] == queries[positions >= 0]).all()
        assert not weights[positions < 0].any()


def test_where_documents_begin():
    positions = torch.tensor([[0, 0, 0, 1, 2, 2, 0, 1, 1]])
    padding = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 0, 1]]).bool()
    assert starts_by_position(positions, padding).nonzero()[:, 1].tolist() == [6]
    assert starts_by_position(torch.tensor([[5, 6, 9, 0, 0]]), None).nonzero()[:, 1].tolist() == [3, 4]
    assert starts_by_index(torch.tensor([[4, 4, 1, 1]])).nonzero()[:, 1].tolist() == [2]
    assert starts_by_length(torch.tensor([0, 2, 2, 6]), (2, 3)).nonzero().tolist() == [[0, 0], [0, 2]]
    assert Documents.of(torch.zeros(3, 5, dtype=torch.bool)) is None


REFUSED = {
    "cache": ({}, {"cache": True}, "KV cache cannot continue"),
    "ring": (
        {"lsh_pattern": "chunk", "lsh_across_buckets": True, "wrap_chunks": True},
        {},
        "`wrap_chunks=True`.*own row",
    ),
    "lengths": ({}, {"cu_seq_lens_q": torch.tensor([0, 9, 70])}, r"`cu_seq_lens_q` is \[0, 9, 70\].*from 0 to the 71"),
    "index": ({}, {"seq_idx": torch.zeros(1, 3)}, r"`seq_idx` has shape \(1, 3\), but must be \(1, 71\)"),
}


def test_refused():
    def call(fields, inputs):
        model = _model(**fields).eval()
        if "cache" in inputs:
            inputs = {"cache": DynamicCache(config=model.config)}
        model(**_packed(_documents()), **inputs)

    assert_refused(call, REFUSED)


@pytest.mark.slow
def test_sft_packing(tmp_path):
    """The batches of TRL's `packing=True` as they come."""
    trl = pytest.importorskip("trl")
    texts = [f"word {i} " * (1 + i % 5) for i in range(48)]
    model = random_model(max_position_embeddings=128, vocab_size=260, num_buckets=None, hash_seed=0)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            str(tmp_path), packing=True, max_length=128, max_steps=3, use_cpu=True, bf16=False, report_to=[]
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=ReformerHfByteTokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] > 128
    with torch.no_grad():
        logits = model.eval()(**batch).logits
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], logits.shape[1]]
        alone = [model(batch["input_ids"][:, a:b]).logits for a, b in zip(starts, ends, strict=True)]
    assert len(starts) > 4
    assert_close(logits, torch.cat(alone, 1), 1e-5)
    trainer.train()
    assert trainer.state.global_step == 3
