# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Errors in backward passes that would leave parameters without gradients, or with wrong ones."""

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
