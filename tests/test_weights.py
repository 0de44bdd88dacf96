# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Weights: the bias of the head, tying, resizing, initialisation, checkpoints that lack some, bf16."""

import copy

import pytest
import torch
from torch.nn.functional import linear

from reformer_hf import ReformerHfForCausalLM, ReformerHfModel

from .helpers import assert_close, gradients, random_model, relative_rms, tiny_config

DEEP = ["local", "lsh", "full", "lsh"]

each_tie = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@pytest.fixture
def input_ids():
    return torch.randint(0, 50, (2, 50), generator=torch.Generator().manual_seed(1))


def test_head_bias(input_ids):
    for tied in (False, True):
        model = random_model(tie_word_embeddings=tied)
        logits = model(input_ids).logits
        added = torch.randn(60)
        with torch.no_grad():
            model.lm_head.bias += added
        assert_close(model(input_ids).logits - logits, added.expand_as(logits), 1e-6, f"bias, tied {tied}")
        assert model.get_output_embeddings().bias is model.lm_head.bias, f"tied {tied}"
        model.set_output_embeddings(torch.nn.Linear(32 if tied else 64, 60))
        assert model.get_output_embeddings().bias is model.lm_head.bias, f"tied {tied}"
        with pytest.raises(ValueError, match=r"`model.set_output_embeddings\(linear\)`"):
            model.lm_head = torch.nn.Linear(32 if tied else 64, 60)
        states = model(input_ids, output_hidden_states=True).hidden_states[1]
        with pytest.raises(ValueError, match=r"width 32, .* both residual streams \(64\)"):
            model.lm_head(states)


def test_head_without_bias(input_ids, tmp_path):
    losses = []
    for chunk_size in (0, 16):
        model = random_model(chunk_size_lm_head=chunk_size, hash_seed=0).train()
        torch.manual_seed(0)
        model.set_output_embeddings(torch.nn.Linear(64, 60, bias=False))
        losses.append(model(input_ids, labels=input_ids).loss)
    assert_close(losses[1], losses[0], 1e-6)
    model.save_pretrained(tmp_path)
    loaded = ReformerHfForCausalLM.from_pretrained(tmp_path)
    assert_close(loaded(input_ids).logits, model.eval()(input_ids).logits, 1e-6)


@torch.no_grad()
def test_tied_head_reads_mean_of_streams(input_ids):
    model = random_model(tie_word_embeddings=True)
    mean = model.reformer(input_ids)[0].unflatten(-1, (2, 32)).mean(-2)
    expected = linear(mean, model.get_input_embeddings().weight, model.lm_head.bias)
    assert_close(model(input_ids).logits, expected, 1e-6)


@each_tie
def test_tied_weights(tied, input_ids):
    model = random_model(torch.float64, tie_word_embeddings=tied)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == tied
    assert head.shape == (60, 32 if tied else 64)
    model(input_ids, labels=input_ids).loss.backward()
    found = embedding.grad.clone()
    model.zero_grad()
    embeds = model.get_input_embeddings()(input_ids).detach().requires_grad_()
    model(inputs_embeds=embeds, labels=input_ids).loss.backward()
    expected = torch.zeros_like(found).index_add_(0, input_ids.flatten(), embeds.grad.flatten(0, 1))
    if tied:
        assert relative_rms(found, expected) > 0.1
        expected = expected + embedding.grad
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize(("vocab_size", "tied"), [(71, True), (40, False)], ids=["larger-tied", "smaller-untied"])
def test_resized_vocabulary(vocab_size, tied, input_ids, tmp_path):
    model = random_model(tie_word_embeddings=tied)
    input_ids = input_ids % 40
    with torch.no_grad():
        expected = model(input_ids).logits
    model.resize_token_embeddings(vocab_size)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert len(embedding.weight) == len(head.weight) == len(head.bias) == vocab_size
    assert model.config.vocab_size == embedding.num_embeddings == head.out_features == vocab_size
    assert (embedding.weight is head.weight) == tied
    assert model.lm_head.bias is head.bias
    shared = min(vocab_size, 60)
    assert_close(model(input_ids).logits[..., :shared], expected[..., :shared], 1e-6)

    labels = (input_ids + vocab_size - 40).clamp(min=0)
    outputs = model.train()(labels, labels=labels)
    assert outputs.logits.shape == (2, 50, vocab_size)
    outputs.loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    with pytest.raises(ValueError, match=f"`input_ids` holds {vocab_size}"):
        model(labels.clone().fill_(vocab_size))

    model.eval().save_pretrained(tmp_path)
    loaded = ReformerHfForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(labels).logits, model(labels).logits)


def test_resized_base_model(input_ids):
    model = random_model(cls=ReformerHfModel)
    expected = model(input_ids)[0]
    model.resize_token_embeddings(71)
    assert model.config.vocab_size == 71
    assert torch.equal(model(input_ids)[0], expected)
    assert model(input_ids + 21)[0].isfinite().all()


@pytest.fixture
def uninitialised_memory_is_nan():
    """What would else depend on what stood there before: zeros, often."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


AXIAL = {"axial_norm_std": 0.3, "axial_pos_shape": (64, 64), "max_position_embeddings": 4096}


def _assert_axial_embeddings_are_drawn(model):
    for weight in model.base_model.embeddings.position_embeddings.weights:
        assert weight.device.type == "cpu"
        assert abs(weight.std().item() / 0.3 - 1) < 0.1
        assert abs(weight.mean().item()) < 0.03


def test_axial_initialisation(tmp_path, uninitialised_memory_is_nan):
    """Also where a checkpoint lacks them."""
    model = ReformerHfForCausalLM(tiny_config(**AXIAL))
    _assert_axial_embeddings_are_drawn(model)
    weights = {name: weight for name, weight in model.state_dict().items() if "position_embeddings" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded, info = ReformerHfForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) == 2
    _assert_axial_embeddings_are_drawn(loaded)


def test_initializer_range():
    model = ReformerHfForCausalLM(tiny_config(initializer_range=0.1))
    for name, parameter in model.named_parameters():
        if "position_embeddings" in name:
            continue
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "layer_norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert abs(parameter.std().item() / 0.1 - 1) < 0.15, name


@each_tie
def test_checkpoint_without_head(tied, input_ids, tmp_path, uninitialised_memory_is_nan):
    base = random_model(cls=ReformerHfModel, tie_word_embeddings=tied)
    base.save_pretrained(tmp_path)
    model, info = ReformerHfForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert all("lm_head" in name for name in info["missing_keys"])
    bias = model.lm_head.bias
    assert bias is model.lm_head.decoder.bias
    assert bias.device.type == "cpu"
    assert not bias.any(), f"bias {bias[:3].tolist()}"
    head = model.lm_head.decoder.weight
    assert (head is model.get_input_embeddings().weight) == tied
    if not tied:
        assert abs(head.std().item() / model.config.initializer_range - 1) < 0.1
    assert torch.equal(model.reformer(input_ids)[0], base(input_ids)[0])
    outputs = model.train()(input_ids, labels=input_ids)
    outputs.loss.backward()
    gradients(model)


def test_base_model_drops_head(input_ids, tmp_path):
    model = random_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    base, info = ReformerHfModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(base(input_ids)[0], model.reformer(input_ids)[0])
    loaded = ReformerHfForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize(
    ("reversible", "tied"), [(True, True), (False, False)], ids=["reversible-tied", "plain-untied"]
)
def test_bf16_weights(reversible, tied, input_ids):
    fields = {"attn_layers": DEEP, "num_buckets": 1, "reversible": reversible, "tie_word_embeddings": tied}
    exact = random_model(**fields)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    outputs = [each(input_ids, labels=input_ids, output_hidden_states=True) for each in (exact, model)]
    assert {state.dtype for state in outputs[1].hidden_states} == {torch.float32}
    assert outputs[1].logits.dtype == torch.bfloat16
    assert_close(outputs[1].logits, outputs[0].logits, 0.012)
    for output in outputs:
        output.loss.backward()
    expected = gradients(exact)
    # A tied head reads the mean of both streams: the logits are smaller, and rounding counts for more.
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.bfloat16
        assert_close(grad, expected[name], 0.13 if tied else 0.09, name)


def test_bf16_weights_with_dropout_and_hashing(input_ids):
    model = random_model(
        torch.bfloat16, attn_layers=DEEP, chunk_size_feed_forward=7, chunk_size_lm_head=9, hidden_dropout_prob=0.1
    )
    outputs = model.train()(input_ids, labels=input_ids, output_hidden_states=True)
    assert {state.dtype for state in outputs.hidden_states} == {torch.float32}
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert all(grad.isfinite().all() and grad.any() for grad in gradients(model).values())
