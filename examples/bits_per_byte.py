# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The metric bits per byte, and a bigram model, a unigram model and xz as baselines."""

import lzma
import math

import datasets
import evaluate
import numpy as np
import torch
from byte_data import count_bytes
from torch import Tensor

from reformer_hf.tokenization_reformer_hf import FIRST_BYTE_ID, LAST_BYTE_ID


class BitsPerByte(evaluate.Metric):
    """
    Bits that a model needs to encode a text, divided by the number of bytes of the text.

    `predictions` are negative log-likelihoods in nats, summed over each sequence. `references` are the numbers of
    bytes in these sequences. The cost of special tokens is included, but they do not count as bytes.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Bits needed to encode a text, per byte of the text.",
            citation="",
            inputs_description="predictions: nats per sequence. references: bytes per sequence.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        num_bytes = sum(references)
        if num_bytes == 0:
            raise ValueError("The held-out text has no bytes, so bits per byte is undefined: give more held-out text.")
        return {"bits_per_byte": math.fsum(predictions) / math.log(2) / num_bytes}


def sum_nll(logits: Tensor | tuple[Tensor, ...], labels: Tensor, shift: bool = True) -> Tensor:
    """
    Sum the negative log-likelihoods of each sequence, `[B]`, so that `Trainer` gathers no `[B, L, V]` logits.

    With `shift`, the logits of a token predict the label of the next one, else that of the token itself.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
    return nll.sum(dim=1)


# The dictionary of `xz -9`.
_XZ_DICTIONARY = 1 << 26


def xz_bits_per_byte(train: np.ndarray, held_out: np.ndarray, sequence_length: int) -> dict[str, float]:
    """
    Compress a text with `xz -9`.

    Args:
        train, held_out: Token ids of `ReformerHfByteTokenizer`; the first held-out one is context. Other tokens than
            bytes are left out.
        sequence_length: Length of sequences.

    Returns:
        Bits per byte of `held_out`: `xz_bits_per_byte`, `xz_sequences_bits_per_byte` with each sequence compressed by
        itself, which sees as much context as a model does, and, if both texts fit into the dictionary of xz,
        `xz_after_training_text_bits_per_byte`, what it adds to the compressed training text.
    """
    held_out = held_out[1:]
    text = _bytes_of(held_out)
    starts = range(0, len(held_out), sequence_length)
    sequences = [_bytes_of(held_out[start : start + sequence_length]) for start in starts]
    sizes = {
        "xz_bits_per_byte": _xz_size(text),
        "xz_sequences_bits_per_byte": sum(map(_xz_size, sequences)),
    }
    if len(train) + len(held_out) <= _XZ_DICTIONARY:
        before = _bytes_of(train)
        sizes["xz_after_training_text_bits_per_byte"] = _xz_size(before + text) - _xz_size(before)
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def _bytes_of(ids: np.ndarray) -> bytes:
    ids = ids[(ids >= FIRST_BYTE_ID) & (ids <= LAST_BYTE_ID)]
    return (ids - FIRST_BYTE_ID).astype(np.uint8).tobytes()


def _xz_size(text: bytes) -> int:
    return len(lzma.compress(text, preset=9))


def bigram_bits_per_byte(train: np.ndarray, held_out: np.ndarray, alpha: float = 0.1) -> float:
    """
    Compute the bits per byte of a bigram model on `held_out`.

    Args:
        train (`np.ndarray`): Token ids of `ReformerHfByteTokenizer`, to which the model is fitted.
        held_out (`np.ndarray`): Token ids to predict, all except the first.
        alpha (`float`, defaults to 0.1): Pseudocount of every pair of tokens.

    Returns:
        `float`: Bits per byte.
    """
    counts = _count_pairs(train) + alpha
    # The padding id 0 does not occur and gets no probability.
    log_probs = np.log2(counts) - np.log2(counts[:, 1:].sum(axis=1, keepdims=True))
    return float(-(log_probs * _count_pairs(held_out)).sum() / count_bytes(held_out[1:]))


def unigram_bits_per_byte(train: np.ndarray, held_out: np.ndarray, alpha: float = 0.1) -> float:
    """
    Compute the bits per byte of a unigram model on `held_out`.

    Args:
        train (`np.ndarray`): Token ids of `ReformerHfByteTokenizer`, to which the model is fitted, except the first.
        held_out (`np.ndarray`): Token ids to predict, which are bytes.
        alpha (`float`, defaults to 0.1): Pseudocount of every byte.

    Returns:
        `float`: Bits per byte.
    """
    counts = _count_pairs(train).sum(axis=0)[FIRST_BYTE_ID:] + alpha
    log_probs = np.log2(counts) - np.log2(counts.sum())
    return float(-log_probs[held_out.astype(np.int64) - FIRST_BYTE_ID].mean())


def _count_pairs(stream: np.ndarray, piece: int = 1 << 20) -> np.ndarray:
    """Count how often each id follows each other id. Reads one piece of the stream at a time."""
    size = LAST_BYTE_ID + 1
    counts = np.zeros(size * size, dtype=np.int64)
    for start in range(0, len(stream) - 1, piece):
        ids = stream[start : start + piece + 1].astype(np.int64)
        counts += np.bincount(ids[:-1] * size + ids[1:], minlength=size * size)
    return counts.reshape(size, size)
