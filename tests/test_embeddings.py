# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Axial position embeddings against the in-tree ones and their definition, and what dropout drops."""

import itertools
import math

import torch
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import AxialPositionEmbeddings as InTreeAxialPositionEmbeddings

from reformer_hf.embeddings import AxialPositionEmbeddings, PositionEmbeddings

from .helpers import assert_close, tiny_config

SHAPES = {1: ((60,), (32,)), 2: ((6, 10), (8, 24)), 3: ((3, 4, 5), (8, 12, 12))}


def _embeddings(axes, **fields):
    shape, dims = SHAPES[axes]
    config = tiny_config(
        axial_pos_shape=shape, axial_pos_embds_dim=dims, max_position_embeddings=math.prod(shape), **fields
    )
    embeddings = AxialPositionEmbeddings(config)
    torch.manual_seed(0)
    for weight in embeddings.weights:
        torch.nn.init.normal_(weight)
    return embeddings


def _definition(embeddings, position):
    """Coordinates are the place of the position in the list of all of them, the last axis the fastest."""
    coordinates = list(itertools.product(*(range(size) for size in embeddings.axes)))[position]
    tables = [weight.reshape(-1, weight.shape[-1]) for weight in embeddings.weights]
    return torch.cat([table[i] for table, i in zip(tables, coordinates, strict=True)])


def test_growing_an_axis():
    """A longer first axis moves no position, so the message of the config suggests it; any other one does."""
    config = {"axial_pos_embds_dim": (8, 24), "max_position_embeddings": 60}
    embeddings = AxialPositionEmbeddings(tiny_config(axial_pos_shape=(6, 10), **config)).eval()
    for weight in embeddings.weights:
        torch.nn.init.normal_(weight)
    for axis, shape in enumerate(((9, 10), (6, 15))):
        grown = AxialPositionEmbeddings(tiny_config(axial_pos_shape=shape, **config)).eval()
        for new, old in zip(grown.weights, embeddings.weights, strict=True):
            new.data[: old.shape[0], : old.shape[1]] = old.data
        position_ids = torch.arange(60)[None]
        assert torch.equal(grown(position_ids), embeddings(position_ids)) == (axis == 0)


def _in_tree(embeddings):
    shape, dims = SHAPES[2]
    config = ReformerConfig(
        axial_pos_shape=shape, axial_pos_embds_dim=dims, hidden_size=32, hidden_dropout_prob=0.0, attn_layers=["local"]
    )
    in_tree = InTreeAxialPositionEmbeddings(config)
    in_tree.load_state_dict(embeddings.state_dict())
    return in_tree


def test_equals_in_tree():
    for training, length in itertools.product((False, True), (1, 2, 9, 10, 11, 37, 60)):
        embeddings = _embeddings(2)
        # In training, in-tree takes the product of the axes for a length only; without dropout it computes the same.
        in_tree = _in_tree(embeddings).train(training and length == 60)
        position_ids = torch.arange(length).expand(2, length)
        found, expected = embeddings.train(training)(position_ids), in_tree(position_ids)
        assert torch.equal(found, expected), (length, training)
        torch.manual_seed(1)
        weight = torch.randn_like(found)
        grads, expected_grads = (
            torch.autograd.grad((out * weight).sum(), list(module.parameters()))
            for out, module in ((found, embeddings), (expected, in_tree))
        )
        for (name, _), grad, expected_grad in zip(embeddings.named_parameters(), grads, expected_grads, strict=True):
            assert_close(grad, expected_grad, 1e-6, f"{name}, {length} positions")


def test_equals_in_tree_at_positions():
    embeddings = _embeddings(2).eval()
    position_ids = torch.tensor([[59, 0, 0, 13], [1, 2, 50, 49]])
    assert torch.equal(embeddings(position_ids), _in_tree(embeddings).eval()(position_ids))


def test_equals_definition():
    for axes in SHAPES:
        embeddings = _embeddings(axes)
        expected = torch.stack([_definition(embeddings, position) for position in range(60)])
        assert torch.equal(embeddings(torch.arange(60)[None])[0], expected), axes
        shuffled = torch.randperm(60).view(2, 30)
        assert torch.equal(embeddings(shuffled), expected[shuffled]), axes
        # Positions differ.
        assert torch.unique(expected, dim=0).shape[0] == 60


def test_dropout_by_last_coordinate():
    """Positions with one last coordinate are dropped together."""
    for axes, length in itertools.product(SHAPES, (1, 23, 60)):
        embeddings, of = _embeddings(axes, hidden_dropout_prob=0.375), f"{axes} axes, {length} positions"
        position_ids = torch.arange(length).expand(64, length)
        whole = embeddings.eval()(position_ids)
        torch.manual_seed(0)
        found = embeddings.train()(position_ids)
        dropped = (found == 0).all(-1)
        # This rate is not rounded.
        assert_close(found[~dropped], whole[~dropped] / 0.625, 1e-6, of)
        last = position_ids[0] % embeddings.axes[-1]
        for coordinate in last.unique():
            column = dropped[:, last == coordinate]
            assert torch.equal(column.any(-1), column.all(-1)), of
        by_coordinate = dropped[:, : embeddings.axes[-1]]
        # Five standard deviations of so many draws.
        assert abs(by_coordinate.float().mean() - 0.375) < 5 * (0.375 * 0.625 / by_coordinate.numel()) ** 0.5, of
        # Rows of a batch draw for themselves.
        assert by_coordinate.any() and not by_coordinate.all(), of


def test_dropout_of_gradient():
    embeddings = _embeddings(2, hidden_dropout_prob=0.375).train()
    torch.manual_seed(0)
    out = embeddings(torch.arange(60)[None])
    kept = (out != 0).any(-1)[0]
    out.sum().backward()
    per_column = kept.view(6, 10)[0] * 6 / 0.625
    assert_close(embeddings.weights[1].grad[0], per_column[:, None].expand(10, 24), 1e-6)


def test_learned_positions():
    torch.manual_seed(0)
    embeddings = PositionEmbeddings(tiny_config(axial_pos_embds=False, hidden_dropout_prob=0.5))
    position_ids = torch.tensor([[3, 0, 255]])
    expected = embeddings.embedding.weight[position_ids]
    assert torch.equal(embeddings.eval()(position_ids), expected)
    found = embeddings.train()(position_ids)
    kept = found != 0
    assert 0 < kept.sum() < kept.numel()
    assert_close(found[kept], 2 * expected[kept], 1e-6)
