# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Bits per byte: the metric, and the figure of a bigram model to hold it against."""

import math

import datasets
import evaluate
import numpy as np
from byte_data import count_bytes

from reformer_hf.tokenization_reformer_hf import LAST_BYTE_ID


class BitsPerByte(evaluate.Metric):
    """
    Bits that a model needs for a text, divided by the bytes of the text.

    `predictions` are negative log-likelihoods in nats, one sum a sequence; `references` the numbers of bytes in these
    sequences. What special tokens cost counts; they are no bytes themselves.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Bits needed for a text, per byte of the text.",
            citation="",
            inputs_description="predictions: nats per sequence. references: bytes per sequence.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        num_bytes = sum(references)
        if num_bytes == 0:
            raise ValueError("The held-out text holds no byte, so that bits per byte are undefined.")
        return {"bits_per_byte": math.fsum(predictions) / math.log(2) / num_bytes}


def bigram_bits_per_byte(train: np.ndarray, held_out: np.ndarray, alpha: float = 0.1) -> float:
    """
    Bits per byte of a bigram model, fitted on `train`, for all tokens of `held_out` but the first.

    Args:
        train, held_out (`np.ndarray`): Streams of token ids of `ReformerHfByteTokenizer`.
        alpha (`float`): Count given to every pair beforehand.
    """
    counts = _count_pairs(train) + alpha
    # The padding id, 0, never occurs and gets no share of the probability.
    log_probs = np.log2(counts) - np.log2(counts[:, 1:].sum(axis=1, keepdims=True))
    return float(-(log_probs * _count_pairs(held_out)).sum() / count_bytes(held_out[1:]))


def _count_pairs(stream: np.ndarray, piece: int = 1 << 20) -> np.ndarray:
    """How often each id follows each; the stream may be a memory map, of which one piece is looked at at a time."""
    size = LAST_BYTE_ID + 1
    counts = np.zeros(size * size, dtype=np.int64)
    for start in range(0, len(stream) - 1, piece):
        ids = stream[start : start + piece + 1].astype(np.int64)
        counts += np.bincount(ids[:-1] * size + ids[1:], minlength=size * size)
    return counts.reshape(size, size)
