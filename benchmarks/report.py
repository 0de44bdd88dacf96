# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Markdown reports of results."""

import math
import statistics
from pathlib import Path

from .cases import OURS
from .plots import draw_plots
from .required import TARGETS, required_figures
from .results import Results

_HEAD = ["case", "implementation", "seconds", "min–max", "processes", "peak MB", "process MB", "time / ours"]
_CHECKS_HEAD = ["implementation", "shape", "hashes", "check", "value", "limit"]


def write_report(results: Results) -> list[Path]:
    """Write the tables and plots next to the JSON file, and return their paths."""
    assert results.path is not None
    plots = draw_plots(results)
    path = results.path.with_suffix(".md")
    path.write_text(markdown(results, plots))
    return [path, *plots]


def markdown(results: Results, plots: list[Path] | None = None) -> str:
    """Return the report as Markdown."""
    parts = [f"# Benchmarks: {results.suite}, {results.date}", _machine(results)]
    parts.append(_table(_HEAD, _rows(results)))
    if results.suite in TARGETS:
        parts += ["## Performance targets", _table(["case", "target", "measured", "met"], _required_rows(results))]
    parts += [f"![]({plot.name})" for plot in plots or []]
    parts += ["## Correctness", _table(_CHECKS_HEAD, _checks(results))]
    return "\n\n".join(parts) + "\n"


def _machine(results: Results) -> str:
    machine = results.machine
    words = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"{machine['threads']} threads",
        f"device {machine.get('gpu') or machine['device']}",
        *(f"{name} {machine[name]}" for name in ("torch", "transformers", "reformer-pytorch") if machine.get(name)),
        f"commit {machine['commit']}",
    ]
    return (
        f"{'; '.join(words)}.\n\n{'bf16 autocast' if results.bf16 else 'fp32'}, batch size 1. Each time is the median "
        "over processes that take turns, and each process reports the median of its runs. Peak MB is the peak memory "
        "above the built model, process MB that of the whole process (1 MB is 10^6 bytes). See `benchmarks/README.md` "
        "for the method."
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _rows(results: Results) -> list[list[str]]:
    rows = []
    for case, name in results.pairs():
        found = results.of(case, name)
        if not found:
            rows.append([case, name, f"failed: {_one_line(results.failure(case, name))}", *[""] * 5])
            continue
        seconds = [measurement["seconds"] for measurement in found]
        median, ours = results.median(case, name), results.median(case, OURS)
        rows.append(
            [
                case,
                name,
                f"{median:.4g}",
                f"{min(seconds):.4g}–{max(seconds):.4g}",
                str(len(seconds)),
                f"{results.median(case, name, 'peak_bytes') / 1e6:,.0f}",
                f"{statistics.median(x['peak_bytes'] + x['built_bytes'] for x in found) / 1e6:,.0f}",
                f"{median / ours:.2f}" if ours else "–",
            ]
        )
    return rows


def _required_rows(results: Results) -> list[list[str]]:
    answers = {True: "yes", False: "**no**", None: "not measured"}
    return [[row.title, row.target, row.measured, answers[row.met]] for row in required_figures(results)]


def _checks(results: Results) -> list[list[str]]:
    rows = []
    for check in results.checks:
        key = [check["implementation"], check["shape"], str(check["num_hashes"])]
        if "error" in check:
            rows.append([*key, f"failed: {_one_line(check['error'])}", "", ""])
        for finding in check.get("findings", []):
            value, limit = finding["value"], finding["limit"]
            verdict = ", **wrong: not timed**" if math.isnan(value) or value > limit else ""
            rows.append([*key, finding["what"], f"{value:.2g}{verdict}", f"{limit:g}"])
    return rows


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "/")[:200]
