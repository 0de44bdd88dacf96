# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether an implementation computes what it should, at a short length. What is wrong is not timed."""

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
from .dense import dense_model
from .reformers import in_tree_model, our_config, our_in_tree_model, random_ids, reformer_pytorch_model

Grads = dict[str, Tensor]


@dataclass(frozen=True)
class Finding:
    """A measure of what is wrong, and how much of it is allowed."""

    what: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        # Not a number is not at or below the limit.
        return self.value <= self.limit


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`; infinite where only one of them is zero."""
    if actual.shape != expected.shape:
        return math.inf
    difference = (actual.double() - expected.double()).square().mean().sqrt().item()
    size = expected.double().square().mean().sqrt().item()
    return difference / size if size else math.inf if difference else 0.0


def worst(actual: Grads, expected: Grads) -> float:
    """Largest relative difference of tensors by name; infinite where names differ."""
    if actual.keys() != expected.keys():
        return math.inf
    # `max` may pass over what is not a number.
    differences = [relative_rms(actual[name], expected[name]) for name in expected]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def check_oracle(shape: Shape, num_hashes: int) -> list[Finding]:
    """Our LSH attention against the dense definition in fp64: output, and gradients of input and weights."""
    torch.manual_seed(0)
    # Odd, so that the last chunk is not full.
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

    def oracle(hidden_states: Tensor) -> Tensor:
        query, value = exact.project(hidden_states, exact.all_heads)
        return dense_attention(query, normalized_keys(query), value, counts, own_value=True).flatten(2)

    found = _with_gradients(module, module, hidden_states)
    expected = _with_gradients(exact, oracle, hidden_states.double())
    output_error = relative_rms(found.pop("output"), expected.pop("output"))
    return [
        Finding("output against the dense definition", output_error, 1e-5),
        Finding("gradients against the dense definition", worst(found, expected), 1e-5),
        _check_decoding(shape, num_hashes),
    ]


def _check_decoding(shape: Shape, num_hashes: int) -> Finding:
    """In fp64: what rounding takes into another bucket is no error of a state."""
    torch.manual_seed(0)
    length = shape.check_length
    model = ReformerHfForCausalLM(our_config(shape, length, num_hashes, num_buckets=8)).double().eval()
    found, expected = steps_and_parallel_pass(model, random_ids(shape, length), prompt=length // 2 + 1)
    return Finding("logits of tokens one by one against all at once", relative_rms(found, expected), 1e-10)


def check_in_tree(shape: Shape, num_hashes: int) -> list[Finding]:
    """Ours in the in-tree pattern against the in-tree model, with the same weights and hash seed."""
    torch.manual_seed(0)
    length = shape.check_length
    in_tree = in_tree_model(shape, length, num_hashes, hash_seed=0)
    _make_comparable(in_tree)
    ours = our_in_tree_model(shape, length, num_hashes, hash_seed=0)
    ours.load_state_dict(in_tree.state_dict())
    ids = random_ids(shape, length)
    with torch.no_grad():
        found, expected = (model.eval()(input_ids=ids)["logits"] for model in (ours, in_tree))
    grads_error = worst(*(_loss_gradients(model, ids) for model in (ours, in_tree)))
    return [
        Finding("logits of ours against in-tree", relative_rms(found, expected), 1e-4),
        # A unit of the feed-forward that rounding takes over the kink of its ReLU is worth up to 1e-3.
        Finding("gradients of ours against in-tree", grads_error, 5e-3),
    ]


def check_dense(shape: Shape, num_hashes: int) -> list[Finding]:
    """No later token moves an earlier logit, and some do move later ones."""
    torch.manual_seed(0)
    length = shape.check_length
    model = dense_model(shape, length, num_hashes).eval()
    ids = random_ids(shape, length)
    changed = ids.clone()
    changed[:, length // 2 :] = (ids[:, length // 2 :] + 1) % shape.vocab_size
    with torch.no_grad():
        logits, moved = (model(input_ids=x)["logits"] for x in (ids, changed))
    before = relative_rms(moved[:, : length // 2], logits[:, : length // 2])
    after = relative_rms(moved[:, length // 2 :], logits[:, length // 2 :])
    return [
        Finding("change of logits before a changed token", before, 1e-5),
        Finding("lack of a change from it on", float(after < 1e-3), 0.0),
        _without_gradient(model, ids),
    ]


def check_reformer_pytorch(shape: Shape, num_hashes: int) -> list[Finding]:
    """
    No logit has a gradient by a later token's embedding, and all parameters have gradients.

    A gradient, not a changed token: in chunks of a sorted order a later token moves the borders of chunks, and with
    them which of the earlier positions an earlier one sees.
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
        Finding("gradient by later tokens", grad[:, length // 2 + 1 :].abs().max().item(), 0.0),
        Finding("lack of one by earlier tokens", float(not grad[:, : length // 2].any()), 0.0),
        _without_gradient(model, ids),
    ]


def _buckets(module: LSHSelfAttention, hidden_states: Tensor) -> Tensor:
    """Buckets `[H, R, L]` of the one sequence, under the module's hash seed."""
    config = module.config
    with torch.no_grad():
        query, _ = module.project(hidden_states, module.all_heads)
    _, length, num_heads, head_size = query.shape
    factors = bucket_factors(config.num_buckets, length, config.lsh_attn_chunk_length, config.max_position_embeddings)
    rotations = random_rotations(config.hash_seed, num_heads, head_size, config.num_hashes, factors)
    return hash_vectors(query, rotations, factors)[0]


def _with_gradients(module: nn.Module, function: Callable[[Tensor], Tensor], hidden_states: Tensor) -> Grads:
    """The output, and the gradients of the input and of all parameters."""
    hidden_states = hidden_states.clone().requires_grad_()
    out = function(hidden_states)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    module.zero_grad()
    (out * weight).sum().backward()
    found = {"output": out.detach(), "grad of input": hidden_states.grad}
    return {**found, **{name: parameter.grad for name, parameter in module.named_parameters()}}


def _make_comparable(in_tree: nn.Module) -> None:
    """
    Score a position itself at -100 instead of -1e5, and drop the head's biases.

    exp(-100) is nothing beside real scores, as exp(-1e5) is; but a logsumexp of -1e5 has a step of 1/128 in fp32. The
    head has two biases of which one does not count.
    """
    for module in in_tree.modules():
        if isinstance(module, modeling_reformer.LSHSelfAttention):
            module.self_mask_value_float32.fill_(-100.0)
    for name, parameter in in_tree.get_submodule("lm_head").named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()


def _loss_gradients(model: nn.Module, ids: Tensor) -> Grads:
    """Gradients of the loss, but for the head's bias, which goes by several names."""
    model.train().zero_grad()
    model(input_ids=ids, labels=ids)["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if not name.startswith("lm_head") or "weight" in name}


def _without_gradient(model: nn.Module, ids: Tensor) -> Finding:
    model.train().zero_grad()
    model(input_ids=ids, labels=ids)["loss"].backward()
    missing = [p for p in model.parameters() if p.grad is None or not p.grad.isfinite().all()]
    return Finding("parameters without a finite gradient", len(missing), 0.0)
