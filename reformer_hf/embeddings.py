# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Word embeddings, and position embeddings: axial (Kitaev et al. 2020, section 4) or learned per position."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from .configuration_reformer_hf import ReformerHfConfig
from .rng import dropout


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
        self.dropout = config.hidden_dropout_prob
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
        if not (self.training and self.dropout):
            return embeddings
        # Positions with the same last coordinate share a dropout decision, as with the in-tree dropout2d.
        kept = embeddings.new_ones((position_ids.shape[0], self.axes[-1]))
        kept = dropout(kept, self.dropout).gather(1, coordinates[-1])
        return embeddings * kept[..., None]


class PositionEmbeddings(nn.Module):
    """Position embeddings with one learned vector per position."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.dropout = config.hidden_dropout_prob
        self.embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return the embeddings `[B, L, E]` of positions `[B, L]`."""
        embeddings = self.embedding(position_ids)
        return dropout(embeddings, self.dropout) if self.training else embeddings


class ReformerHfEmbeddings(nn.Module):
    """The sum of word and position embeddings."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.dropout = config.hidden_dropout_prob
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        positions = AxialPositionEmbeddings if config.axial_pos_embds else PositionEmbeddings
        self.position_embeddings = positions(config)

    def forward(self, input_ids: Tensor | None, position_ids: Tensor, inputs_embeds: Tensor | None) -> Tensor:
        """Return the embeddings `[B, L, E]`, at least in fp32, with which both residual streams start."""
        embeds = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.training:
            embeds = dropout(embeds, self.dropout)
        embeds = embeds + self.position_embeddings(position_ids)
        return embeds.to(torch.promote_types(embeds.dtype, torch.float32))
