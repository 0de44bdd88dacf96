# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""KV cache of full attention: all tokens."""

import torch
from torch import Tensor

from .cache import AttentionCacheLayer, CacheSpec, FixedShape, Seen, grown, self_bias


class FullCacheLayer(AttentionCacheLayer):
    """
    Store keys and values of all tokens by cache position.

    A token attends to all earlier tokens that are not padding, and to itself only if there are none.
    """

    layer_type = "reformer_hf_full"
    # Limits the size of masks.
    append_limit = 256
    tensors = (*AttentionCacheLayer.tensors, "padding")

    def _initialize(self, spec: CacheSpec, key: Tensor, value: Tensor) -> None:
        super()._initialize(spec, key, value)
        self.padding = torch.zeros(self.entries.shape[:2], dtype=torch.bool, device=self.device)

    def can_append(self, num_new: int) -> bool:
        return self.is_initialized

    def _prefill(self, key: Tensor, value: Tensor, padding: Tensor | None) -> None:
        self._write(key, value, padding)

    def _append(self, key: Tensor, value: Tensor, padding: Tensor | None, with_positions: bool) -> Seen:
        num_new = key.shape[1]
        self._write(key, value, padding)
        entries, bias = self._visible_entries(num_new), None
        if num_new == 1 and not self.has_padding and entries.shape[1] > 1:
            entries = entries[:, :-1]
        else:
            bias = self._bias(self._new_positions(num_new), entries.shape[1])
        seen_key, seen_value = entries.transpose(1, 2).chunk(2, dim=-1)
        positions = torch.arange(entries.shape[1], device=self.device) if with_positions else None
        return Seen(seen_key, seen_value, bias, positions)

    def _write(self, key: Tensor, value: Tensor, padding: Tensor | None) -> None:
        self._write_entries(self.length, key, value)
        if padding is not None:
            self._write_rows(self.padding, 1, self.length, padding)

    def _visible_entries(self, num_new: int) -> Tensor:
        return self.entries[:, : self.length + num_new]

    def _bias(self, own: Tensor, num_keys: int) -> Tensor:
        """Return the bias `[B or 1, 1, n, T]` of tokens at the cache positions `own`."""
        position = torch.arange(num_keys, device=self.device)
        masked = position >= own[:, None]
        if self.has_padding:
            masked = masked | self.padding[:, None, None, :num_keys]
        else:
            masked = masked[None, None]
        bias = self.entries.new_zeros(masked.shape).masked_fill_(masked, float("-inf"))
        return bias.masked_fill_(position == own[:, None], self_bias(bias.dtype))

    def _reserve(self, num_new: int) -> None:
        rows = self.entries.shape[1]
        if self.length + num_new > rows:
            for name in ("entries", "padding"):
                self._resize(name, 1, grown(rows, self.length + num_new))

    def _crop(self, num_removed: int) -> None:
        removed = slice(int(self.length) - num_removed, int(self.length))
        self.num_padding -= self.padding[:, removed].sum(-1)
        self.padding[:, removed] = False


class StaticFullCacheLayer(FixedShape, FullCacheLayer):
    """A `FullCacheLayer` of a fixed shape."""

    def _visible_entries(self, num_new: int) -> Tensor:
        return self.entries
