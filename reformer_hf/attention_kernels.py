# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Masked attention of one tile with its logsumexp, forward and backward: torch's fused kernels where one fits, and plain
matrix products elsewhere.

Shapes: g heads, n chunks, C queries in a chunk, W keys in its window, D size of queries and keys, E size of values.
"""

import math
from functools import cache

import torch
from torch import Tensor
from transformers.utils import logging

from .device_policy import policy_for
from .rng import Dropout

logger = logging.get_logger(__name__)

# The least that a mask adds to a score. Finite: a row that sees no key must not give a NaN.
MASKED = -(2.0**90)

# A logsumexp below this one is that of masked keys alone: above any masked score, and below any sum of visible ones.
NO_KEY = -(2.0**80)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, drop: Dropout | None) -> tuple[Tensor, Tensor]:
    """
    Softmax attention with scores `query · key + mask`.

    Args:
        query: `[g, n, C, D]`.
        key, value: `[g, n, W, D or E]`.
        mask: `[g, n, C, W]`, finite, in fp32 at least.
        drop: Dropout of the weights.

    Returns:
        Output `[g, n, C, E]` and logsumexp of the scores `[g, n, C]`, the latter in the dtype of the mask. Where all
        keys of a row are masked the output means nothing, and the logsumexp is as low as the mask.
    """
    kernel = _kernel_for(query, key, value, drop)
    if kernel is not None:
        return kernel.attend(query, key, value, mask)
    return _attend_plainly(query, key, value, mask, drop)


def _attend_plainly(query, key, value, mask, drop: Dropout | None = None) -> tuple[Tensor, Tensor]:
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

    The tile may hold a part of the keys of each query: given the output and the logsumexp over all of them, the
    gradients are this part's (Dao et al. 2022, algorithm 4, with several passes over the keys).

    Args:
        grad_out, out: `[g, n, C, E]`.
        lse: `[g, n, C]`; infinite where a row had no key.
        The other ones: as in `attend`.
    """
    kernel = _kernel_for(query, key, value, drop)
    if kernel is not None:
        return kernel.attend_backward(grad_out, query, key, value, mask, out, lse)
    return _attend_backward_plainly(grad_out, query, key, value, mask, out, lse, drop)


def _attend_backward_plainly(
    grad_out, query, key, value, mask, out, lse, drop: Dropout | None = None
) -> tuple[Tensor, Tensor, Tensor]:
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


def normalized_keys(query: Tensor, epsilon: Tensor | None = None) -> Tensor:
    """
    Keys of shared query-key attention: `q / |q|` with the scale `1 / sqrt(D)`, and the in-tree epsilon.

    `epsilon` is what `key_epsilon` gives, where it is at hand.
    """
    if query.dtype not in (torch.float32, torch.float64):
        return (query * key_scale(query)[..., None]).to(query.dtype)
    epsilon = key_epsilon(query) if epsilon is None or epsilon.dtype != query.dtype else epsilon
    # The mean square plus the in-tree epsilon, times the size, is the square of a hypotenuse.
    return query / torch.hypot(torch.linalg.vector_norm(query, dim=-1, keepdim=True), epsilon)


def key_epsilon(query: Tensor) -> Tensor:
    """What `normalized_keys` adds, in quadrature, to the norm of queries `[…, D]`."""
    return query.new_tensor(math.sqrt(query.shape[-1] * 1e-6))


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


class _CpuKernel:
    """The fused attention of torch on a CPU."""

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=1.0
        )

    @staticmethod
    def attend_backward(grad_out, query, key, value, mask, out, lse) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, lse, 0.0, False, attn_mask=mask, scale=1.0
        )


class _CudaKernel:
    """The memory-efficient attention of torch on CUDA: of its kernels, the one with a mask and a logsumexp."""

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask.to(query.dtype), True, scale=1.0
        )
        return out, lse

    @staticmethod
    def attend_backward(grad_out, query, key, value, mask, out, lse) -> tuple[Tensor, Tensor, Tensor]:
        no_dropout = torch.zeros((), dtype=torch.int64)
        grad_query, grad_key, grad_value, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad_out.to(query.dtype),
            query,
            key,
            value,
            mask.to(query.dtype),
            out.to(query.dtype),
            lse,
            no_dropout,
            no_dropout,
            0.0,
            [True, True, True, False],
            scale=1.0,
        )
        return grad_query, grad_key, grad_value


_Kernel = type[_CpuKernel] | type[_CudaKernel]
# By the name that a `KernelPolicy` has for it.
_KERNELS: dict[str, _Kernel] = {"cpu_flash": _CpuKernel, "cuda_efficient": _CudaKernel}


def _kernel_for(query: Tensor, key: Tensor, value: Tensor, drop: Dropout | None) -> "_Kernel | None":
    """The fused kernel for these inputs, or `None`."""
    policy = policy_for(query.device).kernel
    if policy is None or drop is not None or not policy.takes(query, key, value):
        return None
    sizes = (query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1])
    return _KERNELS[policy.name] if _is_trusted(policy.name, query.device, query.dtype, *sizes) else None


# Compiled code takes the result and not the trial.
@torch.compiler.assume_constant_result
def _is_trusted(name: str, device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
    """Whether a kernel passes its trial, which takes place once in a process for each dtype and sizes of a tile."""
    return _passes_trial(name, device, dtype, *sizes)


@cache
def _passes_trial(name: str, device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
    return _equals_plain(_KERNELS[name], device, dtype, *sizes)


def _equals_plain(
    kernel: "_Kernel",
    device: torch.device,
    dtype: torch.dtype,
    num_queries: int,
    num_keys: int,
    size: int,
    value_size: int,
) -> bool:
    """
    Whether a kernel, tried on a small tile, gives what matrix products give, gradients too.

    These kernels are torch's own, below its public interface. Should another version or device lack them or use them
    in another way, attention gets slower, and not wrong.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_out = (
        torch.randn(1, 1, length, width, generator=generator).to(device, dtype)
        for length, width in (
            (num_queries, size),
            (num_keys, size),
            (num_keys, value_size),
            (num_queries, value_size),
        )
    )
    masked = torch.rand(1, 1, num_queries, num_keys, generator=generator) < 0.5
    masked[:, :, 0] = True
    inputs = (query, key, value, (MASKED * masked).to(device))
    try:
        out, lse = kernel.attend(*inputs)
        grads = kernel.attend_backward(grad_out, *inputs, out, lse.masked_fill(lse < NO_KEY, math.inf))
    except (AttributeError, RuntimeError, TypeError) as error:
        _warn_of_trial(f"does not run on {device} in {dtype} ({error}).")
        return False
    plain_out, plain_lse = _attend_plainly(*inputs)
    plain_lse = plain_lse.masked_fill(plain_lse < NO_KEY, math.inf)
    plain_grads = _attend_backward_plainly(grad_out, *inputs, plain_out, plain_lse)
    # The first query has no key: its output means nothing.
    pairs = [(out[:, :, 1:], plain_out[:, :, 1:]), (lse[:, :, 1:], plain_lse[:, :, 1:])]
    pairs += list(zip(grads, plain_grads, strict=True))
    limit = 1e-3 if dtype == torch.float32 else 3e-2
    equal = all((a.float() - b.float()).norm() <= limit * b.float().norm() for a, b in pairs)
    equal = equal and bool((lse[:, :, 0] < NO_KEY).all())
    if not equal:
        _warn_of_trial(f"gives results on {device} in {dtype} that are not right.")
    return equal


def _warn_of_trial(found: str) -> None:
    logger.warning_once(
        f"The fused attention of torch {torch.__version__} {found} Attention takes plain matrix products instead: the "
        "results are the same, but it is slower. To have it fused, install a version of torch that this package was "
        "tested with (its `constraints.txt`), and please report this warning."
    )
