# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The stack of layers on two residual streams."""

import torch
from torch import Tensor, nn
from transformers import Cache

from .activation_memory import recomputes_activations
from .configuration_reformer_hf import ReformerHfConfig
from .dropout import RateDropout
from .modeling_outputs import ReformerHfModelOutput
from .reformer_layer import ReformerHfLayer
from .reversible import Tape
from .self_attention import AttentionCall
from .stream_norm import StreamLayerNorm


class ReformerHfEncoder(nn.Module):
    """The stack of layers and the layer norm over both streams."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.config = config
        # With gradient checkpointing, layers that are not reversible recompute their activations as well.
        self.always_recomputes = False
        self.dropout = RateDropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(ReformerHfLayer(config, i) for i in range(len(config.attn_layers)))
        self.layer_norm = StreamLayerNorm(2 * config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        call: AttentionCall,
        cache: Cache | None = None,
        cross_cache: Cache | None = None,
        output_hidden_states: bool = False,
    ) -> ReformerHfModelOutput:
        """Compute the normalized streams `[B, L, 2 * E]` from embeddings `[B, L, E]`."""
        x1 = x2 = hidden_states
        source_positions = 0 if call.context is None else call.context.num_positions
        recomputes = self.always_recomputes or (
            self.config.reversible
            and recomputes_activations(self.config, call.num_positions, call.device, source_positions)
        )
        tape = Tape() if recomputes and torch.is_grad_enabled() else None
        all_hidden_states, all_weights = [x2] if output_hidden_states else [], []
        for layer in self.layers:
            x1, x2, weights = layer(x1, x2, call, tape, cache, cross_cache)
            if output_hidden_states:
                all_hidden_states.append(x2)
            all_weights.append(weights)
        streams = torch.cat([x1, x2], dim=-1)
        if tape is not None:
            # The layer norm saves the concatenated streams for its backward pass.
            width = x1.shape[-1]
            tape.share(x1, x2, (streams.detach()[..., :width], streams.detach()[..., width:]))
        del x1, x2
        hidden_states = self.layer_norm(streams)
        with_weights = call.output_attentions
        return ReformerHfModelOutput(
            last_hidden_state=self.dropout(hidden_states),
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(each.values for each in all_weights) if with_weights else None,
            attention_positions=tuple(each.positions for each in all_weights) if with_weights else None,
            cross_attentions=tuple(each.cross for each in all_weights) if with_weights and call.context else None,
            cache=cache,
        )
