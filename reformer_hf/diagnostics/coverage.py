# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
How much of full attention LSH attention covers, how its buckets are filled, and how far its output is off.

Full attention is exact shared query-key attention of the same layer to the same hidden states: softmax over all keys
that a query may see, and over itself only if there is no other.

Shapes: L length, H heads, D head size, E width, R hash rounds, W window length, n queries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..attention_kernels import normalized_keys
from ..full_attention import or_itself, visible_keys, weights_of
from ..hashing import unpack_order
from ..lsh_attention import LSHSelfAttention
from ..reformer_layer import ReformerHfLayer
from ..self_attention import AttentionCall, Found
from .lsh_layers import find_lsh_layers, lsh_attention_of, observe

# Scores of full attention that are computed at a time.
_BLOCK_SCORES = 1 << 22

_COLUMNS = {
    "layer": "layer",
    "head": "head",
    "num_hashes": "hashes",
    "coverage": "coverage",
    "visible_keys": "keys",
    "error": "error",
    "largest_bucket": "largest bucket",
    "bucket_entropy": "entropy",
}


@dataclass(frozen=True)
class AttentionCoverage:
    """
    LSH attention compared with full attention, for each of N LSH layers, each of M numbers of hashes and H heads.

    Means are over queries and texts. A query sees a key if it sees it in any round.

    Args:
        layers: Names of the layers, N.
        num_hashes: Numbers of hashes, M.
        num_queries: Number of queries of each layer, summed over texts, N.
        coverage: `[N, M, H]`, mean share of the attention weights of full attention that fall on keys that LSH
            attention sees, from 0 to 1.
        visible_keys: `[N, M, H]`, mean share of the keys of full attention that LSH attention sees. Keys chosen at
            random would cover about as much.
        error: `[N, M, H]`, root mean square of the difference between the outputs of LSH attention and full attention,
            over the root mean square of the latter.
        layer_error: `[N, M]`, the same after the output projection, for all heads together.
        largest_bucket: `[N, M, H]`, tokens in the largest bucket over the mean of all buckets, a mean over rounds.
        bucket_entropy: `[N, M, H]`, entropy of the bucket of a token over its maximum, a mean over rounds: 1 if all
            buckets are equally full, 0 if one holds all tokens. Like `largest_bucket` it is 1 for a single bucket.
    """

    layers: tuple[str, ...]
    num_hashes: tuple[int, ...]
    num_queries: tuple[int, ...]
    coverage: Tensor
    visible_keys: Tensor
    error: Tensor
    layer_error: Tensor
    largest_bucket: Tensor
    bucket_entropy: Tensor

    def rows(self, per_head: bool = True) -> list[dict[str, Any]]:
        """
        Return the values as rows of plain Python numbers, for example for JSON.

        Args:
            per_head: Whether to return a row for each head. If False, a row has the means over heads, and the error is
                `layer_error`.
        """
        names = ("coverage", "visible_keys", "error", "largest_bucket", "bucket_entropy")
        rows = []
        for i, layer in enumerate(self.layers):
            heads: Sequence[int | None] = range(self.coverage.shape[2]) if per_head else [None]
            for head in heads:
                for j, num_hashes in enumerate(self.num_hashes):
                    values = {name: getattr(self, name)[i, j] for name in names}
                    if head is None:
                        values = {**values, "error": self.layer_error[i, j]}
                    where = {"layer": layer} | ({} if head is None else {"head": head}) | {"num_hashes": num_hashes}
                    numbers = {name: (x.mean() if head is None else x[head]).item() for name, x in values.items()}
                    rows.append(where | numbers)
        return rows

    def to_markdown(self, per_head: bool = True) -> str:
        """Return the `rows` as a Markdown table."""
        rows = self.rows(per_head)
        lines = ["| " + " | ".join(_COLUMNS[name] for name in rows[0]) + " |", "|---" * len(rows[0]) + "|"]
        for row in rows:
            cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def attention_coverage(
    model: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    num_hashes: int | Sequence[int] = (1, 2, 4, 8),
    num_queries: int | None = None,
    seed: int = 0,
    **inputs: Any,
) -> AttentionCoverage:
    """
    Compare the LSH layers of a model with full attention, on a text.

    One forward pass in evaluation mode gives the hidden states that each layer reads. Each layer then hashes them with
    each number of hashes, as in a call `model(…, num_hashes=…)`. Queries are processed in blocks, one head at a time,
    so that memory grows with the length and not with its square; the time does.

    Args:
        model: Any model of this package that has LSH layers. Of an encoder-decoder, pass both inputs, or one of
            `model.get_encoder()` and `model.get_decoder()` with its own.
        input_ids: `[B, L]`, texts.
        attention_mask: `[B, L]`, 1 for tokens, 0 for padding, which is left out.
        num_hashes: Numbers of hash rounds.
        num_queries: Number of queries of each text, drawn without replacement. `None` means all tokens. They are the
            same for all layers of a stack, and see all keys.
        seed: Seed of the drawn queries.
        **inputs: Other arguments of the model, such as `num_buckets` or `decoder_input_ids`.

    Returns:
        `AttentionCoverage`.

    Raises:
        ValueError: If the model has no LSH layer, if a number is below 1, or if the input has a KV cache or several
            documents in a row.
    """
    counts = (num_hashes,) if isinstance(num_hashes, int) else tuple(num_hashes)
    if not counts or min(counts) < 1:
        raise ValueError(f"`num_hashes` is {num_hashes}, but must be one or more numbers of at least 1.")
    if num_queries is not None and num_queries < 1:
        raise ValueError(f"`num_queries` is {num_queries}, but must be at least 1: leave it None for all tokens.")
    found: dict[str, _Sums] = {}

    def measure(name: str, layer: ReformerHfLayer, hidden_states: Tensor, call: AttentionCall) -> None:
        found[name] = _Sums(len(counts), layer.attention.self_attention.num_heads)
        generator = torch.Generator().manual_seed(seed)
        for row in range(call.batch_size):
            of_row = row_of(call, row)
            queries = _draw_queries(of_row, num_queries, generator)
            if len(queries):
                _measure(found[name], layer, hidden_states[row : row + 1], of_row, counts, queries)

    given = {"input_ids": input_ids, "attention_mask": attention_mask} | inputs
    observe(model, measure, find_lsh_layers(model), given)
    values = [sums.means() for sums in found.values()]
    return AttentionCoverage(
        layers=tuple(found),
        num_hashes=counts,
        num_queries=tuple(sums.num_queries for sums in found.values()),
        **{name: torch.stack([of_layer[name] for of_layer in values]) for name in values[0]},
    )


class _Sums:
    """
    Sums over queries and texts, in fp64 on the CPU; see `AttentionCoverage`.

    Args:
        num_counts: How many numbers of hashes there are.
        num_heads: Number of heads.
    """

    def __init__(self, num_counts: int, num_heads: int):
        by_head = [torch.zeros((num_counts, num_heads), dtype=torch.float64) for _ in range(5)]
        self.coverage, self.visible_keys, self.largest_bucket, self.bucket_entropy, self.difference = by_head
        # Squared norms of the output of full attention and, above and here, of differences.
        self.full = torch.zeros(num_heads, dtype=torch.float64)
        self.layer_difference = torch.zeros(num_counts, dtype=torch.float64)
        self.layer_full = torch.zeros((), dtype=torch.float64)
        self.num_queries = self.num_texts = 0

    def means(self) -> dict[str, Tensor]:
        return {
            "coverage": self.coverage / self.num_queries,
            "visible_keys": self.visible_keys / self.num_queries,
            "error": (self.difference / self.full).sqrt(),
            "layer_error": (self.layer_difference / self.layer_full).sqrt(),
            "largest_bucket": self.largest_bucket / self.num_texts,
            "bucket_entropy": self.bucket_entropy / self.num_texts,
        }


def row_of(call: AttentionCall, row: int) -> AttentionCall:
    """Return the call of one row of the batch, which requests attention weights."""
    padding = None if call.padding is None else call.padding[row : row + 1]
    return replace(call, batch_size=1, padding=padding, output_attentions=True)


def project_wide(attention: LSHSelfAttention, hidden_states: Tensor) -> list[Tensor]:
    """Project to queries and values of all heads, `[1, L, H, D]`, at least in fp32."""
    projected = attention.project(hidden_states, attention.all_heads)
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in projected]


def full_weights(query_LD: Tensor, queries: Tensor, call: AttentionCall, causal: bool) -> tuple[Tensor, Tensor]:
    """
    Compute the weights of full attention of one head for some queries.

    Args:
        query_LD: Queries of all positions.
        queries: Positions `[n]` of the queries.
        call: The call of one text.
        causal: Whether attention is causal.

    Returns:
        Weights, and which keys each query sees, both `[n, L]`.
    """
    visible = visible_keys(queries, len(query_LD), causal, call.padding)[0, 0]
    visible = or_itself(visible, queries)
    return weights_of(query_LD[queries], normalized_keys(query_LD), visible), visible


def _draw_queries(call: AttentionCall, number: int | None, generator: torch.Generator) -> Tensor:
    """Return the positions of the queries of one text, `[n]`."""
    tokens = torch.ones(call.length, dtype=torch.bool) if call.padding is None else ~call.padding[0].cpu()
    positions = tokens.nonzero()[:, 0]
    if number is not None and number < len(positions):
        positions = positions[torch.randperm(len(positions), generator=generator)[:number].sort().values]
    return positions.to(call.device)


def _measure(
    sums: _Sums,
    layer: ReformerHfLayer,
    hidden_states: Tensor,
    call: AttentionCall,
    num_hashes: Sequence[int],
    queries: Tensor,
) -> None:
    """Add one text `[1, L, E]` to the sums."""
    attention = lsh_attention_of(layer)
    calls = [attention.begin(replace(call, num_hashes=number)) for number in num_hashes]
    query, value = project_wide(attention, hidden_states)
    full = value.new_empty((len(queries), attention.num_heads, attention.head_size))
    differences = full.new_empty((len(calls), *full.shape))
    for head in range(attention.num_heads):
        heads = slice(head, head + 1)
        seen = []
        for i, each in enumerate(calls):
            out, found = attention.attend([query[:, :, heads], value[:, :, heads]], each, heads)
            differences[i, :, head] = out[0, queries, 0]
            # [n, R, W]
            seen.append(found.weights[1][0, 0][:, queries].transpose(0, 1))
            largest, entropy = _bucket_balance(found, each)
            sums.largest_bucket[i, head] += largest
            sums.bucket_entropy[i, head] += entropy
        for at in torch.arange(len(queries)).split(max(_BLOCK_SCORES // call.length, 1)):
            block = slice(int(at[0]), int(at[-1]) + 1)
            weights, visible = full_weights(query[0, :, head], queries[block], call, attention.pattern.causal)
            full[block, head] = weights @ value[0, :, head]
            # Integers are summed more slowly.
            shares = visible.to(weights.dtype) / visible.sum(1, dtype=weights.dtype, keepdim=True)
            for i, positions in enumerate(seen):
                sums.coverage[i, head] += _covered(weights, positions[block])
                sums.visible_keys[i, head] += _covered(shares, positions[block])
    differences -= full
    sums.difference += _squares(differences, (1, 3))
    sums.full += _squares(full, (0, 2))
    # The output projection is linear.
    projected = [_project_out(layer, x) for x in (*differences, full)]
    sums.layer_difference += torch.stack([_squares(x, (0, 1)) for x in projected[:-1]])
    sums.layer_full += _squares(projected[-1], (0, 1))
    sums.num_queries += len(queries)
    sums.num_texts += 1


def _covered(weights: Tensor, positions: Tensor) -> float:
    """
    Sum over queries the share of their weights that falls on some positions.

    Args:
        weights: `[n, L]`. Those of a query sum to 1.
        positions: `[n, R, W]`, keys that LSH attention sees, -1 for none. A key may be there several times.
    """
    length = weights.shape[1]
    index = positions.flatten(1).long()
    index = torch.where(index < 0, length, index)
    # Setting what is covered to zero counts each key once. The additional column takes what is none.
    missed = pad(weights, (0, 1)).scatter_(1, index, 0.0).sum(1)
    # Sums are 1 up to rounding.
    return (1 - missed).clamp(min=0).double().sum().item()


def _bucket_balance(found: Found, call: AttentionCall) -> tuple[float, float]:
    """Return the size of the largest bucket over the mean, and the entropy over its maximum, of one head and text."""
    num_tokens = call.length if call.padding is None else int((~call.padding).sum())
    num_buckets = math.prod(call.factors)
    if found.order is None or min(num_buckets, num_tokens) == 1:
        return 1.0, 1.0
    # Padding is sorted to the end.
    starts = unpack_order(found.order[0, 0, :, :num_tokens])[1]
    buckets = starts.cumsum(-1) - 1
    sizes = torch.zeros((len(buckets), num_buckets), dtype=torch.float64, device=buckets.device)
    sizes.scatter_add_(1, buckets, torch.ones_like(buckets, dtype=torch.float64))
    entropy = torch.special.entr(sizes / num_tokens).sum(1) / math.log(min(num_buckets, num_tokens))
    return (sizes.amax(1) * num_buckets / num_tokens).mean().item(), entropy.mean().item()


def _project_out(layer: ReformerHfLayer, heads: Tensor) -> Tensor:
    """Apply the output projection of a layer to outputs of all heads, `[n, H, D]`."""
    weight_dtype = layer.attention.layer_norm.weight.dtype
    return layer.attention.output(heads.flatten(1)[None].to(weight_dtype))[0]


def _squares(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.double().square().sum(axes).cpu()
