# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Figures of training runs."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def plot_loss_curve(log_history: list[dict[str, Any]], bigram: float, folder: Path) -> None:
    """Write `loss_curve.png`: the losses in bits by step, and the bits per byte of the `bigram` model as a line."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    curves = (("loss", 1 / math.log(2), "training, per token"), ("eval_bits_per_byte", 1.0, "held out, per byte"))
    for key, factor, label in curves:
        points = [(entry["step"], entry[key] * factor) for entry in log_history if key in entry]
        axes.plot(*zip(*points, strict=True) if points else ([], []), marker=".", label=label)
    axes.axhline(bigram, color="gray", linestyle="--", label="byte bigram model, held out")
    axes.set(xlabel="step", ylabel="bits")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder / "loss_curve.png", dpi=120)
    plt.close(figure)


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a learning curve, of a `.jsonl` file or of the output folder of a run."""
    path = path / "curve.jsonl" if path.is_dir() else path
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot_learning_curve(
    curves: dict[str, list[dict[str, Any]]],
    key: str,
    label: str,
    path: Path,
    baselines: dict[str, float] | None = None,
    time: str = "seconds",
) -> None:
    """
    Plot a metric against the time of training.

    Args:
        curves: The learning curves of runs, by name. Names that are equal up to a comma share a color.
        key, label: Name of the metric in the curves and on the axis.
        path: PNG file to write.
        baselines: Values to draw as horizontal lines.
        time: `"seconds"` or `"cpu_seconds"`.
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    colors: dict[str, str] = {}
    for name, curve in curves.items():
        color = colors.setdefault(name.partition(",")[0], f"C{len(colors)}")
        points = [(entry[time] / 60, entry[key]) for entry in curve if key in entry]
        axes.plot(*zip(*points, strict=True) if points else ([], []), marker=".", color=color, label=name)
    for style, (name, value) in zip(("--", ":", "-."), (baselines or {}).items(), strict=False):
        axes.axhline(value, color="gray", linestyle=style, label=name.replace("_", " "))
    axes.set(xlabel=f"minutes of training{' (CPU time)' if time == 'cpu_seconds' else ''}", ylabel=label)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_confusion_matrix(found: np.ndarray, right: np.ndarray, names: list[str], folder: Path) -> None:
    """Write `confusion_matrix.png`: for each true class, the share of each predicted class."""
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (right, found), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 10 else 0)
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(image, label="share of the true class")
    figure.savefig(folder / "confusion_matrix.png", dpi=120)
    plt.close(figure)
