# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Copying with LSH attention: Table 2 of the paper.

    python -m experiments.duplication

Paper (section 5): sequences 0w0w of 1,024 tokens, with w random out of 127 symbols; a model of one layer, 4 heads,
width and feed-forward 256; trained for 150,000 steps with full attention or with 1, 2 or 4 hashes, and evaluated with
full attention and with 1, 2, 4 and 8 hashes. The loss is on the second w.

Here: the same sequences, layer and evaluation, chunks of 32, one learned embedding per position, and two LSH patterns:
`chunk`, as in the paper's figure 2, with 64 buckets, keys of the query's own bucket, and a key that several rounds
find counted once (equation 4); and `window`, the default of this package, with 16 buckets. The paper gives no chunk
length and no number of buckets for this task. `reformer_copy.gin` of trax is for 4,096 tokens: chunks of 128, 192
buckets, dropout of attention weights, and 50,000 steps of batches of 16 with Adafactor. Here, 2,000 steps of 4,096
tokens with AdamW. Accuracy is that of single symbols; the paper does not say whether its accuracy is.

The same task at 4,096, 16,384 and 65,536 tokens, with `window`, starts from the weights of the length before. Position
embeddings of the second w are those of the shorter second w, repeated, and likewise for the first: each symbol of the
copy then matches its original and, at four times the length, three others, which training has to tell apart.

Next to it, with the same data, learning rates and warm starts, and, except for those of `FEWER_STEPS`, the same number
of steps: the same layer with full attention, on fused kernels, or with local attention; the in-tree model with
one LSH layer; and Llama, of two layers, because one that attends by content alone cannot copy.
"""

import itertools
from collections import defaultdict
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib import pyplot
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, ReformerConfig, ReformerModelWithLMHead

from reformer_hf import ReformerHfConfig, ReformerHfForCausalLM

from .figures import draw_band, panels_of, save, spread
from .records import Record, cpu_seconds_before, cpu_seconds_of_curve
from .runner import Experiment, main, scratch_of
from .training import Schedule, load_final, share_right, train

SYMBOLS = 128
EVAL_HASHES = (8, 4, 2, 1)
# Accuracy in percent with full attention and 8, 4, 2 and 1 hashes in evaluation (Kitaev et al. 2020, Table 2).
PAPER = {
    0: (100, 94.8, 92.5, 76.9, 52.5),
    4: (0.8, 100, 99.9, 99.4, 91.9),
    2: (0.8, 100, 99.9, 98.1, 86.8),
    1: (0.8, 99.9, 99.6, 94.8, 77.9),
}
NUM_HELD_OUT_TOKENS = 1 << 15
PATTERNS = ("window", "chunk")
# Lengths, each warm-started from the one before, and their numbers of training steps.
STEPS = {1024: 2000, 4096: 2000, 16384: 300, 65536: 200}
LENGTHS = tuple(STEPS)
# Models that learn in fewer steps, each of which costs more, or that do not learn.
FEWER_STEPS = {("full", 16384): 150, ("llama", 4096): 300, ("llama", 16384): 60, ("local", 65536): 50}
# Names in figures, and colors.
MODELS = {
    "lsh": ("LSH attention", "C0"),
    "full": ("full attention, fused", "black"),
    "local": ("local attention", "C1"),
    "in-tree": ("in-tree Reformer", "C2"),
    "llama": ("Llama, two layers", "C3"),
}


def steps_of(model: str, length: int) -> int:
    """Return the number of training steps of a model next to others."""
    return FEWER_STEPS.get((model, length), STEPS[length])


@dataclass(frozen=True)
class Run:
    """
    Settings of a run.

    Args:
        hashes: Number of hash rounds in training; 0 for models without LSH attention.
        pattern: `lsh_pattern`. A model with full attention is evaluated with both patterns.
        length: Length of the sequences. If it is in `LENGTHS`, the run starts from the weights of the length before.
        seed: Seed of weights, data and hashes.
        steps: Maximum number of training steps.
        width: Width of the model, with 4 heads.
        model: One of `MODELS`.
    """

    hashes: int
    pattern: str = "window"
    length: int = 1024
    seed: int = 0
    steps: int = 2000
    width: int = 256
    model: str = "lsh"

    @property
    def chunk_length(self) -> int:
        return min(32, self.length // 8)

    @property
    def shorter(self) -> "Run | None":
        """The run whose weights this one starts from."""
        index = LENGTHS.index(self.length) if self.length in LENGTHS else 0
        if not index:
            return None
        length = LENGTHS[index - 1]
        return replace(self, length=length, steps=steps_of(self.model, length))


def draw(run: Run, batch_size: int, seed: int) -> dict[str, Tensor]:
    """Draw sequences 0w0w, `[B, L]`, and labels that are -100 except on the second w."""
    generator, half = torch.Generator().manual_seed(seed), run.length // 2
    word = torch.randint(1, SYMBOLS, (batch_size, half - 1), generator=generator)
    zero = torch.zeros((batch_size, 1), dtype=torch.long)
    input_ids = torch.cat([zero, word, zero, word], dim=1)
    labels = input_ids.clone()
    labels[:, : half + 1] = -100
    return {"input_ids": input_ids, "labels": labels}


def build(run: Run) -> PreTrainedModel:
    """Build the model of a run. With `"lsh"` and `"full"` it has the same parameters."""
    shared: dict[str, Any] = {
        "vocab_size": SYMBOLS,
        "hidden_size": run.width,
        "num_attention_heads": 4,
        "max_position_embeddings": run.length,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if run.model == "llama":
        llama = LlamaConfig(num_hidden_layers=2, intermediate_size=run.width, use_cache=False, **shared)
        return LlamaForCausalLM._from_config(llama, attn_implementation="sdpa")
    shared |= {
        "is_decoder": True,
        "attn_layers": ["lsh" if run.model == "in-tree" else run.model],
        "attention_head_size": run.width // 4,
        "feed_forward_size": run.width,
        "axial_pos_embds": False,
        "hidden_dropout_prob": 0.0,
        "lsh_attn_chunk_length": run.chunk_length,
        "local_attn_chunk_length": run.chunk_length,
        "num_hashes": max(run.hashes, 1),
    }
    if run.model == "in-tree":
        # It has no default for the padding token, and chooses the number of buckets in its first forward pass.
        return ReformerModelWithLMHead(ReformerConfig(**shared | {"pad_token_id": 0}, use_cache=False))
    shared |= {"lsh_pattern": run.pattern, "lsh_deduplicate_keys": run.pattern == "chunk"}
    return ReformerHfForCausalLM(ReformerHfConfig(**shared))


@torch.no_grad()
def accuracy(model: PreTrainedModel, run: Run, **options: Any) -> float:
    """Return the accuracy on the second w of held-out sequences."""
    right, batch_size = [], max(1, 4096 // run.length)
    for start in range(0, max(1, NUM_HELD_OUT_TOKENS // run.length), batch_size):
        batch = draw(run, batch_size, (1 << 40) + start)
        right.append(share_right(model(batch["input_ids"].to(model.device), **options).logits, batch["labels"]))
    return mean(right)


def evaluate(model: PreTrainedModel, run: Run) -> dict[str, float]:
    """Return the accuracy, with the hashes of training and, for LSH attention, with 4."""
    found = {"accuracy": accuracy(model, run)}
    if run.model == "lsh":
        found["accuracy_4_hashes"] = accuracy(model, run, num_hashes=4)
    return found


def stretch_positions(table: Tensor, length: int) -> Tensor:
    """
    Return a table of position embeddings `[length, E]` from one for shorter sequences.

    The query that predicts symbol `t` of the copy, and symbol `t` of the original, keep the vectors that they have for
    `t` modulo the shorter number of symbols.
    """
    symbols, shorter = torch.arange(length // 2), table.shape[0] // 2
    symbols = symbols % (shorter - 1)
    first = torch.cat([torch.zeros(1, dtype=torch.long), 1 + symbols[:-1]])
    return table[torch.cat([first, shorter + symbols])]


def start(run: Run, scratch: Path) -> PreTrainedModel:
    """Return the model that training starts with."""
    torch.manual_seed(run.seed)
    model = build(run)
    if run.shorter is None:
        return model
    weights = load_final(scratch_of("duplication", run.shorter, scratch.parents[1]))
    name = "reformer.embeddings.position_embeddings.embedding.weight"
    if name in weights:
        weights[name] = stretch_positions(weights[name], run.length)
    model.load_state_dict(weights)
    return model


def train_and_evaluate(run: Run, scratch: Path) -> dict[str, Any]:
    """Train a model; evaluate one with LSH or full attention with full attention and with each number of hashes."""
    model = start(run, scratch)
    batch_size = max(1, 4096 // run.length)
    found = train(
        model,
        lambda step: draw(run, batch_size, run.seed << 32 | step),
        lambda model: evaluate(model, run),
        Schedule(run.steps, learning_rate=1e-3, eval_every=max(1, run.steps // 20)),
        scratch,
    )
    if run.model not in ("lsh", "full"):
        return found
    full = _with_weights_of(model, replace(run, model="full"))
    exact, scores = accuracy(full, run), {}
    for pattern in PATTERNS if run.model == "full" else [run.pattern]:
        lsh = _with_weights_of(model, replace(run, pattern=pattern, model="lsh"))
        scores[pattern] = {str(hashes): accuracy(lsh, run, num_hashes=hashes) for hashes in EVAL_HASHES}
        scores[pattern]["full"] = exact
    return found | {"accuracy": scores}


def _with_weights_of(model: PreTrainedModel, run: Run) -> PreTrainedModel:
    """Build the model of a run for evaluation, with the weights and on the device of another one."""
    built: Any = build(run)
    built.load_state_dict(model.state_dict())
    return built.to(model.device).eval()


def report(records: list[Record], folder: Path) -> str:
    """Draw the learning curves and write Table 2, and the table of the longest sequences next to other models."""
    groups: dict[Run, list[Record]] = defaultdict(list)
    race: dict[Run, Record] = {}
    for record in records:
        run = Run(**record["settings"])
        groups[replace(run, seed=0)].append(record["result"])
        if run.seed == 0 and run.hashes <= 1 and run.pattern == "window":
            race[run] = record["result"]
    shortest = min(run.length for run in groups)
    draw_curves({run: results for run, results in groups.items() if run.length == shortest}, folder / "curves.png")
    draw_race(race, folder / "lengths.png")
    return "\n".join([*table_2(groups), "", *race_table(race)]) + "\n"


def table_2(groups: dict[Run, list[Record]]) -> list[str]:
    """Return the rows of Table 2, those of the paper first, and of the same task with longer sequences."""
    names = ("full", *map(str, EVAL_HASHES))
    lines = [
        "| length | trained with | steps | seeds | full | " + " | ".join(map(_hashes, EVAL_HASHES)) + " |",
        "|" + "---|" * (4 + len(names)),
    ]
    for length, hashes in itertools.product(sorted({run.length for run in groups}), (0, 4, 2, 1)):
        trained_with = _hashes(hashes) if hashes else "full attention"
        if length == LENGTHS[0]:
            lines.append(_row(f"{length:,}", f"paper: {trained_with}", "150,000", "", *PAPER[hashes]))
        for run, results in groups.items():
            if (run.length, run.hashes) != (length, hashes) or run.model not in ("lsh", "full"):
                continue
            for pattern in results[0]["accuracy"]:
                values = [[100 * result["accuracy"][pattern][name] for result in results] for name in names]
                cells = (f"`{pattern}`: {trained_with}", f"{run.steps:,}", len(results), *map(spread, values))
                lines.append(_row(f"{length:,}", *cells))
    return lines


def race_table(results: dict[Run, Record]) -> list[str]:
    """Return the final accuracy of each model at each length, and the CPU time of training in total and until 90 %."""
    lines = [
        "| length | model | accuracy | minutes | until 90 % | the same with all shorter lengths |",
        "|---|---|---|---|---|---|",
    ]
    for run in sorted(results, key=lambda run: (run.length, list(MODELS).index(run.model))):
        minutes, values = _curve(results[run], run)
        until = next((at for at, value in zip(minutes, values, strict=True) if value >= 90), None)
        times = (
            ("–", "–") if until is None else (f"{until:.1f}", f"{until + cpu_seconds_before(results, run) / 60:.1f}")
        )
        lines.append(_row(f"{run.length:,}", MODELS[run.model][0], f"{values[-1]:.1f}", f"{minutes[-1]:.1f}", *times))
    return lines


def _curve(result: Record, run: Run) -> tuple[list[float], list[float]]:
    """Return minutes of CPU time and accuracies in percent."""
    minutes = [seconds / 60 for seconds in cpu_seconds_of_curve(result)]
    metric = "accuracy_4_hashes" if run.model == "lsh" else "accuracy"
    return minutes, [100 * entry[metric] for entry in result["curve"]]


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _hashes(number: int) -> str:
    return f"{number} hash" if number == 1 else f"{number} hashes"


def draw_curves(groups: dict[Run, list[Record]], path: Path) -> None:
    """Draw the accuracy of the models of Table 2 against steps."""
    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for run, results in sorted(groups.items(), key=lambda item: (item[0].pattern, item[0].hashes)):
        if run.model not in ("lsh", "full") or run.steps != STEPS.get(run.length, run.steps):
            continue
        name = f"{run.pattern}, {_hashes(run.hashes)}" if run.hashes else "full attention"
        style = {"window": "-", "chunk": "--"}[run.pattern] if run.hashes else ":"
        curves = [result["curve"] for result in results]
        draw_band(axes, curves, "accuracy", name, scale=100, linestyle=style, color=f"C{run.hashes}")
    axes.set(xlabel="training steps", ylabel="accuracy on the copy, %", ylim=(0, 102))
    axes.grid(alpha=0.3)
    # At their ends, curves would be indistinguishable at 100 %.
    axes.legend(fontsize=7)
    save(figure, path)


def draw_race(results: dict[Run, Record], path: Path) -> None:
    """Draw the accuracy of each model against minutes, with a panel for each length."""
    lengths = sorted({run.length for run in results})
    figure, panels = panels_of(lengths, columns=2)
    for run, result in results.items():
        label, color = MODELS[run.model]
        panels[run.length].plot(*_curve(result, run), label=label, color=color, marker=".")
    for length, axes in panels.items():
        axes.set(title=f"{length:,} tokens", xlabel="CPU minutes of training at this length")
        axes.set(ylabel="accuracy on the copy, %", xlim=(0, None), ylim=(0, 102))
        axes.grid(alpha=0.3)
    panels[lengths[0]].legend(fontsize=7, loc="center right")
    save(figure, path)


_SEEDS = (0, 1, 2)
# One hash, and the other models, with lengths that they can be trained at.
RACE = [
    Run(hashes, length=length, steps=steps_of(model, length), model=model)
    for length in LENGTHS
    for model, hashes in (("lsh", 1), ("local", 0), ("full", 0), ("in-tree", 1), ("llama", 0))
    if length < 65536 or model in ("lsh", "local")
]
_TABLE_2 = [
    *(Run(hashes, pattern, seed=seed) for seed in _SEEDS for pattern in PATTERNS for hashes in (4, 2, 1)),
    # It does not learn in 2,000 steps.
    Run(1, "chunk", steps=8000),
    # Evaluated with both patterns.
    *(Run(0, seed=seed, model="full") for seed in _SEEDS),
    *(Run(4, length=length, steps=STEPS[length]) for length in (4096, 16384)),
]
EXPERIMENT = Experiment(
    "duplication",
    list(dict.fromkeys([*_TABLE_2, *RACE])),
    train_and_evaluate,
    report,
    quick=[Run(int(model in ("lsh", "in-tree")), length=64, steps=30, width=32, model=model) for model in MODELS],
    warm_start=attrgetter("shorter"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
