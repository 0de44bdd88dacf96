# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Masked attention of one slab with its logsumexp, forward and backward: torch's fused kernels where one fits, and plain
matrix products elsewhere.

Shapes: g heads, n chunks, C queries in a chunk, W keys in its window, D size of queries and keys, E size of values.
"""

import math

import torch
from torch import Tensor


class Dropout:
    """What to keep of the attention weights, slab by slab, the same for the same seed."""

    def __init__(self, rate: float, seed: int, device: torch.device):
        self._keep_rate = 1.0 - rate
        self._generator = torch.Generator(device).manual_seed(seed)

    @classmethod
    def of(cls, rate: float, seed: int, device: torch.device) -> "Dropout | None":
        """`None` for a rate of zero."""
        return cls(rate, seed, device) if rate > 0 else None

    def __call__(self, weights: Tensor) -> Tensor:
        """Factors of the weights: zero, or the inverse of the rate at which they are kept."""
        keep = torch.empty_like(weights).bernoulli_(self._keep_rate, generator=self._generator)
        return keep.div_(self._keep_rate)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, drop: Dropout | None) -> tuple[Tensor, Tensor]:
    """
    Softmax attention with scores `query · key + mask`.

    Args:
        query: `[g, n, C, D]`.
        key, value: `[g, n, W, D or E]`.
        mask: `[g, n, C, W]`, finite, in fp32 at least.
        drop: Dropout of the weights.

    Returns:
        Output `[g, n, C, E]` and logsumexp of the scores `[g, n, C]`, the latter in the dtype of the mask. Where a row
        is hidden altogether the output means nothing, and the logsumexp is as low as the mask.
    """
    if _fits_cpu_kernel(query, value, drop):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=1.0
        )
    scores = scores_of(query, key, mask)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse[..., None]).exp_()
    if drop is not None:
        weights.mul_(drop(weights))
    return torch.matmul(weights.to(value.dtype), value), lse


def attend_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    out: Tensor,
    lse: Tensor,
    drop: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Gradients of queries `[g, n, C, D]`, keys and values `[g, n, W, D or E]`.

    The slab may hold a part of the keys of each query: given the output and the logsumexp over all of them, the
    gradients are this part's (Dao et al. 2022, algorithm 4, with several passes over the keys).

    Args:
        grad_out, out: `[g, n, C, E]`.
        lse: `[g, n, C]`; infinite where a row had no key.
        The other ones: as in `attend`.
    """
    if _fits_cpu_kernel(query, value, drop):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, lse, 0.0, False, attn_mask=mask, scale=1.0
        )
    weights = scores_of(query, key, mask).sub_(lse[..., None]).exp_()
    grad_weights = torch.matmul(grad_out, value.transpose(-1, -2)).to(weights.dtype)
    kept = weights
    if drop is not None:
        factors = drop(weights)
        kept = weights * factors
        grad_weights.mul_(factors)
    grad_value = torch.matmul(kept.transpose(-1, -2).to(value.dtype), grad_out)
    delta = torch.linalg.vecdot(grad_out.to(weights.dtype), out.to(weights.dtype))
    grad_scores = weights.mul_(grad_weights.sub_(delta[..., None])).to(query.dtype)
    return torch.matmul(grad_scores, key), torch.matmul(grad_scores.transpose(-1, -2), query), grad_value


def key_scale(query: Tensor) -> Tensor:
    """Factor `[…]`, in fp32 at least, that makes a key of each query `[…, D]`: see `normalized_keys`."""
    wide = query.to(torch.promote_types(query.dtype, torch.float32))
    mean_square = torch.linalg.vecdot(wide, wide) / query.shape[-1]
    return torch.rsqrt(mean_square + 1e-6) / math.sqrt(query.shape[-1])


def normalized_keys(query: Tensor) -> Tensor:
    """Keys of shared query-key attention: `q / |q|` with the scale `1 / sqrt(D)`, and the in-tree epsilon."""
    return (query * key_scale(query)[..., None]).to(query.dtype)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """
    One softmax over the keys of two.

    Args:
        out_a, out_b: Outputs `[rows, E]`.
        lse_a, lse_b: Logsumexps `[rows]`, finite.

    Returns:
        Output and logsumexp over the keys of both.
    """
    share = torch.sigmoid(lse_b - lse_a)[:, None]
    return torch.lerp(out_a, out_b, share), torch.logaddexp(lse_a, lse_b)


def scores_of(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """`[g, n, C, W]` in the dtype of the mask."""
    return torch.matmul(query, key.transpose(-1, -2)).to(mask.dtype).add_(mask)


def _fits_cpu_kernel(query: Tensor, value: Tensor, drop: Dropout | None) -> bool:
    return (
        query.device.type == "cpu"
        and query.dtype == torch.float32
        and query.shape[-1] == value.shape[-1]
        and drop is None
    )
