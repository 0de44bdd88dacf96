# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The code of docs/diagnostics.md."""

import re
from pathlib import Path

import pytest

from reformer_hf import ReformerHfByteTokenizer

from ..helpers import random_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "diagnostics.md"


@pytest.mark.slow
def test_page(tmp_path, monkeypatch, capsys):
    """It runs, with a tiny model in place of that of the demo."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    fields = {"vocab_size": 260, "max_position_embeddings": 4096, "attn_layers": ["local", "lsh", "local"]}
    model = random_model(num_attention_heads=4, num_buckets=None, **fields)
    model.save_pretrained(tmp_path / "outputs" / "demo")
    ReformerHfByteTokenizer().save_pretrained(tmp_path / "outputs" / "demo")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    printed = capsys.readouterr().out
    assert "| layer | hashes | coverage |" in printed
    assert re.findall(r"^(\w+) \d", printed, re.MULTILINE) == ["intact", "random", "skip", "full"]
    assert Path("demo.png").read_bytes().startswith(b"\x89PNG")
