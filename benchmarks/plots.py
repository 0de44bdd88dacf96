# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Plots of time against length on logarithmic axes, as in figure 5 of the paper (Kitaev et al. 2020)."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

from .cases import DENSE, OURS, SHAPES, T5, WORKLOADS  # noqa: E402
from .required import fit_growth  # noqa: E402
from .results import Results  # noqa: E402

_COLOURS = {
    "reformer_hf": "C0",
    "reformer_hf-in-tree": "C4",
    "reformer_hf-wide": "C6",
    "transformers": "C1",
    "reformer-pytorch": "C2",
    "dense": "black",
    "t5": "black",
    "lower-bound": "C3",
}
_STYLES = {1: ":", 2: "-", 4: "--", 8: "-."}


def draw_plots(results: Results) -> list[Path]:
    """Draw one plot for each workload and shape with several lengths, next to the JSON file."""
    assert results.path is not None
    paths = []
    for shape_name in SHAPES:
        for workload in WORKLOADS:
            lines = results.times_by_length(workload, shape_name)
            lines = {key: times for key, times in lines.items() if len(times) > 1}
            if lines:
                path = results.path.with_name(f"{results.path.stem}-{shape_name}-{workload}.png")
                _draw(lines, f"{workload}, shape {shape_name}", path)
                paths.append(path)
    return paths


def _draw(lines: dict[tuple[str, int], dict[int, float]], title: str, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 5))
    for (name, num_hashes), times in sorted(lines.items()):
        label = name if name in (DENSE, T5) else f"{name}, {num_hashes} hashes"
        growth = fit_growth(times) if name == OURS else None
        if growth is not None:
            label += f": L^{growth[0]:.2f}"
        style = _STYLES.get(num_hashes, "-")
        axes.plot(list(times), list(times.values()), style, color=_COLOURS.get(name), marker="o", ms=3, label=label)
    _draw_guide(axes, lines)
    lengths = sorted({length for times in lines.values() for length in times})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
    axes.set_xlabel("length L (tokens)")
    axes.set_ylabel("seconds")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_guide(axes, lines: dict[tuple[str, int], dict[int, float]]) -> None:
    """Draw L log L through the first point of our line with the fewest hash rounds."""
    ours = sorted(key for key in lines if key[0] == OURS)
    if not ours:
        return
    times = lines[ours[0]]
    first = min(times)
    values = [times[first] * n * math.log(n) / (first * math.log(first)) for n in times]
    growth = fit_growth(times)
    label = "L log L" + (f": L^{growth[1]:.2f} from 4,096 to 65,536" if growth else "")
    axes.plot(list(times), values, color="grey", lw=1, label=label)
