# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Word embeddings, and position embeddings: axial (Kitaev et al. 2020, section 4) or learned per position."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from .configuration_reformer_hf import ReformerHfConfig
from .dropout import RateDropout


def repeat_entries(table: Tensor, dim: int, size: int, used: int, repeated: int) -> Tensor:
    """
    Cut an embedding table along one axis, or extend it by copies.

    Args:
        table: The table.
        dim: The axis of its entries.
        size: New number of entries.
        used: Number of first entries that stay as they are.
        repeated: The entries from `used` on become copies of this number of first entries, repeated in order: entry
            `i` is a copy of entry `i % repeated`.

    Returns:
        A new table with the dtype and device of the old one.
    """
    entries = torch.arange(size, device=table.device)
    return table.detach().index_select(dim, torch.where(entries < used, entries, entries % repeated))


class AxialTables(nn.ParameterList):
    """
    The embedding tables of all axes.

    It is a `ParameterList` for the in-tree parameter names. It has a `forward` because initialization and disk offload
    act on the module that owns the parameters.
    """

    __call__ = nn.Module.__call__

    def forward(self, coordinates: Sequence[Tensor]) -> Tensor:
        """Return the embeddings `[B, L, E]` of the coordinates `[B, L]` on each axis."""
        tables = (table.flatten(0, -2) for table in self)
        return torch.cat([embedding(i, table) for i, table in zip(coordinates, tables, strict=True)], dim=-1)


class AxialPositionEmbeddings(nn.Module):
    """
    Axial position embeddings: one table per axis, whose embeddings are concatenated.

    The coordinates of a position are its digits in mixed radix, with the last axis changing fastest. The weights have
    the in-tree shapes: axis `a` has the shape `[1, …, axial_pos_shape[a], …, 1, axial_pos_embds_dim[a]]`.
    """

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.axes = tuple(config.axial_pos_shape)
        self.dropout = RateDropout(config.hidden_dropout_prob)
        self.weights = AxialTables()
        for axis, dim in enumerate(config.axial_pos_embds_dim):
            shape = [1] * len(self.axes)
            shape[axis] = self.axes[axis]
            self.weights.append(nn.Parameter(torch.ones(*shape, dim)))

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return the embeddings `[B, L, E]` of positions `[B, L]`, each below the product of the axis sizes."""
        coordinates: list[Tensor] = []
        rest = position_ids
        for size in reversed(self.axes[1:]):
            coordinates.insert(0, rest % size)
            rest = rest // size
        coordinates.insert(0, rest)
        embeddings = self.weights(coordinates)
        if not self.dropout.rate:
            return embeddings
        # Positions with the same last coordinate share a dropout decision, as with the in-tree dropout2d.
        kept = embeddings.new_ones((position_ids.shape[0], self.axes[-1]))
        kept = self.dropout(kept).gather(1, coordinates[-1])
        return embeddings * kept[..., None]

    def resize(self, old: int, new: int) -> None:
        """
        Change the number of positions from `old` to `new`.

        Only the first axis changes its size, because the coordinates of a position depend on the sizes of all others.
        If `new` is larger, the entries that no old position used, on any axis, become copies of used ones.
        """
        strides = [math.prod(self.axes[axis + 1 :]) for axis in range(len(self.axes))]
        num_rows = math.ceil(new / strides[0])
        if new < old:
            self._set_entries(0, num_rows, num_rows, num_rows)
            return
        sizes = (max(self.axes[0], num_rows), *self.axes[1:])
        for axis, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
            used = min(size, math.ceil(old / stride))
            # The last used entry is not repeated if it does not have all of its positions.
            repeated = min(size, max(old // stride, 1))
            if used < size:
                self._set_entries(axis, size, used, repeated)

    def _set_entries(self, axis: int, size: int, used: int, repeated: int) -> None:
        weight = self.weights[axis]
        table = repeat_entries(weight, axis, size, used, repeated)
        if size == self.axes[axis]:
            # A parameter that keeps its size stays the same object, for optimizers.
            weight.detach().copy_(table)
            return
        self.weights[axis] = nn.Parameter(table, requires_grad=weight.requires_grad)
        self.axes = (size, *self.axes[1:])


class PositionEmbeddings(nn.Module):
    """Position embeddings with one learned vector per position."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.dropout = RateDropout(config.hidden_dropout_prob)
        self.embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return the embeddings `[B, L, E]` of positions `[B, L]`."""
        embeddings = self.embedding(position_ids)
        return self.dropout(embeddings)

    def resize(self, old: int, new: int) -> None:
        """Change the number of positions from `old` to `new`: cut the last ones, or repeat the old ones in order."""
        weight = self.embedding.weight
        table = repeat_entries(weight, 0, new, old, old)
        self.embedding.weight = nn.Parameter(table, requires_grad=weight.requires_grad)
        self.embedding.num_embeddings = new


class ReformerHfEmbeddings(nn.Module):
    """The sum of word and position embeddings."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.dropout = RateDropout(config.hidden_dropout_prob)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        positions = AxialPositionEmbeddings if config.axial_pos_embds else PositionEmbeddings
        self.position_embeddings = positions(config)

    def forward(self, input_ids: Tensor | None, position_ids: Tensor, inputs_embeds: Tensor | None) -> Tensor:
        """Return the embeddings `[B, L, E]`, at least in fp32, with which both residual streams start."""
        embeds = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        embeds = self.dropout(embeds) + self.position_embeddings(position_ids)
        return embeds.to(torch.promote_types(embeds.dtype, torch.float32))


def resize_positions(embeddings: nn.Module, old: int, new: int) -> None:
    """
    Change the number of positions of a `ReformerHfEmbeddings` from `old` to `new`.

    The first `min(old, new)` positions keep their vectors. Others start from these vectors, repeated in order.

    Raises:
        ValueError: If `new` is not a number of positions, or if other modules wrap or replace the embeddings.
    """
    if not isinstance(new, int) or isinstance(new, bool) or new < 1:
        raise ValueError(
            f"`new_num_position_embeddings` is {new!r}, but must be an `int` of at least 1: give the length of the "
            "longest input in tokens, such as 16384."
        )
    own = (ReformerHfEmbeddings, AxialPositionEmbeddings, AxialTables, PositionEmbeddings, nn.Embedding, RateDropout)
    positions: Any = embeddings.position_embeddings
    for module in (embeddings, *positions.modules()):
        if not isinstance(module, own):
            # PEFT keeps several copies of such a module, and only one of them would be resized.
            raise ValueError(
                f"The position embeddings are wrapped or replaced by a `{type(module).__name__}`, which cannot be "
                "resized: call `resize_position_embeddings` before this (before `get_peft_model`)."
            )
    if new != old:
        positions.resize(old, new)
