# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Tasks from sequence to sequence whose examples are generated.

`reverse`: the target is the source, reversed.

`lookup`: the source consists of questions, such as `ab=????`, and of records with different keys, such as `qx=3071`,
in random order. The targets are the values of the records with the keys of the questions. Exact attention of a decoder
reads the whole source, but each of its layers makes one step, and the first token of an answer needs two: from its
place to the question, and from the key of the question to the record. A decoder of one layer therefore needs an
encoder that brings questions and records together, across any distance.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Dataset

LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
RECORD_LENGTH = len("ab=1234;")
MAX_QUESTIONS = 8

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
    """
    Draw questions, and as many records with different keys as fit into `length`, and the values asked for.

    There are at most `MAX_QUESTIONS` questions, and at least as many records.
    """
    num_questions = min(MAX_QUESTIONS, (length + 1) // RECORD_LENGTH // 2)
    num_records = (length + 1) // RECORD_LENGTH - num_questions
    num_keys = len(LETTERS) ** 2
    if not 1 <= num_questions or num_records > num_keys:
        raise ValueError(
            f"A source of {length} characters has {num_questions} questions and {num_records} records, but must have "
            f"1 to {num_keys}, each with a key of its own: choose a length from {2 * RECORD_LENGTH} to "
            f"{(num_keys + MAX_QUESTIONS) * RECORD_LENGTH}."
        )
    keys = ["".join(LETTERS[list(divmod(key, len(LETTERS)))]) for key in rng.choice(num_keys, num_records, False)]
    values = [f"{value:04}" for value in rng.integers(10000, size=num_records)]
    asked = rng.choice(num_records, num_questions, replace=False)
    questions = [f"{keys[i]}=????" for i in asked]
    records = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
    return ";".join(questions + records), ";".join(values[i] for i in asked)
