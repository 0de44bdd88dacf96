# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Results, saved as JSON: the machine, the options, all checks and all measurements."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from .cases import Case


@dataclass
class Results:
    """Results of one suite. Each addition is written to `path` at once, unless `path` is `None`."""

    suite: str
    date: str
    machine: dict
    options: dict
    checks: list[dict] = field(default_factory=list)
    measurements: list[dict] = field(default_factory=list)
    path: Path | None = None

    @classmethod
    def load(cls, path: Path) -> "Results":
        return cls(**json.loads(path.read_text()), path=path)

    def drop_failures(self) -> None:
        """Drop failed checks and measurements, so that they are repeated."""
        self.checks = [check for check in self.checks if check.get("ok", False)]
        self.measurements = [found for found in self.measurements if "error" not in found]

    def save(self) -> None:
        if self.path is None:
            return
        kept = {name: value for name, value in vars(self).items() if name != "path"}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # If the run is stopped here, either the old or the new file is intact.
        fresh = self.path.with_suffix(".json.tmp")
        fresh.write_text(json.dumps(kept, indent=1) + "\n")
        fresh.replace(self.path)

    @property
    def bf16(self) -> bool:
        """Whether models run under bf16 autocast. Checks never do."""
        return self.options.get("bf16", False)

    def check(self, shape_name: str, num_hashes: int, implementation: str) -> dict | None:
        """Return the result of the check of an implementation, or `None`."""
        key = (shape_name, num_hashes, implementation)
        for found in self.checks:
            if (found["shape"], found["num_hashes"], found["implementation"]) == key:
                return found
        return None

    def add_check(self, shape_name: str, num_hashes: int, implementation: str, found: dict) -> None:
        key = {"shape": shape_name, "num_hashes": num_hashes, "implementation": implementation}
        self.checks.append({**key, **found})
        self.save()

    def add_measurement(self, case: Case, implementation: str, repeat: int, found: dict) -> None:
        key = {"case": case.name, **case.to_dict(), "implementation": implementation, "repeat": repeat}
        self.measurements.append({**key, **found})
        self.save()

    def of(self, case_name: str, implementation: str) -> list[dict]:
        """Return the successful measurements."""
        return [found for found in self._all(case_name, implementation) if "error" not in found]

    def failure(self, case_name: str, implementation: str) -> str | None:
        """Return the error of the first failed measurement, or `None`."""
        return next((found["error"] for found in self._all(case_name, implementation) if "error" in found), None)

    def median(self, case_name: str, implementation: str, quantity: str = "seconds") -> float | None:
        """Return the median of `"seconds"` or `"peak_bytes"`, or `None` without measurements."""
        found = [measurement[quantity] for measurement in self.of(case_name, implementation)]
        return statistics.median(found) if found else None

    def pairs(self) -> list[tuple[str, str]]:
        """Return cases and implementations in the order of their first measurement."""
        return list(dict.fromkeys((found["case"], found["implementation"]) for found in self.measurements))

    def times_by_length(self, workload: str, shape_name: str) -> dict[tuple[str, int], dict[int, float]]:
        """Return the median time by length, for each implementation and number of hash rounds."""
        lines: dict[tuple[str, int], dict[int, float]] = {}
        for found in self.measurements:
            if (found["workload"], found["shape_name"]) != (workload, shape_name) or "error" in found:
                continue
            line = lines.setdefault((found["implementation"], found["num_hashes"]), {})
            line[found["length"]] = self.median(found["case"], found["implementation"])
        return {key: dict(sorted(line.items())) for key, line in lines.items()}

    def _all(self, case_name: str, implementation: str) -> list[dict]:
        key = (case_name, implementation)
        return [found for found in self.measurements if (found["case"], found["implementation"]) == key]
