# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Decoding token by token with each model's own KV cache."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache, ReformerModelWithLMHead, StaticCache
from transformers.models.reformer import modeling_reformer

from reformer_hf import ReformerHfForCausalLM

# Tokens decoded in one run.
TOKENS_PER_RUN = 128

# Largest number of tokens decoded after the context, in all runs together.
MAX_NEW_TOKENS = 2048

# The generated C++ code calls the kernels of a step without Python between them.
COMPILE_OPTIONS = {"dynamic": False, "fullgraph": True, "options": {"cpp_wrapper": True}}

# Takes a token `[1, 1]` and its position, and returns its logits.
Step = Callable[[Tensor, int], Tensor]


def start_decoding(model: nn.Module, ids: Tensor, compiled: bool = False) -> Step:
    """Fill a KV cache with the context `[1, L]`, and return the decoding step."""
    if isinstance(model, ReformerModelWithLMHead):
        return _start_in_tree(model, ids)
    if compiled:
        cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + MAX_NEW_TOKENS)
    else:
        cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
    forward = torch.compile(model.forward, **COMPILE_OPTIONS) if compiled else model

    def step(token: Tensor, position: int) -> Tensor:
        position_ids = torch.full_like(token, position)
        with torch.no_grad():
            return forward(input_ids=token, position_ids=position_ids, cache=cache, use_cache=True)["logits"]

    return step


def _start_in_tree(model: nn.Module, ids: Tensor) -> Step:
    for module in model.modules():
        # Without a seed, a decoding step compares buckets of different rotations.
        if isinstance(module, modeling_reformer.LSHSelfAttention):
            module.hash_seed = 0
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True)["past_buckets_states"]

    def step(token: Tensor, position: int) -> Tensor:
        with torch.no_grad():
            return model(input_ids=token, past_buckets_states=cache, use_cache=True)["logits"]

    return step


def decode(model: nn.Module, ids: Tensor, compiled: bool = False) -> Callable[[], Tensor]:
    """
    Return a function that decodes `TOKENS_PER_RUN` tokens. Each call continues where the last one stopped.

    The tokens are given. An untrained model would choose the same token over and over, and all copies would fall into
    one bucket.
    """
    step = start_decoding(model, ids, compiled)
    tokens = iter(ids.roll(MAX_NEW_TOKENS // 2, dims=1).repeat(1, MAX_NEW_TOKENS)[:, :MAX_NEW_TOKENS].split(1, dim=1))
    position = ids.shape[1]

    def run() -> Tensor:
        nonlocal position
        for _ in range(TOKENS_PER_RUN):
            logits = step(next(tokens), position)
            position += 1
        return logits

    return run


def steps_and_parallel_pass(model: ReformerHfForCausalLM, ids: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """Return the logits of all tokens after a prompt, decoded token by token and computed by one parallel pass."""
    step = start_decoding(model, ids[:, :prompt])
    decoded = torch.cat([step(ids[:, i : i + 1], i) for i in range(prompt, ids.shape[1])], dim=1)
    with torch.no_grad():
        return decoded, model(ids).logits[:, prompt:]
