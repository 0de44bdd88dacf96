# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
What tests run in processes of their own, alone or as ranks: `python -m tests.worker SCENARIO JSON`.

A scenario takes the keywords of the JSON object; what it finds it writes below its `folder`, rank 0 alone.
"""

import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors.torch import save_file
from torch.distributed import barrier, destroy_process_group, init_process_group, is_initialized
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig

import reformer_hf
from reformer_hf import ReformerHfForCausalLM
from reformer_hf.reformer_layer import ReformerHfLayer
from reformer_hf.training import CausalCollator, MuonWithAdamW, SaveOnSigterm, StopOnNonFinite, last_intact_checkpoint

from .helpers import DROPOUT, random_model, tiny_config

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LAYERS = ["local", "lsh", "full", "lsh"]
GLOBAL_BATCH = 4


def data(num_rows: int, length: int = 40) -> torch.Tensor:
    return torch.randint(1, 60, (num_rows, length), generator=torch.Generator().manual_seed(0))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def partitions_gathered(tensors: dict[str, torch.Tensor]):
    """With the parameters that DeepSpeed has partitioned, if any, in one piece."""
    if not any(hasattr(tensor, "ds_id") for tensor in tensors.values()):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(tensors.values()))


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    # Every rank takes part in gathering; one writes. Weights of two names are two.
    with partitions_gathered(tensors):
        tensors = {name: whole(tensor.detach()).clone() for name, tensor in tensors.items()}
    if RANK == 0:
        save_file(tensors, path)


def sharded_at_load(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The same model by way of a folder, sharded by Transformers."""
    # Only rank 0 writes; the other one waits for it.
    if RANK == 0:
        model.save_pretrained(folder)
    barrier()
    config = DistributedConfig(fsdp_size=WORLD_SIZE)
    return type(model).from_pretrained(folder, distributed_config=config, dtype=model.dtype)


def gradients(
    folder: str, wrap: str, tied: bool = False, head_chunk: int = 0, head: str = "ReformerHfForCausalLM"
) -> None:
    """Loss and gradients of one global batch, each rank with its share of it."""
    if WORLD_SIZE > 1 and not is_initialized():
        init_process_group("gloo")
    fields = {"tie_word_embeddings": tied, "chunk_size_lm_head": head_chunk, "hash_seed": 0, "attn_layers": LAYERS}
    causal = head == "ReformerHfForCausalLM"
    seq2seq = head == "ReformerHfForConditionalGeneration"
    cls = getattr(reformer_hf, head)
    model = random_model(torch.float64, cls, is_decoder=causal, pad_token_id=0, **fields).train()
    if wrap == "plan":
        model = sharded_at_load(model, Path(folder, "initial")).train()
    elif wrap == "fully_shard":
        for layer in [module for module in model.modules() if isinstance(module, ReformerHfLayer)]:
            fully_shard(layer)
        fully_shard(model)
    elif wrap.startswith("ddp"):
        handler = DistributedDataParallelKwargs(find_unused_parameters=wrap == "ddp-unused")
        model = Accelerator(cpu=True, kwargs_handlers=[handler]).prepare(model)
    share = data(GLOBAL_BATCH).chunk(WORLD_SIZE)[RANK]
    labels = share if causal else share[:, :25] if seq2seq else share[:, 0] % 2
    loss = model(share, labels=labels).loss
    loss.backward()
    module = model.module if wrap.startswith("ddp") else model
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(grad is not None for grad in found.values())
    if WORLD_SIZE > 1:
        loss = loss.detach() / WORLD_SIZE
        torch.distributed.all_reduce(loss)
    save({"loss": loss, **found}, Path(folder, "gradients.safetensors"))
    if wrap == "plan":
        module.save_pretrained(Path(folder, "saved"))


class _KillAt(TrainerCallback):
    """The process gets a signal at the beginning of a step; with a rank given, that of this rank alone."""

    def __init__(self, step: int, rank: int | None, signum: int):
        self.step, self.rank, self.signum = step, rank, signum

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.rank in (None, RANK):
            os.kill(os.getpid(), self.signum)


class _StopAt(TrainerCallback):
    """Training ends after a step, as if by itself."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class _SpoilAt(TrainerCallback):
    """A weight becomes infinite before a step, so that its loss is not finite."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.reformer.embeddings.word_embeddings.weight.data.fill_(float("inf"))


def train(
    folder: str,
    max_steps: int,
    batch_size: int = 2,
    dropout: bool = True,
    resume: bool = False,
    kill_at: int | None = None,
    kill_rank: int | None = None,
    signum: int = signal.SIGKILL,
    spoil_at: int | None = None,
    stop_at: int | None = None,
    file_limit: int | None = None,
    wrap: str = "ddp",
    reversible: bool = True,
    muon: bool = False,
    **arguments,
) -> None:
    """A run of `Trainer` with checkpoints every two steps, unless `arguments` say otherwise."""
    set_seed(0)
    fields = {"attn_layers": LAYERS, **(DROPOUT if dropout else {"hash_seed": 0})}
    model = ReformerHfForCausalLM(tiny_config(**fields, reversible=reversible))
    if wrap == "plan":
        init_process_group("gloo")
        model = sharded_at_load(model, Path(folder, "initial"))
    callbacks: list[TrainerCallback] = [StopOnNonFinite(), SaveOnSigterm()]
    if kill_at is not None:
        callbacks.append(_KillAt(kill_at, kill_rank, signum))
    if stop_at is not None:
        callbacks.append(_StopAt(stop_at))
    if spoil_at is not None:
        callbacks.append(_SpoilAt(spoil_at))
    defaults = {
        "output_dir": folder,
        "max_steps": max_steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }
    trainer = Trainer(
        model,
        TrainingArguments(**{**defaults, **arguments}),
        train_dataset=[{"input_ids": row} for row in data(32)],
        data_collator=CausalCollator(0),
        callbacks=callbacks,
        optimizers=(MuonWithAdamW(model) if muon else None, None),
    )
    if file_limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    trainer.train(resume_from_checkpoint=last_intact_checkpoint(folder) if resume else None)
    if RANK == 0:
        log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        Path(folder, "losses.json").write_text(json.dumps({"losses": log, "steps": trainer.state.global_step}))
    save(dict(trainer.model.named_parameters()), Path(folder, "weights.safetensors"))


def time_budget(folder: str) -> None:
    """Steps of a training script whose ranks have clocks of their own: what each decides."""
    # Examples are no package that other processes need.
    from examples.training_run import LearningCurve

    args = SimpleNamespace(device=Accelerator(cpu=True).device)
    state = SimpleNamespace(global_step=0, stateful_callbacks={})
    curve, clock = LearningCurve(max_minutes=1.0), 0.0
    curve._now = lambda: {"seconds": clock, "cpu_seconds": clock}
    curve.on_train_begin(args, state, None)
    decisions = []
    for of_ranks in ((30, 40), (59, 61), (61, 59)):
        control = TrainerControl()
        curve.on_step_begin(args, state, control)
        clock = float(of_ranks[RANK])
        curve.on_optimizer_step(args, state, control)
        curve.on_step_end(args, state, control)
        decisions.append((curve.share_spent, control.should_training_stop))
    Path(folder, f"decisions-{RANK}.json").write_text(json.dumps(decisions))


SCENARIOS = {function.__name__: function for function in (gradients, train, time_budget)}

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]](**json.loads(sys.argv[2]))
    if is_initialized():
        barrier()
        destroy_process_group()
        # All is written. The end of the interpreter, now and then, takes down a rank whose gloo threads still run.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
