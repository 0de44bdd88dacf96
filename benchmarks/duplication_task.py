# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Compare LSH patterns on the duplication task of the Reformer paper (0w0w, with the loss on the second w).

    python -m benchmarks.duplication_task --out duplication.jsonl --table duplication.md

For each setting of a grid, the script trains one layer on random sequences and measures the accuracy on the copied
half with 1, 2, 4 and 8 hashes and with full attention. It skips runs that are already in the output file.
"""

import argparse
import itertools
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from reformer_hf import ReformerHfConfig, ReformerHfForCausalLM

LENGTH, SYMBOLS, CHUNK = 256, 128, 16
BATCH, TEST_BATCH = 8, 64
EVAL_HASHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Run:
    """One setting. `window` is the number of keys that a query sees: chunk length * chunks before."""

    pattern: str
    deduplicate_keys: bool = False
    window: int = CHUNK
    num_buckets: int | None = None
    num_hashes: int = 1
    seed: int = 0
    steps: int = 800


def grid(steps: int, seeds: list[int], hashes: list[int]) -> list[Run]:
    """Return the settings from which the defaults were chosen, full attention first."""
    shapes = [
        ("chunk", 1, 2),
        ("chunk", 1, 1),
        ("window", 1, 2),
        ("window", 1, 1),
        ("window", 2, 1),
        ("window", 2, 0.5),
    ]
    runs = [Run("full", seed=seed, steps=steps) for seed in seeds]
    for (pattern, before, density), deduplicate, num_hashes, seed in itertools.product(
        shapes, (False, True), hashes, seeds
    ):
        runs.append(Run(pattern, deduplicate, CHUNK * before, int(density * LENGTH / CHUNK), num_hashes, seed, steps))
    return runs


def sequences(batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ids `[B, LENGTH]` of 0w0w, and labels that are -100 except on the second w."""
    word = torch.randint(1, SYMBOLS, (batch_size, LENGTH // 2 - 1), generator=generator)
    separator = torch.zeros((batch_size, 1), dtype=torch.long)
    input_ids = torch.cat([separator, word, separator, word], dim=1)
    labels = input_ids.clone()
    labels[:, : LENGTH // 2 + 1] = -100
    return input_ids, labels


def build(run: Run, layer: str) -> ReformerHfForCausalLM:
    """Build one layer of width 128, with one learned embedding per position."""
    lsh = {} if run.pattern == "full" else {"lsh_pattern": run.pattern, "num_buckets": run.num_buckets}
    config = ReformerHfConfig(
        attn_layers=[layer],
        hidden_size=128,
        attention_head_size=32,
        feed_forward_size=512,
        vocab_size=SYMBOLS,
        max_position_embeddings=LENGTH,
        axial_pos_embds=False,
        hidden_dropout_prob=0.0,
        is_decoder=True,
        lsh_attn_chunk_length=CHUNK,
        lsh_num_chunks_before=run.window // CHUNK,
        lsh_deduplicate_keys=run.deduplicate_keys,
        num_hashes=run.num_hashes,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **lsh,
    )
    return ReformerHfForCausalLM(config)


@torch.no_grad()
def accuracy(model: ReformerHfForCausalLM, **kwargs) -> float:
    """Return the accuracy on the second w of held-out sequences."""
    input_ids, labels = sequences(TEST_BATCH, torch.Generator().manual_seed(1 << 20))
    predicted = model.eval()(input_ids, **kwargs).logits[:, :-1].argmax(-1)
    counted = labels[:, 1:] != -100
    return (predicted == labels[:, 1:])[counted].float().mean().item()


def train(run: Run) -> dict:
    """Train and evaluate one setting on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    model = build(run, "full" if run.pattern == "full" else "lsh").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    generator = torch.Generator().manual_seed(run.seed)
    losses, start = [], time.perf_counter()
    for _ in range(run.steps):
        input_ids, labels = sequences(BATCH, generator)
        loss = model(input_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    result = {
        "loss": sum(losses[-50:]) / len(losses[-50:]),
        "learned_at": first_below(losses, 0.1),
        "seconds": seconds,
    }
    if run.pattern == "full":
        return asdict(run) | result | {"accuracy": {"full": accuracy(model)}}
    scores = {str(num_hashes): accuracy(model, num_hashes=num_hashes) for num_hashes in EVAL_HASHES}
    full = build(run, "full")
    full.load_state_dict(model.state_dict())
    return asdict(run) | result | {"accuracy": scores | {"full": accuracy(full)}}


def first_below(losses: list[float], limit: float) -> int | None:
    """Return the first step at which the mean loss of the last ten steps is below `limit`."""
    for step in range(10, len(losses) + 1):
        if sum(losses[step - 10 : step]) / 10 < limit:
            return step
    return None


def table(results: list[dict]) -> str:
    """Return a Markdown table with one row per run."""
    columns = [*(str(num_hashes) for num_hashes in EVAL_HASHES), "full"]
    lines = [
        "| pattern | duplicate keys | W | buckets | hashes | seed | steps | loss | steps to loss 0.1 | seconds | "
        + " | ".join(f"acc. {name}" for name in columns)
        + " |",
        "|" + "---|" * (10 + len(columns)),
    ]
    for r in results:
        lsh = r["pattern"] != "full"
        duplicates = ("removed" if r["deduplicate_keys"] else "counted") if lsh else ""
        cells = [
            r["pattern"],
            duplicates,
            r["window"] if lsh else "",
            r["num_buckets"] or "",
            r["num_hashes"] if lsh else "",
        ]
        cells += [r["seed"], r["steps"], f"{r['loss']:.3f}", r["learned_at"] or "–", f"{r['seconds']:.0f}"]
        cells += [f"{r['accuracy'][name]:.3f}" if name in r["accuracy"] else "" for name in columns]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Run the missing settings of the grid, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="output file in JSON Lines format, one line per run")
    parser.add_argument("--table", type=Path, help="file for a Markdown table of all runs in --out")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--hashes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--processes", type=int, default=2, help="number of parallel runs, each with one thread")
    args = parser.parse_args(argv)
    results = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    fields = Run.__dataclass_fields__
    done = {Run(**{name: result[name] for name in fields}) for result in results}
    missing = [run for run in grid(args.steps, args.seeds, args.hashes) if run not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        futures = [pool.submit(train, run) for run in missing]
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs"):
            results.append(future.result())
            with args.out.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
    if args.table is not None:
        order = {run: i for i, run in enumerate(grid(args.steps, args.seeds, args.hashes))}
        results.sort(key=lambda r: order.get(Run(**{name: r[name] for name in fields}), len(order)))
        args.table.write_text(table(results))


if __name__ == "__main__":
    main()
