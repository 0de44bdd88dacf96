# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""LoRA, the notebook, and lm-evaluation-harness on a saved model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import train_lora
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from reformer_hf import ReformerHfByteTokenizer, ReformerHfForCausalLM
from tests.helpers import tiny_config

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def saved(tmp_path):
    """The folder of a model with random weights."""
    tokenizer = ReformerHfByteTokenizer()
    config = tiny_config(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id)
    ReformerHfForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_lora(saved, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"Line {i} says {i * i}.\n" for i in range(300)))
    bits = train_lora.main(
        [
            *("--model", str(saved), "--data", str(tmp_path / "text.txt"), "--length", "64", "--max_steps", "20"),
            *("--learning_rate", "0.02", "--merge", "--output_dir", str(tmp_path / "lora")),
        ]
    )
    assert bits["after"] < bits["before"] - 0.1
    assert not (tmp_path / "lora" / "model.safetensors").exists()
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "lora" / "merged").eval()
    ids = ReformerHfByteTokenizer()("Line 7 says 49.", return_tensors="pt")["input_ids"]
    assert (adapted(ids).logits - merged(ids).logits).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("trusts", [True, False], ids=["remote-code", "package"])
def test_harness(saved, trusts):
    pytest.importorskip("lm_eval")
    model = f"pretrained={saved}" + ",trust_remote_code=True" * trusts
    code = ("" if trusts else "import reformer_hf; ") + "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    options = ["--model", "hf", "--model_args", model, "--tasks", "python_lines", "--device", "cpu"]
    result = subprocess.run(
        [sys.executable, "-c", code, "run", *options, "--include_path", "examples/harness"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "python_lines" in result.stdout and "acc" in result.stdout


@pytest.mark.slow
def test_notebook(tmp_path):
    """Each cell runs, and the model learns."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples" / "first_steps.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    texts = [output["text"] for output in outputs if output.output_type == "stream" and output.name == "stdout"]
    assert any(text.startswith("def read(self, path):") and len(text) > 100 for text in texts)
    assert any("coverage" in text for text in texts)
