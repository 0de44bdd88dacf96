# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
ListOps: nested operations on lists of digits, whose result is a digit (Nangia & Bowman 2018, arXiv 1804.06028).

    [MAX 4 [MIN 8 2 ] 0 ]  →  4

The long form in Long Range Arena (Tay et al. 2020, arXiv 2011.04006) has expressions of 500 to 2,000 tokens, at most
10 operators deep, with 2 to 10 arguments each. The operators are the minimum, the maximum, the median (rounded down)
and the sum modulo 10. As in that benchmark, an argument is an expression with probability 1/4, and expressions of
other lengths are drawn again. Classes are as frequent as they come out.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import datasets
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(median(values)),
    "[SM": lambda values: sum(values) % 10,
}
END = "]"
DIGITS = [str(digit) for digit in range(10)]

MAX_DEPTH = 10
MAX_ARGUMENTS = 10
EXPRESSION_PROBABILITY = 0.25


def evaluate(tokens: Sequence[str]) -> int:
    """
    Return the value of an expression.

    Raises:
        ValueError: If the tokens are not one expression.
    """
    stack: list[tuple[str, list[int]]] = []
    for i, token in enumerate(tokens):
        if token in OPERATORS:
            stack.append((token, []))
            continue
        if token == END and stack and stack[-1][1]:
            operator, values = stack.pop()
            value = OPERATORS[operator](values)
        elif token in DIGITS:
            value = int(token)
        else:
            raise ValueError(f"Token {i} is {token!r}, but must be an operator, a digit or, after arguments, {END!r}.")
        if stack:
            stack[-1][1].append(value)
        elif i == len(tokens) - 1:
            return value
        else:
            break
    raise ValueError(f"The {len(tokens)} tokens are not one expression: operators and {END!r} do not match.")


def draw_expression(generator: random.Random, min_length: int, max_length: int) -> list[str]:
    """Draw the tokens of an expression of `min_length` to `max_length` tokens."""
    while True:
        tokens = _draw(generator, depth=1, budget=max_length)
        if tokens is not None and len(tokens) >= min_length:
            return tokens


def _draw(generator: random.Random, depth: int, budget: int) -> list[str] | None:
    """Draw an expression that starts at a depth; `None` if it gets longer than `budget` tokens."""
    tokens = [generator.choice(list(OPERATORS))]
    for _ in range(generator.randint(2, MAX_ARGUMENTS)):
        if depth < MAX_DEPTH and generator.random() < EXPRESSION_PROBABILITY:
            argument = _draw(generator, depth + 1, budget - len(tokens))
            if argument is None:
                return None
            tokens += argument
        else:
            tokens.append(generator.choice(DIGITS))
    return [*tokens, END] if len(tokens) < budget else None


def draw_examples(count: int, seed: int, min_length: int = 500, max_length: int = 2000) -> Iterator[dict]:
    """Yield `count` examples: the expression as `text`, and its value as `label`."""
    generator = random.Random(seed)
    for _ in range(count):
        tokens = draw_expression(generator, min_length, max_length)
        yield {"text": " ".join(tokens), "label": evaluate(tokens)}


def load_listops(
    num_train: int, num_held_out: int, seed: int = 0, min_length: int = 500, max_length: int = 2000
) -> datasets.DatasetDict:
    """
    Draw training and held-out examples, none of which is in both.

    Args:
        num_train, num_held_out: Number of examples.
        seed: Seed of the training examples. The held-out ones are the same for every seed.
        min_length, max_length: Lengths of the expressions, in tokens.
    """
    held_out = list(draw_examples(num_held_out, 2**32, min_length, max_length))
    seen = {example["text"] for example in held_out}
    train = [x for x in draw_examples(num_train, seed, min_length, max_length) if x["text"] not in seen]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=DIGITS)})
    splits = {"train": train, "validation": held_out}
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows, features=features) for name, rows in splits.items()}
    )


def listops_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each digit, operator and closing bracket."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", *DIGITS, *OPERATORS, END])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", model_max_length=max_length
    )


def baselines(examples: datasets.DatasetDict) -> dict[str, float]:
    """
    Return the held-out accuracy of two guesses that read at most one token.

    `majority`: the most frequent value. `root_operator`: the most frequent value given the first operator, which alone
    says much, since a maximum of many numbers is mostly 9 and a minimum mostly 0.
    """
    return {
        "majority": majority(examples),
        "root_operator": _accuracy_given(examples, lambda text: text.split(" ", 1)[0]),
    }


def majority(examples: datasets.DatasetDict) -> float:
    """Return the held-out accuracy of the most frequent label."""
    return _accuracy_given(examples, lambda text: "")


def _accuracy_given(examples: datasets.DatasetDict, key: Callable[[str], str]) -> float:
    counts: dict[str, Counter[int]] = {}
    for example in examples["train"]:
        counts.setdefault(key(example["text"]), Counter())[example["label"]] += 1
    best = {name: of_labels.most_common(1)[0][0] for name, of_labels in counts.items()}
    held_out = examples["validation"]
    return sum(best.get(key(each["text"])) == each["label"] for each in held_out) / len(held_out)
