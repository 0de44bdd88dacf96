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

The same task at 4,096 and 16,384 tokens, with `window`, starts from the weights of the length before. Position
embeddings of the second w are those of the shorter second w, repeated, and likewise for the first: each symbol of the
copy then matches its original and, at four times the length, three others, which training has to tell apart.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib import pyplot
from torch import Tensor, nn

from reformer_hf import ReformerHfConfig, ReformerHfForCausalLM

from .figures import draw_band, save, spread
from .records import Record
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
NUM_HELD_OUT = 32
LENGTHS = (1024, 4096, 16384)


@dataclass(frozen=True)
class Run:
    """
    Settings of a run.

    Args:
        hashes: Number of hash rounds in training; 0 for full attention.
        pattern: `lsh_pattern`. A model with full attention is evaluated with this one.
        length: Length of the sequences. If it is in `LENGTHS`, the run starts from the weights of the length before.
        seed: Seed of weights, data and hashes.
        steps: Maximum number of training steps.
        width: Width of the model, with 4 heads.
    """

    hashes: int
    pattern: str = "window"
    length: int = 1024
    seed: int = 0
    steps: int = 2000
    width: int = 256

    @property
    def chunk_length(self) -> int:
        return min(32, self.length // 8)

    @property
    def shorter(self) -> "Run | None":
        """The run whose weights this one starts from."""
        index = LENGTHS.index(self.length) if self.length in LENGTHS else 0
        return replace(self, length=LENGTHS[index - 1]) if index else None


def draw(run: Run, batch_size: int, seed: int) -> dict[str, Tensor]:
    """Draw sequences 0w0w, `[B, L]`, and labels that are -100 except on the second w."""
    generator, half = torch.Generator().manual_seed(seed), run.length // 2
    word = torch.randint(1, SYMBOLS, (batch_size, half - 1), generator=generator)
    zero = torch.zeros((batch_size, 1), dtype=torch.long)
    input_ids = torch.cat([zero, word, zero, word], dim=1)
    labels = input_ids.clone()
    labels[:, : half + 1] = -100
    return {"input_ids": input_ids, "labels": labels}


def build(run: Run, layer: str) -> ReformerHfForCausalLM:
    """Build the model of one layer, `"lsh"` or `"full"`. Both have the same parameters."""
    config = ReformerHfConfig(
        attn_layers=[layer],
        is_decoder=True,
        vocab_size=SYMBOLS,
        hidden_size=run.width,
        attention_head_size=run.width // 4,
        feed_forward_size=run.width,
        max_position_embeddings=run.length,
        axial_pos_embds=False,
        hidden_dropout_prob=0.0,
        lsh_pattern=run.pattern,
        lsh_attn_chunk_length=run.chunk_length,
        lsh_deduplicate_keys=run.pattern == "chunk",
        num_hashes=run.hashes or 1,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return ReformerHfForCausalLM(config)


@torch.no_grad()
def accuracy(model: nn.Module, run: Run, **options: Any) -> float:
    """Return the accuracy on the second w of held-out sequences."""
    right = []
    for start in range(0, NUM_HELD_OUT, 4):
        batch = draw(run, 4, (1 << 40) + start)
        right.append(share_right(model(batch["input_ids"], **options).logits, batch["labels"]))
    return mean(right)


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


def start(run: Run, scratch: Path) -> tuple[ReformerHfForCausalLM, float]:
    """Return the model that training starts with, and the seconds that it was trained for."""
    torch.manual_seed(run.seed)
    model = build(run, "lsh" if run.hashes else "full")
    if run.shorter is None:
        return model, 0.0
    weights, seconds = load_final(scratch_of("duplication", run.shorter, scratch.parents[1]))
    name = "reformer.embeddings.position_embeddings.embedding.weight"
    model.load_state_dict(weights | {name: stretch_positions(weights[name], run.length)})
    return model, seconds


def train_and_evaluate(run: Run, scratch: Path) -> dict[str, Any]:
    """Train a model, and evaluate it with full attention and with each number of hashes."""
    model, seconds = start(run, scratch)
    batch_size = max(1, 4096 // run.length)
    found = train(
        model,
        lambda step: draw(run, batch_size, run.seed << 32 | step),
        lambda model: {"accuracy": accuracy(model, run)},
        Schedule(run.steps, learning_rate=1e-3, eval_every=100),
        scratch,
        seconds_before=seconds,
    )
    full, lsh = (build(run, layer).eval() for layer in ("full", "lsh"))
    for each in (full, lsh):
        each.load_state_dict(model.state_dict())
    scores = {str(hashes): accuracy(lsh, run, num_hashes=hashes) for hashes in EVAL_HASHES}
    return found | {"accuracy": {"full": accuracy(full, run)} | scores}


def report(records: list[Record], folder: Path) -> str:
    """Draw the learning curves and write Table 2."""
    groups: dict[tuple[int, str, int], list[Record]] = defaultdict(list)
    for record in records:
        run = Run(**record["settings"])
        groups[run.length, run.pattern, run.hashes].append(record["result"])
    draw_curves(groups, folder / "curves.png")
    names = ("full", *map(str, EVAL_HASHES))
    lines = [
        "| length | trained with | seeds | " + " | ".join(n if n == "full" else _hashes(int(n)) for n in names) + " | "
        "minutes | with shorter lengths |",
        "|" + "---|" * (5 + len(names)),
    ]
    for length in sorted({key[0] for key in groups}):
        for hashes in (0, 4, 2, 1):
            trained_with = _hashes(hashes) if hashes else "full attention"
            if length == 1024:
                cells = [f"{length:,}", f"paper: {trained_with}", "", *map(str, PAPER[hashes]), "", ""]
                lines.append(f"| {' | '.join(cells)} |")
            for pattern in ("window", "chunk"):
                results = groups.get((length, pattern, hashes), [])
                if results:
                    cells = [f"{length:,}", f"`{pattern}`: {trained_with}", str(len(results))]
                    cells += [spread([100 * result["accuracy"][name] for result in results]) for name in names]
                    cells += [
                        f"{mean(result[key] for result in results) / 60:.1f}" for key in ("seconds", "total_seconds")
                    ]
                    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _hashes(number: int) -> str:
    return f"{number} hash" if number == 1 else f"{number} hashes"


def draw_curves(groups: dict[tuple[int, str, int], list[Record]], path: Path) -> None:
    """Draw the accuracy against steps, with a panel for each length."""
    lengths = sorted({key[0] for key in groups})
    figure, panels = pyplot.subplots(1, len(lengths), figsize=(1 + 4 * len(lengths), 3.5), squeeze=False)
    for axes, length in zip(panels[0], lengths, strict=True):
        for (_, pattern, hashes), results in sorted((key, group) for key, group in groups.items() if key[0] == length):
            name = f"{pattern}, {_hashes(hashes)}" if hashes else "full attention"
            style = {"window": "-", "chunk": "--"}[pattern] if hashes else ":"
            curves = [result["curve"] for result in results]
            draw_band(axes, curves, "accuracy", name, scale=100, linestyle=style, color=f"C{hashes}")
        axes.set(title=f"{length:,} tokens", xlabel="training steps", ylim=(0, 102))
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("accuracy on the copy, %")
    # At their ends, curves would be indistinguishable at 100 %.
    for axes in panels[0]:
        axes.legend(fontsize=7)
    save(figure, path)


_SEEDS = (0, 1, 2)
EXPERIMENT = Experiment(
    "duplication",
    [
        *(
            Run(hashes, pattern, seed=seed)
            for seed in _SEEDS
            for pattern in ("window", "chunk")
            for hashes in (4, 2, 1)
        ),
        # Evaluated with both patterns, so trained for both.
        *(Run(0, pattern, seed=seed) for seed in _SEEDS for pattern in ("window", "chunk")),
        *(Run(hashes, length=length) for length in (4096, 16384) for hashes in (1, 4)),
    ],
    train_and_evaluate,
    report,
    quick=[Run(hashes, length=64, steps=30, width=32) for hashes in (0, 2)],
    warm_start=attrgetter("shorter"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
