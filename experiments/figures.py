# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Curves over seeds."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from matplotlib.axes import Axes

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
    Draw the mean of the curves of several seeds with their smallest and largest values, and its name at its end.

    Args:
        axes: Where to draw.
        curves: For each seed, its curve as `experiments.training.train` returns it. The mean ends with the shortest.
        metric: What to draw.
        name: Name of the mean.
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
    end = (places[-1], mean(values[-1]))
    axes.annotate(name, end, (3, 0), textcoords="offset points", color=line.get_color(), fontsize=7, va="center")
