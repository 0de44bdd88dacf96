# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Correctness checks at a short length. An implementation that fails its check is not timed."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.reformer import modeling_reformer

from reformer_hf import ReformerHfForCausalLM
from reformer_hf.attention_pattern import AttentionPattern
from reformer_hf.hashing import bucket_factors, hash_vectors, random_rotations
from reformer_hf.lsh_attention import LSHSelfAttention
from tests.reference import dense_attention, key_counts, normalized_keys

from .cases import Shape
from .decoding import steps_and_parallel_pass
from .dense import dense_model, t5_model
from .reformers import in_tree_model, our_config, our_in_tree_model, our_model, random_ids, reformer_pytorch_model

Grads = dict[str, Tensor]


@dataclass(frozen=True)
class Finding:
    """An error that a check measured, and the largest value that passes."""

    name: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        # False for NaN.
        return self.value <= self.limit


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Return the RMS of the difference divided by the RMS of `expected`; infinite if only `expected` is zero."""
    if actual.shape != expected.shape:
        return math.inf
    difference = (actual.double() - expected.double()).square().mean().sqrt().item()
    size = expected.double().square().mean().sqrt().item()
    return difference / size if size else math.inf if difference else 0.0


def worst(actual: Grads, expected: Grads) -> float:
    """Return the largest relative error of tensors with the same name; infinite if the names differ."""
    if actual.keys() != expected.keys():
        return math.inf
    # `max` may ignore a NaN.
    differences = [relative_rms(actual[name], expected[name]) for name in expected]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def check_ours(shape: Shape, num_hashes: int) -> list[Finding]:
    """Check our model: of an encoder-decoder, reversible layers and the order of target tokens."""
    return (check_encoder_decoder if shape.decoder_layers else check_reference)(shape, num_hashes)


def check_encoder_decoder(shape: Shape, num_hashes: int) -> list[Finding]:
    """Compare the gradients of reversible layers with those of plain ones, and change target tokens."""
    found = []
    for reversible in (True, False):
        # Recompute activations at this length too.
        fields = {"reversible": reversible, "max_kept_activations": 0, "hash_seed": 0}
        torch.manual_seed(0)
        found.append(_seq2seq_gradients(our_model(shape, shape.check_length, num_hashes, **fields), shape))
    errors = worst(*found)
    torch.manual_seed(0)
    model = our_model(shape, shape.check_length, num_hashes, hash_seed=0)
    return [
        Finding("gradients, compared with layers that are not reversible", errors, 1e-4),
        *_check_target_order(model, shape),
    ]


def check_t5(shape: Shape, num_hashes: int) -> list[Finding]:
    """Check that changed target tokens change later logits and no earlier ones, and that all gradients are finite."""
    torch.manual_seed(0)
    model = t5_model(shape, shape.check_length, num_hashes)
    grads = _seq2seq_gradients(model, shape)
    finite = all(grad is not None and grad.isfinite().all() for grad in grads.values())
    return [
        *_check_target_order(model, shape),
        Finding("gradients that are missing or not finite", float(not finite), 0.0),
    ]


def _check_target_order(model: nn.Module, shape: Shape) -> list[Finding]:
    """Check that changed decoder inputs change later logits and no earlier ones."""
    ids, targets = random_ids(shape, shape.check_length), random_ids(shape, shape.target_length)
    changed, middle = targets.clone(), shape.target_length // 2
    changed[:, middle:] = (targets[:, middle:] + 1) % shape.vocab_size
    with torch.no_grad():
        logits, changed_logits = (
            model.eval()(input_ids=ids, decoder_input_ids=decoder_ids)["logits"] for decoder_ids in (targets, changed)
        )
    after = relative_rms(changed_logits[:, middle:], logits[:, middle:])
    return [
        Finding(
            "change of logits before the first changed target token",
            relative_rms(changed_logits[:, :middle], logits[:, :middle]),
            1e-5,
        ),
        Finding("no change of logits after it", float(after < 1e-3), 0.0),
    ]


def _seq2seq_gradients(model: nn.Module, shape: Shape) -> Grads:
    ids, labels = random_ids(shape, shape.check_length), random_ids(shape, shape.target_length)
    model.train()(input_ids=ids, labels=labels)["loss"].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check_reference(shape: Shape, num_hashes: int) -> list[Finding]:
    """Compare our LSH attention with the dense reference in fp64: output, and gradients of input and weights."""
    torch.manual_seed(0)
    # Odd, so that the last chunk is partial.
    length = 3 * shape.lsh_chunk + 1
    config = our_config(shape, length, num_hashes, hash_seed=0)
    module = LSHSelfAttention(config).eval()
    exact = copy.deepcopy(module).double()
    hidden_states = torch.randn(1, length, shape.width)
    buckets = _buckets(module, hidden_states)
    pattern = AttentionPattern(
        config.lsh_attn_chunk_length,
        chunks_before=config.lsh_num_chunks_before,
        causal=True,
        same_bucket=not config.lsh_across_buckets,
        window=config.lsh_pattern == "window",
        deduplicate_keys=config.lsh_deduplicate_keys,
    )
    counts = torch.stack([key_counts(pattern, of_head.tolist(), [False] * length) for of_head in buckets])[None]

    def reference(hidden_states: Tensor) -> Tensor:
        query, value = exact.project(hidden_states, exact.all_heads)
        return dense_attention(query, normalized_keys(query), value, counts, own_value=True).flatten(2)

    actual = _output_and_gradients(module, lambda x: module(x)[0], hidden_states)
    expected = _output_and_gradients(exact, reference, hidden_states.double())
    output_error = relative_rms(actual.pop("output"), expected.pop("output"))
    return [
        Finding("output, compared with the dense reference", output_error, 1e-5),
        Finding("gradients, compared with the dense reference", worst(actual, expected), 1e-5),
        _check_decoding(shape, num_hashes),
    ]


def _check_decoding(shape: Shape, num_hashes: int) -> Finding:
    """Compare decoding token by token with the parallel pass, in fp64, where rounding changes no bucket."""
    torch.manual_seed(0)
    length = shape.check_length
    model = ReformerHfForCausalLM(our_config(shape, length, num_hashes, num_buckets=8)).double().eval()
    actual, expected = steps_and_parallel_pass(model, random_ids(shape, length), prompt=length // 2 + 1)
    return Finding("logits token by token, compared with the parallel pass", relative_rms(actual, expected), 1e-10)


def check_in_tree(shape: Shape, num_hashes: int) -> list[Finding]:
    """Compare our model, configured as in-tree, with the in-tree model: same weights and hash seed."""
    torch.manual_seed(0)
    length = shape.check_length
    in_tree = in_tree_model(shape, length, num_hashes, hash_seed=0)
    _make_comparable(in_tree)
    ours = our_in_tree_model(shape, length, num_hashes, hash_seed=0)
    ours.load_state_dict(in_tree.state_dict())
    ids = random_ids(shape, length)
    with torch.no_grad():
        actual, expected = (model.eval()(input_ids=ids)["logits"] for model in (ours, in_tree))
    grads_error = worst(*(_loss_gradients(model, ids) for model in (ours, in_tree)))
    return [
        Finding("logits, compared with in-tree", relative_rms(actual, expected), 1e-4),
        # Rounding may change the sign of a ReLU input, which changes gradients by up to 1e-3.
        Finding("gradients, compared with in-tree", grads_error, 5e-3),
    ]


def check_dense(shape: Shape, num_hashes: int) -> list[Finding]:
    """Check that changed tokens change later logits and no earlier ones."""
    torch.manual_seed(0)
    length = shape.check_length
    model = dense_model(shape, length, num_hashes).eval()
    ids = random_ids(shape, length)
    changed = ids.clone()
    changed[:, length // 2 :] = (ids[:, length // 2 :] + 1) % shape.vocab_size
    with torch.no_grad():
        logits, changed_logits = (model(input_ids=x)["logits"] for x in (ids, changed))
    before = relative_rms(changed_logits[:, : length // 2], logits[:, : length // 2])
    after = relative_rms(changed_logits[:, length // 2 :], logits[:, length // 2 :])
    return [
        Finding("change of logits before the first changed token", before, 1e-5),
        Finding("no change of logits after it", float(after < 1e-3), 0.0),
        _check_finite_gradients(model, ids),
    ]


def check_reformer_pytorch(shape: Shape, num_hashes: int) -> list[Finding]:
    """
    Check that logits have no gradient with respect to later embeddings, and that all parameters have gradients.

    The check uses gradients instead of changed tokens, because later tokens shift the chunk boundaries of the sorted
    order and thereby change which earlier positions a query sees.
    """
    torch.manual_seed(0)
    length = shape.check_length
    model = reformer_pytorch_model(shape, length, num_hashes).train()
    ids = random_ids(shape, length)
    embeddings: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        output.retain_grad()
        embeddings.append(output)

    handle = model.get_submodule("model.token_emb").register_forward_hook(keep)
    model(input_ids=ids)["logits"][:, length // 2].square().sum().backward()
    handle.remove()
    grad = embeddings[0].grad
    return [
        Finding("gradient with respect to later tokens", grad[:, length // 2 + 1 :].abs().max().item(), 0.0),
        Finding("no gradient with respect to earlier tokens", float(not grad[:, : length // 2].any()), 0.0),
        _check_finite_gradients(model, ids),
    ]


def _buckets(module: LSHSelfAttention, hidden_states: Tensor) -> Tensor:
    """Return the buckets `[H, R, L]` of a batch of one sequence, with the module's hash seed."""
    config = module.config
    with torch.no_grad():
        query, _ = module.project(hidden_states, module.all_heads)
    _, length, num_heads, head_size = query.shape
    factors = bucket_factors(config.num_buckets, length, config.lsh_attn_chunk_length, config.max_position_embeddings)
    rotations = random_rotations(config.hash_seed, num_heads, head_size, config.num_hashes, factors)
    return hash_vectors(query, rotations, factors)[0]


def _output_and_gradients(module: nn.Module, function: Callable[[Tensor], Tensor], hidden_states: Tensor) -> Grads:
    """Return the output and the gradients of the input and of all parameters."""
    hidden_states = hidden_states.clone().requires_grad_()
    out = function(hidden_states)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    module.zero_grad()
    (out * weight).sum().backward()
    tensors = {"output": out.detach(), "grad of input": hidden_states.grad}
    return {**tensors, **{name: parameter.grad for name, parameter in module.named_parameters()}}


def soften_self_mask(in_tree: nn.Module) -> None:
    """
    Set the score of a position with itself to -100 instead of -1e5.

    exp(-100) is as negligible as exp(-1e5), but fp32 resolves a logsumexp of -1e5 only to 1/128.
    """
    for module in in_tree.modules():
        if isinstance(module, modeling_reformer.LSHSelfAttention):
            module.self_mask_value_float32.fill_(-100.0)


def _make_comparable(in_tree: nn.Module) -> None:
    """Soften the self mask, and set the biases of the LM head to zero: it has two, one of which is not used."""
    soften_self_mask(in_tree)
    for name, parameter in in_tree.get_submodule("lm_head").named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()


def _loss_gradients(model: nn.Module, ids: Tensor) -> Grads:
    """Return the gradients of the loss, except for the bias of the LM head, which has several names."""
    model.train().zero_grad()
    model(input_ids=ids, labels=ids)["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if not name.startswith("lm_head") or "weight" in name}


def _check_finite_gradients(model: nn.Module, ids: Tensor) -> Finding:
    model.train().zero_grad()
    model(input_ids=ids, labels=ids)["loss"].backward()
    missing = [p for p in model.parameters() if p.grad is None or not p.grad.isfinite().all()]
    return Finding("parameters without a finite gradient", len(missing), 0.0)
