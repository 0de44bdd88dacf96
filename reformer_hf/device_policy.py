# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings by device type: tile and chunk sizes, and kernels."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class KernelPolicy:
    """
    A fused attention kernel and the tiles that it supports. Plain matrix products compute all other tiles.

    Args:
        name: Name of the kernel in `attention_kernels`.
        dtypes: Supported dtypes of queries, keys and values.
        chunk_multiple: The number of queries in a chunk must be a multiple of this.
        size_multiple: The number of keys in a window and both head dimensions must be multiples of this.
        equal_head_sizes: Whether keys and values must have the same head dimension.
    """

    name: str
    dtypes: frozenset[torch.dtype]
    chunk_multiple: int = 1
    size_multiple: int = 1
    equal_head_sizes: bool = False

    def takes(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Return whether the kernel supports queries `[g, n, C, D]`, keys `[g, n, W, D]`, values `[g, n, W, E]`."""
        if query.dtype not in self.dtypes or query.shape[-2] % self.chunk_multiple:
            return False
        if self.equal_head_sizes and query.shape[-1] != value.shape[-1]:
            return False
        return not any(size % self.size_multiple for size in (key.shape[-2], query.shape[-1], value.shape[-1]))


@dataclass(frozen=True)
class DevicePolicy:
    """
    Settings for one device type. Results do not depend on them, except for rounding.

    Args:
        tile_scores: Attention scores per tile: few enough for the cache of a CPU, enough to saturate a GPU.
        hash_tile_elements: Projected elements per tile of hashing. This bounds the intermediates, which would
            otherwise grow with length times buckets.
        chunk_positions: Positions per chunk of a position-wise function, summed over the batch. The activations of a
            chunk fit into the cache of a CPU, or saturate a GPU.
        head_group_rows: Rows (batch size times positions times heads) per group of heads in attention. The queries,
            keys and values of a group fit into the cache of a CPU, or saturate a GPU.
        batched_rounds: Rows times hash rounds up to which a tile holds all rounds of its heads. A GPU then runs fewer
            kernels, but all rounds have their outputs in memory. On a CPU, each round has tiles of its own.
        kept_activations: Bytes of activations that a training step keeps instead of recomputing them.
        window_chunk_length: Shortest chunk of queries that runs at full speed in the `window` pattern; longer chunks
            are halved. `None` keeps the chunks of the pattern.
        argmax_by_pooling: Whether hashing computes its argmax by max pooling. On a CPU, max pooling is vectorized and
            the reduction is not.
        pin_uploads: Whether tensors drawn on the CPU are copied to the device from page-locked memory, so that the
            host does not wait for the device.
        kernel: The fused attention kernel; `None` if there is none.
    """

    tile_scores: int
    hash_tile_elements: int
    chunk_positions: int
    head_group_rows: int
    batched_rounds: int
    kept_activations: int
    window_chunk_length: int | None
    argmax_by_pooling: bool
    pin_uploads: bool
    kernel: KernelPolicy | None


CPU = DevicePolicy(
    tile_scores=3 << 16,
    hash_tile_elements=1 << 19,
    chunk_positions=1 << 10,
    head_group_rows=1 << 15,
    batched_rounds=0,
    kept_activations=1 << 29,
    window_chunk_length=32,
    argmax_by_pooling=True,
    pin_uploads=False,
    kernel=KernelPolicy("cpu_flash", frozenset({torch.float32}), equal_head_sizes=True),
)

CUDA = DevicePolicy(
    tile_scores=1 << 26,
    hash_tile_elements=1 << 26,
    chunk_positions=1 << 16,
    head_group_rows=1 << 20,
    batched_rounds=1 << 21,
    kept_activations=1 << 31,
    window_chunk_length=None,
    argmax_by_pooling=False,
    pin_uploads=True,
    # The kernel pads logsumexps to multiples of 32, and requires aligned masks and heads. In fp16, a mask could not be
    # lower than every possible score.
    kernel=KernelPolicy(
        "cuda_efficient", frozenset({torch.float32, torch.bfloat16}), chunk_multiple=32, size_multiple=8
    ),
)

# The sizes for a GPU, without the features that are only known to work on CUDA.
OTHER = replace(CUDA, pin_uploads=False, kernel=None)

# By device type. Tests replace entries, for example to run the policy of CUDA on a CPU.
POLICIES = {"cpu": CPU, "cuda": CUDA}


def suitable_chunk_size(batch_size: int, length: int, device_type: str) -> int:
    """Return the number of positions per chunk of an input `[B, L, …]` that is fastest on a device."""
    return max(min(policy_for(device_type).chunk_positions // max(batch_size, 1), length), 1)


def policy_for(device: torch.device | str) -> DevicePolicy:
    """Return the policy for a device or a device type."""
    return POLICIES.get(torch.device(device).type, OTHER)
