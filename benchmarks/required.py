# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The performance targets of the library, compared with results."""

import math
from dataclasses import dataclass

import numpy as np

from .cases import COMPILED, DENSE, IN_TREE, LOWER_BOUND, OURS, T5
from .results import Results

GROWTH_LENGTHS = (4096, 65536)


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians: that of `baseline` in `case`, divided by ours in the same case or in `our_case`."""

    title: str
    case: str
    baseline: str
    minimum: float | None = None
    quantity: str = "seconds"
    maximum: float | None = None
    our_case: str | None = None
    ours: str = OURS

    @property
    def target(self) -> str:
        return f"≥ {self.minimum:g}" if self.maximum is None else f"≤ {self.maximum:g}"

    def measured(self, results: Results) -> float | None:
        baseline = results.median(self.case, self.baseline, self.quantity)
        ours = results.median(self.our_case or self.case, self.ours, self.quantity)
        return baseline / ours if baseline is not None and ours else None

    def met(self, value: float | None) -> bool | None:
        if value is None:
            return None
        return value >= self.minimum if self.maximum is None else value <= self.maximum


RATIOS = [
    Ratio("training step, L 16,384, 4 hashes: in-tree / ours", "step-L16384-R4", IN_TREE, 3.3),
    Ratio("training step, L 4,096, 8 hashes: in-tree / ours", "step-L4096-R8", IN_TREE, 4.0),
    Ratio("training step, L 16,384, 1 hash: in-tree / ours", "step-L16384-R1", IN_TREE, 1.35),
    Ratio("forward, L 16,384, 4 hashes: in-tree / ours", "forward-L16384-R4", IN_TREE, 4.0),
    Ratio("forward, L 16,384, 1 hash: in-tree / ours", "forward-L16384-R1", IN_TREE, 1.5),
    Ratio("attention op, forward, L 16,384, 4 hashes: in-tree / ours", "attention-L16384-R4", IN_TREE, 5.0),
    Ratio(
        "peak memory, training step, L 16,384, 4 hashes: in-tree / ours", "step-L16384-R4", IN_TREE, 6.0, "peak_bytes"
    ),
    Ratio("training step, L 16,384, 4 hashes: lower bound / ours", "step-L16384-R4", LOWER_BOUND, 0.85),
    Ratio("training step, L 16,384, 4 hashes: reformer-pytorch / ours", "step-L16384-R4", "reformer-pytorch", 2.0),
    Ratio("training step, L 4,096, 2 hashes: dense / ours", "step-L4096-R2", DENSE, 1.8),
    Ratio("training step, L 16,384, 2 hashes: dense / ours", "step-L16384-R2", DENSE, 5.0),
    Ratio("training step, L 65,536, 2 hashes: dense / ours", "step-L65536-R2", DENSE, 18.0),
]

_TOKENS = "decoder-tokens-L{}-R4"
_WIDE_TOKENS = "decoder-ff1024-tokens-L4096-R4"
GENERATION_RATIOS = [
    Ratio("time per token, context of 4,096: in-tree / ours", _TOKENS.format(4096), IN_TREE, 10.0),
    Ratio("time per token, context of 16,384: in-tree / ours", _TOKENS.format(16384), IN_TREE, 20.0),
    Ratio(
        "time per token, ours: context of 65,536 / 1,024",
        _TOKENS.format(65536),
        OURS,
        maximum=1.2,
        our_case=_TOKENS.format(1024),
    ),
    *(
        Ratio(f"time per token, {shape}, context of 4,096: lower bound / {ours}", case, LOWER_BOUND, 0.4, ours=ours)
        for shape, case in (("feed-forward 512", _TOKENS.format(4096)), ("feed-forward 1,024", _WIDE_TOKENS))
        for ours in (OURS, COMPILED)
    ),
    Ratio(
        "prefill of 65,536 tokens / plain forward pass",
        "decoder-prefill-L65536-R4",
        OURS,
        maximum=1.15,
        our_case="decoder-last-L65536-R4",
    ),
]


_SEQ2SEQ = "seq2seq-step-L{}-R1"
SEQ2SEQ_RATIOS = [
    *(
        Ratio(f"training step, source {length:,}, target 256: T5 / ours", _SEQ2SEQ.format(length), T5, 1.0)
        for length in (4096, 8192, 16384)
    ),
    *(
        Ratio(f"peak memory, source {length:,}, target 256: T5 / ours", _SEQ2SEQ.format(length), T5, 2.0, "peak_bytes")
        for length in (8192, 16384)
    ),
]
TARGETS = {"required": RATIOS, "generation": GENERATION_RATIOS, "seq2seq": SEQ2SEQ_RATIOS}


@dataclass(frozen=True)
class Figure:
    """A row of the table of performance targets."""

    title: str
    target: str
    measured: str
    met: bool | None


def required_figures(results: Results) -> list[Figure]:
    """Return the targets of the suite; `met` is `None` if a target was not measured."""
    figures = []
    for ratio in TARGETS[results.suite]:
        value = ratio.measured(results)
        figures.append(Figure(ratio.title, ratio.target, _number(value), ratio.met(value)))
    if results.suite != "required":
        return figures
    return [*figures, _shortest_length(results), *_growths(results)]


def _shortest_length(results: Results) -> Figure:
    """Return the shortest length from which our step with 2 hashes is always faster than the dense step."""
    ours, dense = (results.times_by_length("step", "base").get((name, 2), {}) for name in (OURS, DENSE))
    lengths = sorted(ours.keys() & dense.keys())
    slower = [length for length in lengths if ours[length] >= dense[length]]
    faster = [length for length in lengths if length > max(slower, default=0)]
    measured = f"{faster[0]:,}" if faster else "none" if lengths else "–"
    title = "shortest length from which our step with 2 hashes is always faster than the dense step"
    return Figure(title, "≤ 1,024", measured, bool(faster) and faster[0] <= 1024 if lengths else None)


def _growths(results: Results) -> list[Figure]:
    figures = []
    for (name, num_hashes), times in results.times_by_length("step", "base").items():
        growth = fit_growth(times)
        if name == OURS and growth is not None:
            exponent, allowed = growth
            title = f"training step, {num_hashes} hashes: exponent of L from 4,096 to 65,536 (target: that of L·log L)"
            figures.append(Figure(title, f"≤ {allowed:.3f}", f"{exponent:.3f}", exponent <= allowed))
    return figures


def fit_growth(times: dict[int, float]) -> tuple[float, float] | None:
    """
    Fit `time ∝ L^p` to the lengths from 4,096 to 65,536, by least squares of the logarithms.

    Returns:
        The exponent, and that of `L log L` over the same lengths. `None` if the first or the last length is missing.
    """
    first, last = GROWTH_LENGTHS
    lengths = [length for length in times if first <= length <= last]
    if first not in lengths or last not in lengths:
        return None
    return fit_exponent({n: times[n] for n in lengths}), fit_exponent({n: n * math.log(n) for n in lengths})


def fit_exponent(values: dict[int, float]) -> float:
    """Fit the exponent p of `value ∝ L^p`."""
    return float(np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)[0])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
