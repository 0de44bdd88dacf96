# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The training loop of the experiments. It continues after SIGKILL, and ends with the same weights as without."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from reformer_hf.training import MuonWithAdamW

# Name of the file of the final weights.
FINAL = "model.pt"

# Inputs and labels of a batch, for a step.
Batches = Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class Schedule:
    """
    Length of a training and learning rates of its optimizer.

    The learning rate rises during the warm-up, is constant, and falls to zero during the last fifth.

    Args:
        steps: Maximum number of steps.
        seconds: Maximum number of seconds, without evaluations; `None` for no limit.
        cpu_time: Whether these are CPU seconds of the process, for comparisons on a machine that is shared.
        learning_rate: Its maximum, of AdamW.
        muon_learning_rate: Maximum of Muon for the weights of linear layers (`MuonWithAdamW`); `None` for AdamW alone.
        warmup: Number of steps until it.
        eval_every: Number of steps between two evaluations.
        stop_at: Name of a metric, and the value at which training ends; `None` for no limit. Without a fall of the
            learning rate.
        weight_decay, clip_norm: As usual.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 50
    eval_every: int = 100
    seconds: float | None = None
    stop_at: tuple[str, float] | None = None
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    muon_learning_rate: float | None = None
    cpu_time: bool = False

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        """Create the optimizer of a model."""
        adamw: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": self.weight_decay, "betas": (0.9, 0.98)}
        if self.muon_learning_rate is None:
            return torch.optim.AdamW(model.parameters(), **adamw)
        return MuonWithAdamW(model, self.muon_learning_rate, **adamw)

    def share_done(self, state: "_State") -> float:
        """Return the share of the steps or seconds that is spent, whichever is larger."""
        steps = state.step / self.steps
        if self.seconds is None:
            return steps
        return max(steps, (state.cpu_seconds if self.cpu_time else state.seconds) / self.seconds)

    def share_of_learning_rate(self, state: "_State") -> float:
        done = self.share_done(state)
        falling = 1.0 if self.stop_at is not None else max(1.0 - done, 0.0) / 0.2
        return min(1.0, (state.step + 1) / self.warmup, falling)


@dataclass
class _State:
    """What a training continues from, besides the weights."""

    step: int
    seconds: float
    cpu_seconds: float
    losses: list[float]
    curve: list[dict[str, float]]


def train(
    model: nn.Module,
    batches: Batches,
    evaluate: Callable[[Any], dict[str, float]],
    schedule: Schedule,
    scratch: Path,
    checkpoint_seconds: float = 120.0,
) -> dict[str, Any]:
    """
    Train a model on the device of the process, and keep its final weights in `scratch`, for `load_final`.

    Args:
        model: Called with a batch, it returns an output with `loss`.
        batches: Returns the batch of a step.
        evaluate: Returns metrics of the model in evaluation mode.
        schedule: Length and learning rate.
        scratch: Folder of the checkpoint, which a training that was killed continues from.
        checkpoint_seconds: Seconds between two checkpoints.

    Returns:
        The number of steps, seconds and CPU seconds of training, without evaluations, and the curve: step, seconds,
        mean loss since the last entry, and metrics.
    """
    device = PartialState().device
    model.to(device)
    optimizer = schedule.optimizer(model)
    learning_rates = [group["lr"] for group in optimizer.param_groups]
    state, path = _State(0, 0.0, 0.0, [], []), scratch / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=False)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        torch.cuda.set_rng_state_all(saved["cuda_rng"])
        state = saved["state"]
    last_saved = time.monotonic()
    while not _is_done(state, schedule):
        wall, cpu = time.perf_counter(), time.process_time()
        share = schedule.share_of_learning_rate(state)
        for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = learning_rate * share
        model.train()
        loss = model(**{name: tensor.to(device) for name, tensor in batches(state.step).items()}).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        state.losses.append(loss.item())
        state.step += 1
        state.seconds += time.perf_counter() - wall
        state.cpu_seconds += time.process_time() - cpu
        if not math.isfinite(state.losses[-1]):
            raise FloatingPointError(f"The loss is {state.losses[-1]} at step {state.step}.")
        if state.step % schedule.eval_every == 0 or _is_done(state, schedule):
            _evaluate(model, evaluate, state)
        if time.monotonic() - last_saved > checkpoint_seconds:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
            _save({**saved, "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}, path)
            last_saved = time.monotonic()
    _save({"weights": model.state_dict()}, scratch / FINAL)
    return {
        "steps": state.step,
        "seconds": round(state.seconds, 1),
        "cpu_seconds": round(state.cpu_seconds, 1),
        "curve": state.curve,
    }


def load_final(scratch: Path) -> dict[str, Tensor]:
    """Return the final weights of a training."""
    return torch.load(scratch / FINAL, map_location="cpu")["weights"]


def share_right(logits: Tensor, labels: Tensor) -> float:
    """Return the share of labels `[B, L]` other than -100 that the token before them predicts (`[B, L, V]`)."""
    predicted, labels = logits[:, :-1].argmax(-1), labels[:, 1:].to(logits.device)
    return (predicted == labels)[labels != -100].float().mean().item()


def _is_done(state: _State, schedule: Schedule) -> bool:
    if schedule.stop_at is not None and state.curve and state.step == state.curve[-1]["step"]:
        name, value = schedule.stop_at
        if state.curve[-1][name] >= value:
            return True
    return schedule.share_done(state) >= 1.0


def _evaluate(model: nn.Module, evaluate: Callable[[Any], dict[str, float]], state: _State) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        metrics = evaluate(model.eval())
    entry = {"step": state.step, "seconds": round(state.seconds, 2), "loss": sum(state.losses) / len(state.losses)}
    state.curve.append({name: round(value, 5) for name, value in (entry | metrics).items()})
    state.losses = []


def _save(saved: dict[str, Any], path: Path) -> None:
    """Save atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(saved, partial)
    os.replace(partial, path)
