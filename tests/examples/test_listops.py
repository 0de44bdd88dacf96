# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""ListOps: values of expressions, lengths and depths, splits, tokens, baselines."""

import random

from listops import OPERATORS, baselines, draw_examples, draw_expression, evaluate, listops_tokenizer, load_listops

from ..helpers import assert_refused

CASES = {
    "[MAX 4 [MIN 8 2 ] 0 ]": 4,
    "[SM 9 9 [MED 1 2 3 4 ] ]": 0,
    "[MED 7 [SM 5 5 ] 9 ]": 7,
    "[MIN 3 [MAX 1 [MED 5 6 ] ] ]": 3,
    "[MED 0 9 ]": 4,
}


def _independent_value(tokens: list[str]) -> int:
    """The value by nested recursion on lists, with the median from its definition."""
    if len(tokens) == 1:
        return int(tokens[0])
    arguments, depth, start = [], 0, 1
    for i, token in enumerate(tokens[1:-1], 1):
        depth += (token in OPERATORS) - (token == "]")
        if depth == 0:
            arguments.append(_independent_value(tokens[start : i + 1]))
            start = i + 1
    ordered = sorted(arguments)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2
    return {"[MIN": ordered[0], "[MAX": ordered[-1], "[MED": middle, "[SM": sum(ordered) % 10}[tokens[0]]


def test_evaluate():
    for text, value in CASES.items():
        assert evaluate(text.split()) == value, text
    for example in draw_examples(50, seed=3, min_length=10, max_length=300):
        tokens = example["text"].split()
        assert example["label"] == evaluate(tokens) == _independent_value(tokens)


def test_bad_expressions():
    texts = ("", "[MAX ]", "[MAX 1 2", "1 2", "[MAX 1 ] 2", "[SUM 1 ]", "] 1")
    bad = {text: (text.split(), "expression|must be an operator") for text in texts}
    assert_refused(evaluate, bad)


def test_lengths_and_depths():
    generator = random.Random(0)
    deepest = 0
    for _ in range(20):
        tokens = draw_expression(generator, 500, 2000)
        assert 500 <= len(tokens) <= 2000
        depths = [sum(1 if t in OPERATORS else -1 if t == "]" else 0 for t in tokens[:i]) for i in range(len(tokens))]
        deepest = max(deepest, *depths)
    assert deepest == 10


def test_splits():
    splits = load_listops(40, 30, min_length=3, max_length=12)
    texts = {name: set(split["text"]) for name, split in splits.items()}
    assert texts["train"].isdisjoint(texts["validation"])
    assert len(splits["validation"]) == 30
    again, other = load_listops(40, 30, min_length=3, max_length=12), load_listops(40, 30, 1, 3, 12)
    assert again["train"]["text"] == splits["train"]["text"] != other["train"]["text"]
    assert other["validation"]["text"] == splits["validation"]["text"]


def test_tokenizer():
    tokenizer = listops_tokenizer(64)
    text = next(draw_examples(1, seed=0, min_length=20, max_length=60))["text"]
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.split()) and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 2 + 10 + len(OPERATORS) + 1


def test_baselines():
    splits = load_listops(300, 200, min_length=20, max_length=100)
    found = baselines(splits)
    most_frequent = max(range(10), key=list(splits["train"]["label"]).count)
    assert found["majority"] == list(splits["validation"]["label"]).count(most_frequent) / 200
    # A maximum of several digits is mostly 9, and a minimum mostly 0.
    assert found["root_operator"] > found["majority"] + 0.1
