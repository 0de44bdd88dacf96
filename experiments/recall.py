# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Recall of pairs that are far apart: multi-query associative recall (Arora et al. 2023, "Zoology").

    python -m experiments.recall

A sequence begins with pairs of a key and a value, the value first. Each key comes once more at its end, far beyond the
reach of local layers, and is followed by its value, which the model must predict. Between them there are random tokens
that say nothing. Accuracy is that of the values after the second key of a pair.

Here: 16 pairs out of 32 keys and 16 values, so that chance is 6 %. The shortest sequences, of 64 tokens, consist of
pairs alone. Longer sequences are warm-started from the weights of the length before, for all models alike; further
position embeddings start as copies of those that the weights have. The models are those of `experiments.models` with
two layers. Training, with Muon, ends at 90 %, evaluated every 10 steps, or after a number of steps or CPU seconds.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib import pyplot
from torch import Tensor
from transformers import PreTrainedModel

from .figures import draw_times, panels_of, save, spread
from .models import COLORS, LABELS, MODELS, Sizes
from .records import Record, cpu_seconds_before, cpu_seconds_of_curve
from .runner import Experiment, main, scratch_of
from .training import Schedule, load_final, share_right, train

KEYS, VALUES, FILLER = range(32), range(32, 48), range(48, 64)
VOCAB_SIZE = FILLER.stop
NUM_PAIRS = 16
LENGTHS = (64, 256, 1024, 4096, 16384, 65536)
# Evaluation takes 32 sequences of up to 16,384 tokens, and 8 of 65,536.
MAX_HELD_OUT, HELD_OUT_TOKENS = 32, 1 << 19


@dataclass(frozen=True)
class Run:
    """
    Settings of a run.

    Args:
        model: Name of the model.
        length: Length of the sequences; the run starts with the weights of the length before.
        seed: Seed of weights, data and hashes.
        width: Width of the model.
        tokens: Number of tokens in a batch.
        steps: Maximum number of training steps.
        seconds: Maximum number of CPU seconds, without evaluations.
        learning_rate: Maximum learning rate of AdamW for the shortest sequences; others have a tenth.
        muon_learning_rate: The same of Muon, which trains the weights of linear layers.
        local_chunk, lsh_chunk: Chunk lengths.
        num_hashes: Number of hash rounds.
    """

    model: str
    length: int
    seed: int = 0
    width: int = 128
    tokens: int = 4096
    steps: int = 300
    seconds: float = 300.0
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.05
    local_chunk: int = 4
    lsh_chunk: int = 32
    num_hashes: int = 4

    @property
    def shorter(self) -> "Run | None":
        """The run to start from."""
        lengths = [length for length in LENGTHS if length < self.length]
        return replace(self, length=lengths[-1]) if lengths else None


def draw(run: Run, batch_size: int, seed: int) -> dict[str, Tensor]:
    """Draw sequences and labels `[B, L]`, which are -100 except for the values after the second key of each pair."""
    generator = torch.Generator().manual_seed(seed)

    def choose(pool: range) -> Tensor:
        order = torch.rand((batch_size, len(pool)), generator=generator).argsort(1)
        return pool.start + order[:, :NUM_PAIRS]

    keys = choose(KEYS)
    values = torch.randint(VALUES.start, VALUES.stop, keys.shape, generator=generator)
    order = torch.rand(keys.shape, generator=generator).argsort(1)
    pairs = torch.stack([keys, values], dim=-1)
    asked = pairs.gather(1, order[..., None].expand_as(pairs))
    # What matches a question is then the key itself, and not the token after it.
    pairs = pairs.flip(-1)
    gap = (batch_size, run.length - 4 * NUM_PAIRS)
    filler = torch.randint(FILLER.start, FILLER.stop, gap, generator=generator)
    input_ids = torch.cat([pairs.flatten(1), filler, asked.flatten(1)], dim=1)
    labels = torch.full_like(input_ids, -100)
    labels[:, -2 * NUM_PAIRS + 1 :: 2] = asked[..., 1]
    return {"input_ids": input_ids, "labels": labels}


def build(run: Run) -> PreTrainedModel:
    """Build a model of two layers, with chunks of the same length for sequences of any length."""
    sizes = Sizes(
        VOCAB_SIZE,
        run.length,
        run.width,
        depth=2,
        feed_forward=2 * run.width,
        local_chunk=run.local_chunk,
        lsh_chunk=run.lsh_chunk,
        num_hashes=run.num_hashes,
        position_columns=16,
    )
    return MODELS[run.model](sizes)


def accuracy(model: PreTrainedModel, run: Run) -> float:
    """Return the accuracy on the values of held-out sequences."""
    right = []
    for i in range(min(MAX_HELD_OUT, HELD_OUT_TOKENS // run.length)):
        batch = draw(run, 1, (1 << 40) + i)
        right.append(share_right(model(input_ids=batch["input_ids"].to(model.device)).logits, batch["labels"]))
    return mean(right)


def load_shorter(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Give a model the weights of one for shorter sequences. Further position embeddings are copies of its own."""
    own = model.state_dict()
    for name, weight in weights.items():
        for dim, (old, new) in enumerate(zip(weight.shape, own[name].shape, strict=True)):
            if old != new and "position_embeddings" not in name:
                raise ValueError(
                    f"`{name}` has shape {tuple(weight.shape)}, but the model needs {tuple(own[name].shape)}."
                )
            if old != new:
                weight = weight.index_select(dim, torch.arange(new) % old)
        own[name].copy_(weight)


def train_and_evaluate(run: Run, scratch: Path) -> dict[str, Any]:
    """Train a model, from the weights of the length before."""
    torch.manual_seed(run.seed)
    model = build(run)
    if run.shorter is not None:
        load_shorter(model, load_final(scratch_of("recall", run.shorter, scratch.parents[1])))
    batch_size = max(1, run.tokens // run.length)
    share = 1.0 if run.shorter is None else 0.1
    return train(
        model,
        lambda step: draw(run, batch_size, run.seed << 32 | step),
        lambda model: {"accuracy": accuracy(model, run)},
        Schedule(
            run.steps,
            share * run.learning_rate,
            seconds=run.seconds,
            eval_every=10,
            stop_at=("accuracy", 0.9),
            muon_learning_rate=share * run.muon_learning_rate,
            cpu_time=True,
        ),
        scratch,
    )


def report(records: list[Record], folder: Path) -> str:
    """Draw the time until 90 % against length, and accuracy against time for each length, and write both."""
    results = {Run(**record["settings"]): record["result"] for record in records}
    seeds: dict[Run, list[Run]] = defaultdict(list)
    for run in results:
        seeds[replace(run, seed=0)].append(run)
    groups = sorted(seeds, key=lambda run: (run.length, list(MODELS).index(run.model)))
    draw_curves(results, groups, folder / "curves.png")
    times: dict[str, list[tuple[int, float, bool]]] = defaultdict(list)
    lines = [
        "| length | model | seeds | steps | seconds | with shorter lengths | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in groups:
        found = [results[run] for run in seeds[group]]
        own = [result["cpu_seconds"] for result in found]
        total = [cpu_seconds_before(results, run) + each for run, each in zip(seeds[group], own, strict=True)]
        last = [100 * result["curve"][-1]["accuracy"] for result in found]
        steps = spread([result["steps"] for result in found], 0)
        cells = [f"{group.length:,}", LABELS[group.model], len(found), steps, spread(own, 0), spread(total, 0)]
        lines.append(f"| {' | '.join(map(str, [*cells, spread(last)]))} |")
        times[LABELS[group.model]].append((group.length, mean(total), mean(last) >= 90))
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    draw_times(axes, times, {LABELS[model]: color for model, color in COLORS.items()}, "CPU seconds")
    save(figure, folder / "times.png")
    return "\n".join([*lines, "", *summary(times)]) + "\n"


def summary(times: dict[str, list[tuple[int, float, bool]]]) -> list[str]:
    """Return rows with the time until 90 % of the default model and of Llama at each length."""
    names = [LABELS[model] for model in ("reformer", "dense")]
    lines = [f"| sequence length | {' | '.join(names)} |", "|---|---|---|"]
    found = {name: {length: (time, learned) for length, time, learned in times[name]} for name in names}
    for length in found[names[0]]:
        cells = [f"{length:,}"]
        for name in names:
            time, learned = found[name].get(length, (None, False))
            cells.append(
                "not tried" if time is None else f"{time:.0f} s" if learned else f"below 90 % after {time:.0f} s"
            )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw_curves(results: dict[Run, Record], groups: list[Run], path: Path) -> None:
    """Draw accuracy against CPU time, with a panel for each length."""
    figure, panels = panels_of(list(dict.fromkeys(run.length for run in groups)))
    for run, result in results.items():
        at = cpu_seconds_before(results, run)
        seconds = [at + own for own in cpu_seconds_of_curve(result)]
        values = [100 * entry["accuracy"] for entry in result["curve"]]
        label = None if run.seed else LABELS[run.model]
        panels[run.length].plot(seconds, values, color=COLORS[run.model], label=label, marker=".")
    for length, axes in panels.items():
        axes.set(title=f"{length:,} tokens", xlabel="CPU seconds of training", xlim=(0, None), ylim=(0, 102))
        axes.grid(alpha=0.3)
        axes.set_ylabel("accuracy, %")
    panels[groups[0].length].legend(fontsize=7)
    save(figure, path)


EXPERIMENT = Experiment(
    "recall",
    # Models that do not learn the shortest sequences are not trained on longer ones, except for local layers.
    [
        *(Run(model, LENGTHS[0]) for model in MODELS),
        *(Run(model, length) for length in LENGTHS[1:-1] for model in ("reformer", "local", "dense")),
        Run("reformer", LENGTHS[-1]),
        *(Run("reformer", length, seed) for seed in (1, 2) for length in LENGTHS),
        *(Run("dense", length, seed) for seed in (1, 2) for length in LENGTHS[:4]),
    ],
    train_and_evaluate,
    report,
    quick=[Run(model, 64, width=64, steps=10) for model in MODELS],
    warm_start=attrgetter("shorter"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
