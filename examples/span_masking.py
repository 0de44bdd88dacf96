# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Mask spans of tokens for masked language modeling."""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, TrainerCallback

from reformer_hf.training import CausalCollator


def draw_spans(maskable: Tensor, share: float, mean_span: float, generator: torch.Generator | None = None) -> Tensor:
    """
    Draw which tokens to mask: spans and the gaps between them alternate, both of geometrically distributed lengths.

    The first and the last span of a sequence are cut off at its ends. A sequence without a span gets a masked token.

    Args:
        maskable (`[B, L]`, bool): The tokens that may be masked. Others inside a span split it.
        share (`float`): Expected fraction of these tokens to mask.
        mean_span (`float`): Mean length of a span, in tokens.
        generator (`torch.Generator`, *optional*): Source of randomness. `None` means the global one.

    Returns:
        `Tensor` (`[B, L]`, bool): The tokens to mask.
    """
    batch_size, length = maskable.shape
    # Geometric lengths have no memory, so a sequence begins inside a span with probability `share`.
    begins_inside = torch.rand(batch_size, 1, generator=generator) < share
    is_span = (torch.arange(length) + begins_inside.long()) % 2 == 1
    # Probability that a span, or a gap, ends after each of its tokens.
    end = torch.where(is_span, 1 / mean_span, share / (mean_span * (1 - share)))
    uniform = torch.rand(batch_size, length, generator=generator)
    lengths = (torch.log1p(-uniform) / torch.log1p(-end)).ceil().clamp(1, length)
    changes = torch.zeros(batch_size, length + 1, dtype=torch.long)
    changes.scatter_(1, lengths.cumsum(1).clamp(max=length).long(), 1)
    inside = (begins_inside + changes[:, :length].cumsum(1)) % 2 == 1
    masked = inside & maskable
    # The mean loss over no tokens would be NaN. Maskable tokens have values above 1, others 0.
    fallback = (torch.rand(batch_size, length, generator=generator) + 1) * maskable
    is_fallback = torch.arange(length) == fallback.argmax(1, keepdim=True)
    return masked | (is_fallback & maskable & ~masked.any(1, keepdim=True))


@dataclass
class SpanMaskingCollator(DataCollatorForLanguageModeling):
    """
    Mask spans of tokens, never special ones, and set labels at masked positions only.

    Masks follow from the sequences, `seed` and `epoch`, so that a resumed run draws the same ones. Examples that have
    labels are already masked, and are only padded. `mask_replace_prob` and `random_replace_prob` apply to each masked
    token.

    Args:
        masked_share (`float`, defaults to 0.15): Expected fraction of tokens to mask.
        mean_span (`float`, defaults to 3.0): Mean length of a span, in tokens.
        seed (`int`, defaults to 0): Seed of the masks.
        epoch (`int`, defaults to 0): Epoch for which masks are drawn.

    Raises:
        `ValueError`: If an argument is out of range.
    """

    masked_share: float = 0.15
    mean_span: float = 3.0
    seed: int = 0
    epoch: int = 0

    def __post_init__(self):
        if not 0 < self.masked_share < 1:
            raise ValueError(f"`masked_share` is {self.masked_share}, but must be between 0 and 1.")
        # Between two spans there is at least one token.
        shortest = max(1.0, self.masked_share / (1 - self.masked_share))
        if self.mean_span < shortest:
            raise ValueError(
                f"`mean_span` is {self.mean_span}, but must be at least {shortest:.3g} with a `masked_share` of "
                f"{self.masked_share}."
            )
        # The base class masks every token that is not special, and is told that all tokens outside of spans are.
        self.mlm_probability = 1.0
        super().__post_init__()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if "labels" in examples[0]:
            return CausalCollator(self.tokenizer.pad_token_id)(examples)
        return super().torch_call(examples)

    def torch_mask_tokens(
        self, inputs: Tensor, special_tokens_mask: Tensor | None = None, offset_mapping: Any = None
    ) -> tuple[Tensor, Tensor]:
        if special_tokens_mask is None:
            special_tokens_mask = torch.isin(inputs, torch.tensor(self.tokenizer.all_special_ids))
        self.generator = self.get_generator(zlib.crc32(inputs.numpy().tobytes(), self.seed + self.epoch))
        masked = draw_spans(~special_tokens_mask.bool(), self.masked_share, self.mean_span, self.generator)
        return super().torch_mask_tokens(inputs, special_tokens_mask=~masked)


class NewMasksEachEpoch(TrainerCallback):
    """Tell a `SpanMaskingCollator` the epoch, so that each epoch has other masks."""

    def __init__(self, collator: SpanMaskingCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = int(state.epoch)
