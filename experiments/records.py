# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Records of finished runs, one line of JSON each."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def cpu_seconds_of_curve(result: Record) -> list[float]:
    """Return the CPU seconds of training before each entry of the curve of a result."""
    return [entry["step"] / result["steps"] * result["cpu_seconds"] for entry in result["curve"]]


def cpu_seconds_before(results: Mapping[Any, Record], run: Any) -> float:
    """Return the CPU seconds of training of all runs that a run was warm-started from, `run.shorter` and so on."""
    shorter = run.shorter
    return 0.0 if shorter is None else results[shorter]["cpu_seconds"] + cpu_seconds_before(results, shorter)


def read_records(path: Path) -> list[Record]:
    """Return the records of a file, without lines that a killed process left incomplete."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: line %d is not complete, and is ignored.", path, number)
    return records


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record in one write, after the end of an incomplete line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
