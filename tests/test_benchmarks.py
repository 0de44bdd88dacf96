# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks run, time nothing that is wrong, take turns, and say what was measured."""

import importlib.util
import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

from benchmarks import checks, measure, old_checkpoints, overview, runner  # noqa: E402
from benchmarks.__main__ import main, select  # noqa: E402
from benchmarks.cases import SHAPES, SUITES, Case  # noqa: E402
from benchmarks.checks import Finding  # noqa: E402
from benchmarks.implementations import IMPLEMENTATIONS, Implementation  # noqa: E402
from benchmarks.pages import write_tables  # noqa: E402
from benchmarks.report import markdown  # noqa: E402
from benchmarks.required import TARGETS, fit_growth, required_figures  # noqa: E402
from benchmarks.results import Results  # noqa: E402
from reformer_hf.lsh_attention import LSHSelfAttention  # noqa: E402

HAS_RIVAL = importlib.util.find_spec("reformer_pytorch") is not None
NAMES = [name for name in IMPLEMENTATIONS if HAS_RIVAL or name != "reformer-pytorch"]
QUICK = SHAPES["quick"]
STEP = Case("step", "quick", 256, 2)


def _results(suite="required"):
    machine = {"cpu": "a", "cores": 2, "memory_gib": 1, "threads": 1, "device": "cpu", "commit": "b"}
    return Results(suite, "2026-01-31", machine, {"device": "cpu", "bf16": False, "threads": None})


def _task(kind, name, case=STEP):
    return {
        "task": kind,
        "implementation": name,
        "case": case.to_dict(),
        "device": "cpu",
        "bf16": False,
        "threads": None,
    }


def _table_rows(text, width):
    """Rows of cells, of the tables that are so wide."""
    lines = (line for line in text.splitlines() if line.startswith("|") and "---" not in line)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if len(row) == width]


def test_quick_suite(tmp_path, monkeypatch, capsys):
    # One run is enough of each.
    monkeypatch.setattr(measure, "LONG_SECONDS", 0)
    assert main(["--quick", "--out", str(tmp_path), "--implementations", *NAMES]) == 0
    (path,) = tmp_path.glob("*-quick.json")
    written = json.loads(path.read_text())
    expected = [(case.name, name) for case, names in select(SUITES["quick"], None, NAMES) for name in names]
    # Compiling takes longer than all the rest.
    assert {name for _, name in expected} == set(NAMES) - {"reformer_hf-compiled"}
    measured = written["measurements"]
    assert [(found["case"], found["implementation"]) for found in measured] == expected
    assert all(found["seconds"] > 0 and found["peak_bytes"] >= 0 for found in measured)
    assert written["machine"]["torch"] == torch.__version__

    head, *rows = _table_rows(path.with_suffix(".md").read_text(), 8)
    assert [tuple(row[:2]) for row in rows] == expected
    for row in rows:
        assert float(row[2]) > 0 and float(row[7]) > 0, row
        assert row[1] != "reformer_hf" or row[7] == "1.00"
    assert len(list(tmp_path.glob("*.png"))) == 1
    assert "reformer_hf" in capsys.readouterr().out

    # Results are not overwritten.
    assert main(["--quick", "--out", str(tmp_path), "--implementations", "lower-bound"]) == 0
    assert json.loads(path.read_text()) == written


def test_launch_process():
    found = runner.launch_process(_task("measure", "reformer_hf"))
    assert found["seconds"] > 0 and found["peak_bytes"] > 0 and found["built_bytes"] > 2**20


def test_failed_launch(monkeypatch):
    task = _task("measure", "lower-bound", replace(STEP, workload="forward"))
    assert runner.launch_here(task) == {"error": "ValueError: 'lower-bound' has no workload 'forward'."}
    monkeypatch.setattr(runner.sys, "executable", "false")
    assert runner.launch_process(task) == {"error": "exit status 1: no output"}


@pytest.mark.parametrize("outcome", ["wrong", "not a number", "raises"])
def test_wrong_results_are_not_timed(tmp_path, monkeypatch, capsys, outcome):
    def check(shape, num_hashes):
        if outcome == "raises":
            raise RuntimeError("no | way\nat all")
        return [Finding("fine", 0.0, 0.0), Finding("error", math.nan if outcome == "not a number" else 2.0, 1.0)]

    def never(*args):
        raise AssertionError("was measured")

    monkeypatch.setitem(IMPLEMENTATIONS, "dense", Implementation(never, check, frozenset({"step", "forward"})))
    arguments = [
        "--quick",
        "--out",
        str(tmp_path),
        "--implementations",
        "dense",
        "lower-bound",
        "--cases",
        "quick-step-*",
    ]
    assert main(arguments) == 1
    (path,) = tmp_path.glob("*.json")
    assert {found["implementation"] for found in json.loads(path.read_text())["measurements"]} == {"lower-bound"}
    says = "RuntimeError: no / way at all" if outcome == "raises" else "wrong: not timed"
    assert says in capsys.readouterr().out

    # Once it is right, it is measured, and nothing else again.
    monkeypatch.undo()
    assert main(["--resume", str(path)]) == 0
    measured = json.loads(path.read_text())["measurements"]
    assert [found["implementation"] for found in measured] == ["lower-bound", "dense", "dense"]


def test_non_finite_result():
    broken = Implementation(lambda case, device: lambda: torch.tensor([1.0, math.nan]), lambda shape, num_hashes: [])
    with pytest.raises(RuntimeError, match="not finite"):
        measure.measure(broken, STEP, torch.device("cpu"))


def _ok(name):
    return all(finding.ok for finding in IMPLEMENTATIONS[name].check(QUICK, 2))


def test_checks_notice_wrong_attention(monkeypatch):
    attend = LSHSelfAttention.attend
    assert _ok("reformer_hf") and _ok("reformer_hf-in-tree")

    def wrong(*args, **kwargs):
        out, *rest = attend(*args, **kwargs)
        return 1.01 * out, *rest

    monkeypatch.setattr(LSHSelfAttention, "attend", wrong)
    assert not _ok("reformer_hf") and not _ok("reformer_hf-in-tree")


def test_local_layers_equal_in_tree():
    shape = replace(QUICK, layers=("local", "lsh"))
    assert all(finding.ok for finding in IMPLEMENTATIONS["transformers"].check(shape, 2))


def test_checks_notice_dense_lookahead(monkeypatch):
    build = checks.dense_model

    def looking_ahead(*sizes):
        model = build(*sizes)
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: out + out.roll(-1, 1))
        return model

    assert _ok("dense")
    monkeypatch.setattr(checks, "dense_model", looking_ahead)
    assert not _ok("dense")


def test_checks_notice_rival_lookahead(monkeypatch):
    reformer_pytorch = pytest.importorskip("reformer_pytorch")
    assert _ok("reformer-pytorch")
    build = reformer_pytorch.ReformerLM
    monkeypatch.setattr(reformer_pytorch, "ReformerLM", lambda **fields: build(**{**fields, "causal": False}))
    assert not _ok("reformer-pytorch")


def test_checks_notice_wrong_encoder_decoder(monkeypatch):
    shape = SHAPES["quick-seq2seq"]

    def failed(name):
        return [finding.name for finding in IMPLEMENTATIONS[name].check(shape, 2) if not finding.ok]

    assert not failed("reformer_hf") and not failed("t5")
    build = checks.our_model

    def wrong_gradients(*sizes, reversible=True, **fields):
        model = build(*sizes, reversible=reversible, **fields)
        weight = model.get_encoder().encoder.layers[0].attention.output.dense.weight
        weight.register_hook(lambda grad: 1.01 * grad if reversible else grad)
        return model

    monkeypatch.setattr(checks, "our_model", wrong_gradients)
    assert failed("reformer_hf") == ["gradients, compared with layers that are not reversible"]

    def looking_ahead(build, stack):
        def build_wrong(*sizes, **fields):
            model = build(*sizes, **fields)
            stack(model).register_forward_hook(lambda module, args, out: out + out.roll(-1, 1))
            return model

        return build_wrong

    decoder_only = looking_ahead(build, lambda model: model.model.decoder.encoder.layers[0].feed_forward)
    monkeypatch.setattr(checks, "our_model", decoder_only)
    assert "change of logits before the first changed target token" in failed("reformer_hf")
    wrong_t5 = looking_ahead(checks.t5_model, lambda model: model.decoder.block[0].layer[-1])
    monkeypatch.setattr(checks, "t5_model", wrong_t5)
    assert failed("t5") == ["change of logits before the first changed target token"]


def test_list(capsys):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"suite {name}" in out for name in SUITES)
    assert "step-L16384-R4" in out and "enwik8-step-L4096-R2" in out


def test_unknown_cases(capsys):
    with pytest.raises(SystemExit):
        main(["--cases", "stop-*"])
    assert "--list" in capsys.readouterr().err


def test_suites_match_implementations():
    for entries in SUITES.values():
        for case, names in entries:
            for name in names:
                assert case.workload in IMPLEMENTATIONS[name].workloads, (case.name, name)
    for suite, ratios in TARGETS.items():
        asked = {(case.name, name) for case, names in SUITES[suite] for name in names}
        assert {(ratio.case, ratio.baseline) for ratio in ratios} <= asked
        assert {(ratio.our_case or ratio.case, "reformer_hf") for ratio in ratios} <= asked


class _Launch:
    """Stands for processes: all checks pass, and each measurement takes the seconds of its implementation."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.measured = []

    def __call__(self, task):
        if task["task"] == "check":
            return {"ok": True, "findings": []}
        self.measured.append(task["implementation"])
        return {"seconds": self.seconds[task["implementation"]], "peak_bytes": 1, "built_bytes": 1}


def _run(launch, results, repeats=3):
    runner.run_entries([(STEP, tuple(launch.seconds))], results, repeats, 300.0, launch, lambda name: None)


def test_order_of_measurements():
    launch = _Launch({"a": 1.0, "b": 301.0, "c": 2.0})
    _run(launch, _results())
    assert launch.measured == ["a", "b", "c", "a", "c", "a", "c"]


def test_resume_measures_the_rest(tmp_path):
    launch = _Launch({"a": 1.0, "b": 2.0})
    results = _results()
    results.path = tmp_path / "r.json"
    _run(launch, results, repeats=1)
    resumed = Results.load(results.path)
    assert vars(resumed) == vars(results)
    launch.measured.clear()
    _run(launch, resumed)
    assert launch.measured == ["a", "b", "a", "b"]
    assert len(Results.load(results.path).measurements) == 6


def test_peak_memory():
    size = 2**26

    def prepare(case, device):
        held = torch.ones(size)

        # Half of what is held already, at its peak.
        return lambda: torch.ones(size // 2).sum() + held[0]

    found = measure.measure(
        Implementation(prepare, lambda shape, num_hashes: []), Case("step", "quick", 256, 2), torch.device("cpu")
    )
    assert 0.95 * 2 * size < found["peak_bytes"] < 1.3 * 2 * size
    assert found["built_bytes"] > 4 * size


def test_repeats_of_short_runs(monkeypatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    runs = []
    assert measure.time_runs(lambda: "result", runs.append) == [2] * 5
    assert runs == ["result"] * 6
    monkeypatch.setattr(measure, "LONG_SECONDS", 2)
    assert measure.time_runs(lambda: "result", runs.append) == [2]
    assert len(runs) == 7


def _measured(times):
    """Results with these seconds, or (seconds, bytes), by case and implementation."""
    results = _results()
    for (case, name), found in times.items():
        seconds, peak = found if isinstance(found, tuple) else (found, 1)
        results.add_measurement(case, name, 0, {"seconds": seconds, "peak_bytes": peak, "built_bytes": 1})
    return results


def test_required_figures():
    long, short = Case("step", "base", 16384, 4), Case("step", "base", 4096, 8)
    results = _measured(
        {
            (long, "reformer_hf"): (10.0, 100),
            (long, "transformers"): (40.0, 500),
            (long, "lower-bound"): 8.0,
            (short, "reformer_hf"): 4.0,
            (short, "transformers"): 15.0,
        }
    )
    figures = {figure.title: (figure.measured, figure.met) for figure in required_figures(results)}
    assert figures["training step, L 16,384, 4 hashes: in-tree / ours"] == ("4.00", True)
    assert figures["training step, L 4,096, 8 hashes: in-tree / ours"] == ("3.75", False)
    assert figures["peak memory, training step, L 16,384, 4 hashes: in-tree / ours"] == ("5.00", False)
    assert figures["training step, L 16,384, 4 hashes: lower bound / ours"] == ("0.80", False)
    assert figures["training step, L 16,384, 1 hash: in-tree / ours"] == ("–", None)
    says = {row[0]: row[3] for row in _table_rows(markdown(results), 4)}
    assert says["training step, L 16,384, 4 hashes: in-tree / ours"] == "yes"
    assert says["training step, L 4,096, 8 hashes: in-tree / ours"] == "**no**"
    assert says["training step, L 16,384, 1 hash: in-tree / ours"] == "not measured"


def test_shortest_faster_length():
    for dense, measured, met in (
        ((2, 4, 9), "1,024", True),
        ((0.5, 4, 9), "2,048", False),
        ((2, 4, 3), "none", False),
    ):
        times = {}
        for length, ours, other in zip((1024, 2048, 4096), (1, 2, 4), dense, strict=True):
            case = Case("step", "base", length, 2)
            times |= {(case, "reformer_hf"): ours, (case, "dense"): other}
        (figure,) = (figure for figure in required_figures(_measured(times)) if "shortest" in figure.title)
        assert (figure.measured, figure.met) == (measured, met), dense


def test_growth():
    lengths = [1024, 4096, 16384, 65536]
    exponent, allowed = fit_growth({length: length**1.5 for length in lengths})
    assert exponent == pytest.approx(1.5)
    assert fit_growth({n: 3 * n * math.log2(n) for n in lengths})[0] == pytest.approx(allowed)
    assert 1.05 < allowed < 1.15
    assert fit_growth({4096: 1.0, 16384: 4.0}) is None
    for power, met in ((1.0, True), (1.5, False)):
        times = {(Case("step", "base", n, 2), "reformer_hf"): (n / 1024) ** power for n in lengths}
        (figure,) = (figure for figure in required_figures(_measured(times)) if "exponent" in figure.title)
        assert figure.met is met


def test_old_checkpoints(monkeypatch, capsys):
    monkeypatch.setattr(measure, "LONG_SECONDS", 0)
    old_checkpoints.main(["--quick"])
    text = capsys.readouterr().out
    assert [row[0] for row in _table_rows(text, 6)] == ["tokens", "1,024"] * 2
    assert text.count("Relative difference of the logits of 500 tokens") == 2


def test_old_checkpoints_that_do_not_fit():
    """The in-tree model is tried with half as many tokens until it fits; both run at the same lengths."""

    def launch(task):
        if task["model"] == "transformers" and task["length"] > 2000:
            return {"error": "exit status 1: RuntimeError: can't allocate memory"}
        return {"seconds": task["length"] / (1 if task["model"] == "transformers" else 2), "peak_bytes": 1e6}

    rows = old_checkpoints.compare({}, launch, [4096, 2048], min_length=600)
    assert [row[0] for row in rows] == ["4,096", "2,048", "1,024"]
    assert [row[3] for row in rows] == ["out of memory", "out of memory", "1024.00 s"]
    assert [row[5] for row in rows] == ["–", "–", "2.0 ×, 1.0 ×"]


def test_old_checkpoints_with_wrong_logits(monkeypatch):
    monkeypatch.setattr(old_checkpoints, "relative_rms", lambda *args: math.nan)
    with pytest.raises(RuntimeError, match="The logits of reformer-enwik8 differ by nan"):
        old_checkpoints.main(["--quick", "--checkpoints", "reformer-enwik8"])


def test_readme_holds_the_results(tmp_path):
    readme = overview.README.read_text()
    assert overview.table() in readme
    path = tmp_path / "README.md"
    path.write_text(readme.replace(overview.table(), "outdated\n"))
    write_tables(path, overview.NAME, overview.table())
    assert path.read_text() == readme
    overview.draw(tmp_path / "step_time.png")
    assert (tmp_path / "step_time.png").stat().st_size > 10_000
