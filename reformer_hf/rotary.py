# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864): scores that depend on the distance of two tokens."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of the angles of positions, `[B or 1, L, 1, D / 2]` each, at least in fp32."""

    cos: Tensor
    sin: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Rotation":
        """Move the tensors to a device."""
        return Rotation(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


def rotation_of(position_ids: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> Rotation:
    """
    Compute the rotation of each position: pair `i` of features turns by `position * theta ** (-2 * i / head_size)`.

    Args:
        position_ids: `[B or 1, L]`.
        head_size: Head dimension D, an even number.
        theta: Base of the wavelengths.
        dtype: Dtype of the hidden states.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_size, 2, dtype=dtype, device=position_ids.device) / head_size
    angles = position_ids[..., None, None].to(dtype) * theta**-exponents
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate queries or keys `[B, L, h, D]`. Feature `i` of a head forms a pair with feature `i + D / 2`."""
    cos, sin = rotation
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat(
        [
            torch.addcmul(first * cos, second, sin, value=-1),
            torch.addcmul(second * cos, first, sin),
        ],
        dim=-1,
    )
    return rotated.to(x.dtype)
