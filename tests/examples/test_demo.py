# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The demo at a size that learns nothing: it saves, loads in a new process, and says what failed."""

import sys

import demo
import pytest
from safetensors.torch import load_file, save_file

OPTIONS = """
    --sequence_length 64 --max_bytes 5000 --max_steps 2 --hidden_size 16 --num_attention_heads 2
    --attention_head_size 8 --lsh_attn_chunk_length 8 --sample_length 0 --disable_tqdm true
"""


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", str(tmp_path), *OPTIONS.split()])
    assert demo.main() == 1
    output = capfd.readouterr().out
    assert "Logits of (1, 64, 260): bit-identical" in output
    assert "Generated:" in output
    assert output.split("Lower than the bigram model")[1].split()[0] == "NO"
    assert output.split("Same logits in a new process")[1].split()[0] == "yes"

    saved = load_file(tmp_path / demo.CHECK_FILE)
    saved["logits"][0, 0, 0] += 1e-6
    save_file(saved, tmp_path / demo.CHECK_FILE)
    assert not demo.verify(tmp_path)
