# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""What the figures and tables of the experiments share: curves over seeds, names of curves, files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .records import Record


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean, and the smallest and largest value if they differ."""
    low, high = (f"{bound:.{digits}f}" for bound in (min(values), max(values)))
    return f"{mean(values):.{digits}f}" + (f" ({low}–{high})" if low != high else "")


def draw_band(
    axes: Axes,
    curves: Sequence[Sequence[Record]],
    metric: str,
    name: str,
    at: str = "step",
    scale: float = 1.0,
    **style: Any,
) -> None:
    """
    Draw the mean of the curves of several seeds with their smallest and largest values.

    Args:
        axes: Where to draw.
        curves: For each seed, its curve as `experiments.training.train` returns it. The mean ends with the shortest.
        metric: What to draw.
        name: Name of the mean, for `label_ends` or a legend.
        at: What it is drawn against, of the first seed.
        scale: Factor of the metric, such as 100 for percent.
        style: Options of `Axes.plot`.
    """
    entries = list(zip(*curves, strict=False))
    places = [entry[0][at] for entry in entries]
    values = [[scale * each[metric] for each in entry] for entry in entries]
    (line,) = axes.plot(places, [mean(each) for each in values], label=name, **style)
    if len(curves) > 1:
        low, high = [min(each) for each in values], [max(each) for each in values]
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def draw_times(
    axes: Axes, times: Mapping[str, Sequence[tuple[int, float, bool]]], colors: Mapping[str, str], unit: str
) -> None:
    """
    Draw how long each model took to learn sequences of each length, on logarithmic axes.

    Args:
        axes: Where to draw.
        times: For each model, the lengths in ascending order, the time of training, and whether it learned. Where it
            did not, an open triangle shows the time after which it was stopped.
        colors: Color of each model.
        unit: Unit of the times.
    """
    lengths = sorted({length for entries in times.values() for length, _, _ in entries})
    for name, entries in times.items():
        color = colors[name]
        learned = [(length, time) for length, time, reached in entries if reached]
        stopped = [(length, time) for length, time, reached in entries if not reached]
        axes.plot([length for length, _, _ in entries], [time for _, time, _ in entries], ":", color=color, alpha=0.5)
        if learned:
            axes.plot(*zip(*learned, strict=True), "-o", color=color)
        if stopped:
            axes.plot(*zip(*stopped, strict=True), "^", color=color, fillstyle="none")
        axes.annotate(name, entries[-1][:2], (7, 0), textcoords="offset points", color=color, fontsize=8, va="center")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    # Room for the names.
    axes.set_xlim(lengths[0] / 1.5, lengths[-1] * 16)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="sequence length", ylabel=f"{unit} until 90 %, with all shorter lengths")
    axes.grid(alpha=0.3)


def panels_of(names: Sequence[Any], columns: int = 3) -> tuple[Figure, dict[Any, Axes]]:
    """Return a figure with a panel for each name, in rows of that many columns."""
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(1 + 3.5 * columns, 3.2 * rows), squeeze=False)
    for axes in panels.flat[len(names) :]:
        axes.set_axis_off()
    return figure, dict(zip(names, panels.flat, strict=False))


def label_ends(axes: Axes, spacing: float = 8.0) -> None:
    """Write the names of the lines at their ends, at least `spacing` points apart, when all else is drawn."""
    figure: Any = axes.figure
    points = 72 / figure.dpi
    lines: Any = axes.get_lines()
    ends = [(line, line.get_xydata()[-1]) for line in lines if not line.get_label().startswith("_")]
    axes.set_xlim(0, 1.4 * max((end[0] for _, end in ends), default=1.0))
    lowest = -float("inf")
    for line, end in sorted(ends, key=lambda each: each[1][1]):
        height = axes.transData.transform(end)[1] * points
        lowest = max(height, lowest + spacing)
        offset = (4, lowest - height)
        style: dict[str, Any] = {
            "textcoords": "offset points",
            "color": line.get_color(),
            "fontsize": 7,
            "va": "center",
        }
        axes.annotate(line.get_label(), end, offset, **style)


def save(figure: Figure, path: Path, named_at_ends: bool = False) -> None:
    """Write a figure to a file, with the names of its lines at their ends or not, and close it."""
    figure.tight_layout()
    if named_at_ends:
        for axes in figure.axes:
            label_ends(axes)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
