# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Memory of the activations that a training step keeps, and the rule that decides whether to recompute them."""

import torch

from .configuration_reformer_hf import ReformerHfConfig
from .device_policy import policy_for

# Projections that an attention layer of each type keeps, together with its output.
_KEPT_PER_HEAD = {"local": 4, "lsh": 3, "full": 4}


def kept_activations(config: ReformerHfConfig, positions: int, source_positions: int = 0) -> int:
    """
    Estimate the bytes of activations that a training step keeps for all layers, in fp32 and without attention weights.

    Args:
        config: The config.
        positions: Number of positions, summed over the batch.
        source_positions: Number of positions of the encoder output that the layers attend to, summed over the batch.
    """
    # The inputs of both layer norms, their outputs, and the outputs of the activation function. Dropout masks take a
    # byte per element.
    per_layer = 4 * config.hidden_size + config.feed_forward_size
    all_head_size = config.num_attention_heads * config.attention_head_size
    attention = sum(_KEPT_PER_HEAD[layer_type] * all_head_size for layer_type in config.attn_layers)
    kept = positions * (len(config.attn_layers) * per_layer + attention)
    if config.add_cross_attention:
        # Input and output of the layer norm, queries and outputs; keys and values.
        cross_attention = (
            positions * (2 * config.hidden_size + 2 * all_head_size) + source_positions * 2 * all_head_size
        )
        kept += len(config.attn_layers) * cross_attention
    return 4 * kept


def recomputes_activations(
    config: ReformerHfConfig, positions: int, device: torch.device, source_positions: int = 0
) -> bool:
    """
    Return whether reversible layers recompute activations: those of more than `config.max_kept_activations` bytes.

    Args:
        config, positions, source_positions: As in `kept_activations`.
        device: The device of the activations.
    """
    limit = config.max_kept_activations
    if limit is None:
        limit = policy_for(device).kept_activations
    return kept_activations(config, positions, source_positions) > limit
