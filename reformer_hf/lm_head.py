# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The LM head: logits, and the cross entropy of tokens without storing the logits of all positions."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy, pad

from .chunked import apply_chunked
from .configuration_reformer_hf import ReformerHfConfig

# Label of positions that the loss ignores.
IGNORED = -100


class ReformerHfLMHead(nn.Module):
    """The projection to logits. Its bias has two names: `decoder.bias`, and `bias` as in in-tree checkpoints."""

    # Only used to save a model; see `ReformerHfLMHeadModel.get_expanded_tied_weights_keys` for all other purposes.
    _tied_weights_keys = {"decoder.bias": "bias"}

    def __init__(self, config: ReformerHfConfig):
        super().__init__()
        self.chunk_size = config.chunk_size_lm_head
        self.tied = config.tie_word_embeddings
        self.width = config.output_size
        in_features = config.hidden_size if self.tied else self.width
        self.decoder = nn.Linear(in_features, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.register_load_state_dict_post_hook(tie_bias)

    def forward(self, hidden_states: Tensor, targets: Tensor | None = None) -> Tensor:
        """
        Compute logits or, given targets, the sum of their cross entropies.

        Args:
            hidden_states: `[B, L, 2 * hidden_size]`.
            targets: `[B, L]`, -100 for positions to ignore.

        Returns:
            Logits `[B, L, vocab_size]`, or the sum of cross entropies. The latter only needs the logits of one chunk
            in memory.
        """
        if hidden_states.shape[-1] != self.width:
            raise ValueError(
                f"The hidden states have width {hidden_states.shape[-1]}, but the LM head reads both residual streams "
                f"({self.width}): pass `last_hidden_state`. (Each of `hidden_states` is one stream.)"
            )
        if self.tied:
            # Word embeddings have the width of a single stream.
            hidden_states = hidden_states.unflatten(-1, (2, -1)).mean(-2)
        if targets is not None:
            return self._sum_cross_entropy(hidden_states, targets)
        if not torch.is_grad_enabled() and not 0 < self.chunk_size < hidden_states.shape[1]:
            return self.decoder(hidden_states)
        return apply_chunked(self.decoder, hidden_states, self.chunk_size, self)

    @torch.no_grad()
    def untie(self) -> None:
        """Replace the decoder by one with weights of its own for both streams, which computes the same logits."""
        weight = self.decoder.weight
        out_features, in_features = weight.shape
        self.decoder = nn.Linear(2 * in_features, out_features, device=weight.device, dtype=weight.dtype)
        self.decoder.weight.copy_(weight.repeat(1, 2) / 2)
        self.decoder.bias = self.bias
        self.tied = False

    def _sum_cross_entropy(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        chunk = LinearCrossEntropyOptions(
            batch_chunk_size=self.chunk_size * hidden_states.shape[0], chunking_method=None
        )
        # At least in fp32: products of hidden states and weights too, which Transformers leaves to autocast.
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return linear_cross_entropy(
                hidden_states.flatten(0, 1).to(dtype),
                self.decoder.weight.to(dtype),
                targets.flatten(),
                linear_bias=None if self.decoder.bias is None else self.decoder.bias.to(dtype),
                reduction="sum",
                ignore_index=IGNORED,
                options=chunk,
            )

    def loss(
        self,
        hidden_states: Tensor,
        targets: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        **kwargs,
    ) -> Tensor:
        """
        Compute the cross entropy of the losses in Transformers, without logits of all positions.

        Args:
            hidden_states: `[B, L, 2 * hidden_size]`.
            targets: `[B, L]`, the token to predict at each position.
            num_items_in_batch: The number to divide the sum by; by default, that of the targets.
            ignore_index: The target of positions to ignore.
            **kwargs: Ignored, as in Transformers.
        """
        targets = targets.to(hidden_states.device)
        targets = targets.masked_fill(targets == ignore_index, IGNORED)
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORED).sum()
        # Without targets the loss is NaN, as in Transformers, and its gradient is zero.
        count = torch.as_tensor(num_items_in_batch, device=hidden_states.device)
        # By calling the module, so that its hooks run, such as that of FSDP.
        loss = self(hidden_states, targets) / count.clamp(min=1)
        return torch.where(count > 0, loss, torch.nan)


def tie_bias(head: nn.Module, *_: Any) -> None:
    """Let both names of the bias be one parameter, that of the decoder, also after `load_state_dict(assign=True)`."""
    if isinstance(head, ReformerHfLMHead) and isinstance(head.decoder, nn.Linear):
        head.bias = head.decoder.bias


def next_tokens(
    labels: Tensor | None, shift_labels: Tensor | None = None, ignore_index: int = IGNORED, **kwargs
) -> Tensor:
    """Return the token after each position: `shift_labels`, or `labels` `[B, L]` moved by one position."""
    return pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels


def check_not_fused(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError` if TRL would multiply the concatenated streams by tied weights; a forward pre-hook."""
    if kwargs.get("fused_lm_head"):
        raise ValueError(
            "`tie_word_embeddings` is True, but the fused LM head of TRL needs a head as wide as the encoder output, "
            "`2 * hidden_size`: train a model with `tie_word_embeddings=False`, or use `Trainer`."
        )


def states_to_keep(hidden_states: Tensor, logits_to_keep: int | Tensor, attention_mask: Tensor | None) -> Tensor:
    """Select the hidden states `[B, L, …]` of the positions in `logits_to_keep`."""
    if not isinstance(logits_to_keep, int):
        return hidden_states[:, logits_to_keep]
    kept = hidden_states[:, -logits_to_keep:]
    if attention_mask is None or logits_to_keep == 0 or torch.compiler.is_compiling():
        return kept
    mask = attention_mask[:, -hidden_states.shape[1] :].to(hidden_states.device, torch.bool)
    if mask[:, -logits_to_keep:].all():
        return kept
    indices = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), 0).cummax(-1).values
    indices = indices[:, -logits_to_keep:, None].expand(-1, -1, hidden_states.shape[-1])
    return hidden_states.gather(1, indices)
