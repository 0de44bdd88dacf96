# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""What the kinds of attention share: projections of some of the heads, and what one call draws and keeps."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.cache_utils import Cache

from .cache import Geometry, Places, Weights
from .configuration_reformer_hf import ReformerHfConfig
from .rng import draw_seed

# Rows (positions of all rows of a batch, times heads) that attention takes at a time: queries, keys and values of so
# many lie in a cache of a CPU, and are enough to fill a GPU.
_GROUP_ROWS = {"cpu": 1 << 15, "cuda": 1 << 20}


@dataclass
class AttentionCall:
    """
    One call of an attention layer: what is common to all heads, in the forward pass and in its recomputation.

    Args:
        padding: `[B, L]`, True where there is padding.
        num_hashes: Rounds, instead of the config's.
        output_attentions: Whether the attention weights are wanted too.
        hash_seed: Seed of the hash rotations.
        dropout_seed: Seed of the dropout of attention weights.
        num_buckets: Factors of the number of buckets, instead of the config's.
        cache: Decoding state of the model, with what came before this input.
        layer_idx: Whose part of it is this layer's.
        shared: What layers have in common in this call of the model.
    """

    padding: Tensor | None = None
    num_hashes: int | None = None
    output_attentions: bool = False
    hash_seed: int = 0
    dropout_seed: int = 0
    num_buckets: Sequence[int] | None = None
    cache: Cache | None = None
    layer_idx: int = 0
    shared: dict[Hashable, Any] | None = None
    _kept: dict[Hashable, Any] = field(default_factory=dict)
    _weights: list[Weights] = field(default_factory=list)

    def keep(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, or gave when it was first asked for by this key."""
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    def share(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, or gave the first layer that asked for it by this key."""
        if self.shared is None:
            return compute()
        if key not in self.shared:
            self.shared[key] = compute()
        return self.shared[key]

    @property
    def state(self) -> Any:
        """This layer's decoding state, of the kind that its attention has; `None` if there is none."""
        return None if self.cache is None else self.cache.layers[self.layer_idx]

    def update(self, key: Tensor, value: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """Put keys and values into the state; returns those that the new tokens attend to."""
        return self.cache.update(key, value, self.layer_idx, places)

    def add_weights(self, weights: Weights | None) -> None:
        """Take the attention weights `[B, H, R, L, W]` of some heads, and the positions of their keys, if any."""
        if weights is not None:
            self._weights.append(weights)

    def take_weights(self) -> Weights | None:
        """Those of all heads; `None` where they are not wanted. They are not wanted again."""
        weights, self._weights, self.output_attentions = self._weights, [], False
        if not weights:
            return None
        values, positions = (torch.cat(parts, dim=1) for parts in zip(*weights, strict=True))
        return values, positions


class SelfAttention(nn.Module):
    """Attention of some kind: a subclass projects and attends, for all heads or for a group of them."""

    # Names of the projections into the heads.
    projections: tuple[str, ...] = ()

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.config = config
        self.head_size = config.attention_head_size
        all_head_size = config.num_attention_heads * config.attention_head_size
        for name in self.projections:
            setattr(self, name, nn.Linear(config.hidden_size, all_head_size, bias=False))

    @property
    def dropout(self) -> float:
        """Rate at which attention weights are dropped in this mode."""
        return (self.config.lsh_attention_probs_dropout_prob or 0.0) if self.training else 0.0

    @property
    def all_heads(self) -> slice:
        return slice(0, self.config.num_attention_heads)

    def features(self, heads: slice) -> slice:
        """Where some heads stand among the features of all."""
        size = self.head_size
        return slice(heads.start * size, heads.stop * size)

    def begin(self, padding: Tensor | None = None, **options) -> AttentionCall:
        """A new call; draws the seeds that it needs from torch's global generator. Options as in `AttentionCall`."""
        hash_seed = self._hash_seed()
        return AttentionCall(padding, hash_seed=hash_seed, dropout_seed=draw_seed() if self.dropout else 0, **options)

    def _hash_seed(self) -> int:
        return 0

    def forward(self, hidden_states: Tensor, call: AttentionCall | None = None, heads: slice | None = None) -> Tensor:
        """
        Args:
            hidden_states: `[B, L, E]`.
            call: What `begin` returned; by default a new call. It takes the attention weights if it wants them.
            heads: Which heads; by default all, H of them.

        Returns:
            `[B, L, H * D]`.
        """
        call = self.begin() if call is None else call
        heads = self.all_heads if heads is None else heads
        return self.attend(self.project(hidden_states, heads), call, heads).flatten(2)

    def project(self, hidden_states: Tensor, heads: slice, values: bool = True) -> list[Tensor]:
        """
        Each projection `[B, L, H, D]` of hidden states `[B, L, E]`, of some heads; any positions.

        Without `values` it may be anything, computed at no cost, that gradients go through as they should.
        """
        features = self.features(heads)
        # One view for all, so that autograd sums their gradients in place.
        rows = hidden_states.flatten(0, 1)
        shape = (*hidden_states.shape[:2], -1, self.head_size)
        return [project(getattr(self, name), rows, features, values).view(shape) for name in self.projections]

    def attend(self, projected: Sequence[Tensor], call: AttentionCall, heads: slice) -> Tensor:
        """Output `[B, L, H, D]` of what `project` gave."""
        raise NotImplementedError

    def project_all(self, hidden_states: Tensor) -> list[Tensor]:
        """What `project` gives for all heads, in the least time for a few positions."""
        shape = (*hidden_states.shape[:2], -1, self.head_size)
        return [apply_linear(getattr(self, name), hidden_states).view(shape) for name in self.projections]

    def geometry(self, num_hashes: int | None = None) -> Geometry:
        """What the decoding state of this layer is made for."""
        raise NotImplementedError

    def step(self, projected: Sequence[Tensor], call: AttentionCall) -> Tensor:
        """Output `[B, n, H, D]` for new tokens, all heads, by looking up in the state what they attend to."""
        raise NotImplementedError

    def head_groups(self, hidden_states: Tensor, output: nn.Module) -> list[slice]:
        """
        Heads to be computed at a time, for hidden states `[B, L, E]`.

        All at once where `output`, their projection back, or another projection is more than a plain linear layer: an
        adapter, say, or one whose weights are brought in by a hook.
        """
        num_heads = self.config.num_attention_heads
        size = parallel_heads(self.config, hidden_states.shape[:2].numel(), hidden_states.device.type)
        if not all(is_plain(module) for module in (output, *(getattr(self, name) for name in self.projections))):
            size = num_heads
        return [slice(first, min(first + size, num_heads)) for first in range(0, num_heads, size)]


def parallel_heads(config: ReformerHfConfig, positions: int, device_type: str) -> int:
    """Heads to be computed at a time, given the positions of all rows of a batch: as many as the config says, or as a
    device computes fastest."""
    suitable = max(_GROUP_ROWS.get(device_type, _GROUP_ROWS["cuda"]) // max(positions, 1), 1)
    return min(config.num_parallel_heads or suitable, config.num_attention_heads)


class SharedQueryKeyAttention(SelfAttention):
    """One projection serves queries and keys: LSH and full attention."""

    projections = ("query_key", "value")


def see_themselves(weights: Tensor, positions: Tensor, alone: Tensor, first: int) -> None:
    """
    Give tokens that see no other one the weight of themselves, in the last of the places `[B, H, n, W]`.

    Args:
        alone: Which they are, `[B, 1 or H, n, 1]`.
        first: The column of the first token.
    """
    own = torch.arange(first, first + weights.shape[2], dtype=torch.int32, device=weights.device)[:, None]
    weights[..., -1:] = torch.where(alone, 1.0, weights[..., -1:])
    positions[..., -1:] = torch.where(alone, own, positions[..., -1:])


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a linear layer is nothing more, so that a part of its weight gives a part of its output."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is nn.Linear and not hooks and "forward" not in vars(module)


def apply_linear(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """What a linear layer gives, in less time where it is nothing more."""
    return linear(hidden_states, module.weight, module.bias) if is_plain(module) else module(hidden_states)


def project(module: nn.Module, rows: Tensor, features: slice, values: bool) -> Tensor:
    """Some of the features that a linear layer without bias gives of `[rows, E]`; its `forward` gives all."""
    if is_plain(module):
        weight = module.weight[features]
        return linear(rows, weight) if values else _LinearWithoutValues.apply(rows, weight)
    # `head_groups` asks for all.
    return module(rows)


class _LinearWithoutValues(torch.autograd.Function):
    """The gradients of `linear(input, weight)`, without what it gives."""

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
