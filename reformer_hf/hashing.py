# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Locality-sensitive hashing of vectors into buckets, and sorting of positions by bucket.

Shapes: B batch, L length, H heads, D head size, R hash rounds, N buckets. All functions are pure and use no global
state.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from .device_policy import policy_for


def bucket_factors(
    num_buckets: int | Sequence[int] | None,
    length: int,
    chunk_length: int,
    max_position_embeddings: int,
    bucket_length: int | None = None,
) -> list[int]:
    """
    Return the factors of the number of buckets for an input of `length` positions.

    A given `num_buckets` is returned as a list. For `None` the number follows the in-tree formula: the largest power
    of two up to `2 * length / chunk_length`, at least two, split into two factors if it is large. With a
    `bucket_length` it is the smallest power of two that is at least `length / bucket_length`, so that the average
    bucket is no longer than that.
    """
    if num_buckets is not None:
        return [num_buckets] if isinstance(num_buckets, int) else list(num_buckets)
    if bucket_length is None:
        power = max((2 * (length // chunk_length)).bit_length() - 1, 1)
    else:
        power = ((length - 1) // bucket_length).bit_length()
    unfactorized_limit = 2 * max(int((max_position_embeddings // chunk_length) ** 0.5), chunk_length)
    if 2**power <= unfactorized_limit:
        return [2**power]
    return [2 ** (power // 2), 2 ** (power - power // 2)]


def random_rotations(seed: int, num_heads: int, head_size: int, num_hashes: int, factors: list[int]) -> Tensor:
    """
    Draw random projections `[H, D, R, sum(factors) / 2]` in fp32 on the CPU, from a separate generator.

    They are equal to those that the in-tree model draws after `torch.manual_seed(seed)`.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    shape = (num_heads, head_size, num_hashes, sum(factors) // 2)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def hash_vectors(vectors_BLHD: Tensor, rotations_HDRN: Tensor, factors: list[int]) -> Tensor:
    """
    Hash vectors to buckets `[B, H, R, L]` (int32) by random rotations, `argmax([xR; -xR])` (Andoni et al. 2015).

    With several factors, the buckets of the factors are the mixed-radix digits of the bucket, least significant first.
    Hashing runs at least in fp32, outside autocast and without gradient.
    """
    return hash_by(
        projections_of(rotations_HDRN, factors, vectors_BLHD.dtype, vectors_BLHD.device),
        vectors_BLHD,
        rotations_HDRN.shape[2],
    )


def projections_of(
    rotations_HDRN: Tensor, factors: list[int], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """
    Return the rotations of each factor N as `[H, R * N / 2, D]`; an empty list for a single bucket.

    Args:
        rotations_HDRN: The result of `random_rotations`.
        factors: Factors of the number of buckets.
        dtype: The dtype of the vectors to hash. The rotations have at least fp32.
        device: The device of the vectors to hash.
    """
    if factors == [1]:
        return []
    rotations_HDRN = _upload(rotations_HDRN, device)
    rotations_HDRN = rotations_HDRN.to(torch.promote_types(dtype, torch.float32))
    return [
        part_HDRN.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
        for part_HDRN in rotations_HDRN.split([N // 2 for N in factors], dim=-1)
    ]


def _upload(drawn: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor that was drawn on the CPU to a device, without waiting for the device if the policy says so."""
    if drawn.is_cpu and policy_for(device).pin_uploads:
        return drawn.pin_memory().to(device, non_blocking=True)
    return drawn.to(device)


def hash_by(projections: Sequence[Tensor], vectors_BLHD: Tensor, num_hashes: int) -> Tensor:
    """Hash like `hash_vectors`, given the result of `projections_of`."""
    batch_size, length, num_heads, _ = vectors_BLHD.shape
    device = vectors_BLHD.device
    buckets_BHRL = torch.zeros((batch_size, num_heads, num_hashes, length), dtype=torch.int32, device=device)
    if not projections:
        return buckets_BHRL
    tile_elements = policy_for(device).hash_tile_elements
    step = max(tile_elements // (2 * num_heads * max(projection.shape[1] for projection in projections)), 1)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for start in range(0, length, step):
            vectors_BHDL = vectors_BLHD[:, start : start + step].permute(0, 2, 3, 1).to(projections[0].dtype)
            buckets = buckets_BHRL[..., start : start + step]
            stride = 1
            for projection in projections:
                projected = torch.matmul(projection, vectors_BHDL).unflatten(2, (num_hashes, -1))
                buckets += stride * _argmax_of_both_signs(projected)
                stride *= 2 * projected.shape[3]
    return buckets_BHRL


def both_signs(projections: Sequence[Tensor], num_hashes: int) -> list[Tensor]:
    """Concatenate the result of `projections_of` and its negative, for `hash_few`: `[H, D, R * N]` per factor N."""
    signed = []
    for projection in projections:
        rounds = projection.unflatten(1, (num_hashes, -1))
        signed.append(torch.cat([rounds, -rounds], dim=2).flatten(1, 2).transpose(1, 2).contiguous())
    return signed


def hash_few(signed: Sequence[Tensor], vectors_BLHD: Tensor, num_hashes: int) -> Tensor:
    """
    Hash like `hash_vectors`, with low latency for few vectors.

    Args:
        signed: The result of `both_signs`.
        vectors_BLHD: The vectors.
        num_hashes: Number of hash rounds.

    Returns:
        Buckets `[B, H, L, R]` (int64).
    """
    batch_size, length, num_heads, _ = vectors_BLHD.shape
    shape = (num_heads, batch_size, length, num_hashes)
    if not signed:
        return torch.zeros(shape, dtype=torch.long, device=vectors_BLHD.device).transpose(0, 1)
    if torch.is_autocast_enabled(vectors_BLHD.device.type):
        with torch.autocast(vectors_BLHD.device.type, enabled=False):
            return hash_few(signed, vectors_BLHD, num_hashes)
    vectors = vectors_BLHD.flatten(0, 1).transpose(0, 1)
    if vectors.dtype != signed[0].dtype:
        vectors = vectors.to(signed[0].dtype)
    buckets, stride = None, 1
    for projection in signed:
        digits = torch.bmm(vectors, projection).view(*shape, -1).argmax(-1)
        buckets = digits if buckets is None else torch.add(buckets, digits, alpha=stride)
        stride *= projection.shape[2] // num_hashes
    return buckets.transpose(0, 1)


def _argmax_of_both_signs(projected_BHRNL: Tensor) -> Tensor:
    """Compute `argmax([x; -x])` over the axis N, without building the concatenation."""
    num_projections = projected_BHRNL.shape[3]
    largest, argmax = _max(projected_BHRNL)
    smallest, argmin = _max(-projected_BHRNL)
    return torch.where(largest >= smallest, argmax, argmin + num_projections).int()


def _max(x_BHRNL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum over the axis N and its index."""
    if not policy_for(x_BHRNL.device).argmax_by_pooling:
        return x_BHRNL.max(dim=3)
    # Channels-last pooling is vectorized; a reduction with indices is not.
    images = x_BHRNL.flatten(0, 2)[:, :, None].permute(0, 3, 1, 2)
    largest, argmax = max_pool2d(images, (images.shape[2], 1), return_indices=True)
    shape = (*x_BHRNL.shape[:3], x_BHRNL.shape[4])
    return largest.reshape(shape), argmax.reshape(shape)


def sort_by_bucket(buckets_BHRL: Tensor, padding_BL: Tensor | None = None) -> Tensor:
    """
    Sort the positions of each round by (bucket, position), with padding in an additional last bucket.

    Args:
        buckets_BHRL: Buckets, integers.
        padding_BL: True for padding.

    Returns:
        `[B, H, R, L]` int32: the position, or its complement `~position` where a bucket begins. `unpack_order`
        separates the two. Attention needs no other result of hashing.
    """
    if padding_BL is not None:
        buckets_BHRL = buckets_BHRL.masked_fill(padding_BL[:, None, None, :], torch.iinfo(torch.int32).max)
    sorted_buckets, order = torch.sort(buckets_BHRL, dim=-1, stable=True)
    order = order.int()
    starts = torch.ones_like(order, dtype=torch.bool)
    torch.ne(sorted_buckets[..., 1:], sorted_buckets[..., :-1], out=starts[..., 1:])
    return torch.where(starts, ~order, order)


def unpack_order(order: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the result of `sort_by_bucket` into positions (int32) and whether a bucket begins there (bool)."""
    starts = order < 0
    return torch.where(starts, ~order, order), starts


def invert_order(positions: Tensor) -> Tensor:
    """Return the slot of each position in a sorted order, along the last axis: `inverse[positions[s]] = s`."""
    slots = torch.arange(positions.shape[-1], dtype=positions.dtype, device=positions.device)
    return torch.empty_like(positions).scatter_(-1, positions.long(), slots.expand_as(positions))
