# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Parts of the Reformer, one at a time, on text: Figures 3 and 4 of the paper.

    python -m experiments.ablations
    python -m experiments.ablations --set text=FILE    # another text than the standard library

Paper (section 5): models of three layers, width 1,024 and feed-forward 4,096, on enwik8 at 65,536 bytes and on images
of 12,288. Figure 3 compares shared with separate queries and keys, and reversible layers with those of a Transformer,
both with full attention. Figure 4 compares full attention with 1 to 16 hashes.

Here: three layers of width 128 on the sources of the Python standard library, in slices of 1,024 bytes, with equal
numbers of steps, with Muon, which needs a fraction of the steps of AdamW. What differs from the default model of the
runs that are compared:

- Shared queries and keys are those of `full` layers: a key is its normalized query, and a position does not see itself
  if it sees others. Separate ones are those of a `local` layer with one chunk as long as the sequence: keys are not
  normalized, a position sees itself, and each layer has one more matrix, that of the keys.
- A plain layer has one residual stream instead of two, and the same parameters. The last layer norm and the head read
  this stream twice, in place of two streams. (`reversible=False` in the config is something else: it computes the
  function of a reversible layer, with saved activations.)
- The runs with hashes have LSH layers alone, with chunks of 32. Their patterns are `window`, with 16 buckets of two
  chunks, and `chunk`, with 64 buckets of half a chunk, in which a query only sees keys of its bucket. A key that
  several rounds find counts once per round, or once in total (`lsh_deduplicate_keys`), as in the paper.
"""

import itertools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from torch import Tensor, nn

from reformer_hf import ReformerHfForCausalLM

from .figures import draw_band, save, spread
from .models import causal_lm
from .records import Record
from .runner import Experiment, main
from .text import VOCAB_SIZE, bits_per_byte, draw_text, load_text
from .training import Schedule, train

PATTERNS = ("window", "chunk")
HASHES = (1, 2, 4, 8, 16)
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Run:
    """
    Settings of a run.

    Args:
        attention: `"shared"` or `"separate"`, the queries and keys of full attention, or `lsh_pattern`.
        hashes: Number of hash rounds; 0 for full attention.
        deduplicate: `lsh_deduplicate_keys`.
        plain: Whether layers have one residual stream.
        seed: Seed of weights, data and hashes.
        length: Length of the slices.
        steps: Number of training steps.
        muon_learning_rate: Maximum learning rate of Muon for the weights of linear layers; `None` for AdamW alone.
        width, depth: Sizes of the model.
        text: A file; `None` for the standard library.
    """

    attention: str
    hashes: int = 0
    deduplicate: bool = False
    plain: bool = False
    seed: int = 0
    length: int = 1024
    steps: int = 600
    muon_learning_rate: float | None = 0.05
    width: int = 128
    depth: int = 3
    text: str | None = None


class PlainLayer(nn.Module):
    """The modules of a reversible layer on one residual stream: `y = x + Attention(x)`, then `y + FeedForward(y)`."""

    def __init__(self, layer: Any):
        super().__init__()
        self.attention, self.feed_forward = layer.attention, layer.feed_forward

    def forward(self, x1: Tensor, x2: Tensor, call: Any, *_: Any) -> tuple[Tensor, Tensor, None]:
        """Return the stream `[B, L, E]` twice; `x1` equals `x2`."""
        y = x2 + self.attention(x2, call)[0]
        y = y + self.feed_forward(y)
        return y, y, None


def build(run: Run) -> ReformerHfForCausalLM:
    """Build the model of a run. Equal modules of different runs with the same seed start with equal weights."""
    layer = {"shared": "full", "separate": "local"}.get(run.attention, "lsh")
    lsh: dict[str, Any] = {"lsh_pattern": run.attention, "num_hashes": run.hashes} if layer == "lsh" else {}
    model = causal_lm(
        attn_layers=[layer] * run.depth,
        vocab_size=VOCAB_SIZE,
        hidden_size=run.width,
        attention_head_size=run.width // 4,
        feed_forward_size=2 * run.width,
        max_position_embeddings=run.length,
        local_attn_chunk_length=run.length,
        local_num_chunks_before=0,
        # Shared queries and keys have no rotary position embeddings either.
        local_rope_theta=None,
        lsh_attn_chunk_length=min(32, run.length // 8),
        lsh_deduplicate_keys=run.deduplicate,
        reversible=not run.plain,
        **lsh,
    )
    if run.plain:
        layers: Any = model.reformer.encoder.layers
        for i, each in enumerate(layers):
            layers[i] = PlainLayer(each)
    return model


def train_and_evaluate(run: Run, scratch: Path) -> dict[str, Any]:
    """Train a model for the steps of a run."""
    torch.manual_seed(run.seed)
    model = build(run)
    text, held_out = load_text(run.text)
    batch_size = max(1, BATCH_TOKENS // run.length)
    found = train(
        model,
        lambda step: draw_text(text, batch_size, run.length, run.seed << 32 | step),
        lambda model: {"bits_per_byte": bits_per_byte(model, held_out, run.length, num_bytes=64 * run.length)},
        Schedule(run.steps, eval_every=min(100, run.steps), muon_learning_rate=run.muon_learning_rate),
        scratch,
    )
    return found | {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def name_of(run: Run) -> str:
    """Return the name of a run in figures and in the table."""
    if not run.hashes:
        return f"{run.attention} QK, {'plain' if run.plain else 'reversible'}"
    duplicates = ", counted once" if run.deduplicate else ""
    return f"{run.attention}, {run.hashes} hash{'es' if run.hashes > 1 else ''}{duplicates}"


def report(records: list[Record], folder: Path) -> str:
    """Draw the curves of Figures 3 and 4, and write the last values."""
    groups: dict[Run, list[Record]] = defaultdict(list)
    for record in records:
        run = Run(**record["settings"])
        groups[Run(run.attention, run.hashes, run.deduplicate, run.plain)].append(record["result"])
    order = list(dict.fromkeys(Run(each.attention, each.hashes, each.deduplicate, each.plain) for each in _GRID))
    groups = {run: groups[run] for run in order if run in groups}
    draw_curves(groups, folder / "curves.png")
    lines = ["| model | seeds | parameters | bits per byte |", "|---|---|---|---|"]
    for run, results in groups.items():
        bits = spread([result["curve"][-1]["bits_per_byte"] for result in results], digits=3)
        cells = (name_of(run), len(results), f"{results[0]['parameters']:,}", bits)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def draw_curves(groups: dict[Run, list[Record]], path: Path) -> None:
    """Draw bits per byte against steps: full attention, and each pattern with full attention."""
    figure, panels = pyplot.subplots(1, 3, figsize=(16, 4.5), sharey=True)
    shown = [{run: results for run, results in groups.items() if not run.hashes}]
    for pattern in PATTERNS:
        exact = {run: results for run, results in shown[0].items() if run == Run("shared")}
        shown.append(exact | {run: results for run, results in groups.items() if run.attention == pattern})
    for axes, runs, title in zip(panels, shown, ("full attention", *PATTERNS), strict=True):
        for run, results in runs.items():
            name = name_of(run).removeprefix(f"{title}, ")
            style: dict[str, Any] = {"color": f"C{HASHES.index(run.hashes)}"} if run.hashes else {}
            if run.deduplicate:
                style["linestyle"] = "--"
            elif not run.hashes and title != "full attention":
                name = "full attention"
                style |= {"color": "black", "linestyle": ":"}
            draw_band(
                axes,
                [result["curve"] for result in results],
                "bits_per_byte",
                name,
                **style,
            )
        axes.set(title=title, xlabel="training steps")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out bits per byte")
    save(figure, path, named_at_ends=True)


def grid(seeds: tuple[int, ...], **sizes: Any) -> list[Run]:
    """Return the settings, each seed after the other."""
    runs = []
    for seed in seeds:
        exact = itertools.product(("shared", "separate"), (False, True))
        runs += [Run(attention, plain=plain, seed=seed, **sizes) for attention, plain in exact]
        runs += [Run(pattern, hashes, seed=seed, **sizes) for hashes in HASHES for pattern in PATTERNS]
        runs += [Run(pattern, 4, deduplicate=True, seed=seed, **sizes) for pattern in PATTERNS]
    return runs


# Many hashes cost most of the time: one seed.
_GRID = [run for run in grid((0, 1)) if run.seed == 0 or (run.hashes <= 4 and not run.deduplicate)]
_QUICK = grid((0,), length=64, steps=10, width=32, depth=2)
EXPERIMENT = Experiment("ablations", _GRID, train_and_evaluate, report, quick=_QUICK)

if __name__ == "__main__":
    main(EXPERIMENT)
