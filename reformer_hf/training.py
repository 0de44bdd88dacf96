# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs of `Trainer` that survive faults: which checkpoint is whole, and when to stop."""

import json
import os
import signal
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

logger = logging.get_logger(__name__)

# What Transformers leaves in a checkpoint that it began on SIGTERM and did not finish.
_INCOMPLETE = "checkpoint-is-incomplete.txt"


class NotFiniteError(FloatingPointError):
    """Gradients are infinite or not a number."""


class StopWhereNotFinite(TrainerCallback):
    """
    Ends training with a `NotFiniteError` before an optimizer step that would make weights infinite or NaN, so that the
    last checkpoint stays a good one. A loss that is NaN has such gradients.

    With fp16 such steps are ordinary: `GradScaler` skips them. They are left to it.
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.fp16:
            return
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = get_total_norm(grads)
        # Sharded over processes.
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not torch.isfinite(norm):
            raise NotFiniteError(
                f"The gradients of step {state.global_step + 1} have the norm {norm.item()}: training stops, and "
                f"weights and checkpoints in {args.output_dir!r} stay as they were. Lower `learning_rate` (it is "
                f"{args.learning_rate}) or `max_grad_norm`, or look for what is wrong in the data of this step."
            )


class SaveOnSigterm(TrainerCallback):
    """
    On SIGTERM, finishes the step, saves a checkpoint and ends training; `stopped` is True then.

    Going on from it gives what an unbroken run does, bit for bit. (With `enable_jit_checkpoint` of Transformers the
    checkpoint may fall within a step, when random numbers of that step are drawn already.) Of several processes all
    stop at the same step, whichever got the signal. Works in the main thread only, as signals do.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._handler_before: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._handler_before = signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, signum, frame):
        logger.warning("Got SIGTERM: training ends after this step, with a checkpoint.")
        self.stopped = True

    def on_step_end(self, args, state, control, **kwargs):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            stopped = torch.tensor(int(self.stopped), device=args.device)
            torch.distributed.all_reduce(stopped, torch.distributed.ReduceOp.MAX)
            self.stopped = bool(stopped)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self._handler_before)


def what_is_missing(checkpoint: str | os.PathLike) -> str | None:
    """
    What makes a checkpoint of `Trainer` unfit to go on from; `None` where nothing does.

    Files that were cut off while they were written are found by their own structure: the lengths in the header of
    safetensors, the directory at the end of what `torch.save` writes. The state of the trainer, which is written last,
    must be there.
    """
    folder = Path(checkpoint)
    if (folder / _INCOMPLETE).exists():
        return f"`{_INCOMPLETE}` is there"
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return f"`{TRAINER_STATE_NAME}` is missing or cut off"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        if not _is_whole(path):
            return f"`{path.relative_to(folder)}` is cut off"
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(names - {path.name for path in files})
        if missing:
            return f"`{missing[0]}` is missing"
    return None


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return True
        if path.suffix in (".pt", ".pth"):
            return zipfile.is_zipfile(path)
        if path.suffix == ".json":
            json.loads(path.read_text())
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def last_whole_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    The last checkpoint below `output_dir` from which training can go on, for `resume_from_checkpoint`; `None` where
    there is none.

    A later one that was cut off, by a full disk or a killed process, is named in a warning and passed over.
    """
    folders = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if folder.is_dir() and number.isdecimal():
            folders[int(number)] = folder
    for step in sorted(folders, reverse=True):
        missing = what_is_missing(folders[step])
        if missing is None:
            return str(folders[step])
        logger.warning(f"Passing over the checkpoint {folders[step]}: {missing}.")
    return None
