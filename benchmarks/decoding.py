# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Decoding token by token, by each model's own state."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache, ReformerModelWithLMHead, StaticCache
from transformers.models.reformer import modeling_reformer

from reformer_hf import ReformerHfForCausalLM

# Tokens of one run.
TOKENS = 128

# Tokens that models have positions for beyond the context: those of all runs.
ROOM = 2048

# Gives the logits of a token `[1, 1]` at a position.
Step = Callable[[Tensor, int], Tensor]


def start_decoding(model: nn.Module, ids: Tensor, compiled: bool = False) -> Step:
    """Take the context `[1, L]` into a state."""
    if isinstance(model, ReformerModelWithLMHead):
        return _start_in_tree(model, ids)
    if compiled:
        cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + ROOM)
    else:
        cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
    forward = torch.compile(model.forward, dynamic=False, fullgraph=True) if compiled else model

    def step(token: Tensor, position: int) -> Tensor:
        position_ids = torch.full_like(token, position)
        with torch.no_grad():
            return forward(input_ids=token, position_ids=position_ids, cache=cache, use_cache=True)["logits"]

    return step


def _start_in_tree(model: nn.Module, ids: Tensor) -> Step:
    for module in model.modules():
        # Without a seed a step compares buckets of different rotations.
        if isinstance(module, modeling_reformer.LSHSelfAttention):
            module.hash_seed = 0
    with torch.no_grad():
        state = model(input_ids=ids, use_cache=True)["past_buckets_states"]

    def step(token: Tensor, position: int) -> Tensor:
        with torch.no_grad():
            return model(input_ids=token, past_buckets_states=state, use_cache=True)["logits"]

    return step


def decode(model: nn.Module, ids: Tensor, compiled: bool = False) -> Callable[[], Tensor]:
    """
    A run of `TOKENS` tokens; the next run goes on from there.

    They are given: what a model without training would choose is one token over and over, which all falls into one
    bucket.
    """
    step = start_decoding(model, ids, compiled)
    tokens = iter(ids.roll(ROOM // 2, dims=1).repeat(1, ROOM)[:, :ROOM].split(1, dim=1))
    position = ids.shape[1]

    def run() -> Tensor:
        nonlocal position
        for _ in range(TOKENS):
            logits = step(next(tokens), position)
            position += 1
        return logits

    return run


def steps_and_parallel_pass(model: ReformerHfForCausalLM, ids: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """Logits of all tokens after a prompt, decoded one by one and computed at once."""
    step = start_decoding(model, ids[:, :prompt])
    found = torch.cat([step(ids[:, i : i + 1], i) for i in range(prompt, ids.shape[1])], dim=1)
    with torch.no_grad():
        return found, model(ids).logits[:, prompt:]
