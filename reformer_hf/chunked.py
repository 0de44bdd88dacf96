# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Position-wise functions in chunks of positions, forward and backward. No autograd graph spans several chunks."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from .gradient_checks import refuse_other_sources, refuse_second_derivatives
from .replay import ReplayState, trainable_parameters

PositionWise = Callable[[Tensor], Tensor]


def has_hooks(module: nn.Module) -> bool:
    """Return whether a call of a module does more than its class says: hooks run, or it has another `forward`."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module) or _has_any_global_hook()


def needs_plain_call(module: nn.Module) -> bool:
    """
    Return whether a module must be called once for all positions, with saved activations, for right gradients.

    This is so if a module inside it has hooks, which may change its output by tensors with gradients; if a parameter
    has hooks, which must see the whole gradient, and only once; if weights are no parameters, as in the replicas of
    `nn.DataParallel` and in FSDP1 with `use_orig_params=False`; or within `parametrize.cached()`, whose weights would
    have no gradient if they were computed without one first.
    """
    if getattr(parametrize, "_cache_enabled", 0):
        return True
    return any((inner is not module and has_hooks(inner)) or _has_unusual_weights(inner) for inner in module.modules())


def _has_unusual_weights(module: nn.Module) -> bool:
    if any(parameter is not None and parameter._backward_hooks for parameter in module._parameters.values()):
        return True
    # `isinstance` is slow for tensors, and such weights are no parameters.
    return any(type(value) is Tensor and value.requires_grad for value in vars(module).values())


def chunks_of(hidden_states: Tensor, chunk_size: int) -> Iterator[slice]:
    """Yield the positions of each chunk of `[B, L, …]`; a `chunk_size` of 0 means one chunk."""
    length = hidden_states.shape[1]
    for start in range(0, length, chunk_size or length):
        yield slice(start, min(start + (chunk_size or length), length))


def apply_chunked(function: PositionWise, hidden_states: Tensor, chunk_size: int, module: nn.Module) -> Tensor:
    """
    Apply `function` to `hidden_states` `[B, L, …]` in chunks of positions.

    Only the input is saved for the backward pass, which recomputes each chunk with the same dropout.

    Args:
        function: A function that acts on each position independently.
        hidden_states: `[B, L, …]`.
        chunk_size: Positions per chunk; 0 applies `function` to the whole input.
        module: The module that `function` belongs to, with all of its parameters. The recomputation restores its mode.
            If it needs a plain call, `function` is applied to the whole input.

    Raises:
        RuntimeError: In a backward pass with `create_graph=True`, if there are several chunks.
    """
    if chunk_size == 0 or chunk_size >= hidden_states.shape[1] or needs_plain_call(module):
        return function(hidden_states)
    return _Chunked.apply(function, module, chunk_size, hidden_states, *trainable_parameters(module))


def map_chunks(function: Callable[[Tensor], Sequence[Tensor]], hidden_states: Tensor, chunk_size: int) -> list[Tensor]:
    """Apply `function`, which returns several results, to chunks of positions, without gradient."""
    results: list[Tensor] = []
    for positions in chunks_of(hidden_states, chunk_size):
        parts = function(hidden_states[:, positions])
        if not results:
            results = [x.new_empty((x.shape[0], hidden_states.shape[1], *x.shape[2:])) for x in parts]
        for result, part in zip(results, parts, strict=True):
            result[:, positions] = part
    return results


def vjp_chunks(
    function: Callable[[Tensor], Tensor | Sequence[Tensor]],
    hidden_states: Tensor,
    grads_of: Callable[[slice], Sequence[Tensor]],
    chunk_size: int,
    parameters: Sequence[Tensor],
    grad_parameters: list[Tensor | None],
    checks_sources: bool = False,
) -> Iterator[tuple[slice, list[Tensor], Tensor]]:
    """
    Compute the value and the vector-Jacobian product of `function`, chunk by chunk.

    Args:
        function: Maps a chunk of positions to one or several results.
        hidden_states, chunk_size: As in `apply_chunked`.
        grads_of: Returns the gradient of each result at the given positions.
        parameters: Parameters of `function`. All of them require gradients.
        grad_parameters: Initially one `None` per parameter. Receives the gradients of the parameters, summed over
            chunks; the entries of unused parameters remain `None`.
        checks_sources: Whether to raise an error if the results depend on other tensors with gradients.

    Yields:
        For each chunk: its positions, the results, and the gradient of `hidden_states` at these positions.
    """
    for positions in chunks_of(hidden_states, chunk_size):
        chunk = hidden_states[:, positions].detach().requires_grad_()
        with torch.enable_grad():
            out = function(chunk)
        results = [out] if isinstance(out, Tensor) else list(out)
        if checks_sources:
            refuse_other_sources(results, [chunk, *parameters])
        grad, *new_grads = torch.autograd.grad(results, [chunk, *parameters], grads_of(positions), allow_unused=True)
        accumulate(grad_parameters, new_grads)
        yield positions, [x.detach() for x in results], torch.zeros_like(chunk) if grad is None else grad


def accumulate(sums: list[Tensor | None], new_grads: Sequence[Tensor | None]) -> None:
    """Add new gradients to their sums, out of place: several of them may be one tensor. `None` means zero."""
    for i, new in enumerate(new_grads):
        if new is not None:
            sums[i] = new if (total := sums[i]) is None else total + new


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, module, chunk_size, hidden_states, *parameters):
        ctx.save_for_backward(hidden_states, *parameters)
        ctx.function, ctx.chunk_size, ctx.parameters = function, chunk_size, parameters
        ctx.state = ReplayState(hidden_states.device, module)
        out = torch.cat([function(chunk) for chunk in hidden_states.split(chunk_size, dim=1)], dim=1)
        ctx.state.keep_changed_buffers()
        return out

    @staticmethod
    def backward(ctx, grad_out):
        refuse_second_derivatives()
        # Saved parameters only serve autograd's check that they have not changed since.
        hidden_states, parameters = ctx.saved_tensors[0], ctx.parameters
        grad = torch.empty_like(hidden_states)
        grad_parameters: list[Tensor | None] = [None] * len(parameters)
        inputs = (ctx.function, hidden_states, lambda at: (grad_out[:, at],), ctx.chunk_size)
        with ctx.state.replay():
            chunks = vjp_chunks(*inputs, parameters, grad_parameters, ctx.state.has_foreign_modules)
            for positions, _, grad_chunk in chunks:
                grad[:, positions] = grad_chunk
        return None, None, None, grad, *grad_parameters
