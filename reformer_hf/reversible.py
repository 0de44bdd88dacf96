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

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunked import chunks_of, vjp_chunks
from .rng import ReplayState

Streams = tuple[Tensor, Tensor]


@dataclass
class Branch:
    """
    One residual branch of a layer.

    Args:
        function: From one stream `[B, L, E]` to what is added to the other.
        parameters: Those of `function` that require gradients.
        chunk_size: Positions that it may take at a time; 0 for all.
        draws: Whether it takes random numbers from the global generators.
    """

    function: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]
    chunk_size: int = 0
    draws: bool = False

    def add_to(self, other: Tensor, stream: Tensor, sign: int = 1) -> Tensor:
        """The other stream with the branch of `stream` added, or taken away where the sign is -1."""
        out = torch.empty_like(other)
        for positions in chunks_of(stream, self.chunk_size):
            torch.add(other[:, positions], self.function(stream[:, positions]), alpha=sign, out=out[:, positions])
        return out

    def go_back(
        self, total: Tensor, stream: Tensor, grad_total: Tensor, grad_stream: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """
        Take the branch of `stream` away from `total`, and carry the gradient through it.

        Returns:
            What is left of `total`, the gradient of `stream` with what came through the branch added to `grad_stream`,
            and the gradients of the parameters.
        """
        rest = grad_sum = None
        grad_parameters: list[Tensor | None] = [None] * len(self.parameters)
        for positions, added, grad in vjp_chunks(
            self.function, stream, grad_total, self.chunk_size, self.parameters, grad_parameters
        ):
            if rest is None:
                # Not before the first chunk's graph is gone: where there is one chunk, memory is fullest then.
                rest, grad_sum = torch.empty_like(total), torch.empty_like(grad_stream)
            torch.sub(total[:, positions], added, out=rest[:, positions])
            torch.add(grad_stream[:, positions], grad, out=grad_sum[:, positions])
        return rest, grad_sum, grad_parameters


@dataclass
class _Record:
    """What a layer needs to go back: its branches and the state under which they ran."""

    branches: tuple[Branch, Branch]
    states: tuple[ReplayState, ReplayState]


class Tape:
    """The pair of streams on which the backward pass of a stack stands, and the layers behind it."""

    def __init__(self) -> None:
        self._streams: Streams | None = None
        self._records: list[_Record] = []

    def push(self, record: _Record, streams: Streams) -> int:
        """Put a layer and its output on the tape; returns the layer's place."""
        self._records.append(record)
        self._streams = streams
        return len(self._records) - 1

    def rewind(self, place: int) -> tuple[_Record, Streams]:
        """Take the layer at `place` off the tape, with its output; layers after it, which had no part in the loss, are
        inverted on the way."""
        if self._streams is None or place >= len(self._records):
            raise RuntimeError(
                "The activations of this reversible model were used up by an earlier backward pass. Run the forward "
                "pass again, or build the model with `reversible=False` to go backward twice (`retain_graph=True`)."
            )
        while place < len(self._records) - 1:
            record = self._records.pop()
            with torch.no_grad():
                self._streams = _invert(record, self._streams)
        streams, self._streams = self._streams, None
        return self._records.pop(), streams

    def put_back(self, streams: Streams) -> None:
        """Stand on these streams, unless there is no layer left that could want them."""
        if self._records:
            self._streams = streams


def reversible_layer(x1: Tensor, x2: Tensor, attention: Branch, feed_forward: Branch, tape: Tape) -> Streams:
    """
    One layer whose input is recomputed from its output in the backward pass.

    Args:
        x1, x2: The two streams `[B, L, E]`, in fp32 at least for the inversion to be accurate.
        attention, feed_forward: The branches. Called again in the backward pass they must do what they did.
        tape: Shared by the layers of one forward pass, in order.

    Returns:
        The two streams after the layer.

    Raises:
        RuntimeError: In a second backward pass, or in one with `create_graph=True`.
    """
    parameters = (*attention.parameters, *feed_forward.parameters)
    return _ReversibleLayer.apply(attention, feed_forward, tape, x1, x2, *parameters)


class _ReversibleLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attention, feed_forward, tape, x1, x2, *parameters):
        attention_state = ReplayState(x1.device, generators=attention.draws)
        y1 = attention.add_to(x1, x2)
        feed_forward_state = ReplayState(x1.device, generators=feed_forward.draws)
        y2 = feed_forward.add_to(x2, y1)
        record = _Record((attention, feed_forward), (attention_state, feed_forward_state))
        ctx.tape, ctx.place = tape, tape.push(record, (y1.detach(), y2.detach()))
        return y1, y2

    @staticmethod
    def backward(ctx, grad_y1, grad_y2):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A second derivative through a reversible layer is not supported (`create_graph=True`): build the "
                "model with `reversible=False`."
            )
        record, (y1, y2) = ctx.tape.rewind(ctx.place)
        attention, feed_forward = record.branches
        attention_state, feed_forward_state = record.states
        with feed_forward_state.replay():
            x2, grad_x1, feed_forward_grads = feed_forward.go_back(y2, y1, grad_y2, grad_y1)
        del y2
        with attention_state.replay():
            x1, grad_x2, attention_grads = attention.go_back(y1, x2, grad_x1, grad_y2)
        ctx.tape.put_back((x1, x2))
        return None, None, None, grad_x1, grad_x2, *attention_grads, *feed_forward_grads


def _invert(record: _Record, streams: Streams) -> Streams:
    """The input of a layer, from its output."""
    y1, y2 = streams
    attention, feed_forward = record.branches
    attention_state, feed_forward_state = record.states
    with feed_forward_state.replay():
        x2 = feed_forward.add_to(y2, y1, sign=-1)
    with attention_state.replay():
        return attention.add_to(y1, x2, sign=-1), x2
