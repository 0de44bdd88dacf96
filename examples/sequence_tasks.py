# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Tasks from sequence to sequence whose examples are generated.

`reverse`: the target is the source, reversed.

`lookup`: the source consists of records, such as `qx=3071;`, in random order. The first one has a question in place of
a value, such as `ab=????;`, and the target is the value of the record with the same key. Where the question and that
record meet matters: exact attention of a decoder reads the whole source, but each of its layers makes one step. The
first token of the target needs two steps, from the start to the question and from its key to the record. A decoder of
one layer therefore needs an encoder that brings both together, across any distance.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Dataset

LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
RECORD_LENGTH = len("ab=1234;")

# Draws one example, a source and a target, of at most so many characters.
Draw = Callable[[np.random.Generator, int], tuple[str, str]]


@dataclass(frozen=True)
class SequenceTask:
    """
    A generated task.

    Args:
        draw: Draws an example.
        description: What the source and the target are.
        max_length: Length of the longest sources, including the end token.
        max_target_length: Length of the longest targets, including the end token.
        stages: Lengths of sources and numbers of training examples, in the order of training.
        config: Fields of the config of a new model.
        options: Training arguments that differ from those of other data.
    """

    draw: Draw
    description: str
    max_length: int
    max_target_length: int
    stages: tuple[tuple[int, int], ...]
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


class GeneratedExamples(Dataset):
    """
    Examples that are generated when they are read. The seed and the index of an example determine it.

    Args:
        draw: Draws an example.
        stages: Lengths of sources and numbers of examples of such lengths, in this order.
        seed: Seed of all examples.
        encode: Maps the source and the target to model inputs; by default, a dictionary of both texts.
    """

    def __init__(
        self,
        draw: Draw,
        stages: tuple[tuple[int, int], ...],
        seed: int,
        encode: Callable[[str, str], dict] = lambda source, target: {"source": source, "target": target},
    ):
        self._draw, self._stages, self._seed, self._encode = draw, stages, seed, encode

    def __len__(self) -> int:
        return sum(number for _, number in self._stages)

    def __getitem__(self, index: int) -> dict:
        remaining = index
        for length, number in self._stages:
            if remaining < number:
                # The end token is not part of the text.
                return self._encode(*self._draw(np.random.default_rng((self._seed, index)), length - 1))
            remaining -= number
        raise IndexError(f"The index {index} is out of range: there are {len(self)} examples.")


def draw_reverse(rng: np.random.Generator, length: int) -> tuple[str, str]:
    """Draw 16 to `length` random letters and their reverse."""
    letters = "".join(rng.choice(LETTERS, rng.integers(min(16, length), length + 1)))
    return letters, letters[::-1]


def draw_lookup(rng: np.random.Generator, length: int) -> tuple[str, str]:
    """Draw a question and as many records with different keys as fit into `length`, and the value asked for."""
    num_records = (length + 1) // RECORD_LENGTH - 1
    num_keys = len(LETTERS) ** 2
    if not 1 <= num_records <= num_keys:
        raise ValueError(
            f"A source of {length} characters has {num_records} records, but must have 1 to {num_keys}, each with a "
            f"key of its own: choose a length from {2 * RECORD_LENGTH} to {(num_keys + 1) * RECORD_LENGTH}."
        )
    keys = [
        f"{LETTERS[key // len(LETTERS)]}{LETTERS[key % len(LETTERS)]}"
        for key in rng.choice(num_keys, num_records, replace=False)
    ]
    values = [f"{value:04}" for value in rng.integers(10000, size=num_records)]
    asked = rng.integers(num_records)
    records = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
    return ";".join([f"{keys[asked]}=????", *records]), values[asked]
