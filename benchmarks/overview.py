# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
The figure and the table of the README, from saved results.

    python -m benchmarks.overview
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

from .cases import DENSE, IN_TREE, OURS  # noqa: E402
from .decoding import TOKENS_PER_RUN  # noqa: E402
from .pages import write_tables  # noqa: E402
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

README, NAME = ROOT / "README.md", "benchmarks.overview"
NAMES = {IN_TREE: "Reformer of Transformers", DENSE: "dense model", "reformer-pytorch": "`reformer-pytorch`"}
# File, case, what it is, quantity, and with what it is compared.
_REQUIRED, _GENERATION = "2026-11-24-required", "2026-11-26-generation"
ROWS = (
    (_REQUIRED, "step-L16384-R4", "training step, 16,384 tokens, 4 hashes", "seconds", (IN_TREE, "reformer-pytorch")),
    (_REQUIRED, "step-L16384-R4", "its peak memory", "peak_bytes", (IN_TREE, "reformer-pytorch")),
    (_REQUIRED, "step-L4096-R2", "training step, 4,096 tokens, 2 hashes", "seconds", (DENSE,)),
    (_REQUIRED, "step-L65536-R2", "training step, 65,536 tokens, 2 hashes", "seconds", (DENSE,)),
    (_GENERATION, "decoder-tokens-L4096-R4", "one token after 4,096 tokens", "seconds", (IN_TREE, DENSE)),
    (_GENERATION, "decoder-tokens-L16384-R4", "one token after 16,384 tokens", "seconds", (IN_TREE, DENSE)),
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


def table() -> str:
    """Return the table of the README: medians of this package and of others on the same work."""
    lines = ["| | reformer_hf | others | ratio |", "|---|---|---|---|"]
    for file, case, workload, quantity, rivals in ROWS:
        results = Results.load(ROOT / "benchmarks" / "results" / f"{file}.json")
        ours = results.median(case, OURS, quantity)
        for implementation in rivals:
            theirs = results.median(case, implementation, quantity)
            if ours is None or theirs is None:
                raise ValueError(f"{file}.json has no {quantity} of {case} for {OURS} and {implementation}.")
            per_token = TOKENS_PER_RUN if "-tokens-" in case else 1
            values = (_shown(value / per_token, quantity) for value in (ours, theirs))
            lines.append(f"| {workload} | {' | '.join(values)}, {NAMES[implementation]} | {theirs / ours:.1f} × |")
    return "\n".join(lines) + "\n"


def _shown(value: float, quantity: str) -> str:
    if quantity == "peak_bytes":
        return f"{value / 1e6:,.0f} MB"
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


if __name__ == "__main__":
    draw()
    write_tables(README, NAME, table())
