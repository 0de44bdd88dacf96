# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Callbacks for `Trainer`: stop on non-finite gradients, save a checkpoint on SIGTERM, and push code with weights."""

import shutil
import signal
import sys
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)


class NonFiniteGradientsError(FloatingPointError):
    """Raised when gradients are infinite or NaN."""


class StopOnNonFinite(TrainerCallback):
    """
    Stop training before an optimizer step with non-finite gradients.

    The weights and the last checkpoint stay intact. A NaN loss has non-finite gradients too. With fp16 the callback
    does nothing, because `GradScaler` skips such steps; with DeepSpeed it warns and does nothing, because DeepSpeed
    has taken the step.

    Raises:
        `NonFiniteGradientsError`: If the norm of the gradients is infinite or NaN.
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.fp16:
            return
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not grads:
            logger.warning_once("`StopOnNonFinite` finds no gradients to check, for example with DeepSpeed.")
            return
        norm = get_total_norm(grads)
        # Gradients may be sharded.
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not torch.isfinite(norm):
            raise NonFiniteGradientsError(
                f"The gradient norm of step {state.global_step + 1} is {norm.item()}. Training stops; the weights and "
                f"the checkpoints in {args.output_dir!r} are unchanged. Lower `learning_rate` (now "
                f"{args.learning_rate}) or `max_grad_norm`, or check the data of this step."
            )


class SaveOnSigterm(TrainerCallback):
    """
    On SIGTERM, finish the current step, save a checkpoint and stop training.

    `stopped` is then `True`. A run that resumes from this checkpoint equals an uninterrupted run, bit for bit. (With
    `enable_jit_checkpoint` of Transformers, the checkpoint may be saved within a step, after random numbers of that
    step are drawn.) In distributed training all processes stop at the same step, whichever receives the signal.
    Training must run in the main thread, because only that can handle signals.

    The first signal and the end of training restore the previous handler, so a second signal has its usual effect.
    If training raises an exception, `Trainer` does not tell its callbacks; a later signal is then passed on to the
    previous handler.
    """

    def __init__(self) -> None:
        self.stopped = False
        # Whether this process has received a signal that no step has answered.
        self._signalled = False
        self._previous_handler: Any = None
        self._training_loop: CodeType | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        # Earlier training may have raised an exception.
        self._restore_handler()
        self.stopped = self._signalled = False
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__") == TrainerCallback.__module__:
            frame = frame.f_back
        self._training_loop = frame.f_code
        self._previous_handler = signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, signum, frame):
        self._restore_handler()
        while frame is not None and frame.f_code is not self._training_loop:
            frame = frame.f_back
        if frame is None:
            signal.raise_signal(signum)
            return
        logger.warning("Received SIGTERM: saving a checkpoint and stopping after this step.")
        self._signalled = True

    def on_step_end(self, args, state, control, **kwargs):
        # A signal from here on, such as one while processes wait for each other, is for the next step.
        stopped = self._signalled
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            any_stopped = torch.tensor(int(stopped), device=args.device)
            torch.distributed.all_reduce(any_stopped, torch.distributed.ReduceOp.MAX)
            stopped = bool(any_stopped)
        if stopped:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self._restore_handler()
        if self._signalled and not self.stopped:
            # It came after the last step.
            signal.raise_signal(signal.SIGTERM)

    def _restore_handler(self) -> None:
        # Another handler may have replaced this one.
        if signal.getsignal(signal.SIGTERM) == self._stop:
            signal.signal(signal.SIGTERM, self._previous_handler or signal.SIG_DFL)


class PushModelCode(TrainerCallback):
    """
    Add the code of the model to what `Trainer(push_to_hub=True)` pushes while it trains.

    At each checkpoint, `Trainer` pushes weights and config, but no code, which follows only at the end of training.
    With this callback the model on the Hub can be loaded by `trust_remote_code=True` from the first push on. Loading
    with the package installed does not need it.
    """

    def on_push_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for path in (Path(args.output_dir) / f"checkpoint-{state.global_step}").glob("*.py"):
                shutil.copy(path, args.output_dir)
