# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""In-tree checkpoints load as they are and give in-tree outputs and gradients; where in-tree is wrong, ours is not."""

import copy

import pytest
import torch
import transformers
from transformers import ReformerConfig, ReformerModel, ReformerModelWithLMHead
from transformers.models.reformer import modeling_reformer

from reformer_hf import ReformerHfForCausalLM, ReformerHfModel

from .helpers import assert_close, gradients, relative_rms

# Training of the in-tree model takes the product of its axes for a length, no other.
AXES = (8, 32)
TRAINING_LENGTH = 256

LAYERS = {"local": ["local"], "lsh": ["lsh"], "mixed": ["local", "lsh", "local", "lsh"]}
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


class _TorchWithRotationsOfFp32:
    """What the in-tree module sees as `torch`: it draws in fp32, in which ours are drawn too, whatever it asks for."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def randn(*size, dtype=None, **kwargs):
        return torch.randn(*size, **kwargs).to(dtype or torch.float32)


@pytest.fixture
def rotations_of_fp32(monkeypatch):
    monkeypatch.setattr(modeling_reformer, "torch", _TorchWithRotationsOfFp32())


def _in_tree(causal, layers="mixed", bias=False, **fields):
    """An in-tree model whose parameters are all random, the bias of the head too if wanted."""
    torch.manual_seed(0)
    after = 0 if causal else 1
    defaults = {
        "attn_layers": LAYERS[layers],
        "num_hashes": 2,
        "num_buckets": 8,
        "axial_pos_shape": AXES,
        "axial_pos_embds_dim": (8, 24),
        "max_position_embeddings": TRAINING_LENGTH,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "attention_head_size": 16,
        "feed_forward_size": 48,
        "is_decoder": causal,
        "local_num_chunks_after": after,
        "lsh_num_chunks_after": after,
        "lsh_attn_chunk_length": 16,
        "local_attn_chunk_length": 8,
        "vocab_size": 50,
        "hash_seed": 3,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    }
    config = ReformerConfig(**{**defaults, **fields})
    model = (ReformerModelWithLMHead if causal else ReformerModel)(config)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    if causal and not bias:
        # In-tree does not add it before Transformers 5.24.
        model.lm_head.bias.data.zero_()
        if model.lm_head.decoder.bias is not None:
            model.lm_head.decoder.bias.data.zero_()
    return model.eval()


def _ours(in_tree, folder):
    """What in-tree saved, loaded by our class."""
    in_tree.save_pretrained(folder)
    cls = ReformerHfForCausalLM if in_tree.config.is_decoder else ReformerHfModel
    ours, info = cls.from_pretrained(folder, dtype=in_tree.dtype, max_kept_activations=0, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[what], (what, info[what])
    return ours.eval()


def _inputs(length, padded):
    torch.manual_seed(1)
    attention_mask = torch.ones(2, length, dtype=torch.long)
    if padded:
        attention_mask[1, -3:] = 0
    return {"input_ids": torch.randint(0, 50, (2, length)), "attention_mask": attention_mask}


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
    ours = _ours(in_tree, folder)
    for length, padded in inputs:
        batch = _inputs(length, padded)
        # The first length that it meets would fix its number of buckets.
        fresh = copy.deepcopy(in_tree)
        _assert_equal_outputs(fresh, ours, batch, output_limit)
        if length == TRAINING_LENGTH:
            _assert_equal_gradients(fresh, ours, batch, gradient_limit)


@each_direction
def test_local_fp64(tmp_path, causal):
    _assert_equal(_in_tree(causal, "local").double(), tmp_path, ALL_INPUTS)


@each_direction
@each_round
@pytest.mark.parametrize("layers", ["lsh", "mixed"])
def test_lsh_fp64(tmp_path, rotations_of_fp32, layers, num_hashes, causal):
    _assert_equal(_in_tree(causal, layers, num_hashes=num_hashes).double(), tmp_path, INPUTS)


@pytest.mark.slow
@each_direction
@each_round
@pytest.mark.parametrize("layers", ["lsh", "mixed"])
@pytest.mark.parametrize("num_buckets", [8, None, [4, 8]], ids=str)
def test_fp64_grid(tmp_path, rotations_of_fp32, num_buckets, layers, num_hashes, causal):
    in_tree = _in_tree(causal, layers, num_hashes=num_hashes, num_buckets=num_buckets).double()
    _assert_equal(in_tree, tmp_path, [*ALL_INPUTS, (120, False), (120, True)])


@pytest.mark.parametrize("num_hashes", [1, 4], ids=lambda rounds: f"R{rounds}")
@pytest.mark.parametrize("num_buckets", [None, [4, 8]], ids=["buckets-of-the-length", "factorised"])
def test_bucket_counts_fp64(tmp_path, rotations_of_fp32, num_buckets, num_hashes):
    """The number of buckets for 120 is another than that for 128, to which in-tree pads."""
    for causal, padded in ((False, False), (True, True)):
        in_tree = _in_tree(causal, num_hashes=num_hashes, num_buckets=num_buckets).double()
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


@pytest.mark.parametrize("fields", OTHER_FIELDS, ids=_fields_id)
def test_other_fields_fp64(tmp_path, rotations_of_fp32, fields):
    for causal, padded in ((False, True), (True, False)):
        _assert_equal(_in_tree(causal, **fields).double(), tmp_path, [(TRAINING_LENGTH, padded)])


@pytest.mark.slow
@pytest.mark.parametrize("fields", OTHER_FIELDS, ids=_fields_id)
@each_direction
def test_other_fields_fp64_grid(tmp_path, rotations_of_fp32, fields, causal):
    # In-tree, an input is a multiple of the feed-forward's chunks.
    multiple = fields.get("chunk_size_feed_forward", 1)
    inputs = [(length, padded) for length, padded in ALL_INPUTS if length % multiple == 0]
    _assert_equal(_in_tree(causal, **fields).double(), tmp_path, inputs)


@pytest.mark.parametrize(("layers", "length"), [("local", 13), ("lsh", 13), ("lsh", 29)])
def test_ring_of_chunks_before_fp64(tmp_path, rotations_of_fp32, layers, length):
    """As many chunks before as there are: rings of two chunks, of 8 (local) and 16 (LSH)."""
    for causal in (False, True):
        in_tree = _in_tree(causal, layers, num_hashes=1, lsh_num_chunks_before=2, local_num_chunks_before=2).double()
        _assert_equal(in_tree, tmp_path, [(length, False)])


@pytest.mark.parametrize(("layers", "length"), [("local", 13), ("lsh", 29)])
@each_direction
def test_ring_walked_twice_differs(tmp_path, rotations_of_fp32, causal, layers, length):
    """In-tree, a chunk farther away than the ring is long is the query's own; ours, the ring is walked once more."""
    in_tree = _in_tree(causal, layers, num_hashes=1, lsh_num_chunks_before=3, local_num_chunks_before=3).double()
    ours, inputs = _ours(in_tree, tmp_path), _inputs(length, False)
    with torch.no_grad():
        assert relative_rms(ours(**inputs)[0], in_tree(**inputs)[0]) > 1e-3


def _soften_self_mask(in_tree):
    """
    Score a position itself at -100 instead of -1e5.

    It is the same rule, since exp(-100) counts nothing beside real scores. But a logsumexp of -1e5 has a step of 1/128
    in fp32: rows that see only themselves in several rounds lose that much, and what follows may hash elsewhere.
    """
    for module in in_tree.modules():
        if isinstance(module, modeling_reformer.LSHSelfAttention):
            module.self_mask_value_float32.fill_(-100.0)
    return in_tree


FP32 = [
    ("local", 1, 8),
    ("lsh", 1, 8),
    ("lsh", 2, [4, 8]),
    ("lsh", 4, None),
    ("mixed", 1, None),
    ("mixed", 2, [4, 8]),
    ("mixed", 4, 8),
]


@pytest.mark.parametrize(("layers", "num_hashes", "num_buckets"), FP32)
def test_fp32(tmp_path, layers, num_hashes, num_buckets):
    for causal, inputs in ((False, [(13, True), (TRAINING_LENGTH, False)]), (True, [(100, False), (256, True)])):
        in_tree = _soften_self_mask(_in_tree(causal, layers, num_hashes=num_hashes, num_buckets=num_buckets))
        _assert_equal(in_tree, tmp_path, inputs, 1e-5, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "num_hashes", "num_buckets"), FP32)
@each_direction
def test_fp32_grid(tmp_path, layers, num_hashes, num_buckets, causal):
    in_tree = _soften_self_mask(_in_tree(causal, layers, num_hashes=num_hashes, num_buckets=num_buckets))
    _assert_equal(in_tree, tmp_path, ALL_INPUTS, 1e-5, 1e-4)


@pytest.mark.parametrize("num_hashes", [2, 4], ids=lambda rounds: f"R{rounds}")
def test_fp32_beats_in_tree_fp32(tmp_path, rotations_of_fp32, num_hashes):
    """Our fp32 is nearer to the in-tree fp64 than the in-tree fp32 is."""
    in_tree = _in_tree(True, "lsh", num_hashes=num_hashes)
    ours = _ours(in_tree, tmp_path)
    for padded in (False, True):
        inputs = _inputs(TRAINING_LENGTH, padded)
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            found, single = ours(**inputs)[0][real], in_tree(**inputs)[0][real]
            exact = copy.deepcopy(in_tree).double()(**inputs)[0][real]
        assert relative_rms(found, exact) < relative_rms(single, exact) / 5
        assert_close(found, exact, 1e-6)


def test_other_hash_seed_differs(tmp_path):
    """The measure tells models apart: another hash seed moves the output by much more than any limit above."""
    in_tree = _in_tree(True, "lsh")
    ours = _ours(in_tree, tmp_path)
    ours.config.hash_seed = 4
    inputs = _inputs(TRAINING_LENGTH, False)
    with torch.no_grad():
        assert relative_rms(ours(**inputs)[0], in_tree(**inputs)[0]) > 0.01


def test_head_bias(tmp_path, rotations_of_fp32):
    in_tree = _in_tree(True, bias=True).double()
    ours = _ours(in_tree, tmp_path)
    inputs = _inputs(100, False)
    head = in_tree.lm_head
    # Transformers 5.24 gave the decoder a bias of its own and adds that. Before, none was added.
    added_in_tree = head.decoder.bias is not None
    bias = head.decoder.bias if added_in_tree else head.bias
    assert bias.all()
    assert ours.lm_head.bias is ours.lm_head.decoder.bias
    assert torch.equal(ours.lm_head.bias, bias)
    with torch.no_grad():
        assert_close(ours(**inputs).logits, in_tree(**inputs).logits + (0 if added_in_tree else bias), 1e-9)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_forward_writes_nothing(tmp_path, training):
    """In-tree, the first length fixes the number of buckets, in the config too."""
    ours = _ours(_in_tree(True, num_buckets=None), tmp_path).train(training)
    before = copy.deepcopy(ours.config.to_dict())
    fresh = copy.deepcopy(ours)
    ours(**_inputs(TRAINING_LENGTH, True))
    ours(**_inputs(17, False))
    assert ours.config.to_dict() == before
    inputs = _inputs(100, False)
    assert torch.equal(ours(**inputs)[0], fresh(**inputs)[0])


def test_num_hashes_in_training(tmp_path):
    """In-tree, backward fails."""
    ours = _ours(_in_tree(True, num_hashes=1), tmp_path).train()
    other = copy.deepcopy(ours)
    other.config.num_hashes = 4
    inputs = _inputs(TRAINING_LENGTH, True)
    found, expected = _gradients(ours, {**inputs, "num_hashes": 4}), _gradients(other, inputs)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    name = "reformer.encoder.layers.1.attention.self_attention.query_key.weight"
    assert relative_rms(_gradients(ours, inputs)[name], expected[name]) > 0.01


def test_backward_in_eval(tmp_path):
    """In-tree asserts in the one and refuses the other."""
    ours = _ours(_in_tree(True), tmp_path)
    inputs = _inputs(77, True)
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
    ours = _ours(_in_tree(True), tmp_path)
    inputs = _inputs(100, False)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    ours(**inputs)
    ours.train()(**inputs)[0].sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_without_hash_seed(tmp_path):
    ours = _ours(_in_tree(True, hash_seed=None), tmp_path)
    inputs = _inputs(100, False)
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
    ours = _ours(_in_tree(True), tmp_path)
    inputs = _inputs(TRAINING_LENGTH, False)
    expected = _gradients(ours, inputs)
    ours.reformer.embeddings.requires_grad_(False)
    ours.zero_grad()
    found = _gradients(ours, inputs)
    assert set(found) == {name for name in expected if ".embeddings." not in name}
    for name, grad in found.items():
        assert torch.equal(grad, expected[name]), name
