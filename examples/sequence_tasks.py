# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Tasks from sequence to sequence whose examples are generated.

`reverse`: the target is the source, reversed.

`capitals`: the source begins with the 26 letters of the alphabet, in random order. Later, among signs that say
nothing, each of them comes once more, in another order, as a small letter or a capital. The target is the first
sequence, in which the letters are capitals if they are capitals later. Exact attention of the decoder reads the whole
source, but each of its layers makes one step, and a letter of the target needs two: from its place to the letter at
that place, and from there to the other one. A decoder of one layer therefore needs an encoder that brings the two
together, across any distance.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Dataset

LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
SIGNS = np.array(list(" .,-"))

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


def draw_capitals(rng: np.random.Generator, length: int) -> tuple[str, str]:
    """
    Draw the letters, a text of signs and letters, and the letters as in that text; `length` characters in total.

    Raises:
        ValueError: If `length` is too short for all letters to come twice.
    """
    number = len(LETTERS)
    # Each letter has a part of the text of its own, at a random place.
    part = (length - number) // number
    if part < 1:
        raise ValueError(f"A source has {length} characters, but must have at least {2 * number}.")
    letters = rng.permutation(LETTERS)
    cased = np.where(rng.random(number) < 0.5, np.char.upper(letters), letters)
    text = rng.choice(SIGNS, length - number)
    text[part * np.arange(number) + rng.integers(part, size=number)] = rng.permutation(cased)
    return "".join([*letters, *text]), "".join(cased)
