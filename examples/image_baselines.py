# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Baselines for bits per dimension: residuals of neighbors in the same color channel, and lossless image formats."""

import io

import numpy as np
from PIL import Image

# The value that predicts the first pixel of a tile.
FIRST = 128


def median_prediction(left: np.ndarray, above: np.ndarray, upper_left: np.ndarray) -> np.ndarray:
    """Predict bytes as JPEG-LS does: the median of left, above and left + above − upper left (integers)."""
    return np.median(np.stack([left, above, left + above - upper_left]), axis=0).astype(np.int64)


def neighbor_predictions(tiles: np.ndarray) -> dict[str, np.ndarray]:
    """
    Predict each byte of tiles from its neighbors in the same color channel.

    Pixels of the first row are predicted from the left neighbor, those of the first column from the one above, and the
    first pixel as 128.

    Args:
        tiles: `[num_tiles, height, width, 3]` (`uint8`).

    Returns:
        Predictions (`int64`, shaped like `tiles`, from 0 to 255) by name: `left`, `above`, their `mean`, and `median`,
        the median of left, above and left + above − upper left (the predictor of JPEG-LS).
    """
    padded = np.pad(tiles.astype(np.int64), ((0, 0), (1, 0), (1, 0), (0, 0)))
    left, above, upper_left = padded[:, 1:, :-1], padded[:, :-1, 1:], padded[:, :-1, :-1]
    predictions = {
        "left": left.copy(),
        "above": above.copy(),
        "mean": (left + above) // 2,
        "median": median_prediction(left, above, upper_left),
    }
    for prediction in predictions.values():
        prediction[:, 0, 1:] = tiles[:, 0, :-1]
        prediction[:, 1:, 0] = tiles[:, :-1, 0]
        prediction[:, 0, 0] = FIRST
    return predictions


def neighbor_bits(train: np.ndarray, held_out: np.ndarray, alpha: float = 0.1) -> dict[str, float]:
    """
    Compute the bits per byte of residuals of `neighbor_predictions`.

    For each predictor and color channel, a histogram of the residuals modulo 256 is fitted to the training tiles.

    Args:
        train, held_out: Tiles `[num_tiles, height, width, 3]` (`uint8`).
        alpha: Pseudocount of every residual.

    Returns:
        Bits per byte of the held-out tiles, by name of the predictor.
    """
    fitted, predicted = neighbor_predictions(train), neighbor_predictions(held_out)
    return {name: _residual_bits(train - fitted[name], held_out - predicted[name], alpha) for name in fitted}


def _residual_bits(train: np.ndarray, held_out: np.ndarray, alpha: float) -> float:
    bits = []
    for channel in range(3):
        counts = np.bincount(train[..., channel].ravel() % 256, minlength=256) + alpha
        costs = np.log2(counts.sum()) - np.log2(counts)
        bits.append(costs[held_out[..., channel] % 256].mean())
    return float(np.mean(bits))


def format_bits(tiles: np.ndarray, image_format: str, **options) -> float:
    """
    Compute the bits per byte of tiles as files of a lossless image format, one file for each tile with its headers.

    Args:
        tiles: `[num_tiles, height, width, 3]` (`uint8`).
        image_format: Format of Pillow, such as `"PNG"`.
        options: Options of the format for `Image.save`.
    """
    num_bytes = 0
    for tile in tiles:
        file = io.BytesIO()
        Image.fromarray(tile).save(file, image_format, **options)
        num_bytes += file.tell()
    return 8 * num_bytes / tiles.size
