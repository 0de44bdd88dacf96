# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Position-wise functions in chunks of positions, forward and backward, so that no graph spans more than one chunk."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .rng import ReplayState

PositionWise = Callable[[Tensor], Tensor]


def apply_chunked(
    function: PositionWise, hidden_states: Tensor, chunk_size: int, parameters: Sequence[Tensor] = ()
) -> Tensor:
    """
    `function` of `hidden_states` `[B, L, …]`, `chunk_size` positions at a time.

    Nothing but the input is kept for the backward pass, which computes each chunk once more, with the same dropout.

    Args:
        function: Acts on each position by itself.
        hidden_states: `[B, L, …]`.
        chunk_size: Positions at a time; 0 calls `function` on the whole.
        parameters: What `function` uses that takes gradients.
    """
    if chunk_size == 0 or chunk_size >= hidden_states.shape[1]:
        return function(hidden_states)
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    return _Chunked.apply(function, chunk_size, hidden_states, *parameters)


def vjp_chunked(
    function: PositionWise, hidden_states: Tensor, grad_out: Tensor, chunk_size: int, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """
    Value and vector-Jacobian product of `function`, chunk by chunk.

    Args:
        function, hidden_states, chunk_size: As in `apply_chunked`.
        grad_out: Gradient of the output.
        parameters: What `function` uses that takes gradients; every one requires it.

    Returns:
        The output, the gradient of `hidden_states`, and those of `parameters` (`None` where not used).
    """
    outs, grads = [], []
    grad_parameters: list[Tensor | None] = [None] * len(parameters)
    chunk_size = chunk_size or max(hidden_states.shape[1], 1)
    for chunk, grad_chunk in zip(
        hidden_states.split(chunk_size, dim=1), grad_out.split(chunk_size, dim=1), strict=True
    ):
        chunk = chunk.detach().requires_grad_()
        with torch.enable_grad():
            out = function(chunk)
        grad, *news = torch.autograd.grad(out, [chunk, *parameters], grad_chunk, allow_unused=True)
        outs.append(out.detach())
        grads.append(torch.zeros_like(chunk) if grad is None else grad)
        for i, new in enumerate(news):
            if new is not None:
                grad_parameters[i] = new if grad_parameters[i] is None else grad_parameters[i].add_(new)
    if len(outs) == 1:
        return outs[0], grads[0], grad_parameters
    return torch.cat(outs, dim=1), torch.cat(grads, dim=1), grad_parameters


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, chunk_size, hidden_states, *parameters):
        ctx.save_for_backward(hidden_states)
        ctx.function, ctx.chunk_size, ctx.parameters = function, chunk_size, parameters
        ctx.state = ReplayState(hidden_states.device)
        return torch.cat([function(chunk) for chunk in hidden_states.split(chunk_size, dim=1)], dim=1)

    @staticmethod
    def backward(ctx, grad_out):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A second derivative through a chunked function is not supported (`create_graph=True`): set "
                "`chunk_size_feed_forward=0` and `chunk_size_lm_head=0`."
            )
        (hidden_states,) = ctx.saved_tensors
        with ctx.state.replay():
            _, grad, grad_parameters = vjp_chunked(
                ctx.function, hidden_states, grad_out, ctx.chunk_size, ctx.parameters
            )
        return None, None, grad, *grad_parameters
