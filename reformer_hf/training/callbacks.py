# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Callbacks for `Trainer`: stop before weights become non-finite, save a checkpoint on SIGTERM."""

import signal
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)


class NonFiniteGradientsError(FloatingPointError):
    """Gradients are infinite or not a number."""


class StopOnNonFinite(TrainerCallback):
    """
    Stop training with a `NonFiniteGradientsError` before an optimizer step that would make weights infinite or NaN.

    The last checkpoint stays valid. A loss that is NaN has such gradients.

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
            raise NonFiniteGradientsError(
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
