# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Write the tables of `docs/choosing_a_config.md`: ready-made sizes, and the largest that fits into a memory budget.

    python -m benchmarks.model_sizes
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from reformer_hf import ReformerHfConfig
from reformer_hf.training import estimate_training_memory

from .pages import write_tables

PAGE = Path(__file__).resolve().parent.parent / "docs" / "choosing_a_config.md"

BUDGETS = (16, 24, 40, 80)
LENGTHS = (4096, 16384, 65536, 262144, 1048576)
# The rest of a device is for its context, for the allocator and for what the estimate leaves out.
USABLE = 0.9


@dataclass(frozen=True)
class Size:
    """A width and a depth, with heads of dimension 64 and a feed-forward four times as wide."""

    hidden_size: int
    num_layers: int

    def config(self, length: int) -> ReformerHfConfig:
        """Return the config for sequences of `length` tokens."""
        return ReformerHfConfig(
            is_decoder=True,
            vocab_size=32000,
            hidden_size=self.hidden_size,
            num_attention_heads=self.hidden_size // 64,
            attention_head_size=64,
            feed_forward_size=4 * self.hidden_size,
            attn_layers=["local", "lsh"] * (self.num_layers // 2),
            num_hashes=2,
            max_position_embeddings=length,
            chunk_size_lm_head=4096,
        )


SIZES = {
    "XS": Size(256, 6),
    "S": Size(512, 12),
    "M": Size(768, 12),
    "L": Size(1024, 24),
    "XL": Size(1536, 24),
    "2XL": Size(2048, 24),
    "3XL": Size(2560, 32),
}


@cache
def peak_gigabytes(size: Size, length: int) -> float:
    """Return the peak of a training step with gradient accumulation on a GPU: fp32, AdamW, one sequence."""
    estimate = estimate_training_memory(size.config(length), length, device="cuda")
    return (estimate.total + estimate.gradients) / 1e9


@cache
def num_parameters(size: Size) -> int:
    """Return the number of parameters at the shortest length; position embeddings of longer ones add little."""
    return estimate_training_memory(size.config(LENGTHS[0]), LENGTHS[0]).parameters // 4


def largest(budget: int, length: int) -> str:
    """Return the largest size that fits, with its peak memory."""
    fitting = [name for name, size in SIZES.items() if peak_gigabytes(size, length) <= USABLE * budget]
    return f"{fitting[-1]} ({peak_gigabytes(SIZES[fitting[-1]], length):.1f} GB)" if fitting else "–"


def tables() -> str:
    """Return both tables as Markdown."""
    names = ("size", "`hidden_size`", "layers", "heads", "`feed_forward_size`", "parameters")
    lines = [f"| {' | '.join(names)} |", "|---|---|---|---|---|---|"]
    for name, size in SIZES.items():
        config = size.config(LENGTHS[0])
        fields = (config.hidden_size, size.num_layers, config.num_attention_heads, config.feed_forward_size)
        lines.append(f"| {name} | {' | '.join(f'{x:,}' for x in fields)} | {num_parameters(size) / 1e6:,.0f} M |")
    lines += ["", f"| memory | {' | '.join(f'{length:,} tokens' for length in LENGTHS)} |"]
    lines.append(f"|{'---|' * (len(LENGTHS) + 1)}")
    for budget in BUDGETS:
        lines.append(f"| {budget} GB | {' | '.join(largest(budget, length) for length in LENGTHS)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_tables(PAGE, "benchmarks.model_sizes", tables())
