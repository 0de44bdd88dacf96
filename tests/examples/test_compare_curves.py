# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Learning curves of several runs: the table, the figure, and what is refused."""

import json

import pytest
from compare_curves import main


def test_compare(tmp_path):
    for name, last in (("lsh-0", 0.5), ("lsh-1", 0.4), ("local-0", 0.25)):
        entries = [{"step": 1, "loss": 2.0}]
        entries += [
            {"step": 10 * i, "seconds": 60.0 * i, "cpu_seconds": 30.0 * i, "eval_accuracy": accuracy}
            for i, accuracy in ((1, 0.45), (2, last))
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    figure = tmp_path / "figure.png"
    table = main([str(tmp_path), "--baselines", "majority=0.2", "--figure", str(figure)]).splitlines()
    assert table[2:] == [
        "| local | 0 | 20 | 1.0 | 0.450 | 0.250 |",
        "| lsh | 0 | 20 | 1.0 | 0.500 | 0.500 |",
        "| lsh | 1 | 20 | 1.0 | 0.450 | 0.400 |",
    ]
    assert figure.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="has no 'eval_f1'"):
        main([str(tmp_path), "--key", "eval_f1"])


def test_no_runs(tmp_path):
    with pytest.raises(ValueError, match="holds no runs"):
        main([str(tmp_path)])
