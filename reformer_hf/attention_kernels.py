# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Masked attention of one tile with its logsumexp, forward and backward. Uses torch's fused kernels if they support the
tile, and plain matrix products otherwise.

Shapes: g heads, n chunks, C queries in a chunk, W keys in its window, D size of queries and keys, E size of values.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from transformers.utils import logging

from .device_policy import policy_for
from .dropout import DropoutFactors

logger = logging.get_logger(__name__)

# The lowest value that a mask adds to a score. It is finite, so that a row without visible keys gives no NaN.
MASKED = -(2.0**90)

# A logsumexp below this value belongs to a row without visible keys. It is above the logsumexp of masked scores, and
# below that of any visible score.
NO_KEY = -(2.0**80)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, drop: DropoutFactors | None
) -> tuple[Tensor, Tensor]:
    """
    Compute softmax attention with scores `query · key + mask`.

    Args:
        query: `[g, n, C, D]`.
        key, value: `[g, n, W, D or E]`.
        mask: `[g, n, C, W]`, finite, at least in fp32.
        drop: Dropout of the attention weights.

    Returns:
        Output `[g, n, C, E]` and logsumexp of the scores `[g, n, C]`, the latter in the dtype of the mask. If all keys
        of a row are masked, its output is arbitrary, but finite, and its logsumexp is as low as the mask.
    """
    kernel = _kernel_for(query, key, value, drop)
    if kernel is not None:
        return kernel.attend(query, key, value, mask)
    return _attend_plainly(query, key, value, mask, drop)


def _attend_plainly(query, key, value, mask, drop: DropoutFactors | None = None) -> tuple[Tensor, Tensor]:
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
    drop: DropoutFactors | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Compute the gradients of `attend`.

    The tile may contain only a part of each query's keys: given the output and the logsumexp over all keys, the
    gradients are those of this part (Dao et al. 2022, algorithm 4, with several passes over the keys).

    Args:
        grad_out, out: Output and its gradient, `[g, n, C, E]`.
        query, key, value, mask, drop: As in `attend`.
        lse: `[g, n, C]`, infinite for rows without keys.

    Returns:
        Gradients of queries `[g, n, C, D]`, keys `[g, n, W, D]` and values `[g, n, W, E]`.
    """
    kernel = _kernel_for(query, key, value, drop)
    if kernel is not None:
        return kernel.attend_backward(grad_out, query, key, value, mask, out, lse)
    return _attend_backward_plainly(grad_out, query, key, value, mask, out, lse, drop)


def _attend_backward_plainly(
    grad_out, query, key, value, mask, out, lse, drop: DropoutFactors | None = None
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
    """Return the factors `[…]`, at least in fp32, that turn queries `[…, D]` into keys; see `normalized_keys`."""
    wide = query.to(torch.promote_types(query.dtype, torch.float32))
    return torch.rsqrt(torch.linalg.vecdot(wide, wide) + 1e-6 * query.shape[-1])


def normalized_keys(query: Tensor, epsilon: Tensor | None = None) -> Tensor:
    """
    Compute the keys of shared query-key attention: `q / |q|` with the scale `1 / sqrt(D)` and the in-tree epsilon.

    Args:
        query: `[…, D]`.
        epsilon: The result of `key_epsilon`, if it is already computed.
    """
    if query.dtype not in (torch.float32, torch.float64):
        return (query * key_scale(query)[..., None]).to(query.dtype)
    epsilon = key_epsilon(query) if epsilon is None or epsilon.dtype != query.dtype else epsilon
    # The hypotenuse of the norm and `epsilon` is the inverse of `key_scale`, in fewer operations, of which a decoding
    # step has many.
    return query / torch.hypot(torch.linalg.vector_norm(query, dim=-1, keepdim=True), epsilon)


def key_epsilon(query: Tensor) -> Tensor:
    """Return the value that `normalized_keys` adds in quadrature to the norm of queries `[…, D]`."""
    return query.new_tensor(math.sqrt(query.shape[-1] * 1e-6))


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """
    Merge two softmax attentions over different keys into one.

    Args:
        out_a, out_b: Outputs `[rows, E]`.
        lse_a, lse_b: Logsumexps `[rows]`, finite.

    Returns:
        Output and logsumexp over the keys of both.
    """
    share = torch.sigmoid(lse_b - lse_a)[:, None]
    return torch.lerp(out_a, out_b, share), torch.logaddexp(lse_a, lse_b)


def merge_all(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """
    Merge softmax attentions over different keys into one.

    Args:
        out: Outputs `[number, rows, E]`.
        lse: Logsumexps `[number, rows]`, finite.

    Returns:
        Output `[rows, E]` and logsumexp `[rows]` over the keys of all.
    """
    total = lse.logsumexp(0)
    shares = (lse - total).exp_()
    return (out * shares[..., None]).sum(0), total


def scores_of(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Return the scores `[g, n, C, W]`, mask included, in the dtype of the mask."""
    return torch.matmul(query, key.transpose(-1, -2)).to(mask.dtype).add_(mask)


class _CpuKernel:
    """Torch's fused attention on a CPU."""

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
    """Torch's memory-efficient attention on CUDA, the kernel that takes a mask and returns a logsumexp."""

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask.to(query.dtype), True, scale=1.0
        )
        return out, lse

    @staticmethod
    def attend_backward(grad_out, query, key, value, mask, out, lse) -> tuple[Tensor, Tensor, Tensor]:
        no_dropout = torch.zeros((), dtype=torch.int64)
        # The kernel reads the output in the memory layout of its own forward pass, [g, C, n, E], whatever the strides.
        out = out.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        grad_query, grad_key, grad_value, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad_out.to(query.dtype),
            query,
            key,
            value,
            mask.to(query.dtype),
            out,
            lse,
            no_dropout,
            no_dropout,
            0.0,
            [True, True, True, False],
            scale=1.0,
        )
        return grad_query, grad_key, grad_value


_Kernel = type[_CpuKernel] | type[_CudaKernel]
# By `KernelPolicy.name`.
_KERNELS: dict[str, _Kernel] = {"cpu_flash": _CpuKernel, "cuda_efficient": _CudaKernel}


def _kernel_for(query: Tensor, key: Tensor, value: Tensor, drop: DropoutFactors | None) -> _Kernel | None:
    """Return the fused kernel for these inputs, or `None`."""
    policy = policy_for(query.device).kernel
    if policy is None or drop is not None or not policy.takes(query, key, value):
        return None
    sizes = (query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1])
    return _KERNELS[policy.name] if _is_trusted(policy.name, query.device, query.dtype, *sizes) else None


# torch.compile uses the result as a constant and does not trace the trial.
@torch.compiler.assume_constant_result
def _is_trusted(name: str, device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
    """Return whether a kernel passes its trial, which runs once per process for each dtype and size of tiles."""
    return _passes_trial(name, device, dtype, *sizes)


@cache
def _passes_trial(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    num_queries: int,
    num_keys: int,
    size: int,
    value_size: int,
) -> bool:
    """
    Return whether a kernel agrees with plain matrix products on a small tile, gradients included.

    These kernels are not part of torch's public API. If another version or device lacks them or changes their
    behavior, attention becomes slower but stays correct.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_out = (
        torch.randn(1, 2, length, width, generator=generator).to(device, dtype)
        for length, width in ((num_queries, size), (num_keys, size), (num_keys, value_size), (num_queries, value_size))
    )
    masked = torch.rand(1, 2, num_queries, num_keys, generator=generator) < 0.5
    # Only the first query of the second chunk has no keys.
    masked[..., 0] = False
    masked[:, 1, 0] = True
    kernel, inputs = _KERNELS[name], (query, key, value, (MASKED * masked).to(device))
    try:
        out, lse = kernel.attend(*inputs)
        # Outputs of several rounds are merged in another memory layout than that of the kernel.
        merged = out.contiguous()
        grads = kernel.attend_backward(grad_out, *inputs, merged, lse.masked_fill(lse < NO_KEY, math.inf))
    except torch.OutOfMemoryError:
        # This says nothing about the kernel.
        raise
    except (AttributeError, RuntimeError, TypeError) as error:
        _warn_of_trial(f"does not run on {device} in {dtype} ({error}).")
        return False
    equal = _is_close((out, lse, *grads), grad_out, inputs, limit=5e-3 if dtype == torch.float32 else 3e-2)
    if not equal:
        _warn_of_trial(f"gives wrong results on {device} in {dtype}.")
    return equal


def _is_close(found: Sequence[Tensor], grad_out: Tensor, inputs: Sequence[Tensor], limit: float) -> bool:
    """Compare output, logsumexp and gradients of a kernel with plain matrix products of the same inputs in fp64."""
    # On the CPU, whatever the precision that products have on the device, such as TF32.
    out, lse, *grads = (x.cpu().double() for x in found)
    query, key, value, mask = (x.cpu().double() for x in inputs)
    plain_out, plain_lse = _attend_plainly(query, key, value, mask)
    lacks_keys = plain_lse < NO_KEY
    plain_lse_or_inf = plain_lse.masked_fill(lacks_keys, math.inf)
    plain_grads = _attend_backward_plainly(
        grad_out.cpu().double(), query, key, value, mask, plain_out, plain_lse_or_inf
    )
    # Without keys, the output is arbitrary.
    pairs = [(a[~lacks_keys], b[~lacks_keys]) for a, b in ((out, plain_out), (lse, plain_lse))]
    pairs += list(zip(grads, plain_grads, strict=True))
    # If queries have one key each, the gradients of queries and keys are only the rounding of numbers of this size.
    size = plain_grads[2].norm().item()
    equal = all(
        (a - b).norm().item() <= limit * max(b.norm().item(), least)
        for (a, b), least in zip(pairs, (0.0, 0.0, size, size, 0.0), strict=True)
    )
    return equal and bool((lse[lacks_keys] < NO_KEY).all())


def _warn_of_trial(problem: str) -> None:
    logger.warning_once(
        f"The fused attention of torch {torch.__version__} {problem} Attention uses plain matrix products instead, "
        "which give the same results but are slower. To use fused attention, install a version of torch that this "
        "package was tested with (see `constraints.txt`), and please report this warning."
    )
