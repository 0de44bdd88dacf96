# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Command-line interface of the benchmarks: `python -m benchmarks --help`."""

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
  python -m benchmarks --list                              list suites, cases and workloads
  python -m benchmarks --quick                             run everything at tiny sizes, in less than a minute
  python -m benchmarks --suite required                    measure the performance targets
  python -m benchmarks --suite lengths --cases 'step-*-R2' --implementations reformer_hf dense
  python -m benchmarks --resume benchmarks/results/2026-01-31-required.json

Do not use the machine for other work during a run. Each measurement is saved as soon as it is finished: you can stop
at any time and continue with --resume."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` and return the exit status: 1 if a check or a measurement failed."""
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
        results.drop_failures()
    else:
        results = _fresh_results(options)
    entries = select(SUITES[results.suite], results.options["cases"], results.options["implementations"])
    entries = entries_for(torch.device(results.options["device"]), entries)
    if not entries:
        parser.error(f"suite {results.suite!r} has no matching case or implementation; see --list")
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
    """Return all suites with their cases and implementations, and all workloads, as text."""
    lines = []
    for name, entries in SUITES.items():
        lines.append(f"suite {name}")
        lines += [f"  {case.name:28} {' '.join(names)}" for case, names in entries]
    lines.append("workloads")
    lines += [f"  {name:28} {description}" for name, description in WORKLOADS.items()]
    return "\n".join(lines)


def select(entries: list[Entry], cases: list[str] | None, implementations: list[str] | None) -> list[Entry]:
    """Return the entries whose case and implementations match one of the patterns. `None` matches all."""
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
        options={name: getattr(options, name) for name in ("device", "bf16", "threads", "cases", "implementations")},
        path=_free_path(options.out, f"{date}-{suite}"),
    )


def _free_path(folder: Path, stem: str) -> Path:
    """Return the path `stem.json`, with a number appended if that file exists."""
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
        description="Measure speed and memory of reformer_hf and of baselines, after checking their correctness.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    suites = [name for name in SUITES if name != "quick"]
    parser.add_argument("--suite", choices=suites, default="required", help="cases to run (default: required)")
    parser.add_argument(
        "--cases", nargs="+", metavar="PATTERN", help="run only the cases that match, such as 'step-*-R2'"
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        metavar="PATTERN",
        help=f"run only these implementations: {', '.join(IMPLEMENTATIONS)}; patterns are allowed",
    )
    parser.add_argument("--repeats", type=int, default=3, help="processes per case and implementation (default: 3)")
    parser.add_argument(
        "--once-above",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="do not repeat measurements that take longer than this (default: 300)",
    )
    parser.add_argument("--threads", type=int, help="number of torch threads (default: that of torch)")
    parser.add_argument("--device", default="cpu", help="device of the models: cpu (default) or cuda")
    parser.add_argument("--bf16", action="store_true", help="measure under bf16 autocast, as Trainer's option --bf16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for results")
    parser.add_argument("--quick", action="store_true", help="run the suite of tiny sizes once, in this process")
    parser.add_argument("--list", action="store_true", help="list suites, cases and workloads, and exit")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="JSON",
        help="continue these results, with their cases and options",
    )
    parser.add_argument(
        "--report", type=Path, metavar="JSON", help="write the table and plots of these results, and exit"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
