# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Base class of the attention types, the inputs and results of their calls, and projections of groups of heads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from transformers.cache_utils import Cache

from .attention_pattern import AttentionPattern
from .cache import CacheSpec, Past, Seen, bias_in
from .chunk_attention import chunk_attention, chunk_attention_weights
from .chunked import has_hooks
from .configuration_reformer_hf import ReformerHfConfig
from .cross_attention import Context
from .device_policy import policy_for, suitable_chunk_size
from .documents import Documents
from .dropout import RateDropout, draw_seed
from .rotary import Rotation

# Attention weights and the positions of their keys.
Weights = tuple[Tensor, Tensor]


class DocumentHashing(NamedTuple):
    """
    How the tokens of packed documents hash: each document has as many buckets as in a row of its own.

    Args:
        groups: For documents with the same number of buckets, their flat positions `[n]` in the batch, and the
            projections that hash them, as `hashing.projections_of` returns them.
        first_bucket: The first bucket of each position's document, `[B, L]`.
    """

    groups: Sequence[tuple[Tensor, Sequence[Tensor]]]
    first_bucket: Tensor


@dataclass(frozen=True)
class AttentionCall:
    """
    The inputs of one attention call that all heads share, in the forward pass and in its recomputation.

    `SelfAttention.begin` sets the fields that differ between layers.

    Args:
        batch_size, length, dtype, device: Properties of the hidden states `[B, L, E]`.
        padding: `[B, L]`, True for padding.
        rotation: Rotation of the queries and keys of local layers; `None` for none.
        num_hashes: Number of hash rounds; overrides the config.
        output_attentions: Whether to return attention weights.
        documents: The documents of packed rows; `None` if each row is one document.
        context: The encoder output, in the decoder of an encoder-decoder.
        fills_cache: Whether to return keys, values and buckets for the cache.
        past: Cached tokens before the input.
        projections: Rotations that hash all heads, as `hashing.projections_of` returns them.
        document_hashing: How packed documents hash; `None` if there are none.
        factors: Factors of the number of buckets. `None` means those that follow from the config and the length.
        document_order: The result of `Documents.sort`.
        dropout_seed: Seed of the dropout of attention weights.
    """

    batch_size: int
    length: int
    dtype: torch.dtype
    device: torch.device
    padding: Tensor | None = None
    rotation: Rotation | None = None
    num_hashes: int | None = None
    output_attentions: bool = False
    documents: Documents | None = None
    context: Context | None = None
    fills_cache: bool = False
    past: Past | None = None
    projections: Sequence[Tensor] = ()
    factors: Sequence[int] | None = None
    document_hashing: DocumentHashing | None = None
    document_order: Tensor | None = None
    dropout_seed: int = 0

    @property
    def num_positions(self) -> int:
        """Number of positions, summed over the batch."""
        return self.batch_size * self.length

    @property
    def suitable_chunk_size(self) -> int:
        """Positions per chunk of a position-wise function that is fastest on the device."""
        return suitable_chunk_size(self.batch_size, self.length, self.device.type)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "AttentionCall":
        """Move the tensors to a device: accelerate calls this where the layers of a model are on several devices."""
        device = torch.device(device)
        if device == self.device:
            return self

        def move(value: Any) -> Any:
            return value if value is None else value.to(device, non_blocking=non_blocking)

        return replace(
            self,
            device=device,
            padding=move(self.padding),
            rotation=move(self.rotation),
            documents=move(self.documents),
            context=move(self.context),
        )

    @classmethod
    def on(cls, hidden_states: Tensor, **options: Any) -> "AttentionCall":
        """Create a call on hidden states `[B, L, E]`."""
        batch_size, length, _ = hidden_states.shape
        return cls(batch_size, length, hidden_states.dtype, hidden_states.device, **options)


@dataclass(frozen=True)
class Found:
    """
    The results of attention of some heads in addition to its output.

    Args:
        order: Sorted order of cached and new tokens, `[B, h, R, T + L]`, which the recomputation reuses; `None` means
            the order of positions.
        key, value: `[B, n, h, D]`, if the call fills a cache.
        buckets: `[B, h, R, n]`, if the call fills a cache.
        weights: Attention weights `[B, h, R, n, W]` before dropout and the positions of their keys, if requested.
    """

    order: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    buckets: Tensor | None = None
    weights: Weights | None = None

    @classmethod
    def join(cls, groups: Sequence["Found"]) -> "Found":
        """Concatenate the results of groups of heads to those of all heads."""
        if len(groups) == 1:
            return groups[0]
        weights = None
        if groups[0].weights is not None:
            values, positions = zip(*(group.weights for group in groups), strict=True)
            weights = torch.cat(values, dim=1), torch.cat(positions, dim=1)
        return cls(
            order=_join([group.order for group in groups], 1),
            key=_join([group.key for group in groups], 2),
            value=_join([group.value for group in groups], 2),
            buckets=_join([group.buckets for group in groups], 1),
            weights=weights,
        )


def _join(parts: Sequence[Tensor | None], axis: int) -> Tensor | None:
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None], dim=axis)


class SelfAttention(nn.Module):
    """Base class of the attention types. A subclass projects and attends, for all heads or a group of them."""

    # Names of the modules that project hidden states to the heads.
    projections: tuple[str, ...] = ()

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.config = config
        self.num_heads, self.head_size = config.num_attention_heads, config.attention_head_size
        self.all_heads = slice(0, self.num_heads)
        self.weights_dropout = RateDropout(config.lsh_attention_probs_dropout_prob or 0.0)
        # The spec of this attention's cache layer.
        self.cache_spec = CacheSpec(None, self.num_heads, self.head_size)
        for name in self.projections:
            setattr(self, name, nn.Linear(config.hidden_size, self.num_heads * self.head_size, bias=False))

    @property
    def dropout(self) -> float:
        """Dropout rate of attention weights in the current mode."""
        return self.weights_dropout.rate

    def features(self, heads: slice) -> slice:
        """Return the range of the features of some heads among the features of all heads."""
        return slice(heads.start * self.head_size, heads.stop * self.head_size)

    def cache_spec_for(self, num_hashes: int | None) -> CacheSpec:
        """Return the spec of the cache layer for a call with this number of hash rounds; `None` means the config's."""
        return self.cache_spec.with_hashes(num_hashes or self.config.num_hashes)

    def begin(self, call: AttentionCall, cache_layer: Any = None) -> AttentionCall:
        """Complete a call with the fields of this layer, and draw the seeds that it needs."""
        past = None
        if cache_layer is not None and cache_layer.is_initialized:
            cache_layer.fetch()
            past = cache_layer.past()
        dropout_seed = draw_seed() if self.dropout else 0
        call = replace(call, past=past, fills_cache=cache_layer is not None, dropout_seed=dropout_seed)
        return call if call.documents is None else replace(call, document_order=call.documents.sort(call.padding))

    def forward(
        self,
        hidden_states: Tensor,
        call: AttentionCall | None = None,
        cache: Cache | None = None,
        layer_idx: int = 0,
    ) -> tuple[Tensor, Weights | None]:
        """
        Compute the output of all heads.

        Args:
            hidden_states: `[B, L, E]`.
            call: The inputs that all heads share.
            cache, layer_idx: KV cache of the earlier tokens, to which the new ones are added, and the index of its
                layer.

        Returns:
            Output `[B, L, H * D]`, and attention weights if the call requests them.
        """
        call = call or AttentionCall.on(hidden_states)
        cache_layer: Any = None if cache is None else cache.layers[layer_idx]
        if cache is not None and cache_layer.can_append(call.length):
            return self.append(hidden_states, call, cache, layer_idx)
        call = self.begin(call, cache_layer)
        out, found = self.attend_heads(self.project(hidden_states, self.all_heads), call, self.all_heads)
        if cache is not None:
            self.prefill(found, call, cache, layer_idx)
        return out, found.weights

    def project(self, hidden_states: Tensor, heads: slice, values: bool = True) -> list[Tensor]:
        """
        Project hidden states to some of the heads.

        Args:
            hidden_states: `[B, L, E]` at any positions.
            heads: The heads.
            values: Whether the values of the projections are needed. If False, they are undefined and cost nothing to
                compute, but their gradients are right.

        Returns:
            Each projection, `[B, L, h, D]`.
        """
        features = self.features(heads)
        # Plain projections share one view, so that autograd accumulates their gradients in place.
        rows = hidden_states.flatten(0, 1)
        shape = (*hidden_states.shape[:2], -1, self.head_size)
        modules = [getattr(self, name) for name in self.projections]
        # Of others, `head_groups` ensures that these are all features. Examples may have adapters of their own.
        projected = [
            project(each, rows, features, values) if is_plain(each) else each(hidden_states) for each in modules
        ]
        return [output.view(shape) for output in projected]

    def project_new(self, hidden_states: Tensor) -> list[Tensor]:
        """Project few hidden states to all heads, by calling the projections as modules."""
        shape = (*hidden_states.shape[:2], -1, self.head_size)
        return [getattr(self, name)(hidden_states).view(shape) for name in self.projections]

    def attend(
        self, projected: Sequence[Tensor], call: AttentionCall, heads: slice, found: Found | None = None
    ) -> tuple[Tensor, Found]:
        """
        Attend with some of the heads.

        This is a pure function. The backward pass of a reversible layer recomputes it with the earlier `found`.

        Args:
            projected: The result of `project` for these heads.
            call: The inputs that all heads share.
            heads: The heads.
            found: The additional results of the forward pass, to be reused in a recomputation.

        Returns:
            Output `[B, L, h, D]`, and the additional results.
        """
        raise NotImplementedError

    def attend_heads(
        self, projected: Sequence[Tensor], call: AttentionCall, heads: slice, found: Found | None = None
    ) -> tuple[Tensor, Found]:
        """Call `attend` and concatenate the heads of the output, `[B, L, h * D]`."""
        out, found = self.attend(projected, call, heads, found)
        return out.flatten(2), found

    def attend_in_chunks(
        self,
        inputs: tuple[Tensor, Tensor | None, Tensor],
        pattern: AttentionPattern,
        order: Tensor | None,
        padding: Tensor | None,
        call: AttentionCall,
        heads: slice,
        found: Found,
    ) -> tuple[Tensor, Found]:
        """
        Compute `chunk_attention` of cached and new tokens.

        Args:
            inputs: Queries, keys and values, those of cached tokens first.
            pattern, order, padding: As in `chunk_attention`.
            call, heads, found: As in `attend`.

        Returns:
            Output of the new tokens, and `found` with the attention weights if the call requests them.
        """
        # Different groups of heads use different dropout masks.
        dropout = self.dropout, call.dropout_seed + heads.start
        out = chunk_attention(*inputs, pattern, order, padding, *dropout, call.document_order)
        weights = found.weights
        if call.output_attentions and weights is None:
            weights = chunk_attention_weights(*inputs[:2], pattern, order, padding, call.document_order)
        if call.past is not None:
            num_cached = call.past.key.shape[1]
            out = out[:, num_cached:]
            if weights is not None:
                values, index = (x[:, :, :, num_cached:] for x in weights)
                weights = values, call.past.heads(heads).cache_positions(index)
        return out, replace(found, weights=weights)

    def prefill(self, found: Found, call: AttentionCall, cache: Cache, layer_idx: int) -> None:
        """Write the keys, values and hashing results of all heads to the cache."""
        options = {"spec": self.cache_spec_for(call.num_hashes), "padding": call.padding}
        cache.update(found.key, found.value, layer_idx, **options, **self._hashing(found, call))

    def _hashing(self, found: Found, call: AttentionCall) -> dict[str, Any]:
        """Return the arguments that the cache layer takes in addition to keys and values."""
        return {}

    def append(
        self, hidden_states: Tensor, call: AttentionCall, cache: Cache, layer_idx: int
    ) -> tuple[Tensor, Weights | None]:
        """
        Append a few new tokens `[B, n, E]` to the cache and attend to the keys that they see there.

        Returns:
            Output `[B, n, H * D]`, and attention weights if the call requests them.
        """
        layer: Any = cache.layers[layer_idx]
        limit = layer.append_limit
        if hidden_states.shape[1] <= limit:
            return self._append(hidden_states, call, cache, layer_idx)
        outs, weights = [], []
        for start in range(0, hidden_states.shape[1], limit):
            block = slice(start, start + limit)
            padding = None if call.padding is None else call.padding[:, block]
            out, seen = self._append(hidden_states[:, block], replace(call, padding=padding), cache, layer_idx)
            outs.append(out)
            weights.append(seen)
        if not call.output_attentions:
            return torch.cat(outs, dim=1), None
        return torch.cat(outs, dim=1), _join_steps(weights)

    def _append(
        self, hidden_states: Tensor, call: AttentionCall, cache: Cache, layer_idx: int
    ) -> tuple[Tensor, Weights | None]:
        raise NotImplementedError

    def append_and_attend(
        self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, cache: Cache, layer_idx: int
    ) -> tuple[Tensor, Weights | None]:
        """Append projected tokens `[B, n, H, D]` to a cache layer that returns the same keys for all tokens."""
        options = {"padding": call.padding, "with_positions": call.output_attentions}
        seen: Any = cache.update(key, value, layer_idx, **options)[0]
        out, weights = self.attend_to(query.transpose(1, 2), seen, call.output_attentions)
        if weights is not None:
            values, positions = weights
            weights = values[:, :, None], positions[:, :, None]
        return out.transpose(1, 2).flatten(2), weights

    def attend_to(self, query: Tensor, seen: Seen, with_weights: bool) -> tuple[Tensor, Weights | None]:
        """
        Attend to the keys that a cache layer returned.

        Args:
            query: A few queries in the layout of the keys, `[B, H, n, D]` or `[B * H * n, 1, 1, D]`.
            seen: The result of the cache layer.
            with_weights: Whether to return attention weights.

        Returns:
            Output in the layout of the queries, and attention weights before dropout with the positions of their keys.
        """
        key, value, bias = seen.key, seen.value, seen.bias
        if key.dtype != query.dtype:
            key, value = key.to(query.dtype), value.to(query.dtype)
            bias = None if bias is None else bias_in(query.dtype, bias)
        out = scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=self.dropout, scale=1.0)
        if self.dropout and bias is not None:
            # As in a parallel pass, dropout does not apply to a query without keys other than its own.
            exact = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
            out = torch.where(bias.amax(-1, keepdim=True) < 0, exact, out)
        if not with_weights:
            return out, None
        scores = torch.matmul(query, key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32))
        if bias is not None:
            scores = scores + bias
        weights = scores.softmax(-1)
        positions = seen.positions.to(torch.int32).expand(weights.shape)
        if bias is not None:
            masked = (bias < 0).expand(weights.shape) & (weights == 0)
            positions = positions.masked_fill(masked, -1)
        return out, (weights, positions)

    def head_groups(self, call: AttentionCall, output: nn.Module) -> list[slice]:
        """
        Split the heads into groups that are computed one after the other.

        All heads form one group unless `output`, the output projection, and all other projections are plain linear
        layers. An adapter is not, nor is a layer whose weights are loaded by a hook.
        """
        num_heads = self.num_heads
        size = parallel_heads(self.config, call.num_positions, call.device.type)
        if not all(is_plain(module) for module in (output, *(getattr(self, name) for name in self.projections))):
            size = num_heads
        return [slice(first, min(first + size, num_heads)) for first in range(0, num_heads, size)]


class ReformerHfSelfOutput(nn.Module):
    """Output projection of attention, from heads to the residual stream."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        all_head_size = config.num_attention_heads * config.attention_head_size
        self.dense = nn.Linear(all_head_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, features: slice | None = None) -> Tensor:
        """
        Project the outputs of some heads.

        Args:
            hidden_states: Outputs of h heads, `[B, L, h * D]`.
            features: Range of their features among those of all heads; `None` for all heads.

        Returns:
            Their contribution to the sum over all heads, `[B, L, E]`.
        """
        if features is None or not is_plain(self.dense) or features == slice(0, self.dense.in_features):
            return self.dense(hidden_states)
        return linear(hidden_states, self.dense.weight[:, features])


def _join_steps(steps: Sequence[Weights]) -> Weights:
    """Concatenate attention weights `[B, H, R, n, W]` of consecutive tokens, padded to the same number of keys."""
    width = max(weights.shape[-1] for weights, _ in steps)
    padded = [
        (pad(weights, (0, width - weights.shape[-1])), pad(positions, (0, width - positions.shape[-1]), value=-1))
        for weights, positions in steps
    ]
    weights, positions = zip(*padded, strict=True)
    return torch.cat(weights, dim=3), torch.cat(positions, dim=3)


def parallel_heads(config: ReformerHfConfig, positions: int, device_type: str) -> int:
    """
    Return the number of heads per group: the config's or, by default, the number that is fastest on a device.

    Args:
        config: The config.
        positions: Number of positions, summed over the batch.
        device_type: Type of the device.
    """
    suitable = max(policy_for(device_type).head_group_rows // max(positions, 1), 1)
    return min(config.num_parallel_heads or suitable, config.num_attention_heads)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module is a plain linear layer, so that part of its weight computes part of its output."""
    return type(module) is nn.Linear and not has_hooks(module)


def project(module: nn.Linear, rows: Tensor, features: slice, values: bool) -> Tensor:
    """Compute some of the output features of a plain linear layer without bias for `[rows, E]`."""
    weight = module.weight
    if features != slice(0, module.out_features):
        weight = weight[features]
    return linear(rows, weight) if values else _LinearWithoutValues.apply(rows, weight)


class _LinearWithoutValues(torch.autograd.Function):
    """Compute the gradients of `linear(input, weight)` without its output."""

    @staticmethod
    def forward(ctx, input, weight):
        device_type = input.device.type
        autocast = torch.is_autocast_enabled(device_type) and input.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device_type) if autocast else input.dtype
        ctx.save_for_backward(input, weight)
        return input.new_empty(1, dtype=dtype).expand(input.shape[0], weight.shape[0])

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        grad_input = torch.mm(grad, weight.to(grad.dtype)).to(input.dtype)
        grad_weight = torch.mm(grad.t(), input.to(grad.dtype)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_input, grad_weight
