# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Defaults on text: bits per byte of the default model after a few hundred steps, with one field changed.

    python -m experiments.text_defaults

The default causal model, without dropout, on slices of 4,096 bytes of the sources of the Python standard library, one
slice per step. `docs/defaults.md` holds the results.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot

from reformer_hf import ReformerHfForCausalLM

from .figures import draw_band, save, spread
from .models import causal_lm
from .records import Record
from .runner import Experiment, label, main
from .text import VOCAB_SIZE, bits_per_byte, draw_text, load_text
from .training import Schedule, train


@dataclass(frozen=True)
class Run:
    """
    Settings of a run; those that are not described are fields of the config.

    Args:
        layers: Attention layers, separated by commas, repeated to six layers.
        learning_rate: Maximum learning rate of AdamW.
        muon_learning_rate: That of Muon for the weights of linear layers; `None` for AdamW alone.
        seed: Seed of weights, data and hashes.
        steps: Number of training steps.
        length: Length of the slices.
        width: Width of the model.
    """

    layers: str = "local,lsh"
    local_rope_theta: float | None = 10000.0
    initializer_range: float = 0.02
    axial_norm_std: float = 0.02
    local_attn_chunk_length: int = 64
    num_hashes: int = 1
    learning_rate: float = 1e-3
    muon_learning_rate: float | None = None
    seed: int = 0
    steps: int = 300
    length: int = 4096
    width: int = 256


def build(run: Run) -> ReformerHfForCausalLM:
    """Build the model of a run."""
    layers = run.layers.split(",")
    return causal_lm(
        attn_layers=layers * (6 // len(layers)),
        vocab_size=VOCAB_SIZE,
        hidden_size=run.width,
        max_position_embeddings=run.length,
        local_rope_theta=run.local_rope_theta,
        initializer_range=run.initializer_range,
        axial_norm_std=run.axial_norm_std,
        local_attn_chunk_length=run.local_attn_chunk_length,
        num_hashes=run.num_hashes,
    )


def train_and_evaluate(run: Run, scratch: Path) -> dict[str, Any]:
    """Train a model for the steps of a run."""
    torch.manual_seed(run.seed)
    model = build(run)
    text, held_out = load_text()
    return train(
        model,
        lambda step: draw_text(text, 1, run.length, run.seed << 32 | step),
        lambda model: {"bits_per_byte": bits_per_byte(model, held_out, run.length)},
        Schedule(
            run.steps,
            run.learning_rate,
            eval_every=max(1, run.steps // 6),
            muon_learning_rate=run.muon_learning_rate,
        ),
        scratch,
    )


def report(records: list[Record], folder: Path) -> str:
    """Draw bits per byte against steps, and write the last values."""
    groups: dict[Run, list[Record]] = defaultdict(list)
    for record in records:
        groups[replace(Run(**record["settings"]), seed=0)].append(record["result"])
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    lines = ["| changed | seeds | steps | bits per byte | CPU minutes |", "|---|---|---|---|---|"]
    for run, results in groups.items():
        draw_band(axes, [result["curve"] for result in results], "bits_per_byte", label(run))
        bits = spread([result["curve"][-1]["bits_per_byte"] for result in results], digits=3)
        minutes = spread([result["cpu_seconds"] / 60 for result in results])
        lines.append(f"| {label(run)} | {len(results)} | {run.steps} | {bits} | {minutes} |")
    axes.set(xlabel="training steps", ylabel="held-out bits per byte")
    axes.grid(alpha=0.3)
    save(figure, folder / "curves.png", named_at_ends=True)
    return "\n".join(lines) + "\n"


EXPERIMENT = Experiment(
    "text_defaults",
    [
        Run(),
        Run(learning_rate=3e-3),
        Run(local_rope_theta=None),
        Run(initializer_range=0.05),
        Run(muon_learning_rate=0.05),
        Run(muon_learning_rate=0.02),
        Run(muon_learning_rate=0.01),
        Run(muon_learning_rate=0.02, layers="local"),
        *(Run(muon_learning_rate=0.02, local_attn_chunk_length=chunk) for chunk in (16, 32)),
        # Trained for longer, a layer may use what is further away.
        *(Run(muon_learning_rate=0.02, local_attn_chunk_length=chunk, steps=1200) for chunk in (16, 64)),
        Run(muon_learning_rate=0.05, initializer_range=0.05),
        Run(muon_learning_rate=0.05, axial_norm_std=0.1),
        Run(muon_learning_rate=0.05, local_attn_chunk_length=16),
        Run(muon_learning_rate=0.05, local_attn_chunk_length=128),
        Run(muon_learning_rate=0.05, num_hashes=4),
        Run(muon_learning_rate=0.05, layers="local"),
        Run(muon_learning_rate=0.05, layers="local,local,lsh"),
    ],
    train_and_evaluate,
    report,
    quick=[Run(local_rope_theta=theta, steps=6, length=256, width=64) for theta in (10000.0, None)],
)

if __name__ == "__main__":
    main(EXPERIMENT)
