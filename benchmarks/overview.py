# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
The figure of the README: seconds of a training step against length, from saved results.

    python -m benchmarks.overview
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

from .cases import DENSE, IN_TREE, OURS  # noqa: E402
from .results import Results  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
FIGURE = ROOT / "docs" / "images" / "step_time.png"
NUM_HASHES = 2
# File, implementation, name in the figure, color, and where the name stands next to the last point, in points.
LINES = (
    ("2026-11-24-required", DENSE, "dense model: fused\nattention, activation\ncheckpointing", "black", (10, 0)),
    ("2026-11-24-lengths", IN_TREE, "Reformer of\nTransformers", "C1", (-4, 22)),
    ("2026-11-24-lengths", OURS, "reformer_hf", "C0", (10, 0)),
)


def step_seconds(file: str, implementation: str) -> dict[int, float]:
    """Return the median seconds of a training step by length."""
    results = Results.load(ROOT / "benchmarks" / "results" / f"{file}.json")
    return results.times_by_length("step", "base")[implementation, NUM_HASHES]


def draw(path: Path = FIGURE) -> None:
    """Draw the figure."""
    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    for file, implementation, name, color, place in LINES:
        seconds = step_seconds(file, implementation)
        lengths = list(seconds)
        axes.plot(lengths, list(seconds.values()), color=color, marker="o", markersize=4, linewidth=2)
        end = (lengths[-1], seconds[lengths[-1]])
        style = {"xytext": place, "textcoords": "offset points", "va": "center", "fontsize": 10, "color": color}
        axes.annotate(f"{name}\n{end[1]:,.0f} s" if lengths[-1] == 65536 else name, end, **style)
    axes.set(xscale="log", yscale="log", xlabel="sequence length in tokens", xlim=(900, 300_000), ylim=(0.2, 1000))
    axes.set_xticks([1 << exponent for exponent in range(10, 17)], minor=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_title("Seconds of a training step, six layers of width 256, two CPU cores", fontsize=11)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    draw()
