# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Quality per second: held-out bits per byte of text against the time of training.

    python -m experiments.quality

Models of equal width, depth and heads, and nearly equal numbers of parameters (`experiments.models`), with the same
learning rates, batches and CPU seconds: the default layers of this package; local layers alone; the in-tree Reformer;
Llama with fused attention; Mistral with a sliding window as long as the reach of the local layers. The optimizer is
AdamW and, for some of them, Muon (`MuonWithAdamW`).

The text is the Python standard library, in slices of 4,096 or 16,384 bytes, one per step.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot

from .figures import save, spread
from .models import COLORS, LABELS, MODELS, Sizes
from .records import Record, cpu_seconds_of_curve
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
        seconds: CPU seconds of training, without evaluations.
        learning_rate: Maximum learning rate of AdamW.
        muon_learning_rate: That of Muon for the weights of linear layers; `None` for AdamW alone.
        seed: Seed of weights and data.
        width, depth: Sizes of the model.
        initializer_range: Standard deviation of initial weights; `None` for the default of each model.
    """

    model: str
    length: int
    seconds: float = 420.0
    learning_rate: float = 1e-3
    muon_learning_rate: float | None = None
    seed: int = 0
    width: int = 256
    depth: int = 6
    initializer_range: float | None = None


def train_and_evaluate(run: Run, scratch: Path) -> dict[str, Any]:
    """Train a model for the seconds of a run."""
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
        Schedule(
            1_000_000,
            run.learning_rate,
            seconds=run.seconds,
            eval_every=max(1, (1 << 19) // run.length),
            muon_learning_rate=run.muon_learning_rate,
            cpu_time=True,
        ),
        scratch,
    )
    return found | {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def report(records: list[Record], folder: Path) -> str:
    """Draw bits per byte against CPU minutes, and write the last values."""
    groups: dict[Run, list[Record]] = defaultdict(list)
    for record in records:
        groups[replace(Run(**record["settings"]), seed=0)].append(record["result"])
    runs = sorted(groups, key=lambda run: (list(MODELS).index(run.model), run.muon_learning_rate or 0.0))
    lengths = sorted({run.length for run in runs})
    figure, panels = pyplot.subplots(1, len(lengths), figsize=(1 + 7 * len(lengths), 4), squeeze=False)
    lines = [
        "| length | model | optimizer | runs | parameters | steps | CPU minutes | bits per byte |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for axes, length in zip(panels[0], lengths, strict=True):
        of_length = [run for run in runs if run.length == length]
        for run in of_length:
            results = groups[run]
            name, optimizer, style = LABELS[run.model], f"AdamW, {run.learning_rate:g}", "-"
            if run.muon_learning_rate is not None:
                optimizer, style = f"Muon, {run.muon_learning_rate:g}", "--"
            minutes = [[seconds / 60 for seconds in cpu_seconds_of_curve(result)] for result in results]
            cells = [f"{length:,}", name, optimizer, len(results), f"{results[0]['parameters']:,}"]
            cells += [spread([result["steps"] for result in results], 0), spread([each[-1] for each in minutes])]
            cells.append(spread([result["curve"][-1]["bits_per_byte"] for result in results], 3))
            lines.append(f"| {' | '.join(map(str, cells))} |")
            label = name if run.muon_learning_rate is None else f"{name}, Muon"
            for i, (result, at) in enumerate(zip(results, minutes, strict=True)):
                bits = [entry["bits_per_byte"] for entry in result["curve"]]
                axes.plot(at, bits, color=COLORS[run.model], label=None if i else label, linestyle=style)
        entries = [entry for run in of_length for result in groups[run] for entry in result["curve"]]
        lowest = min(entry["bits_per_byte"] for entry in entries)
        axes.set(title=f"{length:,} bytes", xlabel="CPU minutes of training", ylim=(lowest - 0.2, 5))
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("held-out bits per byte")
    save(figure, folder / "curves.png", named_at_ends=True)
    return "\n".join(lines) + "\n"


EXPERIMENT = Experiment(
    "quality",
    [
        *(Run(model, length) for length in (4096, 16384) for model in MODELS),
        *(Run(model, length, muon_learning_rate=0.05) for length in (4096, 16384) for model in ("reformer", "local")),
        *(Run("dense", length, muon_learning_rate=0.05) for length in (4096, 16384)),
        # The default of `train_causal_lm.py`.
        *(Run(model, 4096, muon_learning_rate=0.02) for model in ("reformer", "local", "dense")),
    ],
    train_and_evaluate,
    report,
    quick=[Run(model, 256, seconds=2.0, width=64, depth=2) for model in MODELS],
)

if __name__ == "__main__":
    main(EXPERIMENT)
