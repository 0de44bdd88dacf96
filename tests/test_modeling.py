# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The models: randomness, training, options that change nothing, outputs on request, loss, generation."""

import inspect
import itertools

import accelerate
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments, set_seed

from reformer_hf import (
    ReformerHfConfig,
    ReformerHfForCausalLM,
    ReformerHfForMaskedLM,
    ReformerHfForTokenClassification,
    ReformerHfModel,
)
from reformer_hf.cross_attention import Context
from reformer_hf.documents import Documents
from reformer_hf.dropout import draw_seed
from reformer_hf.rotary import rotation_of
from reformer_hf.self_attention import AttentionCall

from .helpers import DROPOUT, assert_close, gradients, random_model, relative_rms, tiny_config

DEEP = ["local", "lsh", "full", "lsh"]


def _twin(model, **fields):
    """The same weights under a config that differs in some fields."""
    twin = type(model)(type(model.config)(**{**model.config.to_dict(), **fields})).to(model.dtype)
    twin.load_state_dict(model.state_dict())
    return twin.train(model.training)


def _ids(length=50, batch_size=2):
    return torch.randint(0, 50, (batch_size, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def input_ids():
    return _ids()


def test_evaluation_repeats(input_ids):
    for layers in (["local"], ["lsh"], ["full"], DEEP):
        model = random_model(attn_layers=layers, **DROPOUT)
        state = torch.get_rng_state()
        logits = model(input_ids).logits
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(5)
        assert torch.equal(model(input_ids).logits, logits)
        assert torch.equal(_twin(model, hash_seed=0)(input_ids).logits, logits)
        assert torch.equal(_twin(model, hash_seed=1)(input_ids).logits, logits) == ("lsh" not in layers)


def test_training_draws_one_seed_per_lsh_layer(input_ids):
    model = random_model(attn_layers=DEEP).train()
    torch.manual_seed(5)
    loss = model(input_ids, labels=input_ids).loss
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    for _ in range(DEEP.count("lsh")):
        draw_seed()
    assert torch.equal(torch.get_rng_state(), state)


def test_training_hashes_anew(input_ids):
    model = random_model(attn_layers=DEEP)
    seeded = _twin(model, hash_seed=3)
    expected = seeded(input_ids).logits
    seeded.train()
    state = torch.get_rng_state()
    assert torch.equal(seeded(input_ids).logits, expected)
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    first, second = model(input_ids).logits, model(input_ids).logits
    assert relative_rms(first, second) > 1e-3
    torch.set_rng_state(state)
    assert torch.equal(model(input_ids).logits, first)


class _RecordingTrainer(Trainer):
    """Keeps every loss to the last bit."""

    losses = ()

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = (*self.losses, loss)
        return loss


def _trained(seed, folder, max_steps=20):
    """Losses and weights of a run."""
    set_seed(seed)
    model = ReformerHfForCausalLM(tiny_config(attn_layers=DEEP, **DROPOUT))
    args = TrainingArguments(
        output_dir=folder,
        seed=seed,
        max_steps=max_steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in _ids(40, 12)]
    trainer = _RecordingTrainer(model=model, args=args, train_dataset=data)
    trainer.train()
    return torch.stack(trainer.losses), model.state_dict()


def test_seed_fixes_training(tmp_path):
    (losses, weights), (again, weights_again) = (_trained(0, tmp_path) for _ in range(2))
    others, _ = _trained(1, tmp_path, max_steps=1)
    assert len(losses) == 20 and losses[-5:].mean() < 0.95 * losses[:5].mean()
    assert torch.equal(again, losses)
    for name, weight in weights.items():
        assert torch.equal(weights_again[name], weight), name
    assert not torch.equal(others[0], losses[0])


def test_any_length_trains():
    """As `num_buckets` is not given, all lengths in turn go through one model without leaving a trace."""
    sizes = {"hidden_size": 8, "attention_head_size": 4, "feed_forward_size": 8, "max_position_embeddings": 4096}
    chunks = {"local_attn_chunk_length": 64, "lsh_attn_chunk_length": 64}
    model = random_model(attn_layers=["local", "lsh"], num_buckets=None, **sizes, **chunks).train()
    fields = model.config.to_dict()
    for length in (1, 63, 1000, 4096, 65):
        model.zero_grad()
        torch.manual_seed(0)
        input_ids = _ids(length, 1)
        # A single token has no successor to be scored on.
        labels = {} if length == 1 else {"labels": input_ids}
        outputs = model(input_ids, **labels)
        (outputs.logits.square().mean() if length == 1 else outputs.loss).backward()
        for name, grad in gradients(model).items():
            assert grad.isfinite().all(), (length, name)
            # The attention of a single token is its own value, whatever queries and keys are.
            no_effect = length == 1 and name.endswith((".query.weight", ".key.weight", ".query_key.weight"))
            # Up to rounding.
            assert (grad.norm().item() > 1e-6) != no_effect, (length, name, grad.norm())
        assert model.config.to_dict() == fields


def test_reversible_equals_plain(input_ids):
    for mode in ("training", "evaluation", "no-grad"):
        reversible = random_model(attn_layers=DEEP, **DROPOUT).train(mode == "training")
        plain = _twin(reversible, reversible=False)
        logits = []
        for model in (reversible, plain):
            torch.manual_seed(2)
            with torch.set_grad_enabled(mode != "no-grad"):
                logits.append(model(input_ids).logits)
        assert torch.equal(*logits), mode


@pytest.mark.parametrize(("num_hashes", "training"), [(1, False), (3, True)], ids=["one-evaluation", "three-training"])
def test_num_hashes_argument(num_hashes, training, input_ids):
    model = random_model(attn_layers=DEEP, **DROPOUT).train(training)
    configured = _twin(model, num_hashes=num_hashes)
    results = []
    for each, given in ((model, num_hashes), (configured, None)):
        torch.manual_seed(2)
        outputs = each(input_ids, labels=input_ids, num_hashes=given)
        outputs.loss.backward()
        results.append((outputs.logits, gradients(each)))
    (logits, grads), (expected, expected_grads) = results
    assert torch.equal(logits, expected)
    for name, grad in grads.items():
        assert torch.equal(grad, expected_grads[name]), name
    torch.manual_seed(2)
    assert relative_rms(model(input_ids).logits, logits) > 1e-3


def test_config_is_not_written(input_ids):
    model = random_model(num_buckets=None, **DROPOUT)
    fields = model.config.to_dict()
    for training in (False, True):
        model.train(training)
        for length in (50, 7, 33):
            model(input_ids[:, :length], labels=input_ids[:, :length], num_hashes=3).loss.backward()
    assert model.config.to_dict() == fields
    assert model.config.num_buckets is None


@pytest.mark.parametrize(
    ("reversible", "tied"), [(True, True), (False, False)], ids=["reversible-tied", "plain-untied"]
)
def test_chunks_of_positions(reversible, tied, input_ids):
    whole = random_model(torch.float64, attn_layers=DEEP, reversible=reversible, tie_word_embeddings=tied)
    output = whole(input_ids, labels=input_ids)
    output.loss.backward()
    expected = gradients(whole)
    for sizes in ((7, 0), (0, 7), (1, 64), (50, 13)):
        chunked = _twin(whole, chunk_size_feed_forward=sizes[0], chunk_size_lm_head=sizes[1])
        found = chunked(input_ids, labels=input_ids)
        assert_close(found.logits, output.logits, 1e-12, f"logits, chunks of {sizes}")
        # Transformers computes the loss in fp32.
        assert_close(found.loss, output.loss, 1e-6, f"loss, chunks of {sizes}")
        found.loss.backward()
        for name, grad in gradients(chunked).items():
            assert_close(grad, expected[name], 1e-12, f"{name}, chunks of {sizes}")


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_hidden_states_and_attentions(causal, input_ids):
    after = 0 if causal else 1
    fields = {"local_num_chunks_after": after, "lsh_num_chunks_after": after, "is_decoder": causal}
    fields["lsh_num_chunks_before"] = 1
    model = random_model(cls=ReformerHfModel, attn_layers=DEEP, **fields)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones(2, 50)}
    inputs["attention_mask"][1, :9] = 0
    plain = model(**inputs)
    assert list(plain) == ["last_hidden_state"] and plain.last_hidden_state.shape == (2, 50, model.config.output_size)
    streams = []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda _, args, returned: streams.append((args[1], returned[1])))
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert torch.equal(outputs.last_hidden_state, plain.last_hidden_state)

    assert len(outputs.hidden_states) == len(DEEP) + 1
    for state, (before, _) in zip(outputs.hidden_states, streams, strict=False):
        assert state.shape == (2, 50, 32) and torch.equal(state, before)
    assert torch.equal(outputs.hidden_states[-1], streams[-1][1])

    real = inputs["attention_mask"].bool()
    window = 8 * (2 + after)
    sizes = {"local": (1, window), "lsh": (2, window), "full": (1, 50)}
    for kind, weights, positions in zip(DEEP, outputs.attentions, outputs.attention_positions, strict=True):
        rounds, window = sizes[kind]
        assert weights.shape == positions.shape == (2, 2, rounds, 50, window)
        assert weights.dtype == torch.float32 and not weights.requires_grad
        # [queries, H, R, W] where there is no padding.
        weights, positions = (x.permute(0, 3, 1, 2, 4)[real] for x in (weights, positions))
        assert_close(weights.sum((2, 3)), torch.ones(91, 2), 1e-6, f"sum of {kind} weights")
        seen = positions >= 0
        assert not weights[~seen].any() and (positions[~seen] == -1).all()
        batch_rows, queries = real.nonzero().T[..., None, None, None]
        assert real[batch_rows.expand_as(positions)[seen], positions[seen]].all()
        assert bool((positions > queries).any()) != causal


@pytest.mark.parametrize(("reversible", "where"), [(True, "config"), (True, "call"), (False, "call")])
def test_outputs_in_training(reversible, where, input_ids):
    model = random_model(attn_layers=DEEP, reversible=reversible, **DROPOUT).train()
    wanted = {"output_hidden_states": True, "output_attentions": True}
    asked, inputs = (_twin(model, **wanted), {}) if where == "config" else (_twin(model), wanted)
    for each, given in ((model, {}), (asked, inputs)):
        torch.manual_seed(2)
        outputs = each(input_ids, labels=input_ids, **given)
        outputs.loss.backward()
    assert len(outputs.hidden_states) == len(DEEP) + 1
    assert len(outputs.attentions) == len(outputs.attention_positions) == len(DEEP)
    expected = gradients(model)
    for name, grad in gradients(asked).items():
        assert torch.equal(grad, expected[name]), name


def test_arguments_overrule_config(input_ids):
    model = random_model(output_hidden_states=True, output_attentions=True)
    outputs = model(input_ids, output_hidden_states=False, output_attentions=False)
    assert list(outputs) == ["logits"]


@torch.no_grad()
def test_return_tuples(input_ids):
    model = random_model()
    expected = model(input_ids, labels=input_ids, output_hidden_states=True)
    for found in (
        model(input_ids, labels=input_ids, output_hidden_states=True, return_dict=False),
        _twin(model, return_dict=False)(input_ids, labels=input_ids, output_hidden_states=True),
    ):
        assert isinstance(found, tuple) and len(found) == 3
        assert torch.equal(found[0], expected.loss) and torch.equal(found[1], expected.logits)
        for state, expected_state in zip(found[2], expected.hidden_states, strict=True):
            assert torch.equal(state, expected_state)
    last, cache = model.reformer(input_ids, return_dict=False)
    assert cache.get_seq_length() == input_ids.shape[1]
    (last,) = model.reformer(input_ids, use_cache=False, return_dict=False)
    assert torch.equal(last, model.reformer(input_ids).last_hidden_state)


@torch.no_grad()
def test_logits_to_keep(input_ids):
    for chunk_size, tied in itertools.product((0, 7), (False, True)):
        model = random_model(chunk_size_lm_head=chunk_size, tie_word_embeddings=tied)
        logits, of = model(input_ids).logits, f"chunks of {chunk_size}, tied {tied}"
        assert logits.shape == (2, 50, 60)
        for kept in (0, 1, 5, 50):
            found = model(input_ids, logits_to_keep=kept).logits
            assert_close(found, logits[:, -kept:], 1e-6, f"the last {kept}, {of}")
        positions = torch.tensor([3, 0, 49])
        found = model(input_ids, logits_to_keep=positions).logits
        assert_close(found, logits[:, positions], 1e-6, f"positions, {of}")


def test_loss(input_ids):
    model = random_model()
    logits = model(input_ids).logits
    scores = logits[:, :-1].flatten(0, 1)
    labels = input_ids.clone()
    labels[0, :20] = -100
    for each in (input_ids, labels):
        expected = cross_entropy(scores, each[:, 1:].flatten())
        assert_close(model(input_ids, labels=each).loss, expected, 1e-6)
        counted = (each[:, 1:] != -100).sum()
        for items in (7, torch.tensor(7)):
            found = model(input_ids, labels=each, num_items_in_batch=items).loss
            assert_close(found, expected * counted / 7, 1e-6)
    # Already where the loss wants them: position i scores label i.
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert_close(model(input_ids, shift_labels=labels).loss, expected, 1e-6)
    assert_close(model(input_ids, labels=input_ids, shift_labels=labels).loss, expected, 1e-6)


LABELS = {
    "labels": {},
    "counted": {"num_items_in_batch": torch.tensor(7)},
    "shifted": {"shift_labels": True},
    "another-ignored": {"ignore_index": -1},
}


@pytest.mark.parametrize("kwargs", LABELS.values(), ids=LABELS)
def test_loss_without_logits(kwargs, input_ids):
    """In training with a chunked head: the same loss and gradients, and no logits. The whole ones are
    summed in fp32."""
    labels = input_ids.masked_fill(input_ids < 20, kwargs.get("ignore_index", -100))
    inputs = {"labels": labels, **kwargs}
    if "shift_labels" in kwargs:
        inputs = {"shift_labels": labels}
    for tied in (False, True):
        whole = random_model(torch.float64, tie_word_embeddings=tied, hash_seed=0).train()
        chunked = _twin(whole, chunk_size_lm_head=7).train()
        outputs = [model(input_ids, **inputs) for model in (whole, chunked)]
        assert outputs[0].logits is not None and outputs[1].logits is None
        assert_close(outputs[1].loss, outputs[0].loss, 1e-6)
        for output in outputs:
            (3 * output.loss).backward()
        expected = gradients(whole)
        for name, grad in gradients(chunked).items():
            assert_close(grad, expected[name], 1e-6, f"{name}, tied {tied}")


def test_logits_where_wanted(input_ids):
    model = random_model(chunk_size_lm_head=7)
    assert model(input_ids, labels=input_ids).logits is not None
    assert model.train()(input_ids).logits is not None
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    output = model(input_ids, labels=input_ids)
    assert torch.equal(output.loss, output.logits.sum())


def test_loss_without_logits_in_bf16(input_ids):
    """Summed in fp32: in bf16 a sum of a hundred losses has a step of 2."""
    model = random_model(chunk_size_lm_head=7, hash_seed=0).train()
    expected = model(input_ids, labels=input_ids).loss
    found = model.to(torch.bfloat16)(input_ids, labels=input_ids).loss
    assert found.dtype == torch.float32
    assert_close(found, expected, 0.003)


@pytest.mark.parametrize("pattern", ["window", "chunk"])
def test_default_encoder_looks_both_ways(pattern):
    """Also with layers of one kind alone, and at a length of many chunks."""
    for layers in (["local"], ["lsh"], ["local", "lsh"]):
        torch.manual_seed(0)
        config = ReformerHfConfig(attn_layers=layers, lsh_pattern=pattern, vocab_size=60)
        assert config.chunks_after("lsh") == config.chunks_before("lsh") > 0
        model = ReformerHfModel(config).eval()
        embeds = torch.randn(1, 300, 256, requires_grad=True)
        states = model(inputs_embeds=embeds).last_hidden_state
        reach = torch.autograd.grad(states[0, 100].square().sum(), embeds)[0][0].abs().sum(-1)
        assert reach[:100].any() and reach[101:].any(), layers
        changed = embeds.detach().clone()
        changed[:, 150:].neg_()
        moved = (model(inputs_embeds=changed).last_hidden_state - states)[0, :150].abs().amax(-1)
        assert moved.max() > 1e-3, layers


def test_reach_follows_direction():
    """A config whose direction changes after it was created, and an in-tree one, which says what it says."""
    config = ReformerHfConfig()
    assert (config.chunks_after("local"), config.chunks_after("lsh")) == (1, 2)
    config.is_decoder = True
    ReformerHfForCausalLM(config)
    assert config.chunks_after("local") == config.chunks_after("lsh") == 0
    assert ReformerHfConfig.from_dict({"model_type": "reformer"}).chunks_after("lsh") == 0


@pytest.mark.parametrize("chunk_size", [0, 16])
def test_batch_without_targets(chunk_size):
    """The loss is NaN, as in Transformers, and the gradients are zero: a step does not spoil the weights."""
    model = random_model(chunk_size_lm_head=chunk_size).train()
    ids = torch.arange(40)[None]
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss.isnan() and not any(each.grad.any() for each in model.parameters() if each.grad is not None)


def test_call_moves_to_device():
    """As accelerate moves the arguments of a layer on another device, with all tensors inside."""
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[:, 4] = True
    call = AttentionCall.on(
        torch.zeros(2, 9, 8),
        padding=torch.zeros(2, 9, dtype=torch.bool),
        rotation=rotation_of(torch.arange(9)[None], 4, 100.0, torch.float32),
        documents=Documents.of(starts),
        context=Context.of(torch.zeros(2, 5, 16), torch.ones(2, 5)),
    )
    moved = accelerate.utils.send_to_device(call, torch.device("meta"), non_blocking=True)
    tensors = [moved.padding, *moved.rotation, moved.documents.starts, moved.context.hidden_states, moved.context.bias]
    assert {moved.device, *(tensor.device for tensor in tensors)} == {torch.device("meta")}
    assert moved.documents.spans == call.documents.spans and call.to("cpu") is call
    assert call.padding.device == torch.device("cpu")


def test_columns_of_trainer():
    """`Trainer` passes on what a signature names: packed documents must be there."""
    for head in (ReformerHfForCausalLM, ReformerHfForMaskedLM, ReformerHfForTokenClassification):
        assert {"seq_idx", "cu_seq_lens_q"} <= inspect.signature(head.forward).parameters.keys(), head
