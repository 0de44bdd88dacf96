# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Which keys of a text each head and hash round of an LSH layer sees, and how full attention weights them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention_pattern import AttentionPattern
from ..hashing import unpack_order
from ..reformer_layer import ReformerHfLayer
from ..self_attention import AttentionCall, Found
from .coverage import full_weights, project_wide, row_of
from .lsh_layers import find_lsh_layers, lsh_attention_of, observe


@dataclass(frozen=True)
class SeenKeys:
    """
    The keys that n queries of a text of L tokens see in an LSH layer, for h heads and R hash rounds, on the CPU.

    Args:
        layer: Name of the layer.
        heads: The heads, h.
        queries: Positions of the queries, `[n]`.
        weights: Attention weights of full attention, `[h, n, L]`. Those of a query sum to 1.
        visible: Which keys a query sees in full attention, `[n, L]`: all earlier ones or, in a bidirectional layer,
            all others; itself only if there is no other.
        seen: Which of these it sees in each round of LSH attention, `[h, R, n, L]`. None, if it finds no key but its
            own, except for the first token of a causal layer, which sees its own in the first round.
        buckets: The bucket of each token in each round, `[h, R, L]`, numbered from 0 in the order of hashing without
            the empty ones.
        pattern: The attention pattern of the layer.
    """

    layer: str
    heads: tuple[int, ...]
    queries: Tensor
    weights: Tensor
    visible: Tensor
    seen: Tensor
    buckets: Tensor
    pattern: AttentionPattern


def seen_keys(
    model: nn.Module,
    input_ids: Tensor,
    layer: int | str,
    heads: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
    num_hashes: int | None = None,
    **inputs: Any,
) -> SeenKeys:
    """
    Find the keys that tokens of a text see in an LSH layer, in each head and hash round.

    Takes one forward pass in evaluation mode. Without `queries`, the result grows with the square of the length.

    Args:
        model: Any model of this package that has LSH layers, except an encoder-decoder; take one of its stacks.
        input_ids: `[1, L]`, one text.
        layer: Name of an LSH layer, or its index in `attn_layers`.
        heads: The heads. `None` means all.
        queries: Positions of the tokens. `None` means all.
        num_hashes: Number of hash rounds. `None` means that of the config.
        **inputs: Other arguments of the model, such as `num_buckets`.

    Returns:
        `SeenKeys`.

    Raises:
        ValueError: If the layer, a head or a position does not exist, or if there is not exactly one text.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"`input_ids` has shape {tuple(input_ids.shape)}, but must be one text, [1, length].")
    positions = _checked(queries, input_ids.shape[1], "queries", "the text", "tokens")
    layers = find_lsh_layers(model, [layer])
    if len(layers) > 1:
        raise ValueError(f"Layer {layer!r} is one of {list(layers)}: give a name.")
    ((name, module),) = layers.items()
    selected = _checked(heads, lsh_attention_of(module).num_heads, "heads", "the layer", "heads")
    results: list[SeenKeys] = []

    def take(name: str, layer: ReformerHfLayer, hidden_states: Tensor, call: AttentionCall) -> None:
        results.append(_seen_keys(name, layer, hidden_states, row_of(call, 0), selected, torch.tensor(positions)))

    given = {"input_ids": input_ids.to(next(model.parameters()).device), "num_hashes": num_hashes} | inputs
    observe(model, take, layers, given)
    return results[0]


def _checked(indices: Sequence[int] | None, number: int, name: str, owner: str, things: str) -> list[int]:
    """Return indices, all of them by default."""
    if indices is None:
        return list(range(number))
    if not indices or not all(0 <= index < number for index in indices):
        raise ValueError(f"`{name}` is {list(indices)}, but {owner} has {number} {things}: give some from 0.")
    return list(indices)


def _seen_keys(
    name: str, layer: ReformerHfLayer, hidden_states: Tensor, call: AttentionCall, heads: list[int], queries: Tensor
) -> SeenKeys:
    """Compare one text `[1, L, E]` with full attention, one head at a time."""
    attention = lsh_attention_of(layer)
    call = attention.begin(call)
    query, value = project_wide(attention, hidden_states)
    queries = queries.to(call.device)
    weights, seen, buckets = [], [], []
    for head in heads:
        of_head = slice(head, head + 1)
        found = attention.attend([query[:, :, of_head], value[:, :, of_head]], call, of_head)[1]
        head_weights, visible = full_weights(query[0, :, head], queries, call, attention.pattern.causal)
        weights.append(head_weights.cpu())
        seen.append((_marked(found.weights[1][0, 0][:, queries], call.length) & visible).cpu())
        buckets.append(_buckets(found, call).cpu())
    return SeenKeys(
        layer=name,
        heads=tuple(heads),
        queries=queries.cpu(),
        weights=torch.stack(weights),
        visible=visible.cpu(),
        seen=torch.stack(seen),
        buckets=torch.stack(buckets),
        pattern=attention.pattern,
    )


def _marked(positions: Tensor, length: int) -> Tensor:
    """Return whether each of L positions is among some, `[R, n, W]` with -1 for none: `[R, n, L]`."""
    # The additional column takes what is none.
    marked = torch.zeros((*positions.shape[:2], length + 1), dtype=torch.bool, device=positions.device)
    return marked.scatter_(2, torch.where(positions < 0, length, positions).long(), True)[..., :-1]


def _buckets(found: Found, call: AttentionCall) -> Tensor:
    """Return the bucket of each token in each round of one head, `[R, L]`."""
    if found.order is None:
        return torch.zeros((call.num_hashes, call.length), dtype=torch.long)
    positions, starts = unpack_order(found.order[0, 0])
    numbers = starts.cumsum(-1) - 1
    return torch.empty_like(numbers).scatter_(-1, positions.long(), numbers)
