# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Quality per second: held-out bits per byte of text against the time of training.

    python -m experiments.quality --jobs 1 --threads 2    # with nothing else running

Models of equal width, depth and heads, and nearly equal numbers of parameters (`experiments.models`), with the same
learning rates, batches and seconds: the default layers of this package; local layers alone; the in-tree Reformer;
Llama with fused attention; Mistral with a sliding window as long as the reach of the local layers.

The text is the Python standard library, in slices of 4,096 or 16,384 bytes, one per step.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot

from .figures import save
from .models import COLORS, LABELS, MODELS, Sizes
from .records import Record
from .runner import Experiment, main
from .text import VOCAB_SIZE, bits_per_byte, draw_text, load_text
from .training import Schedule, train


@dataclass(frozen=True)
class Run:
    """
    Settings of a run.

    Args:
        model: Name of the model.
        length: Sequence length.
        seconds: Seconds of training, without evaluations.
        learning_rate: Maximum learning rate.
        seed: Seed of weights and data.
        width, depth: Sizes of the model.
        initializer_range: Standard deviation of initial weights.
    """

    model: str
    length: int
    seconds: float = 420.0
    learning_rate: float = 1e-3
    seed: int = 0
    width: int = 256
    depth: int = 6
    initializer_range: float | None = None


def train_and_evaluate(run: Run, scratch: Path) -> dict[str, Any]:
    """Train a model for so many seconds."""
    torch.manual_seed(run.seed)
    sizes = Sizes(
        VOCAB_SIZE,
        run.length,
        run.width,
        run.depth,
        feed_forward=2 * run.width,
        initializer_range=run.initializer_range,
    )
    model = MODELS[run.model](sizes)
    text, held_out = load_text()
    found = train(
        model,
        lambda step: draw_text(text, 1, run.length, run.seed << 32 | step),
        lambda model: {"bits_per_byte": bits_per_byte(model, held_out, run.length)},
        Schedule(1_000_000, run.learning_rate, seconds=run.seconds, eval_every=max(1, (1 << 19) // run.length)),
        scratch,
    )
    return found | {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def report(records: list[Record], folder: Path) -> str:
    """Draw bits per byte against minutes, and write the last values."""
    groups: dict[tuple[int, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record["settings"]["length"], record["settings"]["model"]].append(record)
    lengths = sorted({length for length, _ in groups})
    figure, panels = pyplot.subplots(1, len(lengths), figsize=(1 + 5 * len(lengths), 4), squeeze=False)
    lines = [
        "| length | model | learning rate | seed | parameters | steps | minutes | bits per byte |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for axes, length in zip(panels[0], lengths, strict=True):
        for name in (name for name in MODELS if (length, name) in groups):
            group = groups[length, name]
            for record in group:
                settings, result = record["settings"], record["result"]
                cells = [f"{length:,}", LABELS[name], f"{settings['learning_rate']:g}", settings["seed"]]
                cells += [f"{result['parameters']:,}", f"{result['steps']:,}", f"{result['seconds'] / 60:.1f}"]
                cells.append(f"{result['curve'][-1]['bits_per_byte']:.3f}")
                lines.append(f"| {' | '.join(map(str, cells))} |")
            best = min(group, key=lambda record: record["result"]["curve"][-1]["bits_per_byte"])["result"]["curve"]
            minutes, bits = zip(*((entry["seconds"] / 60, entry["bits_per_byte"]) for entry in best), strict=True)
            axes.plot(minutes, bits, color=COLORS[name], label=LABELS[name])
        of_length = [record for key, group in groups.items() if key[0] == length for record in group]
        lowest = min(entry["bits_per_byte"] for record in of_length for entry in record["result"]["curve"])
        axes.set(title=f"{length:,} bytes", xlabel="minutes of training", ylim=(lowest - 0.2, 5))
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("held-out bits per byte")
    save(figure, folder / "curves.png", named_at_ends=True)
    return "\n".join(lines) + "\n"


EXPERIMENT = Experiment(
    "quality",
    [Run(model, length) for length in (4096, 16384) for model in MODELS],
    train_and_evaluate,
    report,
    quick=[Run(model, 256, seconds=2.0, width=64, depth=2) for model in MODELS],
)

if __name__ == "__main__":
    main(EXPERIMENT)
