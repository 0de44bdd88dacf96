# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The dense baselines: Transformers of the same width, depth and heads, with exact attention."""

from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, T5Config, T5ForConditionalGeneration

from .cases import Shape


def dense_model(shape: Shape, length: int, num_hashes: int) -> nn.Module:
    """Build GPT-2, whose feed-forward has two matrices like ours, with activation checkpointing."""
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=length,
        n_embd=shape.width,
        n_layer=len(shape.layers),
        n_head=shape.num_heads,
        n_inner=shape.feed_forward,
        activation_function="relu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.activation_checkpointing_enable()
    return model


def t5_model(shape: Shape, length: int, num_hashes: int) -> nn.Module:
    """Build T5, whose feed-forward has two matrices like ours, with activation checkpointing."""
    config = T5Config(
        vocab_size=shape.vocab_size,
        d_model=shape.width,
        d_kv=shape.head_size,
        d_ff=shape.feed_forward,
        num_layers=len(shape.layers),
        num_decoder_layers=len(shape.decoder_layers),
        num_heads=shape.num_heads,
        dropout_rate=0.0,
        use_cache=False,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model.activation_checkpointing_enable()
    return model
