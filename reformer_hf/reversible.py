# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Reversible residual layers (Gomez et al. 2017; Kitaev et al. 2020, section 3).

    y1 = x1 + attention(x2)        x2 = y2 - feed_forward(y1)
    y2 = x2 + feed_forward(y1)     x1 = y1 - attention(x2)

Each layer is one autograd function with its parameters among the inputs, so that whatever hooks on modules and
parameters (DDP, FSDP2, adapters) sees them as it sees those of any layer. No layer keeps its input: a tape that the
stack shares holds the one pair of streams that exists, the output of the last layer, and every backward step replaces
the output of its layer by the input.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .chunked import apply_chunked, chunks_of, map_chunks, vjp_chunks
from .rng import ReplayState

Streams = tuple[Tensor, Tensor]
Gradients = list[Tensor | None]


class Branch(ABC):
    """
    One residual branch of a layer: a function of one stream `[B, L, E]` that is added to the other.

    The function is pure but for the dropout that it draws. What it finds on its way, such as a sorted order, it
    returns; the backward pass gives it back, so that it is not found again.

    Args:
        parameters: Those of the function that require gradients.
        uses_rng: Whether it takes random numbers from the global generators.
    """

    parameters: Sequence[Tensor]
    uses_rng: bool

    @abstractmethod
    def add(self, other: Tensor, stream: Tensor) -> tuple[Tensor, Any]:
        """The other stream with the branch of `stream` added, differentiable, and what was found."""

    @abstractmethod
    def add_to(self, other: Tensor, stream: Tensor, sign: int = 1, found: Any = None) -> tuple[Tensor, Any]:
        """The same without gradient; subtracted where the sign is -1."""

    @abstractmethod
    def reverse_and_grad(
        self, total: Tensor, stream: Tensor, grad_total: Tensor, grad_stream: Tensor, rest: Tensor, found: Any
    ) -> tuple[Tensor, Gradients]:
        """
        Subtract the branch of `stream` from `total`, and propagate the gradient through it.

        Args:
            rest: Takes what is left of `total`, and may be `total`.
            found: What was found in the forward pass.

        Returns:
            The gradient of `stream`, `grad_stream` included, and the gradients of the parameters.
        """


@dataclass
class PositionWiseBranch(Branch):
    """
    Acts on each position by itself.

    Args:
        function: From a chunk of positions to what is added there.
        parameters, uses_rng: See `Branch`.
        chunk_size: Positions at a time; 0 for all.
        recompute: Whether `add` keeps nothing but its inputs and computes each chunk once more in the backward pass.
    """

    function: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]
    uses_rng: bool = False
    chunk_size: int = 0
    recompute: bool = False

    def add(self, other: Tensor, stream: Tensor) -> tuple[Tensor, None]:
        added = apply_chunked(self.function, stream, self.chunk_size, self.parameters, self.recompute)
        return other + added, None

    def add_to(self, other: Tensor, stream: Tensor, sign: int = 1, found: Any = None) -> tuple[Tensor, None]:
        out = torch.empty_like(other)
        for positions in chunks_of(stream, self.chunk_size):
            torch.add(other[:, positions], self.function(stream[:, positions]), alpha=sign, out=out[:, positions])
        return out, None

    def reverse_and_grad(
        self, total: Tensor, stream: Tensor, grad_total: Tensor, grad_stream: Tensor, rest: Tensor, found: Any
    ) -> tuple[Tensor, Gradients]:
        grad_sum = torch.empty_like(grad_stream)
        grads: Gradients = [None] * len(self.parameters)
        chunks = vjp_chunks(
            self.function, stream, lambda at: (grad_total[:, at],), self.chunk_size, self.parameters, grads
        )
        for positions, (added,), grad in chunks:
            torch.sub(total[:, positions], added, out=rest[:, positions])
            torch.add(grad_stream[:, positions], grad, out=grad_sum[:, positions])
        return grad_sum, grads


@dataclass
class AttentionPart:
    """
    What some heads add to a stream: `write(attend(read(stream)))`.

    Args:
        read: From a chunk of positions of the stream to queries, keys and values there. Takes `values=False` where the
            results themselves are not needed, but their gradients are.
        attend: From those of all positions, and what it found before if it is run again, to the output of the heads
            `[B, L, …]` and what it found. Uses no parameters.
        write: From a chunk of positions of that output to what is added there.
    """

    read: Callable[..., Sequence[Tensor]]
    attend: Callable[[Sequence[Tensor], Any], tuple[Tensor, Any]]
    write: Callable[[Tensor], Tensor]


@dataclass
class AttentionBranch(Branch):
    """
    A sum over parts, which are computed one after the other.

    Nothing as wide as the stream exists but the stream, its gradient and those of the other one: what reads from and
    writes to them takes a chunk of positions at a time.

    Args:
        parts: See `AttentionPart`.
        parameters, uses_rng: See `Branch`.
        chunk_size: Positions to be read or written at a time; 0 for all.
        dropout: Makes, for one pass over the parts, the function that takes some positions of what one of them adds to
            what is left of it; `None` where nothing is dropped.
    """

    parts: Sequence[AttentionPart]
    parameters: Sequence[Tensor]
    uses_rng: bool = False
    chunk_size: int = 0
    dropout: Callable[[], Callable[[Tensor, slice], Tensor]] | None = None

    def add(self, other: Tensor, stream: Tensor) -> tuple[Tensor, list]:
        chunks, drop, found = list(chunks_of(stream, self.chunk_size)), self._drop(), []
        for part in self.parts:
            inputs = zip(*(part.read(stream[:, at]) for at in chunks), strict=True)
            heads, of_part = part.attend([torch.cat(x, dim=1) for x in inputs], None)
            added = torch.cat([drop(part.write(heads[:, at]), at) for at in chunks], dim=1)
            other = other + added
            found.append(of_part)
        return other, found

    def add_to(
        self, other: Tensor, stream: Tensor, sign: int = 1, found: Sequence | None = None
    ) -> tuple[Tensor, list]:
        out, drop, found_now = torch.empty_like(other), self._drop(), []
        for part, of_part in zip(self.parts, found or [None] * len(self.parts), strict=True):
            heads, of_part = part.attend(map_chunks(part.read, stream, self.chunk_size), of_part)
            for at in chunks_of(stream, self.chunk_size):
                added = drop(part.write(heads[:, at]), at)
                torch.add(other[:, at], added, alpha=sign, out=out[:, at])
            other = out
            found_now.append(of_part)
        return out, found_now

    def reverse_and_grad(
        self, total: Tensor, stream: Tensor, grad_total: Tensor, grad_stream: Tensor, rest: Tensor, found: Sequence
    ) -> tuple[Tensor, Gradients]:
        grad_sum, drop = torch.empty_like(grad_stream), self._drop()
        grads: Gradients = [None] * len(self.parameters)
        for part, of_part in zip(self.parts, found, strict=True):
            # An adapter may draw random numbers as it reads, and is to draw them again.
            state = ReplayState(stream.device, generators=self.uses_rng)
            inputs = [x.requires_grad_() for x in map_chunks(part.read, stream, self.chunk_size)]
            with torch.enable_grad():
                heads, _ = part.attend(inputs, of_part)
            grad_heads = torch.empty_like(heads)
            grads_of = partial(_grad_added, drop, grad_total)
            for at, (added,), grad in vjp_chunks(
                part.write, heads.detach(), grads_of, self.chunk_size, self.parameters, grads
            ):
                torch.sub(total[:, at], drop(added, at), out=rest[:, at])
                grad_heads[:, at] = grad
            grad_inputs = torch.autograd.grad(heads, inputs, grad_heads, materialize_grads=True)
            del inputs, heads, grad_heads
            read, grads_of = partial(part.read, values=False), partial(_at, grad_inputs)
            with state.replay():
                for at, _, grad in vjp_chunks(read, stream, grads_of, self.chunk_size, self.parameters, grads):
                    torch.add(grad_stream[:, at], grad, out=grad_sum[:, at])
            del grad_inputs, grads_of
            # What the next part is taken from, and added to.
            total, grad_stream = rest, grad_sum
        return grad_sum, grads

    def _drop(self) -> Callable[[Tensor, slice], Tensor]:
        return _drop_nothing if self.dropout is None else self.dropout()


def _drop_nothing(added: Tensor, at: slice) -> Tensor:
    return added


def _grad_added(drop: Callable[[Tensor, slice], Tensor], grad_total: Tensor, at: slice) -> Sequence[Tensor]:
    return (drop(grad_total[:, at], at),)


def _at(tensors: Sequence[Tensor], positions: slice) -> Sequence[Tensor]:
    return [tensor[:, positions] for tensor in tensors]


@dataclass
class _Record:
    """What the backward pass of a layer needs: its branches, the state under which they ran, and what they found."""

    branches: tuple[Branch, Branch]
    states: tuple[ReplayState, ReplayState] | None = None
    found: tuple[Any, Any] = (None, None)


class Tape:
    """The pair of streams on which the backward pass of a stack stands, and the layers behind it."""

    def __init__(self) -> None:
        self._streams: Streams | None = None
        # Whether nobody else has a hold of them, so that they may be written over.
        self._private = False
        self._records: list[_Record] = []

    def push(self, record: _Record, streams: Streams) -> int:
        """Put a layer and its output on the tape; returns the layer's place."""
        self._records.append(record)
        self._streams, self._private = streams, False
        return len(self._records) - 1

    def share(self, streams: Streams) -> None:
        """Stand on these streams, which equal the output of the last layer, so that it need not exist twice."""
        if self._streams is not None:
            self._streams = streams

    def rewind(self, place: int) -> tuple[_Record, Streams, bool]:
        """Take the layer at `place` off the tape, with its output, and say whether that may be written over; layers
        after it, which had no part in the loss, are inverted on the way."""
        if self._streams is None or place >= len(self._records):
            raise RuntimeError(
                "The activations of this reversible model were used up by an earlier backward pass. Run the forward "
                "pass again, or build the model with `reversible=False` to go backward twice (`retain_graph=True`)."
            )
        while place < len(self._records) - 1:
            record = self._records.pop()
            with torch.no_grad():
                self._streams, self._private = _invert(record, self._streams), True
        streams, self._streams = self._streams, None
        return self._records.pop(), streams, self._private

    def put_back(self, streams: Streams) -> None:
        """Stand on these streams, of which nobody else knows, unless there is no layer left that could want them."""
        if self._records:
            self._streams, self._private = streams, True


def residual_layer(
    x1: Tensor, x2: Tensor, attention: Branch, feed_forward: Branch, tape: Tape | None
) -> tuple[Tensor, Tensor, Any]:
    """
    One layer of two residual branches.

    Args:
        x1, x2: The two streams `[B, L, E]`, in fp32 at least for the inversion to be accurate.
        attention, feed_forward: The branches. Run again in the backward pass they must do what they did.
        tape: Shared by the layers of one forward pass, in order; the backward pass then recomputes the input of each
            layer from its output. `None` keeps activations.

    Returns:
        The two streams after the layer, and what `attention` found.

    Raises:
        RuntimeError: In a second backward pass through a tape, or in one with `create_graph=True`.
    """
    needs_grad = x1.requires_grad or x2.requires_grad or attention.parameters or feed_forward.parameters
    if not (torch.is_grad_enabled() and needs_grad):
        y1, found = attention.add_to(x1, x2)
        y2, _ = feed_forward.add_to(x2, y1)
    elif tape is None:
        y1, found = attention.add(x1, x2)
        y2, _ = feed_forward.add(x2, y1)
    else:
        record = _Record((attention, feed_forward))
        y1, y2 = _ReversibleLayer.apply(record, tape, x1, x2, *attention.parameters, *feed_forward.parameters)
        found = record.found[0]
    return y1, y2, found


class _ReversibleLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, record, tape, x1, x2, *parameters):
        attention, feed_forward = record.branches
        attention_state = ReplayState(x1.device, generators=attention.uses_rng)
        y1, found = attention.add_to(x1, x2)
        feed_forward_state = ReplayState(x1.device, generators=feed_forward.uses_rng)
        y2, feed_forward_found = feed_forward.add_to(x2, y1)
        record.states, record.found = (attention_state, feed_forward_state), (found, feed_forward_found)
        ctx.tape, ctx.place = tape, tape.push(record, (y1.detach(), y2.detach()))
        return y1, y2

    @staticmethod
    def backward(ctx, grad_y1, grad_y2):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A second derivative through a reversible layer is not supported (`create_graph=True`): build the "
                "model with `reversible=False`."
            )
        record, (y1, y2), private = ctx.tape.rewind(ctx.place)
        (attention, feed_forward), (found, feed_forward_found) = record.branches, record.found
        attention_state, feed_forward_state = record.states
        x2 = y2 if private else torch.empty_like(y2)
        with feed_forward_state.replay():
            grad_x1, feed_forward_grads = feed_forward.reverse_and_grad(
                y2, y1, grad_y2, grad_y1, rest=x2, found=feed_forward_found
            )
        del y2
        x1 = y1 if private else torch.empty_like(y1)
        with attention_state.replay():
            grad_x2, attention_grads = attention.reverse_and_grad(y1, x2, grad_x1, grad_y2, rest=x1, found=found)
        ctx.tape.put_back((x1, x2))
        return None, None, grad_x1, grad_x2, *attention_grads, *feed_forward_grads


def _invert(record: _Record, streams: Streams) -> Streams:
    """The input of a layer, from its output."""
    y1, y2 = streams
    (attention, feed_forward), (found, feed_forward_found) = record.branches, record.found
    attention_state, feed_forward_state = record.states
    with feed_forward_state.replay():
        x2, _ = feed_forward.add_to(y2, y1, sign=-1, found=feed_forward_found)
    with attention_state.replay():
        return attention.add_to(y1, x2, sign=-1, found=found)[0], x2
