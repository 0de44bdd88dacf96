# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Dropout whose masks can be drawn again: from seeds, and in chunks of positions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .device_policy import suitable_chunk_size


def draw_seed() -> int:
    """Draw a seed for another generator from torch's global CPU generator."""
    return int(torch.randint(2**62, (), device="cpu"))


@dataclass(frozen=True)
class DropoutMask:
    """
    Which elements dropout keeps.

    Args:
        keep: 1 for elements to keep and 0 for others, int8.
        scale: The factor for kept elements, the inverse of their share.
    """

    keep: Tensor
    scale: float

    @classmethod
    def draw(cls, like: Tensor, rate: float, generator: torch.Generator | None = None) -> "DropoutMask":
        """
        Draw a mask. A random number of 64 bits decides for several elements, which is much faster than `bernoulli_`.

        Args:
            like: A tensor of the shape and on the device of the mask.
            rate: Dropout rate, rounded to a multiple of 1/256 if that changes it and its complement by at most
                2 %, else of 2^-16.
            generator: A generator; `None` uses the global one of the device.
        """
        bits = 8 if abs(round(rate * 256) / 256 - rate) <= 0.02 * min(rate, 1 - rate) else 16
        num_levels = 1 << bits
        dropped = min(max(round(rate * num_levels), 1), num_levels - 1)
        drawn = torch.empty(math.ceil(like.numel() * bits / 64), dtype=torch.int64, device=like.device)
        drawn.random_(-(2**63), None, generator=generator)
        levels = drawn.view(torch.int8 if bits == 8 else torch.int16)[: like.numel()].view(like.shape)
        # 0 below the lowest level to keep and 1 from there on. Clamping is ten times as fast as a comparison.
        lowest_kept = dropped - num_levels // 2
        keep = levels.clamp_(lowest_kept - 1, lowest_kept).sub_(lowest_kept - 1).to(torch.int8)
        return cls(keep, num_levels / (num_levels - dropped))

    def apply(self, tensor: Tensor, positions: slice = slice(None)) -> Tensor:
        """Scale the elements to keep at some positions of `[B, L, …]` and set the others to zero."""
        return self.keep[:, positions].to(tensor.dtype).mul_(tensor).mul_(self.scale)


class ApplyMask(torch.autograd.Function):
    """Save a mask of one byte per element instead of factors."""

    @staticmethod
    def forward(ctx, tensor, keep, scale):
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return DropoutMask(keep, scale).apply(tensor)

    @staticmethod
    def backward(ctx, grad):
        (keep,) = ctx.saved_tensors
        return ApplyMask.apply(grad, keep, ctx.scale), None, None


def dropout(tensor: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """Apply dropout to `[B, L, …]`, with the global random number generator of the device unless one is given."""
    if not rate:
        return tensor
    mask = DropoutMask.draw(tensor, rate, generator)
    return ApplyMask.apply(tensor, mask.keep, mask.scale)


class RateDropout(nn.Dropout):
    """
    The rate of a dropout, in the current mode. Parts of the model read it where a tensor is computed in pieces.

    Code that looks for `nn.Dropout` to change rates or modes, such as `disable_dropout` of TRL, finds it.
    """

    @property
    def rate(self) -> float:
        return self.p if self.training else 0.0

    def forward(self, tensor: Tensor) -> Tensor:
        """Apply dropout to `[B, L, …]`."""
        return dropout(tensor, self.rate)


class DropoutFactors:
    """Dropout factors for a sequence of tensors, reproducible from a seed."""

    def __init__(self, rate: float, seed: int, device: torch.device):
        self._rate = rate
        self._generator = torch.Generator(device).manual_seed(seed)

    @classmethod
    def of(cls, rate: float, seed: int, device: torch.device) -> "DropoutFactors | None":
        """Create the factors, or return `None` for a rate of zero."""
        return cls(rate, seed, device) if rate > 0 else None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the factors of the next tensor `[g, n, …]`: zero, or the inverse of the keep rate."""
        mask = DropoutMask.draw(tensor, self._rate, self._generator)
        return mask.keep.to(tensor.dtype).mul_(mask.scale)


@dataclass(frozen=True)
class SeededDropout:
    """Dropout of a tensor that is computed in chunks of positions and as a sum: all summands share one mask."""

    rate: float
    seed: int

    def in_chunks(self, tensor: Tensor) -> Callable[[Tensor, slice], Tensor]:
        """Return a function that applies the dropout of `[B, L, …]` to a summand at some positions."""
        return DropoutMask.draw(tensor, self.rate, self._generator(tensor)).apply

    def __call__(self, tensor: Tensor) -> Tensor:
        """Apply the dropout to all positions, differentiably."""
        return dropout(tensor, self.rate, self._generator(tensor))

    def _generator(self, tensor: Tensor) -> torch.Generator:
        return torch.Generator(tensor.device).manual_seed(self.seed)


def draw_block_seeds(tensor: Tensor) -> list[int]:
    """Draw a seed for each block of positions of `[B, L, …]`, of the size of a chunk that suits the device."""
    return [draw_seed() for _ in tensor.split(_block_size(tensor), dim=1)]


def dropout_in_blocks(tensor: Tensor, rate: float, seeds: Sequence[int]) -> Tensor:
    """
    Apply dropout to `[B, L, …]`, with the mask of a seed in each block of positions.

    A tensor that is computed in chunks then has the same mask as one that is computed as a whole.
    """
    if not rate:
        return tensor
    blocks = zip(tensor.split(_block_size(tensor), dim=1), seeds, strict=True)
    masks = [DropoutMask.draw(block, rate, torch.Generator(tensor.device).manual_seed(seed)) for block, seed in blocks]
    keep = masks[0].keep if len(masks) == 1 else torch.cat([mask.keep for mask in masks], dim=1)
    return ApplyMask.apply(tensor, keep, masks[0].scale)


def _block_size(tensor: Tensor) -> int:
    return suitable_chunk_size(tensor.shape[0], tensor.shape[1], tensor.device.type)
