# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Word and position embeddings; axial positions of any number of axes (Kitaev et al. 2020, section 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, embedding

from .configuration_reformer_hf import ReformerHfConfig


class AxialTables(nn.ParameterList):
    """The tables of all axes: a list, for the names of its parameters, and a module that computes with them, for what
    looks for the module that owns parameters (initialisation, and weights that wait on a disk until it is called)."""

    __call__ = nn.Module.__call__

    def forward(self, coordinates: Sequence[Tensor]) -> Tensor:
        """Embeddings `[B, L, E]` of the coordinates `[B, L]` on each axis."""
        tables = (table.flatten(0, -2) for table in self)
        return torch.cat([embedding(i, table) for i, table in zip(coordinates, tables, strict=True)], dim=-1)


class AxialPositionEmbeddings(nn.Module):
    """
    One table an axis; a position's embedding is the concatenation of what its coordinates select.

    Coordinates are the digits of the position in mixed radix, the last axis the fastest. Weights have the in-tree
    shapes: axis `a` of `n` holds `[1, …, axial_pos_shape[a], …, 1, axial_pos_embds_dim[a]]`.
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
        """Embeddings `[B, L, E]` of positions `[B, L]`, each below the product of the axes."""
        coordinates: list[Tensor] = []
        rest = position_ids
        for size in reversed(self.axes[1:]):
            coordinates.insert(0, rest % size)
            rest = rest // size
        coordinates.insert(0, rest)
        embeddings = self.weights(coordinates)
        if not (self.training and self.dropout):
            return embeddings
        # Positions that share their last coordinate are dropped together, as by dropout2d in-tree.
        kept = embeddings.new_ones((position_ids.shape[0], self.axes[-1]))
        kept = dropout(kept, self.dropout).gather(1, coordinates[-1])
        return embeddings * kept[..., None]


class PositionEmbeddings(nn.Module):
    """One learned vector for each position."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.dropout = config.hidden_dropout_prob
        self.embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, position_ids: Tensor) -> Tensor:
        """Embeddings `[B, L, E]` of positions `[B, L]`."""
        return dropout(self.embedding(position_ids), self.dropout, training=self.training)


class ReformerHfEmbeddings(nn.Module):
    """Sum of word and position embeddings."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.dropout = config.hidden_dropout_prob
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        positions = AxialPositionEmbeddings if config.axial_pos_embds else PositionEmbeddings
        self.position_embeddings = positions(config)

    def forward(self, input_ids: Tensor | None, position_ids: Tensor, inputs_embeds: Tensor | None) -> Tensor:
        """`[B, L, E]`, in fp32 at least: the streams of the reversible stack start here."""
        embeds = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.training:
            embeds = dropout(embeds, self.dropout)
        embeds = embeds + self.position_embeddings(position_ids)
        return embeds.to(torch.promote_types(embeds.dtype, torch.float32))
