# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""What the training scripts share: arguments, trainer, checkpoints to resume from, time budgets, learning curves."""

import json
import logging
import re
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback

from reformer_hf import ReformerHfConfig
from reformer_hf.hub import RunReport, write_model_card
from reformer_hf.tokenization_reformer_hf import LAST_BYTE_ID
from reformer_hf.training import MuonWithAdamW, SaveOnSigterm, StopOnNonFinite, find_corruption, last_intact_checkpoint

logger = logging.getLogger(__name__)

_MANY_EPOCHS = 1e6
# Ends of the names of what a log line shows.
_LOGGED = ("loss", "per_byte", "per_dimension", "per_masked_byte", "accuracy", "exact_match")


@dataclass
class ScriptTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for small models on long sequences."""

    output_dir: str | None = field(default="outputs/model", metadata={"help": "Output folder."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the checkpoints in `output_dir` and start over."}
    )
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Training batch size per device."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Evaluation batch size per device."})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Pin memory, for faster copies to a GPU."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of epochs."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    muon_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of Muon, which trains the weights of linear layers, next to AdamW for "
            "everything else. 0 trains everything with AdamW. By default 0.02 for new models of text and "
            "images, and 0 for others, with DeepSpeed and with another `optim`."
        },
    )
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Warm-up steps, or a fraction of all steps if below 1."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Number of steps between two logs."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float | None = field(default=200, metadata={"help": "Number of steps between two evaluations."})
    save_steps: float = field(default=200, metadata={"help": "Number of steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Maximum number of checkpoints to keep."})
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Minutes of training, without evaluations; replaces the number of epochs. The learning rate "
            "then follows the time: it rises during the fraction `warmup_steps` and falls to zero."
        },
    )

    cpu_time: bool = field(
        default=False,
        metadata={"help": "`max_minutes` are CPU time of the process, for comparisons on a machine that is shared."},
    )

    def __post_init__(self):
        # Denormal numbers, such as attention weights that are almost zero, slow a CPU down, more and more as attention
        # becomes sharper. Threads take this setting from the one that starts them, with the first tensors.
        torch.set_flush_denormal(True)
        if self.max_minutes is not None:
            if self.max_minutes <= 0 or self.max_steps > 0 or not 0 <= self.warmup_steps < 1:
                raise ValueError(
                    f"`max_minutes` is {self.max_minutes}, `max_steps` {self.max_steps} and `warmup_steps` "
                    f"{self.warmup_steps}: give minutes above 0, no `max_steps`, and a fraction below 1 as warm-up."
                )
            self.num_train_epochs = _MANY_EPOCHS
        super().__post_init__()


class LearningCurve(TrainerCallback, ExportableState):
    """
    Write losses and metrics to `curve.jsonl` in the output folder, with the seconds of training before each.

    The seconds leave out evaluations. `cpu_seconds` are those of all threads of the process. Checkpoints contain them:
    a resumed run continues with the remaining time.

    Args:
        max_minutes: Time after which training stops; `None` for no limit.
        cpu_time: Whether the limit is one of CPU time.
    """

    def __init__(self, max_minutes: float | None = None, cpu_time: bool = False):
        self.max_seconds = None if max_minutes is None else 60 * max_minutes
        self.limited = "cpu_seconds" if cpu_time else "seconds"
        self._spent = {"seconds": 0.0, "cpu_seconds": 0.0}
        self._started: dict[str, float] | None = None
        # The share of the limit that is spent, as of the last step.
        self.share_spent = 0.0

    def spent(self) -> dict[str, float]:
        """Return the seconds of training so far, by the clock and of CPU time."""
        if self._started is None:
            return dict(self._spent)
        now = self._now()
        return {name: spent + now[name] - self._started[name] for name, spent in self._spent.items()}

    def _update_share(self, args: TrainingArguments) -> None:
        """Let all processes agree on the share of the limit that is spent, which is that of the first one."""
        if self.max_seconds is not None:
            share = torch.tensor(self.spent()[self.limited] / self.max_seconds, device=args.device)
            self.share_spent = float(broadcast(share))

    @staticmethod
    def _now() -> dict[str, float]:
        return {"seconds": time.monotonic(), "cpu_seconds": time.process_time()}

    def state(self) -> dict[str, Any]:
        """Return what `Trainer` saves with a checkpoint."""
        return {"args": {}, "attributes": {"spent": self.spent()}}

    def on_train_begin(self, args, state, control, **kwargs):
        # Checkpoints of older versions have no entry, and `Trainer` only replaces those that exist.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step == 0:
            return
        self._spent = {**self._spent, **saved["attributes"]["spent"]}
        self._update_share(args)
        path = Path(args.output_dir, "curve.jsonl")
        if state.is_world_process_zero and path.exists():
            # An interrupted run may have written entries after the checkpoint.
            lines = path.read_text().splitlines(keepends=True)
            rewritten = path.with_suffix(".partial")
            rewritten.write_text("".join(line for line in lines if _step_of(line) <= state.global_step))
            rewritten.replace(path)

    def on_step_begin(self, args, state, control, **kwargs):
        if self._started is None:
            self._started = self._now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        # The schedule reads it next.
        self._update_share(args)

    def on_step_end(self, args, state, control, **kwargs):
        if self.share_spent >= 1:
            control.should_training_stop = control.should_evaluate = True
        if control.should_evaluate or control.should_save or control.should_training_stop:
            self._spent, self._started = self.spent(), None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            path = Path(args.output_dir, "curve.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            entry = {"step": state.global_step, **self.spent(), **(logs or {})}
            with path.open("a") as file:
                file.write(json.dumps({name: _rounded(value) for name, value in entry.items()}) + "\n")


class LogLines(TrainerCallback):
    """Write one line per log where there is no progress bar."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {name: value for name, value in (logs or {}).items() if name.endswith(_LOGGED)}
        if state.is_world_process_zero and shown:
            values = ", ".join(f"{name.replace('_', ' ')} {float(value):.4g}" for name, value in shown.items())
            of_all = "" if args.max_minutes else f" of {state.max_steps}"
            logger.info("step %d%s: %s", state.global_step, of_all, values)


class ScriptTrainer(Trainer):
    """
    A `Trainer` with a time budget and a learning curve.

    It stops on non-finite gradients, saves a checkpoint on SIGTERM, and writes no model card: the scripts write their
    own.

    Args:
        muon_by_default: Whether to train with Muon unless the arguments say otherwise.
        **kwargs: Of `Trainer`.
    """

    def __init__(self, muon_by_default: bool = False, **kwargs):
        super().__init__(**kwargs)
        if self.args.muon_learning_rate is None:
            chosen = self.is_deepspeed_enabled or self.args.optim != TrainingArguments.optim
            self.args.muon_learning_rate = 0.02 if muon_by_default and not chosen else 0.0
        self.curve = LearningCurve(self.args.max_minutes, self.args.cpu_time)
        self.on_sigterm = SaveOnSigterm()
        for callback in (StopOnNonFinite(), self.on_sigterm, self.curve):
            self.add_callback(callback)
        if self.args.disable_tqdm:
            self.remove_callback(PrinterCallback)
            self.add_callback(LogLines())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer of the arguments, or, with `muon_learning_rate`, two in one."""
        args = self.args
        if not args.muon_learning_rate or self.optimizer is not None:
            return super().create_optimizer(model)
        if self.is_deepspeed_enabled:
            raise ValueError(
                f"`muon_learning_rate` is {args.muon_learning_rate}, but DeepSpeed flattens weights and Muon needs "
                "matrices: leave it out, or use FSDP2."
            )
        self.optimizer = MuonWithAdamW(
            model or self.model,
            args.muon_learning_rate,
            args.learning_rate,
            (args.adam_beta1, args.adam_beta2),
            args.adam_epsilon,
            args.weight_decay,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Create the schedule of the arguments, or, with `max_minutes`, one that follows the time."""
        if self.args.max_minutes is None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self._share_of_learning_rate)
        return self.lr_scheduler

    def _share_of_learning_rate(self, step: int) -> float:
        done, warmup = self.curve.share_spent, self.args.warmup_steps
        return min(done / warmup if warmup else 1.0, max(1.0 - done, 0.0) / (1.0 - warmup))

    def train_or_exit(self, checkpoint: str | None) -> dict[str, float]:
        """Train and return the metrics, or exit after a SIGTERM with its status."""
        metrics = self.train(resume_from_checkpoint=checkpoint).metrics
        if self.on_sigterm.stopped:
            logger.warning("Stopped after step %d. Run the same command again to resume.", self.state.global_step)
            raise SystemExit(128 + signal.SIGTERM)
        return metrics

    def save_run(self, metrics: dict[str, float]) -> None:
        """Save the model, the state of the trainer, and `{train,eval,all}_results.json`."""
        self.save_model()
        self.save_state()
        of_training = {name for name in metrics if name.startswith("train_")}
        of_evaluation = metrics.keys() - of_training - {"total_flos"}
        for split, names in {"train": of_training | {"epoch"}, "eval": of_evaluation}.items():
            self.save_metrics(split, {name: value for name, value in metrics.items() if name in names})

    def create_model_card(self, *args, **kwargs):
        """Keep the existing model card."""


def write_card_of_run(trainer: ScriptTrainer, report: RunReport) -> None:
    """Write the model card, with the command of this process, if it is a script, and the seconds of training."""
    script = Path(sys.argv[0])
    command = shlex.join(["python", f"examples/{script.name}", *sys.argv[1:]]) if script.suffix == ".py" else ""
    write_model_card(trainer, replace(report, command=command, seconds=trainer.curve.spent()["seconds"]))


def find_checkpoint(args: ScriptTrainingArguments) -> str | None:
    """Return the checkpoint to resume from: the requested one, or the last intact one in `output_dir`."""
    output_dir = Path(args.output_dir)
    if args.overwrite_output_dir:
        if args.should_save:
            for folder in output_dir.glob("checkpoint-*"):
                shutil.rmtree(folder)
            (output_dir / "curve.jsonl").unlink(missing_ok=True)
        return None
    requested = args.resume_from_checkpoint
    if requested is not None and str(requested).lower() not in {"true", "last"}:
        if not Path(requested).is_dir():
            raise ValueError(
                f"`resume_from_checkpoint` is {requested!r}, which is not a folder: give a checkpoint folder."
            )
        corruption = find_corruption(requested)
        if corruption:
            raise ValueError(f"The checkpoint {requested!r} is corrupt: {corruption}. Give an intact checkpoint.")
        return requested
    checkpoint = last_intact_checkpoint(output_dir)
    if requested is not None and checkpoint is None:
        raise ValueError(
            f"`resume_from_checkpoint` is {requested!r}, but there is no checkpoint in "
            f"{args.output_dir!r}: leave it out to train from the start."
        )
    if checkpoint is not None:
        logger.info("Resuming from %s. Use `--overwrite_output_dir` to start over.", checkpoint)
    return checkpoint


def check_byte_config(config: ReformerHfConfig, sequence_length: int) -> None:
    """Raise `ValueError` if a model of this config cannot read `sequence_length` bytes."""
    if sequence_length < 2:
        raise ValueError(f"`sequence_length` is {sequence_length}, but must be at least 2.")
    if config.max_position_embeddings < sequence_length:
        raise ValueError(
            f"`sequence_length` is {sequence_length}, but the model reads at most "
            f"{config.max_position_embeddings} tokens (`max_position_embeddings`): lower `sequence_length`, "
            "or save the model with more positions (`model.resize_position_embeddings`)."
        )
    if config.vocab_size <= LAST_BYTE_ID:
        raise ValueError(
            f"`vocab_size` is {config.vocab_size}, but a byte-level model needs at least {LAST_BYTE_ID + 1}: "
            "choose another model."
        )


def parse_overrides(text: str | None, config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Parse `key=value,key=value` into a dictionary. Raises `ValueError` for keys that are no config fields."""
    names = {each.name for each in fields(config_class)}
    overrides = {}
    for item in re.split(r",(?=\s*\w+=)", text) if text else []:
        name, separator, value = item.strip().partition("=")
        if not separator or name not in names:
            raise ValueError(
                f"`config_overrides` contains {item!r}, but each entry must be key=value, with a field of "
                f"`{config_class.__name__}` as the key."
            )
        try:
            overrides[name] = json.loads(value)
        except json.JSONDecodeError:
            overrides[name] = value
    return overrides


def _step_of(line: str) -> float:
    """Return the step of a line of `curve.jsonl`; infinity for a line that was not written completely."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
