# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Compare old checkpoints in our model and in the in-tree model: equal logits, time and peak memory of a forward pass.

    python -m benchmarks.old_checkpoints
    python -m benchmarks.old_checkpoints --checkpoints reformer-enwik8 --lengths 65536 16384

The folders have the hyperparameters of google/reformer-enwik8 and google/reformer-crime-and-punishment and random
weights. Both models load them as they are, each in processes of its own, and run in evaluation mode. First, their
logits at a short length are compared. If the in-tree model does not fit into `--memory_gib` at a length (by default,
all positions), both run at half of it as well, and so on.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import ReformerConfig, ReformerModelWithLMHead

from reformer_hf import ReformerHfForCausalLM

from .checks import relative_rms, soften_self_mask
from .machine import describe_machine
from .measure import PeakMemory, check_finite, time_runs

MODELS = {"reformer_hf": ReformerHfForCausalLM, "transformers": ReformerModelWithLMHead}

# Fields of the published configs. All others have their in-tree defaults there.
CHECKPOINTS: dict[str, dict] = {
    "reformer-enwik8": {
        "attn_layers": ["local", "local", "lsh", "local"] * 3,
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "attention_head_size": 128,
        "feed_forward_size": 4096,
        "vocab_size": 258,
        "max_position_embeddings": 65536,
        "axial_pos_shape": [128, 512],
        "axial_pos_embds_dim": [256, 768],
        "num_hashes": 4,
        "num_buckets": 512,
        "lsh_attn_chunk_length": 256,
        "local_attn_chunk_length": 128,
        "hidden_dropout_prob": 0.2,
        "lsh_attention_probs_dropout_prob": 0.1,
        "local_attention_probs_dropout_prob": 0.2,
        "is_decoder": True,
    },
    "reformer-crime-and-punishment": {
        "attn_layers": ["local", "lsh"] * 3,
        "hidden_size": 256,
        "num_attention_heads": 2,
        "attention_head_size": 64,
        "feed_forward_size": 512,
        "vocab_size": 320,
        "max_position_embeddings": 524288,
        "axial_pos_shape": [512, 1024],
        "axial_pos_embds_dim": [64, 192],
        "num_hashes": 1,
        "num_buckets": [64, 128],
        "lsh_attn_chunk_length": 64,
        "local_attn_chunk_length": 64,
        "hidden_dropout_prob": 0.05,
        "lsh_attention_probs_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.05,
        "is_decoder": True,
    },
}

# Replace fields for `--quick`.
_QUICK = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "attention_head_size": 16,
    "feed_forward_size": 48,
    "max_position_embeddings": 1024,
    "axial_pos_shape": [16, 64],
    "axial_pos_embds_dim": [8, 24],
    "lsh_attn_chunk_length": 16,
    "local_attn_chunk_length": 8,
}
# Both checkpoints have chunks of at most 256 tokens; the last one is partial.
_CHECK_LENGTH, _QUICK_CHECK_LENGTH = 4000, 500
# Rounding differs, and may move a vector to another bucket.
_LIMIT = 1e-4
_GIB = 2**30

Launch = Callable[[dict], dict]


def _fields(name: str, quick: bool) -> dict:
    return {**CHECKPOINTS[name], **(_QUICK if quick else {})}


def build_folder(name: str, folder: Path, quick: bool) -> None:
    """Save an in-tree model with the hyperparameters of a checkpoint and weights that are all random."""
    torch.manual_seed(0)
    model = ReformerModelWithLMHead(ReformerConfig(**_fields(name, quick)))
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def perform(task: dict) -> dict:
    """
    Load the folder of a task in one of the models, and write its logits or measure its forward pass.

    Returns:
        `parameters`, and for a measurement `seconds` and `peak_bytes`, the peak memory above the loaded model.
    """
    if task["threads"] is not None:
        torch.set_num_threads(task["threads"])
    if task["memory_bytes"] is not None:
        # Allocations above it fail, instead of having the process killed.
        resource.setrlimit(resource.RLIMIT_DATA, (task["memory_bytes"], task["memory_bytes"]))
    model = _load(task["model"], task["folder"])
    found: dict = {"parameters": model.num_parameters()}
    ids = torch.randint(2, 258, (1, task["length"]), generator=torch.Generator().manual_seed(1))
    if task["logits"] is not None:
        if task["model"] == "transformers":
            soften_self_mask(model)
        torch.save(_logits(model, ids), task["logits"])
        return found
    # Load libraries and start threads.
    _logits(model, ids[:, : task["length"] // 16])
    peak = PeakMemory(torch.device("cpu"))
    found["seconds"] = statistics.median(time_runs(lambda: _logits(model, ids), check_finite))
    return {**found, "peak_bytes": peak.above_built()}


def _load(name: str, folder: str) -> nn.Module:
    # Without a seed, the in-tree model draws hash rotations anew in each call. Ours has the seed 0 in evaluation.
    model, info = MODELS[name].from_pretrained(folder, hash_seed=0, output_loading_info=True)
    if any(info.values()):
        raise ValueError(f"{name} does not use exactly the weights of {folder}: {info}.")
    return model.eval()


@torch.no_grad()
def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def launch_process(task: dict) -> dict:
    """Perform a task in a process of its own. Return `{"error": …}` if it fails."""
    command = [sys.executable, "-m", "benchmarks.old_checkpoints", "--task", json.dumps(task)]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines() or ["no output"]
    return {"error": f"exit status {done.returncode}: {lines[-1]}"}


def check(folder: Path, task: dict, launch: Launch, length: int) -> tuple[float, int, int]:
    """Return the relative difference of the logits of both models, and their numbers of parameters."""
    logits, parameters = [], []
    for name in MODELS:
        path = folder / f"{name}.pt"
        found = launch({**task, "model": name, "length": length, "logits": str(path), "memory_bytes": None})
        if "error" in found:
            raise RuntimeError(f"{name}: {found['error']}")
        logits.append(torch.load(path))
        parameters.append(found["parameters"])
    return relative_rms(*logits), *parameters


def compare(task: dict, launch: Launch, lengths: Sequence[int], min_length: int) -> list[list[str]]:
    """Return the rows of a table: each length, and shorter ones until the in-tree model fits into memory."""
    rows: list[list[str]] = []
    measured: set[int] = set()
    for wanted in lengths:
        length, fits = wanted, False
        while not fits and length >= min_length and length not in measured:
            measured.add(length)
            ours, in_tree = (launch({**task, "model": name, "length": length, "logits": None}) for name in MODELS)
            fits = "error" not in in_tree
            rows.append([f"{length:,}", *_cells(ours), *_cells(in_tree), _ratio(ours, in_tree)])
            length //= 2
    return rows


def _cells(found: dict) -> list[str]:
    if "error" not in found:
        return [f"{found['seconds']:.2f} s", f"{found['peak_bytes'] / 1e6:,.0f} MB"]
    failed = "out of memory" if "allocate" in found["error"] or "MemoryError" in found["error"] else found["error"]
    return [failed, "–"]


def _ratio(ours: dict, in_tree: dict) -> str:
    if "error" in ours or "error" in in_tree:
        return "–"
    return f"{in_tree['seconds'] / ours['seconds']:.1f} ×, {in_tree['peak_bytes'] / ours['peak_bytes']:.1f} ×"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table for each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--checkpoints", nargs="+", choices=CHECKPOINTS, default=list(CHECKPOINTS))
    parser.add_argument("--lengths", nargs="+", type=int, help="numbers of tokens (default: all positions)")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--memory_gib", type=float, default=20.0, help="memory of each process")
    parser.add_argument("--quick", action="store_true", help="tiny sizes in one process, to see whether it works")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.task:
        sys.stdout.write(json.dumps(perform(json.loads(options.task))) + "\n")
        return
    launch, check_length = (perform, _QUICK_CHECK_LENGTH) if options.quick else (launch_process, _CHECK_LENGTH)
    memory_bytes = None if options.quick else int(options.memory_gib * _GIB)
    machine = describe_machine(options.threads, "cpu")
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None))
    print("\nTime and peak memory above the loaded model, of a forward pass of one sequence in fp32.")
    for name in tqdm(options.checkpoints):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            build_folder(name, folder / "checkpoint", options.quick)
            task = {"folder": str(folder / "checkpoint"), "threads": options.threads, "memory_bytes": memory_bytes}
            difference, ours, in_tree = check(folder, task, launch, check_length)
            print(
                f"\n## {name}\n\n{ours:,} parameters, in-tree {in_tree:,} (one of two biases of its head is unused)."
            )
            print(f"Relative difference of the logits of {check_length:,} tokens: {difference:.1e}.\n")
            if not difference <= _LIMIT:
                raise RuntimeError(f"The logits of {name} differ by {difference:.1e}, more than {_LIMIT:.0e}.")
            lengths = options.lengths or [_fields(name, options.quick)["max_position_embeddings"]]
            print("| tokens | reformer_hf | peak memory | in-tree | peak memory | in-tree / ours |")
            print("|---|---|---|---|---|---|")
            for row in compare(task, launch, lengths, min_length=check_length):
                print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
