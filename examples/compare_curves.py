# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Compare the learning curves of several runs in a figure and a table.

    python examples/compare_curves.py docs/results/listops --key eval_accuracy --label accuracy \\
        --baselines majority=0.151,root_operator=0.346 --figure docs/results/listops.png

The folder holds the `curve.jsonl` of each run under the name of the run and its seed, such as `lsh-0.jsonl`. The table
is printed as Markdown.
"""

import argparse
from pathlib import Path

from model_report import plot_learning_curve, read_curve


def compare(folder: Path, key: str, time: str = "cpu_seconds") -> str:
    """
    Return a Markdown table of the runs in a folder.

    Args:
        folder: Folder of `NAME-SEED.jsonl` files.
        key: The metric.
        time: `"seconds"` or `"cpu_seconds"`.

    Raises:
        ValueError: If there are no runs, or if one has no such metric.
    """
    rows = ["| run | seed | steps | minutes | best | last |", "|---|---|---|---|---|---|"]
    for path in _runs(folder):
        found = [entry for entry in read_curve(path) if key in entry]
        if not found:
            raise ValueError(f"`{path}` has no {key!r}: set `--key` to a metric of its lines.")
        name, _, seed = path.stem.rpartition("-")
        last, best = found[-1], max(entry[key] for entry in found)
        cells = (name, seed, f"{last['step']:,}", f"{last[time] / 60:.1f}", f"{best:.3f}", f"{last[key]:.3f}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _runs(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*-*.jsonl"))
    if not paths:
        raise ValueError(f"`{folder}` holds no runs: put the `curve.jsonl` of each run there as NAME-SEED.jsonl.")
    return paths


def main(argv: list[str] | None = None) -> str:
    """Write the figure and return the table."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of NAME-SEED.jsonl files")
    parser.add_argument("--key", default="eval_accuracy", help="metric to compare")
    parser.add_argument("--label", default="accuracy", help="name of the metric in the figure")
    parser.add_argument("--time", default="cpu_seconds", choices=["seconds", "cpu_seconds"], help="time on the axis")
    parser.add_argument("--baselines", default="", help="horizontal lines: name=value,name=value")
    parser.add_argument("--figure", type=Path, help="PNG file to write")
    options = parser.parse_args(argv)
    pairs = [item.partition("=")[::2] for item in options.baselines.split(",") if item]
    if options.figure:
        curves = {", seed ".join(path.stem.rsplit("-", 1)): read_curve(path) for path in _runs(options.folder)}
        baselines = {name: float(value) for name, value in pairs}
        plot_learning_curve(curves, options.key, options.label, options.figure, baselines, options.time)
    return compare(options.folder, options.key, options.time)


if __name__ == "__main__":
    print(main())
