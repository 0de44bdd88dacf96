# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Command line of the benchmarks: `python -m benchmarks --help`."""

import argparse
import datetime
import sys
from fnmatch import fnmatch
from pathlib import Path

import torch
from tqdm import tqdm

from .cases import SUITES, WORKLOADS, Entry
from .device import entries_for
from .implementations import IMPLEMENTATIONS
from .machine import describe_machine
from .report import markdown, write_report
from .results import Results
from .runner import count_measurements, launch_here, launch_process, run_entries

_EPILOG = """examples:
  python -m benchmarks --list                              what there is
  python -m benchmarks --quick                             try everything at tiny sizes, in less than a minute
  python -m benchmarks --suite required                    the figures that the library must show
  python -m benchmarks --suite lengths --cases 'step-*-R2' --implementations reformer_hf dense
  python -m benchmarks --resume benchmarks/results/2026-01-31-required.json

Leave the machine alone meanwhile. Results are kept after each measurement: stop when you like, and resume."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if an implementation was wrong or failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch {torch.__version__} finds no CUDA device on this machine")
    if options.list:
        print(listing())
        return 0
    if options.report is not None:
        return _report(Results.load(options.report))
    if options.resume is not None:
        results = Results.load(options.resume)
        results.forget_failures()
    else:
        results = _fresh_results(options)
    entries = select(SUITES[results.suite], results.options["cases"], results.options["implementations"])
    entries = entries_for(torch.device(results.options["device"]), entries)
    if not entries:
        parser.error(f"suite {results.suite!r} has no such case or implementation; see --list")
    quick = results.suite == "quick"
    repeats = 1 if quick else options.repeats
    with tqdm(total=count_measurements(entries, repeats), unit="measurement") as bar:

        def advance(name: str) -> None:
            bar.set_description(name)
            bar.update()

        launch = launch_here if quick else launch_process
        run_entries(entries, results, repeats, options.once_above, launch, advance)
    return _report(results)


def listing() -> str:
    """Suites with their cases, workloads and implementations."""
    lines = []
    for name, entries in SUITES.items():
        lines.append(f"suite {name}")
        lines += [f"  {case.name:28} {' '.join(names)}" for case, names in entries]
    lines.append("workloads")
    lines += [f"  {name:28} {what}" for name, what in WORKLOADS.items()]
    return "\n".join(lines)


def select(entries: list[Entry], cases: list[str] | None, implementations: list[str] | None) -> list[Entry]:
    """Entries whose names match one of the patterns each; None matches all."""
    selected = []
    for case, names in entries:
        kept = tuple(name for name in names if _matches(name, implementations))
        if kept and _matches(case.name, cases):
            selected.append((case, kept))
    return selected


def _matches(name: str, patterns: list[str] | None) -> bool:
    return patterns is None or any(fnmatch(name, pattern) for pattern in patterns)


def _fresh_results(options: argparse.Namespace) -> Results:
    suite = "quick" if options.quick else options.suite
    date = datetime.date.today().isoformat()
    return Results(
        suite=suite,
        date=date,
        machine=describe_machine(options.threads, options.device),
        options={name: getattr(options, name) for name in ("device", "threads", "cases", "implementations")},
        path=_free_path(options.out, f"{date}-{suite}"),
    )


def _free_path(folder: Path, stem: str) -> Path:
    """`stem.json`, or with a number where there is one of that name."""
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.json", number + 1
    return path


def _report(results: Results) -> int:
    print(markdown(results))
    print("\n".join(f"wrote {path}" for path in (results.path, *write_report(results))))
    failed = any("error" in found for found in results.measurements)
    return int(failed or any(not check.get("ok", False) for check in results.checks))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure speed and memory of reformer_hf beside its rivals, after checking that they are correct.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    suites = [name for name in SUITES if name != "quick"]
    parser.add_argument("--suite", choices=suites, default="required", help="which cases (default: required)")
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", help="of these, only the ones named so: 'step-*-R2'")
    parser.add_argument(
        "--implementations",
        nargs="+",
        metavar="PATTERN",
        help=f"only these: {', '.join(IMPLEMENTATIONS)}; patterns too",
    )
    parser.add_argument("--repeats", type=int, default=3, help="processes per case and implementation (default: 3)")
    parser.add_argument(
        "--once-above",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="do not repeat what takes longer than this (default: 300)",
    )
    parser.add_argument("--threads", type=int, help="threads of torch (default: as many as torch takes)")
    parser.add_argument("--device", default="cpu", help="where models run: cpu (default) or cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for results")
    parser.add_argument("--quick", action="store_true", help="the suite of tiny sizes, once, all in this process")
    parser.add_argument("--list", action="store_true", help="show suites, cases and workloads, and stop")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="JSON",
        help="go on with these results, cases and options",
    )
    parser.add_argument("--report", type=Path, metavar="JSON", help="write table and plots of these results, and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
