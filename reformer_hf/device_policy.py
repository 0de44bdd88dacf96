# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""What depends on the type of device: how much is computed at a time, and by which kernel. The one place for it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class KernelPolicy:
    """
    A fused attention kernel, and the tiles that it takes; plain matrix products compute the others.

    Args:
        name: Which of the kernels of `attention_kernels` it is.
        dtypes: Those of queries, keys and values.
        chunk_multiple: What the queries of a chunk are a multiple of.
        size_multiple: What the keys of a window and both head dimensions are a multiple of.
        equal_head_sizes: Whether the values are as wide as the keys.
    """

    name: str
    dtypes: frozenset[torch.dtype]
    chunk_multiple: int = 1
    size_multiple: int = 1
    equal_head_sizes: bool = False

    def takes(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the kernel fits queries `[g, n, C, D]`, keys `[g, n, W, D]` and values `[g, n, W, E]`."""
        if query.dtype not in self.dtypes or query.shape[-2] % self.chunk_multiple:
            return False
        if self.equal_head_sizes and query.shape[-1] != value.shape[-1]:
            return False
        return not any(size % self.size_multiple for size in (key.shape[-2], query.shape[-1], value.shape[-1]))


@dataclass(frozen=True)
class DevicePolicy:
    """
    How to compute on one type of device. The results do not depend on it, but for rounding.

    Args:
        tile_scores: Attention scores that exist at a time: few enough for the cache of a CPU, many enough to fill a
            GPU.
        hash_tile_elements: Elements of the projections that exist at a time in hashing, so that no intermediate grows
            with length times buckets.
        chunk_positions: Positions of all rows of a batch that a position-wise function takes at a time: their inner
            activations lie in the cache of a CPU, or fill a GPU.
        head_group_rows: Rows (positions of all rows of a batch, times heads) that attention takes at a time: as many
            queries, keys and values lie in the cache of a CPU, or fill a GPU.
        window_chunk_length: Shortest chunk of queries, in the `window` pattern, that is computed at full speed; longer
            ones are halved. `None` leaves the chunks as the pattern has them.
        argmax_by_pooling: Whether the argmax of a hash is taken by max-pooling, which runs on the vector units of a
            CPU as the reduction does not.
        pin_uploads: Whether what is drawn on the CPU is copied from page-locked memory, so that the host does not wait
            for the device.
        kernel: The fused attention kernel; `None` where there is none.
    """

    tile_scores: int
    hash_tile_elements: int
    chunk_positions: int
    head_group_rows: int
    window_chunk_length: int | None
    argmax_by_pooling: bool
    pin_uploads: bool
    kernel: KernelPolicy | None


CPU = DevicePolicy(
    tile_scores=3 << 16,
    hash_tile_elements=1 << 19,
    chunk_positions=1 << 10,
    head_group_rows=1 << 15,
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
    window_chunk_length=None,
    argmax_by_pooling=False,
    pin_uploads=True,
    # Rows of logsumexps come in multiples of 32; masks and heads must be aligned. A mask in fp16 could not be lower
    # than any score.
    kernel=KernelPolicy(
        "cuda_efficient", frozenset({torch.float32, torch.bfloat16}), chunk_multiple=32, size_multiple=8
    ),
)

# Sizes for a GPU, and nothing that is known to run on CUDA alone.
OTHER = replace(CUDA, pin_uploads=False, kernel=None)

# By type of device. Tests put another policy here, to run that of CUDA on a CPU.
POLICIES = {"cpu": CPU, "cuda": CUDA}


def policy_for(device: torch.device | str) -> DevicePolicy:
    """The policy for a device, or for a type of device."""
    return POLICIES.get(torch.device(device).type, OTHER)
