# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""In-tree checkpoints load as they are and give in-tree outputs and gradients; where in-tree is wrong, ours is not."""

import copy

import pytest
import torch
import transformers
from transformers import ReformerForMaskedLM, ReformerForSequenceClassification

from reformer_hf import ReformerHfConfig

from .helpers import assert_close, gradients, relative_rms
from .in_tree import (
    CLASSES,
    TRAINING_LENGTH,
    each_class,
    in_tree_head,
    in_tree_model,
    load_ours,
    random_inputs,
    random_targets,
    soften_self_mask,
)

each_direction = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
each_round = pytest.mark.parametrize("num_hashes", [1, 2, 4], ids=lambda rounds: f"R{rounds}")

LENGTHS = [5, 13, 100, 128, TRAINING_LENGTH]
# Lengths, and whether the second row is padded.
INPUTS = [(5, False), (13, True), (100, True), (128, False), (TRAINING_LENGTH, True)]
ALL_INPUTS = [(length, padded) for length in LENGTHS for padded in (False, True)]


@pytest.fixture(autouse=True)
def _quiet():
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def _assert_equal_outputs(in_tree, ours, inputs, limit):
    """Last hidden states, or logits, where there is no padding."""
    with torch.no_grad():
        expected, found = in_tree(**inputs)[0], ours(**inputs)[0]
    real = inputs["attention_mask"].bool()
    assert_close(found[real], expected[real], limit)


def _gradients(model, inputs):
    model.train()
    model.zero_grad()
    out = model(**inputs)[0]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    (out * weight * inputs["attention_mask"][..., None]).sum().backward()
    model.eval()
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def _assert_equal_gradients(in_tree, ours, inputs, limit):
    expected, found = _gradients(in_tree, inputs), _gradients(ours, inputs)
    # In-tree leaves its bias out of the computation.
    names = {name for name, _ in in_tree.named_parameters()} - {"lm_head.bias"}
    assert set(expected) - {"lm_head.bias"} == names
    for name in sorted(names):
        assert_close(found[name], expected[name], limit, name)


def _assert_equal(in_tree, folder, inputs, output_limit=1e-9, gradient_limit=1e-9):
    """Equal outputs for inputs of these lengths, padded or not, and equal gradients where in-tree trains."""
    ours = load_ours(in_tree, folder)
    for length, padded in inputs:
        batch = random_inputs(length, padded)
        # The first length that it meets would fix its number of buckets.
        fresh = copy.deepcopy(in_tree)
        _assert_equal_outputs(fresh, ours, batch, output_limit)
        if length == TRAINING_LENGTH:
            _assert_equal_gradients(fresh, ours, batch, gradient_limit)


@each_direction
def test_local_fp64(tmp_path, causal):
    _assert_equal(in_tree_model(causal, "local").double(), tmp_path, ALL_INPUTS)


@pytest.mark.parametrize(
    ("layers", "num_hashes", "causal"),
    [("lsh", 1, True), ("lsh", 4, False), ("mixed", 1, False), ("mixed", 2, True)],
    ids=["lsh-R1-causal", "lsh-R4-bidirectional", "mixed-R1-bidirectional", "mixed-R2-causal"],
)
def test_lsh_fp64(tmp_path, rotations_of_fp32, layers, num_hashes, causal):
    _assert_equal(in_tree_model(causal, layers, num_hashes=num_hashes).double(), tmp_path, INPUTS)


@pytest.mark.slow
@each_direction
@each_round
@pytest.mark.parametrize("layers", ["lsh", "mixed"])
@pytest.mark.parametrize("num_buckets", [8, None, [4, 8]], ids=str)
def test_fp64_grid(tmp_path, rotations_of_fp32, num_buckets, layers, num_hashes, causal):
    in_tree = in_tree_model(causal, layers, num_hashes=num_hashes, num_buckets=num_buckets).double()
    _assert_equal(in_tree, tmp_path, [*ALL_INPUTS, (120, False), (120, True)])


@pytest.mark.parametrize(
    ("num_buckets", "num_hashes"), [(None, 4), ([4, 8], 1)], ids=["buckets-of-the-length-R4", "factorised-R1"]
)
def test_bucket_counts_fp64(tmp_path, rotations_of_fp32, num_buckets, num_hashes):
    """The number of buckets for 120 is another than that for 128, to which in-tree pads."""
    for causal, padded in ((False, False), (True, True)):
        in_tree = in_tree_model(causal, num_hashes=num_hashes, num_buckets=num_buckets).double()
        _assert_equal(in_tree, tmp_path, [(120, padded), (120, not padded), (TRAINING_LENGTH, padded)])


OTHER_FIELDS = [
    {"lsh_num_chunks_before": 3, "local_num_chunks_before": 2},
    {"lsh_num_chunks_before": 0, "local_num_chunks_before": 0},
    {"lsh_attn_chunk_length": 8, "local_attn_chunk_length": 32},
    {"lsh_attn_chunk_length": 16, "local_attn_chunk_length": 64, "num_hashes": 3},
    {"axial_pos_embds": False},
    {"chunk_size_feed_forward": 32, "chunk_size_lm_head": 32},
    {"hidden_act": "gelu"},
    {"tie_word_embeddings": False, "layer_norm_eps": 1e-3},
]


def _fields_id(fields):
    return ",".join(f"{name}={value}" for name, value in fields.items())


# The same, those together that have nothing to do with each other.
OTHER_FIELDS_TOGETHER = {
    "more-chunks-before": OTHER_FIELDS[0],
    "no-chunks-before": OTHER_FIELDS[1],
    "longer-local-chunks": OTHER_FIELDS[2] | {"num_hashes": 3},
    "embeddings-feed-forward-and-head": OTHER_FIELDS[4] | OTHER_FIELDS[5] | OTHER_FIELDS[6] | OTHER_FIELDS[7],
}


@pytest.mark.parametrize("fields", OTHER_FIELDS_TOGETHER.values(), ids=OTHER_FIELDS_TOGETHER)
def test_other_fields_fp64(tmp_path, rotations_of_fp32, fields):
    for causal, padded in ((False, True), (True, False)):
        _assert_equal(in_tree_model(causal, **fields).double(), tmp_path, [(TRAINING_LENGTH, padded)])


@pytest.mark.slow
@pytest.mark.parametrize("fields", OTHER_FIELDS, ids=_fields_id)
@each_direction
def test_other_fields_fp64_grid(tmp_path, rotations_of_fp32, fields, causal):
    # In-tree, an input is a multiple of the feed-forward's chunks.
    multiple = fields.get("chunk_size_feed_forward", 1)
    inputs = [(length, padded) for length, padded in ALL_INPUTS if length % multiple == 0]
    _assert_equal(in_tree_model(causal, **fields).double(), tmp_path, inputs)


@pytest.mark.parametrize(("layers", "length"), [("local", 13), ("lsh", 13), ("lsh", 29)])
def test_ring_of_chunks_before_fp64(tmp_path, rotations_of_fp32, layers, length):
    """As many chunks before as there are: rings of two chunks, of 8 (local) and 16 (LSH)."""
    for causal in (False, True):
        in_tree = in_tree_model(
            causal, layers, num_hashes=1, lsh_num_chunks_before=2, local_num_chunks_before=2
        ).double()
        _assert_equal(in_tree, tmp_path, [(length, False)])


@pytest.mark.parametrize(("layers", "length", "causal"), [("local", 13, True), ("lsh", 29, False)])
def test_ring_walked_twice_differs(tmp_path, rotations_of_fp32, causal, layers, length):
    """In-tree, a chunk farther away than the ring is long is the query's own; ours, the ring is walked once more."""
    in_tree = in_tree_model(causal, layers, num_hashes=1, lsh_num_chunks_before=3, local_num_chunks_before=3).double()
    ours, inputs = load_ours(in_tree, tmp_path), random_inputs(length, False)
    with torch.no_grad():
        assert relative_rms(ours(**inputs)[0], in_tree(**inputs)[0]) > 1e-3


FP32 = [
    ("local", 1, 8),
    ("lsh", 1, 8),
    ("lsh", 2, [4, 8]),
    ("lsh", 4, None),
    ("mixed", 1, None),
    ("mixed", 2, [4, 8]),
    ("mixed", 4, 8),
]


@pytest.mark.parametrize(
    ("layers", "num_hashes", "num_buckets"), [("local", 1, 8), ("lsh", 2, [4, 8]), ("mixed", 4, None)]
)
def test_fp32(tmp_path, layers, num_hashes, num_buckets):
    for causal, inputs in ((False, [(13, True), (TRAINING_LENGTH, False)]), (True, [(100, False), (256, True)])):
        in_tree = soften_self_mask(in_tree_model(causal, layers, num_hashes=num_hashes, num_buckets=num_buckets))
        _assert_equal(in_tree, tmp_path, inputs, 1e-5, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "num_hashes", "num_buckets"), FP32)
@each_direction
def test_fp32_grid(tmp_path, layers, num_hashes, num_buckets, causal):
    in_tree = soften_self_mask(in_tree_model(causal, layers, num_hashes=num_hashes, num_buckets=num_buckets))
    _assert_equal(in_tree, tmp_path, ALL_INPUTS, 1e-5, 1e-4)


def test_fp32_beats_in_tree_fp32(tmp_path, rotations_of_fp32):
    """Our fp32 is nearer to the in-tree fp64 than the in-tree fp32 is."""
    in_tree = in_tree_model(True, "lsh", num_hashes=4)
    ours = load_ours(in_tree, tmp_path)
    for padded in (False, True):
        inputs = random_inputs(TRAINING_LENGTH, padded)
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            found, single = ours(**inputs)[0][real], in_tree(**inputs)[0][real]
            exact = copy.deepcopy(in_tree).double()(**inputs)[0][real]
        assert relative_rms(found, exact) < relative_rms(single, exact) / 5
        assert_close(found, exact, 1e-6)


def test_other_hash_seed_differs(tmp_path):
    """The measure tells models apart: another hash seed moves the output by much more than any limit above."""
    in_tree = in_tree_model(True, "lsh")
    ours = load_ours(in_tree, tmp_path)
    ours.config.hash_seed = 4
    inputs = random_inputs(TRAINING_LENGTH, False)
    with torch.no_grad():
        assert relative_rms(ours(**inputs)[0], in_tree(**inputs)[0]) > 0.01


def test_head_bias(tmp_path, rotations_of_fp32):
    in_tree = in_tree_model(True, bias=True).double()
    ours = load_ours(in_tree, tmp_path)
    inputs = random_inputs(100, False)
    head = in_tree.lm_head
    # Transformers 5.24 gave the decoder a bias of its own and adds that. Before, none was added.
    added_in_tree = head.decoder.bias is not None
    bias = head.decoder.bias if added_in_tree else head.bias
    assert bias.all()
    assert ours.lm_head.bias is ours.lm_head.decoder.bias
    assert torch.equal(ours.lm_head.bias, bias)
    with torch.no_grad():
        assert_close(ours(**inputs).logits, in_tree(**inputs).logits + (0 if added_in_tree else bias), 1e-9)


def _outputs_and_loss(model, inputs, targets):
    """All outputs where there is no padding, and the loss."""
    with torch.no_grad():
        outputs = model(**inputs, **targets)
    real = inputs["attention_mask"].bool()
    names = {"loss", "logits", "start_logits", "end_logits", "last_hidden_state"} & outputs.keys()
    return {name: outputs[name][real] if outputs[name].shape[:2] == real.shape else outputs[name] for name in names}


def _loss_gradients(model, inputs, targets):
    model.train().zero_grad()
    outputs = model(**inputs, **targets)
    # Padding has no part in the gradient of the model without a head.
    loss = outputs.loss if targets else outputs[0][inputs["attention_mask"].bool()].square().sum()
    loss.backward()
    model.eval()
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def _cross_entropy(logits, labels, **kwargs):
    """The in-tree loss. That of Transformers rounds logits to fp32."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _assert_equal_heads(in_tree, folder, output_limit, gradient_limit, targets=None):
    ours = load_ours(in_tree, folder)
    if isinstance(in_tree, ReformerForMaskedLM):
        ours.loss_function = _cross_entropy
    for length, padded in ((13, True), (100, False), (TRAINING_LENGTH, True)):
        inputs = random_inputs(length, padded)
        given = random_targets(type(in_tree), inputs) if targets is None else targets
        expected, found = (_outputs_and_loss(model, inputs, given) for model in (copy.deepcopy(in_tree), ours))
        assert expected.keys() == found.keys()
        assert ("loss" in found) == bool(given)
        if padded and "start_logits" in found:
            # A softmax over all positions, which includes those of padding.
            del expected["loss"]
        for name, tensor in expected.items():
            assert_close(found[name], tensor, output_limit, name)
    if "start_positions" in given:
        inputs = random_inputs(TRAINING_LENGTH, False)
    expected, found = (_loss_gradients(model, inputs, given) for model in (in_tree, ours))
    # In-tree, this parameter is not used.
    names = {name for name, _ in in_tree.named_parameters()} - {"lm_head.bias"}
    assert expected.keys() - {"lm_head.bias"} == found.keys() - {"lm_head.bias"} == names
    if "start_positions" in given:
        # A softmax over positions does not change if the same number is added to all.
        for name in ("qa_outputs.bias", "reformer.encoder.layer_norm.bias"):
            assert max(gradients[name].abs().max() for gradients in (expected, found)) < 1e-6
            names.remove(name)
    for name in sorted(names):
        assert_close(found[name], expected[name], gradient_limit, name)


@each_class
def test_heads_fp64(tmp_path, rotations_of_fp32, cls):
    _assert_equal_heads(in_tree_head(cls).double(), tmp_path, 1e-9, 1e-9)


@pytest.mark.parametrize("cls", [ReformerForMaskedLM, ReformerForSequenceClassification])
def test_heads_fp32(tmp_path, cls):
    _assert_equal_heads(soften_self_mask(in_tree_head(cls)), tmp_path, 1e-5, 1e-4)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_sequence_losses_fp64(tmp_path, rotations_of_fp32, problem):
    for num_labels in (1, 3):
        fields = {"num_labels": num_labels, "problem_type": problem}
        in_tree = in_tree_head(ReformerForSequenceClassification, **fields).double()
        labels = torch.rand((2, num_labels), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        _assert_equal_heads(in_tree, tmp_path / str(num_labels), 1e-9, 1e-9, {"labels": labels})


def test_parameter_counts():
    for cls in CLASSES:
        in_tree = in_tree_head(cls)
        ours = CLASSES[cls](ReformerHfConfig.from_dict(in_tree.config.to_dict()))
        sizes = [
            {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
            for model in (in_tree, ours)
        ]
        assert sizes[0] == sizes[1], cls
        # In-tree, one of the two biases of an LM head is not used. Ours have two names for one parameter.
        unused = in_tree.lm_head.bias.numel() if hasattr(in_tree, "lm_head") else 0
        assert ours.num_parameters() == in_tree.num_parameters() - unused, cls


def test_tied_in_tree_config(tmp_path):
    """The in-tree LM head has weights of its own whatever its config says."""
    in_tree = in_tree_model(True, tie_word_embeddings=True)
    ours = load_ours(in_tree, tmp_path)
    assert torch.equal(ours.lm_head.decoder.weight, in_tree.lm_head.decoder.weight)


def test_forward_writes_nothing(tmp_path):
    """In-tree, the first length fixes the number of buckets, in the config too."""
    loaded = load_ours(in_tree_model(True, num_buckets=None), tmp_path)
    for training in (False, True):
        ours, fresh = (copy.deepcopy(loaded).train(training) for _ in range(2))
        before = copy.deepcopy(ours.config.to_dict())
        ours(**random_inputs(TRAINING_LENGTH, True))
        ours(**random_inputs(17, False))
        assert ours.config.to_dict() == before, f"training {training}"
        inputs = random_inputs(100, False)
        assert torch.equal(ours(**inputs)[0], fresh(**inputs)[0]), f"training {training}"


def test_num_hashes_in_training(tmp_path):
    """In-tree, backward fails."""
    ours = load_ours(in_tree_model(True, num_hashes=1), tmp_path).train()
    other = copy.deepcopy(ours)
    other.config.num_hashes = 4
    inputs = random_inputs(TRAINING_LENGTH, True)
    found, expected = _gradients(ours, {**inputs, "num_hashes": 4}), _gradients(other, inputs)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    name = "reformer.encoder.layers.1.attention.self_attention.query_key.weight"
    assert relative_rms(_gradients(ours, inputs)[name], expected[name]) > 0.01


def test_backward_in_eval(tmp_path):
    """In-tree asserts in the one and refuses the other."""
    ours = load_ours(in_tree_model(True), tmp_path)
    inputs = random_inputs(77, True)
    grads = []
    for training in (False, True):
        ours.train(training).zero_grad()
        ours(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({name: grad.clone() for name, grad in gradients(ours).items()})
    for name, grad in grads[0].items():
        assert grad.any()
        assert torch.equal(grads[1][name], grad), name


def test_global_generator(tmp_path):
    """In-tree, a layer with a hash seed reseeds it, and one in training always does."""
    ours = load_ours(in_tree_model(True), tmp_path)
    inputs = random_inputs(100, False)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    ours(**inputs)
    ours.train()(**inputs)[0].sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_without_hash_seed(tmp_path):
    ours = load_ours(in_tree_model(True, hash_seed=None), tmp_path)
    inputs = random_inputs(100, False)
    assert torch.equal(ours(**inputs)[0], ours(**inputs)[0])
    ours.train()
    outs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outs.append(ours(**inputs)[0].detach())
    assert torch.equal(outs[0], outs[1])
    assert relative_rms(outs[2], outs[0]) > 0.01


def test_frozen_embeddings(tmp_path):
    """In-tree, all weights of the encoder then go without."""
    ours = load_ours(in_tree_model(True), tmp_path)
    inputs = random_inputs(TRAINING_LENGTH, False)
    expected = _gradients(ours, inputs)
    ours.reformer.embeddings.requires_grad_(False)
    ours.zero_grad()
    found = _gradients(ours, inputs)
    assert set(found) == {name for name in expected if ".embeddings." not in name}
    for name, grad in found.items():
        assert torch.equal(grad, expected[name]), name
