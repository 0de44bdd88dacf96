# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Reversible residual layers (Gomez et al. 2017; Kitaev et al. 2020, section 3).

    y1 = x1 + attention(x2)        x2 = y2 - feed_forward(y1)
    y2 = x2 + feed_forward(y1)     x1 = y1 - attention(x2)

A layer may have more than these two branches, see `residual_layer`. Each layer is one autograd function whose inputs
include its parameters, so that tools with hooks on modules and parameters (DDP, FSDP2, adapters) work as for any other
layer. Layers do not save their inputs. Consecutive layers form a segment, which holds a single pair of streams: at
first the output of its last layer. The backward pass of a layer replaces the layer's output in the segment by its
input. A layer whose inputs are not the outputs of the layer before, because a hook or a wrapper changed them, begins a
new segment.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .chunked import accumulate, chunks_of, map_chunks, vjp_chunks
from .dropout import SeededDropout
from .gradient_checks import refuse_other_sources, refuse_second_derivatives
from .replay import ReplayState, is_foreign, trainable_parameters

logger = logging.get_logger(__name__)

Streams = tuple[Tensor, Tensor]
Gradients = list[Tensor | None]


@dataclass
class Branch(ABC):
    """
    One residual branch of a layer: a function of one stream `[B, L, E]` that is added to the other stream.

    The function is pure except for dropout. It returns intermediate results such as a sorted order, and the backward
    pass reuses them.

    Args:
        module: The module that computes the function, with all of its parameters.

    Attributes:
        parameters: Tensors other than the stream that require gradients: the parameters of the module, and in some
            branches others.
    """

    module: nn.Module

    def __post_init__(self) -> None:
        self.parameters = trainable_parameters(self.module)

    @property
    def checks_sources(self) -> bool:
        """Whether a module inside may read tensors that are not its parameters, see `vjp_chunks`."""
        return any(map(is_foreign, self.module.modules()))

    @abstractmethod
    def add_to(self, other: Tensor, stream: Tensor, sign: int = 1, found: Any = None) -> tuple[Tensor, Any]:
        """
        Add the branch of `stream` to the other stream, or subtract it if the sign is -1, without gradient.

        Returns:
            The sum, and intermediate results.
        """

    def replay_state(self, device: torch.device) -> ReplayState:
        """Capture what the function depends on besides its input."""
        return ReplayState(device, self.module)

    @abstractmethod
    def reverse_and_grad(
        self, total: Tensor, stream: Tensor, grad_total: Tensor, grad_stream: Tensor, rest: Tensor, found: Any
    ) -> tuple[Tensor, Gradients]:
        """
        Subtract the branch of `stream` from `total`, and backpropagate through the branch.

        Args:
            total: The sum that the branch was added to.
            stream: The input of the branch.
            grad_total, grad_stream: Gradients of both, the latter without that of the branch.
            rest: Receives the difference. May be `total` itself.
            found: Intermediate results of the forward pass.

        Returns:
            The gradient of `stream`, including `grad_stream`, and the gradients of the parameters.
        """


@dataclass
class PositionWiseBranch(Branch):
    """
    A branch that acts on each position independently.

    Args:
        module: Maps a chunk of positions to the values that are added to them.
        chunk_size: Positions per chunk; 0 for all.
    """

    chunk_size: int = 0

    def add_to(self, other: Tensor, stream: Tensor, sign: int = 1, found: Any = None) -> tuple[Tensor, None]:
        out = torch.empty_like(other)
        for positions in chunks_of(stream, self.chunk_size):
            torch.add(other[:, positions], self.module(stream[:, positions]), alpha=sign, out=out[:, positions])
        return out, None

    def reverse_and_grad(
        self, total: Tensor, stream: Tensor, grad_total: Tensor, grad_stream: Tensor, rest: Tensor, found: Any
    ) -> tuple[Tensor, Gradients]:
        grads: Gradients = [None] * len(self.parameters)
        inputs = self.module, stream, lambda at: (grad_total[:, at],), self.chunk_size
        chunks = vjp_chunks(*inputs, self.parameters, grads, self.checks_sources)
        return _reverse_chunks(chunks, total, grad_stream, rest), grads


@dataclass
class ContextBranch(Branch):
    """
    A branch that acts on each position independently, given what it computes from a context for all positions.

    Args:
        module: The module that computes the functions, with all of its parameters.
        function: Maps a chunk of positions and the prepared context to the values that are added to them.
        context: Another input of the branch, which may require a gradient.
        prepare: Maps the context to tensors, such as keys and values.
        chunk_size: Positions per chunk; 0 for all.
        observe: Maps the stream and the prepared context to intermediate results.
    """

    function: Callable[..., Tensor]
    context: Tensor
    prepare: Callable[[Tensor], Sequence[Tensor]]
    chunk_size: int = 0
    observe: Callable[[Tensor, Sequence[Tensor]], Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context.requires_grad:
            self.parameters.append(self.context)

    def add_to(self, other: Tensor, stream: Tensor, sign: int = 1, found: Any = None) -> tuple[Tensor, Any]:
        prepared, out = self.prepare(self.context), torch.empty_like(other)
        for positions in chunks_of(stream, self.chunk_size):
            added = self.function(stream[:, positions], *prepared)
            torch.add(other[:, positions], added, alpha=sign, out=out[:, positions])
        return out, self.observe(stream, prepared) if self.observe is not None else None

    def reverse_and_grad(
        self, total: Tensor, stream: Tensor, grad_total: Tensor, grad_stream: Tensor, rest: Tensor, found: Any
    ) -> tuple[Tensor, Gradients]:
        # Hooks of the context see its whole gradient, later.
        context = self.context.detach().requires_grad_(self.context.requires_grad)
        parameters = [context if tensor is self.context else tensor for tensor in self.parameters]
        with torch.enable_grad():
            prepared = self.prepare(context)
        if self.checks_sources:
            refuse_other_sources(prepared, parameters)
        leaves = [tensor.detach().requires_grad_() for tensor in prepared]
        grads: Gradients = [None] * (len(leaves) + len(parameters))
        chunks = vjp_chunks(
            lambda chunk: self.function(chunk, *leaves),
            stream,
            lambda at: (grad_total[:, at],),
            self.chunk_size,
            [*leaves, *parameters],
            grads,
            self.checks_sources,
        )
        grad_sum = _reverse_chunks(chunks, total, grad_stream, rest)
        grads_of_leaves, grads = grads[: len(leaves)], grads[len(leaves) :]
        tracked = [(x, grad) for x, grad in zip(prepared, grads_of_leaves, strict=True) if x.requires_grad]
        if tracked and parameters:
            outputs, grads_of_outputs = zip(*tracked, strict=True)
            accumulate(grads, torch.autograd.grad(outputs, parameters, grads_of_outputs, allow_unused=True))
        return grad_sum, grads


def _reverse_chunks(
    chunks: Iterator[tuple[slice, list[Tensor], Tensor]], total: Tensor, grad_stream: Tensor, rest: Tensor
) -> Tensor:
    """Write `total` without what each chunk of `vjp_chunks` has added to `rest`; return the sum of gradients."""
    grad_sum = torch.empty_like(grad_stream)
    for positions, (added,), grad in chunks:
        torch.sub(total[:, positions], added, out=rest[:, positions])
        torch.add(grad_stream[:, positions], grad, out=grad_sum[:, positions])
    return grad_sum


@dataclass
class AttentionPart:
    """
    The contribution of some heads to a stream: `write(attend(read(stream)))`.

    Args:
        read: Maps a chunk of positions of the stream to queries, keys and values. Called with `values=False` if only
            the gradients of the results are needed.
        attend: Maps queries, keys and values of all positions to the output of the heads `[B, L, …]` and intermediate
            results. Also takes the intermediate results of an earlier run, or `None`. Uses no parameters.
        write: Maps a chunk of positions of that output to the values that are added to them.
    """

    read: Callable[..., Sequence[Tensor]]
    attend: Callable[[Sequence[Tensor], Any], tuple[Tensor, Any]]
    write: Callable[[Tensor], Tensor]


@dataclass
class AttentionBranch(Branch):
    """
    A branch that is a sum over parts, computed one after the other.

    The only tensors as large as a stream are the streams and their gradients: parts read and write in chunks of
    positions.

    Args:
        module: See `Branch`.
        parts: See `AttentionPart`.
        chunk_size: Positions per chunk to read and write; 0 for all.
        dropout: Dropout of the sum over the parts; `None` for none.
    """

    parts: Sequence[AttentionPart]
    chunk_size: int = 0
    dropout: SeededDropout | None = None

    def add_to(
        self, other: Tensor, stream: Tensor, sign: int = 1, found: Sequence | None = None
    ) -> tuple[Tensor, list]:
        out, drop, found_now = torch.empty_like(other), self._drop(stream), []
        for part, part_found in zip(self.parts, found or [None] * len(self.parts), strict=True):
            output, part_found = part.attend(map_chunks(part.read, stream, self.chunk_size), part_found)
            for at in chunks_of(stream, self.chunk_size):
                added = drop(part.write(output[:, at]), at)
                torch.add(other[:, at], added, alpha=sign, out=out[:, at])
            other = out
            found_now.append(part_found)
        return out, found_now

    def reverse_and_grad(
        self, total: Tensor, stream: Tensor, grad_total: Tensor, grad_stream: Tensor, rest: Tensor, found: Sequence
    ) -> tuple[Tensor, Gradients]:
        grad_sum, drop = torch.empty_like(grad_stream), self._drop(stream)
        grads: Gradients = [None] * len(self.parameters)
        for part, part_found in zip(self.parts, found, strict=True):
            # An adapter may draw random numbers in `read`, or change buffers, which the second call below must repeat.
            state = self.replay_state(stream.device)
            inputs = [x.requires_grad_() for x in map_chunks(part.read, stream, self.chunk_size)]
            state.keep_changed_buffers()
            with torch.enable_grad():
                output, _ = part.attend(inputs, part_found)
            grad_output = torch.empty_like(output)
            grads_of = partial(_grad_added, drop, grad_total)
            chunks = (self.chunk_size, self.parameters, grads, self.checks_sources)
            for at, (added,), grad in vjp_chunks(part.write, output.detach(), grads_of, *chunks):
                torch.sub(total[:, at], drop(added, at), out=rest[:, at])
                grad_output[:, at] = grad
            grad_inputs = torch.autograd.grad(output, inputs, grad_output, materialize_grads=True)
            del inputs, output, grad_output
            read, grads_of = partial(part.read, values=False), partial(_at, grad_inputs)
            with state.replay():
                for at, _, grad in vjp_chunks(read, stream, grads_of, *chunks):
                    torch.add(grad_stream[:, at], grad, out=grad_sum[:, at])
            del grad_inputs, grads_of
            # The next part is subtracted from the rest, and adds to the gradient.
            total, grad_stream = rest, grad_sum
        return grad_sum, grads

    def _drop(self, stream: Tensor) -> Callable[[Tensor, slice], Tensor]:
        return _drop_nothing if self.dropout is None else self.dropout.in_chunks(stream)


def _drop_nothing(added: Tensor, at: slice) -> Tensor:
    return added


def _grad_added(drop: Callable[[Tensor, slice], Tensor], grad_total: Tensor, at: slice) -> Sequence[Tensor]:
    return (drop(grad_total[:, at], at),)


def _at(tensors: Sequence[Tensor], positions: slice) -> Sequence[Tensor]:
    return [tensor[:, positions] for tensor in tensors]


@dataclass
class _Record:
    """The branches of a layer, the state under which each of them ran, and their intermediate results."""

    branches: Sequence[Branch]
    states: list[ReplayState] = field(default_factory=list)
    found: list[Any] = field(default_factory=list)

    def run(self, x1: Tensor, x2: Tensor, captures_states: bool = False) -> Streams:
        """Compute the output of the layer without gradient, and record the results."""
        for branch in self.branches:
            if captures_states:
                self.states.append(branch.replay_state(x1.device))
            total, found = branch.add_to(x1, x2)
            if captures_states:
                self.states[-1].keep_changed_buffers()
            self.found.append(found)
            x1, x2 = x2, total
        return x1, x2

    def reversed(self) -> Iterator[tuple[Branch, ReplayState, Any]]:
        """Iterate over the branches from the last to the first, with their states and results."""
        return zip(reversed(self.branches), reversed(self.states), reversed(self.found), strict=True)

    def invert(self, streams: Streams) -> Streams:
        """Recompute the input of the layer from its output."""
        stream, total = streams
        for branch, state, found in self.reversed():
            with state.replay():
                rest, _ = branch.add_to(total, stream, sign=-1, found=found)
            stream, total = rest, stream
        return stream, total


class _Segment:
    """Consecutive layers whose backward pass has not run yet, and the output of the last one of them."""

    def __init__(self) -> None:
        self._streams: Streams | None = None
        self._versions: list[int] = []
        # Whether there are no other references to the streams, so that they may be overwritten.
        self._private = False
        self._records: list[_Record] = []

    def push(self, record: _Record, streams: Streams) -> int:
        """Append a layer and its output to the segment, and return the index of the layer."""
        self._records.append(record)
        self._set_streams(streams, private=False)
        return len(self._records) - 1

    def ends_with(self, x1: Tensor, x2: Tensor) -> bool:
        """
        Return whether these are the streams at the end of the segment, in the same memory.

        Raises:
            RuntimeError: If they were changed in place.
        """
        if self._streams is None or not all(_same_memory(x, y) for x, y in zip((x1, x2), self._streams, strict=True)):
            return False
        self._check_versions()
        return True

    def share(self, streams: Streams) -> None:
        """Replace the streams by equal ones that are kept elsewhere, so that only one copy exists."""
        self._set_streams(streams, private=False)

    def rewind(self, index: int) -> tuple[_Record, Streams, bool]:
        """
        Remove the layer at `index` from the segment. Invert the layers after it, which did not contribute to the loss.

        Returns:
            The layer, its output, and whether the output may be overwritten.

        Raises:
            RuntimeError: If an earlier backward pass has removed the layer, or if its output was changed in place.
        """
        if self._streams is None or index >= len(self._records):
            raise RuntimeError(
                "The activations of this reversible model were used up by an earlier backward pass. Run the forward "
                "pass again, or build the model with `reversible=False` for several backward passes "
                "(`retain_graph=True`)."
            )
        self._check_versions()
        while index < len(self._records) - 1:
            record = self._records.pop()
            with torch.no_grad():
                self._set_streams(record.invert(self._streams), private=True)
        streams, self._streams = self._streams, None
        return self._records.pop(), streams, self._private

    def put_back(self, streams: Streams) -> None:
        """Store streams without other references as the output of the last layer, if any layers are left."""
        if self._records:
            self._set_streams(streams, private=True)

    def _set_streams(self, streams: Streams, private: bool) -> None:
        self._streams, self._private = streams, private
        self._versions = [stream._version for stream in streams]

    def _check_versions(self) -> None:
        if self._streams is not None and [stream._version for stream in self._streams] != self._versions:
            raise RuntimeError(
                "The output of a reversible layer was changed in place, which the backward pass needs: return a "
                "changed copy instead (such as `hidden_states + vector`), or build the model with `reversible=False`."
            )


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


class Tape:
    """The segments of reversible layers of one forward pass."""

    def __init__(self) -> None:
        self._segment: _Segment | None = None

    def segment_after(self, x1: Tensor, x2: Tensor) -> _Segment:
        """Return the segment for a layer with these inputs: the last one if it ends with them, else a new one."""
        if self._segment is None or not self._segment.ends_with(x1, x2):
            self._segment = _Segment()
        return self._segment

    def share(self, x1: Tensor, x2: Tensor, streams: Streams) -> None:
        """Let the last segment, if it ends with `x1` and `x2`, hold equal streams that are kept elsewhere instead."""
        if self._segment is not None and self._segment.ends_with(x1, x2):
            self._segment.share(streams)


def residual_layer(
    x1: Tensor, x2: Tensor, branches: Sequence[Branch], tape: Tape | None
) -> tuple[Tensor, Tensor, Sequence[Any]]:
    """
    Compute one layer of residual branches. The backward pass recomputes its input from its output.

    Each branch reads one stream and is added to the other. Then the streams swap: the next branch reads the
    stream that was changed last.

    Args:
        x1, x2: The two streams `[B, L, E]`, at least in fp32 for an accurate inversion. The first branch reads `x2`.
        branches: Two branches or more. A second run in the backward pass must reproduce the first one.
        tape: The tape that the layers of one forward pass share. Not needed without gradient.

    Returns:
        The two streams after the layer, the one that was changed last in the second place, and the intermediate
        results of each branch.

    Raises:
        RuntimeError: In a second backward pass through the layer, or in one with `create_graph=True`, or if one of the
            streams after the layer was changed in place.
    """
    parameters = [parameter for branch in branches for parameter in branch.parameters]
    needs_grad = x1.requires_grad or x2.requires_grad or parameters
    record = _Record(branches)
    if tape is None or not (torch.is_grad_enabled() and needs_grad):
        x1, x2 = record.run(x1, x2)
        return x1, x2, record.found
    if x1.dtype.itemsize < 4:
        logger.warning_once(
            f"The residual streams are in {x1.dtype}, so recomputed activations are inaccurate: keep them "
            "in fp32, for FSDP2 with `MixedPrecisionPolicy(…, cast_forward_inputs=False)`."
        )
    x1, x2 = _ReversibleLayer.apply(record, tape.segment_after(x1, x2), x1, x2, *parameters)
    return x1, x2, record.found


class _ReversibleLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, record, segment, x1, x2, *parameters):
        y1, y2 = record.run(x1, x2, captures_states=True)
        # For autograd's check that parameters have not changed since.
        ctx.save_for_backward(*parameters)
        ctx.segment, ctx.index = segment, segment.push(record, (y1.detach(), y2.detach()))
        return y1, y2

    @staticmethod
    def backward(ctx, grad1, grad2):
        refuse_second_derivatives()
        _ = ctx.saved_tensors
        record, (stream, total), stream_is_private = ctx.segment.rewind(ctx.index)
        total_is_private = stream_is_private
        grads: list[Gradients] = []
        for branch, state, found in record.reversed():
            rest = total if total_is_private else torch.empty_like(total)
            with state.replay():
                grad1, parameter_grads = branch.reverse_and_grad(total, stream, grad2, grad1, rest=rest, found=found)
            grads.insert(0, parameter_grads)
            # Before this branch, the streams were in the other order.
            (stream, total), (grad1, grad2) = (rest, stream), (grad2, grad1)
            stream_is_private, total_is_private = True, stream_is_private
        ctx.segment.put_back((stream, total))
        return None, None, grad1, grad2, *(grad for parameter_grads in grads for grad in parameter_grads)
