# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Residuals of tiles: what is left of each byte after the predictor of JPEG-LS. Nothing is lost."""

import numpy as np
from image_baselines import FIRST, median_prediction, neighbor_predictions


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
            left, above = tiles[:, row, column - 1], tiles[:, row - 1, column]
            predicted = median_prediction(left, above, tiles[:, row - 1, column - 1])
            if row == 1 or column == 1:
                predicted = left if column > 1 else above if row > 1 else FIRST
            tiles[:, row, column] = (predicted + tiles[:, row, column]) % 256
    return tiles[:, 1:, 1:].astype(np.uint8)
