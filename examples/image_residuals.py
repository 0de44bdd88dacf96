# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Residuals of tiles: what is left of each byte after the predictor of JPEG-LS. Nothing is lost."""

import numpy as np
import torch
from image_baselines import FIRST, median_prediction, neighbor_predictions
from transformers import LogitsProcessor


def to_residuals(tiles: np.ndarray) -> np.ndarray:
    """
    Subtract the predictions of bytes from their neighbors, modulo 256.

    Args:
        tiles: `[num_tiles, height, width, 3]` (`uint8`).

    Returns:
        Residuals of the predictor `median` of `image_baselines.neighbor_predictions`, of the same shape and dtype.
    """
    return ((tiles - neighbor_predictions(tiles)["median"]) % 256).astype(np.uint8)


def from_residuals(residuals: np.ndarray) -> np.ndarray:
    """Return the tiles `[num_tiles, height, width, 3]` (`uint8`) of the result of `to_residuals`."""
    # A row above and a column on the left, so that all pixels have neighbors.
    tiles = np.pad(residuals.astype(np.int64), ((0, 0), (1, 0), (1, 0), (0, 0)))
    for row in range(1, tiles.shape[1]):
        for column in range(1, tiles.shape[2]):
            tiles[:, row, column] = (_prediction(tiles, row, column) + tiles[:, row, column]) % 256
    return tiles[:, 1:, 1:].astype(np.uint8)


def _prediction(tiles: np.ndarray, row: int, column: int) -> np.ndarray:
    """Return the prediction `[num_tiles, 3]` of a pixel of tiles that begin with a row and a column of zeros."""
    left, above = tiles[:, row, column - 1], tiles[:, row - 1, column]
    if row > 1 and column > 1:
        return median_prediction(left, above, tiles[:, row - 1, column - 1])
    return left if column > 1 else above if row > 1 else np.full_like(left, FIRST)


class NoWrapping(LogitsProcessor):
    """
    Do not sample residuals that lead below 0 or above 255, where a bright pixel would become a dark one.

    A model of residuals does not see how bright a pixel is. A residual counts as the number from -128 to 127 that it
    equals modulo 256. An instance is for one call of `generate`.

    Args:
        size: Height and width of a tile.
    """

    def __init__(self, size: int):
        self.size = size
        self.num_decoded = 0
        self.tiles = np.zeros(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set the scores `[B, V]` of the bytes after `input_ids` `[B, L]`, which begin with the token of begin."""
        residuals = input_ids[:, 1:].cpu().numpy()
        if not len(self.tiles):
            self.tiles = np.zeros((len(residuals), self.size + 1, self.size + 1, 3), dtype=np.int64)
        for i in range(self.num_decoded, residuals.shape[1]):
            row, column, channel = self._place(i)
            predicted = _prediction(self.tiles, row, column)[:, channel]
            self.tiles[:, row, column, channel] = (predicted + residuals[:, i]) % 256
        self.num_decoded = residuals.shape[1]
        row, column, channel = self._place(self.num_decoded)
        predicted = torch.from_numpy(_prediction(self.tiles, row, column)[:, channel])
        value = predicted[:, None] + (torch.arange(256) + 128) % 256 - 128
        wraps = ((value < 0) | (value > 255)).to(scores.device)
        return torch.cat([scores[:, :256].masked_fill(wraps, -torch.inf), scores[:, 256:]], dim=1)

    def _place(self, i: int) -> tuple[int, int, int]:
        """Return row, column and channel of byte `i`, with the row and the column of zeros."""
        pixel, channel = divmod(i, 3)
        return 1 + pixel // self.size, 1 + pixel % self.size, channel
