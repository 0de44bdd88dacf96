# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Errors in backward passes that would leave parameters without gradients, or with wrong ones."""

from collections.abc import Sequence

import torch
from torch import Tensor


def refuse_second_derivatives() -> None:
    """Raise `RuntimeError` in a backward pass with `create_graph=True`: ours cannot be differentiated again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "Second derivatives (`create_graph=True`) are not supported, whatever the config: attention and "
            "recomputed layers have their own backward passes. Use first derivatives alone."
        )


class _RefusedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, anchor):
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "The hidden states were computed with a KV cache and have no gradient: leave `cache` out, and set "
            "`use_cache=False`, before `backward`."
        )


def refuse_gradient(hidden_states: Tensor) -> Tensor:
    """Return hidden states whose backward pass raises an error, instead of leaving parameters without gradients."""
    return _RefusedGradient.apply(hidden_states, hidden_states.new_zeros(()).requires_grad_())


def refuse_other_sources(results: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """
    Raise `RuntimeError` if results depend on tensors with gradients other than `sources`.

    A recomputation in a backward pass computes the gradients of its inputs and of parameters alone. Those of a tensor
    that a module reads without owning it, such as a parameter that it keeps in a list, would be lost.
    """
    seen = {each.grad_fn for each in sources if each.grad_fn is not None}
    leaves = {id(each) for each in sources}
    nodes = [each.grad_fn for each in results if each.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in leaves:
            raise RuntimeError(
                "A module in a layer that recomputes activations reads a tensor of shape "
                f"{tuple(leaf.shape)} that is not one of its parameters, so that the gradient of the tensor would be "
                "lost: register it as a parameter, or set `reversible=False`, `chunk_size_feed_forward=0` and "
                "`chunk_size_lm_head=0`."
            )
        nodes += [before for before, _ in node.next_functions if before is not None]
