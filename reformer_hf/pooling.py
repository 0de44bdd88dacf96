# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Pooling of the tokens of a sequence to one vector. It reads no padding, on either side."""

import torch
from torch import Tensor
from transformers.utils import logging

from .configuration_reformer_hf import ReformerHfConfig

logger = logging.get_logger(__name__)


def tokens_to_pool(
    config: ReformerHfConfig, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor | None:
    """
    Return a mask `[B, L]` that is True for tokens and False for padding; `None` if there is no padding.

    Raises:
        ValueError: If there are several sequences, but neither a mask nor the id of padding.
    """
    if attention_mask is not None:
        return attention_mask.bool()
    if input_ids is None:
        logger.warning_once(
            "A sequence head cannot tell padding in `inputs_embeds` without an `attention_mask`, so it pools over all "
            "positions: pass a mask if the sequences are padded."
        )
        return None
    if config.pad_token_id is not None:
        return input_ids != config.pad_token_id
    if input_ids.shape[0] > 1:
        raise ValueError(
            f"`input_ids` holds {input_ids.shape[0]} sequences, but `pad_token_id` of the config is None, so that a "
            "sequence head cannot tell padding: set `model.config.pad_token_id` to the id of the tokenizer "
            "(`tokenizer.pad_token_id`), or pass an `attention_mask`."
        )
    return None


def pool(hidden_states: Tensor, tokens: Tensor | None, pooling: str) -> Tensor:
    """
    Select the hidden states of the first or last token of each sequence, or compute the mean over all of its tokens.

    Args:
        hidden_states: `[B, L, E]`.
        tokens: `[B, L]`, True for tokens and False for padding; `None` if there is no padding.
        pooling: `"first"`, `"last"` or `"mean"`.

    Returns:
        `[B, E]`. For a row of padding alone: the hidden state of its first or last position, or zeros.
    """
    if tokens is None:
        tokens = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
    tokens = tokens.to(hidden_states.device)
    if pooling == "mean":
        weights = tokens.float() / tokens.sum(-1, keepdim=True).clamp(min=1)
        return torch.einsum("ble,bl->be", hidden_states, weights.to(hidden_states.dtype))
    if pooling == "first":
        index = tokens.int().argmax(-1)
    else:
        index = tokens.shape[1] - 1 - tokens.flip(-1).int().argmax(-1)
    return hidden_states[torch.arange(len(index), device=index.device), index]
