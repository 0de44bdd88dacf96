# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Position-wise functions in chunks of positions, forward and backward, so that no graph spans more than one chunk."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .rng import ReplayState

PositionWise = Callable[[Tensor], Tensor]

# Positions of all rows of a batch whose inner activations a cache holds; a GPU wants them all at a time.
_CACHED_POSITIONS = {"cpu": 4096}


def suitable_chunk_size(hidden_states: Tensor) -> int:
    """Positions of `[B, L, …]` that the device computes fastest at a time."""
    batch_size, length = hidden_states.shape[:2]
    cached = _CACHED_POSITIONS.get(hidden_states.device.type, batch_size * length)
    return max(min(cached // max(batch_size, 1), length), 1)


def chunks_of(hidden_states: Tensor, chunk_size: int) -> Iterator[slice]:
    """Positions of each chunk of `[B, L, …]`; 0 stands for one chunk."""
    length = hidden_states.shape[1]
    for start in range(0, length, chunk_size or length):
        yield slice(start, min(start + (chunk_size or length), length))


def apply_chunked(
    function: PositionWise,
    hidden_states: Tensor,
    chunk_size: int,
    parameters: Sequence[Tensor] = (),
    recompute: bool = True,
) -> Tensor:
    """
    `function` of `hidden_states` `[B, L, …]`, `chunk_size` positions at a time.

    Args:
        function: Acts on each position by itself.
        hidden_states: `[B, L, …]`.
        chunk_size: Positions at a time; 0 calls `function` on the whole.
        parameters: What `function` uses that takes gradients.
        recompute: Whether nothing but the input is kept for the backward pass, which then computes each chunk once
            more, with the same dropout.
    """
    if chunk_size == 0 or chunk_size >= hidden_states.shape[1]:
        return function(hidden_states)
    if not recompute:
        return _in_chunks(function, hidden_states, chunk_size)
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    return _Chunked.apply(function, chunk_size, hidden_states, *parameters)


def vjp_chunks(
    function: PositionWise,
    hidden_states: Tensor,
    grad_out: Tensor,
    chunk_size: int,
    parameters: Sequence[Tensor],
    grad_parameters: list[Tensor | None],
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """
    Value and vector-Jacobian product of `function`, chunk by chunk.

    Args:
        function, hidden_states, chunk_size: As in `apply_chunked`.
        grad_out: Gradient of the output.
        parameters: What `function` uses that takes gradients; every one requires it.
        grad_parameters: Takes their gradients, summed over chunks, in place of as many `None`; those of parameters
            that were not used stay `None`.

    Yields:
        For each chunk its positions, the output and the gradient of `hidden_states` there.
    """
    for positions in chunks_of(hidden_states, chunk_size):
        chunk = hidden_states[:, positions].detach().requires_grad_()
        with torch.enable_grad():
            out = function(chunk)
        grad, *news = torch.autograd.grad(out, [chunk, *parameters], grad_out[:, positions], allow_unused=True)
        for i, new in enumerate(news):
            if new is not None:
                grad_parameters[i] = new if grad_parameters[i] is None else grad_parameters[i].add_(new)
        yield positions, out.detach(), torch.zeros_like(chunk) if grad is None else grad


def _in_chunks(function: PositionWise, hidden_states: Tensor, chunk_size: int) -> Tensor:
    return torch.cat([function(chunk) for chunk in hidden_states.split(chunk_size, dim=1)], dim=1)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, chunk_size, hidden_states, *parameters):
        ctx.save_for_backward(hidden_states)
        ctx.function, ctx.chunk_size, ctx.parameters = function, chunk_size, parameters
        ctx.state = ReplayState(hidden_states.device)
        return _in_chunks(function, hidden_states, chunk_size)

    @staticmethod
    def backward(ctx, grad_out):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A second derivative through a chunked function is not supported (`create_graph=True`): set "
                "`chunk_size_feed_forward=0` and `chunk_size_lm_head=0`."
            )
        (hidden_states,) = ctx.saved_tensors
        grad = torch.empty_like(hidden_states)
        grad_parameters: list[Tensor | None] = [None] * len(ctx.parameters)
        with ctx.state.replay():
            for positions, _, grad_chunk in vjp_chunks(
                ctx.function, hidden_states, grad_out, ctx.chunk_size, ctx.parameters, grad_parameters
            ):
                grad[:, positions] = grad_chunk
        return None, None, grad, *grad_parameters
