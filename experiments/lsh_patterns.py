# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
LSH patterns, windows and numbers of buckets on a short duplication task: how the defaults were chosen.

    python -m experiments.lsh_patterns

Sequences 0w0w of 256 symbols, with the loss on the second w, as in `experiments.duplication`; one layer of width 128,
4 heads, feed-forward 512, chunks of 16, one learned embedding per position, Adam, 800 steps. Each setting is evaluated
with 1, 2, 4 and 8 hashes and with full attention. `docs/defaults.md` holds the results.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reformer_hf import ReformerHfForCausalLM

from . import duplication
from .models import causal_lm
from .records import Record
from .runner import Experiment, main
from .training import Schedule, train

LENGTH, CHUNK, BATCH_SIZE = 256, 16, 8
EVAL_HASHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Run:
    """
    Settings of a run.

    Args:
        pattern: `"full"`, or `lsh_pattern`.
        deduplicate_keys: `lsh_deduplicate_keys`.
        window: Number of keys before that a query sees: chunk length * chunks before.
        num_buckets: Number of buckets.
        num_hashes: Number of hash rounds in training.
        seed: Seed of weights, data and hashes.
        steps: Number of training steps.
    """

    pattern: str
    deduplicate_keys: bool = False
    window: int = CHUNK
    num_buckets: int | None = None
    num_hashes: int = 1
    seed: int = 0
    steps: int = 800


def grid(steps: int, seeds: tuple[int, ...], hashes: tuple[int, ...]) -> list[Run]:
    """Return the settings from which the defaults were chosen, full attention first."""
    shapes = [
        ("chunk", 1, 2),
        ("chunk", 1, 1),
        ("window", 1, 2),
        ("window", 1, 1),
        ("window", 2, 1),
        ("window", 2, 0.5),
    ]
    runs = [Run("full", seed=seed, steps=steps) for seed in seeds]
    for (pattern, before, density), deduplicate, num_hashes, seed in itertools.product(
        shapes, (False, True), hashes, seeds
    ):
        runs.append(Run(pattern, deduplicate, CHUNK * before, int(density * LENGTH / CHUNK), num_hashes, seed, steps))
    return runs


def build(run: Run, layer: str) -> ReformerHfForCausalLM:
    """Build one layer of width 128, with one learned embedding per position."""
    lsh: dict[str, Any] = {} if run.pattern == "full" else {"lsh_pattern": run.pattern, "num_buckets": run.num_buckets}
    return causal_lm(
        attn_layers=[layer],
        hidden_size=128,
        attention_head_size=32,
        feed_forward_size=512,
        vocab_size=duplication.SYMBOLS,
        max_position_embeddings=LENGTH,
        axial_pos_embds=False,
        lsh_attn_chunk_length=CHUNK,
        lsh_num_chunks_before=run.window // CHUNK,
        lsh_deduplicate_keys=run.deduplicate_keys,
        num_hashes=run.num_hashes,
        **lsh,
    )


def train_and_evaluate(run: Run, scratch: Path) -> dict[str, Any]:
    """Train a model, and evaluate it with each number of hashes and with full attention."""
    torch.manual_seed(run.seed)
    task = duplication.Run(hashes=run.num_hashes, length=LENGTH)
    model = build(run, "full" if run.pattern == "full" else "lsh")
    found = train(
        model,
        lambda step: duplication.draw(task, BATCH_SIZE, run.seed << 32 | step),
        lambda model: {"accuracy": duplication.accuracy(model, task)},
        Schedule(run.steps, eval_every=min(50, run.steps)),
        scratch,
    )
    full = build(run, "full")
    full.load_state_dict(model.state_dict())
    scores = {"full": duplication.accuracy(full.eval(), task)}
    if run.pattern != "full":
        scores |= {str(hashes): duplication.accuracy(model, task, num_hashes=hashes) for hashes in EVAL_HASHES}
    return found | {"accuracy": scores}


def report(records: list[Record], folder: Path) -> str:
    """Return a table with one row per run."""
    names = (*map(str, EVAL_HASHES), "full")
    lines = [
        "| pattern | duplicate keys | W | buckets | hashes | seed | steps | loss | steps to loss 0.1 | seconds | "
        + " | ".join(f"acc. {name}" for name in names)
        + " |",
        "|" + "---|" * (10 + len(names)),
    ]
    for record in records:
        run, result = Run(**record["settings"]), record["result"]
        learned = next((entry["step"] for entry in result["curve"] if entry["loss"] < 0.1), "–")
        cells: list[Any] = [run.pattern]
        if run.pattern == "full":
            cells += [""] * 4
        else:
            cells += ["removed" if run.deduplicate_keys else "counted", run.window, run.num_buckets, run.num_hashes]
        cells += [run.seed, run.steps, f"{result['curve'][-1]['loss']:.3f}", learned, f"{result['seconds']:.0f}"]
        cells += [f"{result['accuracy'][name]:.3f}" if name in result["accuracy"] else "" for name in names]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


EXPERIMENT = Experiment(
    "lsh_patterns",
    grid(800, (0,), (1, 2, 4)),
    train_and_evaluate,
    report,
    quick=[Run("window", window=32, num_buckets=8, num_hashes=2, steps=3)],
)

if __name__ == "__main__":
    main(EXPERIMENT)
