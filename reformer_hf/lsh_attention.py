# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""LSH attention (Kitaev et al. 2020, section 2): shared query-key attention among positions that hash together."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import logging

from .attention_kernels import normalized_keys
from .attention_pattern import AttentionPattern
from .cache import CacheSpec
from .configuration_reformer_hf import ReformerHfConfig
from .documents import Documents
from .dropout import draw_seed
from .hashing import bucket_factors, hash_by, hash_few, projections_of, random_rotations, sort_by_bucket
from .self_attention import AttentionCall, DocumentHashing, Found, SelfAttention, Weights

logger = logging.get_logger(__name__)


class LSHSelfAttention(SelfAttention):
    """Attention of each position to the positions in its buckets, over `num_hashes` rounds."""

    projections = ("query_key", "value")

    def __init__(self, config: ReformerHfConfig):
        super().__init__(config)
        self.pattern = AttentionPattern(
            chunk_length=config.lsh_attn_chunk_length,
            chunks_before=config.chunks_before("lsh"),
            chunks_after=config.chunks_after("lsh"),
            causal=config.is_decoder,
            same_bucket=not config.lsh_across_buckets,
            window=config.lsh_pattern == "window",
            deduplicate_keys=config.lsh_deduplicate_keys,
            **config.ring,
        )
        self.cache_spec = CacheSpec(self.pattern, self.num_heads, self.head_size, config.num_hashes)

    def begin(self, call: AttentionCall, cache_layer: Any = None) -> AttentionCall:
        hash_seed = self._hash_seed()
        call = super().begin(call, cache_layer)
        num_hashes = call.num_hashes or self.config.num_hashes
        if call.past is not None:
            hashing = {"projections": cache_layer.projections, "factors": cache_layer.factors}
            return replace(call, num_hashes=num_hashes, **hashing)
        call = replace(call, num_hashes=num_hashes)
        if call.documents is not None:
            return replace(call, document_hashing=self._document_hashing(call, call.documents, hash_seed))
        # A static cache says how many tokens are to come.
        planned = call.length if cache_layer is None else max(call.length, cache_layer.get_max_length())
        factors = call.factors or factors_of(self.config, planned)
        return replace(call, projections=self._draw_projections(call, hash_seed, factors), factors=factors)

    def _draw_projections(self, call: AttentionCall, seed: int, factors: Sequence[int]) -> Sequence[Tensor]:
        rotations = random_rotations(seed, self.num_heads, self.head_size, call.num_hashes, list(factors))
        return projections_of(rotations, list(factors), call.dtype, call.device)

    def _document_hashing(self, call: AttentionCall, documents: Documents, seed: int) -> DocumentHashing:
        groups: dict[tuple[int, ...], list] = {}
        first_buckets, num_buckets = [], 0
        for (row, start, stop), length in zip(documents.spans, documents.lengths, strict=True):
            factors = tuple(call.factors or factors_of(self.config, max(length, 1)))
            groups.setdefault(factors, []).append((row, start, stop))
            num_buckets = num_buckets if start else 0
            first_buckets.append(num_buckets)
            num_buckets += math.prod(factors)
        repeats = torch.tensor([stop - start for _, start, stop in documents.spans])
        first_bucket = torch.tensor(first_buckets, dtype=torch.int32).repeat_interleave(repeats).to(call.device)
        hashing = [
            (documents.flat_positions(spans), self._draw_projections(call, seed, factors))
            for factors, spans in groups.items()
        ]
        return DocumentHashing(hashing, first_bucket.view(call.batch_size, call.length))

    def _hash_seed(self) -> int:
        if self.config.hash_seed is not None:
            return self.config.hash_seed
        return draw_seed() if self.training else 0

    def attend(
        self, projected: Sequence[Tensor], call: AttentionCall, heads: slice, found: Found | None = None
    ) -> tuple[Tensor, Found]:
        query, value = projected
        if found is None:
            found = self._hash(query, value, call, heads)
        inputs: tuple[Tensor, Tensor | None, Tensor] = (query, None, value)
        padding = call.padding
        if call.past is not None:
            inputs, padding = call.past.heads(heads).prepend(query, normalized_keys(query), value, padding)
        pattern = self.pattern.for_length(inputs[0].shape[1])
        order = found.order if pattern is self.pattern else None
        return self.attend_in_chunks(inputs, pattern, order, padding, call, heads, found)

    def _hash(self, query: Tensor, value: Tensor, call: AttentionCall, heads: slice) -> Found:
        """Hash and sort some heads, and return the sorted order with the results that a cache needs."""
        is_short = self.pattern.for_length(query.shape[1]) is not self.pattern
        if is_short and not call.fills_cache:
            return Found()
        if call.document_hashing is not None:
            buckets = _hash_documents(query.detach(), call.document_hashing, heads, call.num_hashes)
            return Found(order=sort_by_bucket(buckets, call.padding))
        projections = [projection[heads] for projection in call.projections]
        buckets = hash_by(projections, query.detach(), call.num_hashes)
        if not call.fills_cache:
            return Found(order=sort_by_bucket(buckets, call.padding))
        if call.padding is not None:
            buckets = buckets.masked_fill(call.padding[:, None, None], math.prod(call.factors))
        past = [] if call.past is None else [call.past.buckets[:, heads]]
        order = sort_by_bucket(torch.cat([*past, buckets], dim=-1))
        return Found(order, normalized_keys(query), value, buckets)

    def _hashing(self, found: Found, call: AttentionCall) -> dict[str, Any]:
        return {
            "projections": call.projections,
            "factors": call.factors,
            "buckets": found.buckets,
            "order": found.order,
        }

    def _append(
        self, hidden_states: Tensor, call: AttentionCall, cache: Cache, layer_idx: int
    ) -> tuple[Tensor, Weights | None]:
        layer: Any = cache.layers[layer_idx]
        query, value = self.project_new(hidden_states)
        buckets = hash_few(layer.signed_projections, query, layer.spec.num_hashes)
        if call.padding is not None:
            buckets = buckets.masked_fill(call.padding[:, None, :, None], layer.num_buckets)
        options = {"padding": call.padding, "with_positions": call.output_attentions, "buckets": buckets}
        seen: Any = cache.update(normalized_keys(query, layer.key_epsilon), value, layer_idx, **options)[0]
        # Each token of each head has separate keys.
        batch_size, num_new, num_heads, head_size = query.shape
        query = query.transpose(1, 2).reshape(-1, 1, 1, head_size)
        out, weights = self.attend_to(query, seen, call.output_attentions)
        if weights is not None:
            shape = (batch_size, num_heads, num_new, layer.spec.num_hashes, -1)
            values, positions = (x.view(shape).transpose(2, 3) for x in weights)
            weights = values, positions
        return out.view(batch_size, num_heads, num_new, head_size).transpose(1, 2).flatten(2), weights


def _hash_documents(query: Tensor, hashing: DocumentHashing, heads: slice, num_hashes: int) -> Tensor:
    """Hash packed documents, and number the buckets of a row's documents consecutively, `[B, h, R, L]`."""
    groups, first_bucket = hashing
    batch_size, length, num_heads, _ = query.shape
    rows = query.flatten(0, 1)
    buckets = first_bucket.new_empty((batch_size * length, num_heads, num_hashes))
    for positions, projections in groups:
        vectors = rows.index_select(0, positions)[None]
        hashed = hash_by([projection[heads] for projection in projections], vectors, num_hashes)
        buckets.index_copy_(0, positions, hashed[0].permute(2, 0, 1))
    return first_bucket[:, None, None] + buckets.view(batch_size, length, num_heads, -1).permute(0, 2, 3, 1)


def warn_of_few_buckets(config: ReformerHfConfig, cache: Cache, num_new: int) -> None:
    """Warn if the tokens of a cache have far fewer buckets than a parallel pass over them and new ones would use."""
    if config.num_buckets is not None or torch.compiler.is_compiling():
        return
    hashed: Any = next((layer for layer in cache.layers if getattr(layer, "factors", None)), None)
    if hashed is None:
        return
    length = int(hashed.length) + num_new
    if math.prod(factors_of(config, length)) > 2 * hashed.num_buckets:
        longest = config.max_position_embeddings
        logger.warning_once(
            f"The first call with this cache had few tokens, and so its tokens are hashed into {hashed.num_buckets} "
            "buckets: LSH attention finds only recent ones in so few. If you decode by hand, pass `num_buckets="
            f"{factors_of(config, longest)}` to the first call (for {longest} tokens), or a `StaticCache` of the "
            "length to come; in `generate`, start a new cache."
        )


def factors_of(config: ReformerHfConfig, length: int) -> list[int]:
    """Return the factors of the number of buckets for an input of this length."""
    # What a query sees of its bucket.
    reach = config.lsh_attn_chunk_length * (config.chunks_before("lsh") + config.chunks_after("lsh"))
    return bucket_factors(
        config.num_buckets,
        config.padded_length(length),
        config.lsh_attn_chunk_length,
        config.max_position_embeddings,
        reach if config.lsh_pattern == "window" else None,
    )
