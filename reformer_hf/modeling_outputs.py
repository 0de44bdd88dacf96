# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Outputs of the models."""

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput


@dataclass
class ReformerHfModelOutput(ModelOutput):
    """
    Output of `ReformerHfModel`.

    Args:
        last_hidden_state (`[B, L, 2 * hidden_size]`): Both residual streams, concatenated and normalized.
        cache (*optional*): The KV cache, including this input.
        hidden_states (*optional*): The second stream `[B, L, hidden_size]` before each layer and after the last one,
            not normalized. `last_hidden_state` is none of them.
        attentions (*optional*): For each layer, the attention weights `[B, H, R, L, W]` by hash round and index in the
            query's window, before dropout. They sum to 1 over R and W, and have no gradient.
        attention_positions (*optional*): For each layer, the positions `[B, H, R, L, W]` of the keys of these weights,
            -1 for masked keys.
        cross_attentions (*optional*): For each layer, the attention weights `[B, H, L, S]` of the encoder output.
    """

    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    attention_positions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class ReformerHfCausalLMOutput(ModelOutput):
    """
    Output of `ReformerHfForCausalLM`.

    Args:
        loss (*optional*): Cross entropy of the next token, if labels were given.
        logits (`[B, L, vocab_size]`): Scores of the next token.
        cache, hidden_states, attentions, attention_positions, cross_attentions (*optional*): As in
            `ReformerHfModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    attention_positions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class ReformerHfMaskedLMOutput(MaskedLMOutput):
    """`MaskedLMOutput` with the positions of attention weights, see `ReformerHfModelOutput`."""

    attention_positions: tuple[Tensor, ...] | None = None


@dataclass
class ReformerHfSequenceClassifierOutput(SequenceClassifierOutput):
    """`SequenceClassifierOutput` with the positions of attention weights, see `ReformerHfModelOutput`."""

    attention_positions: tuple[Tensor, ...] | None = None


@dataclass
class ReformerHfTokenClassifierOutput(TokenClassifierOutput):
    """`TokenClassifierOutput` with the positions of attention weights, see `ReformerHfModelOutput`."""

    attention_positions: tuple[Tensor, ...] | None = None


@dataclass
class ReformerHfQuestionAnsweringOutput(QuestionAnsweringModelOutput):
    """`QuestionAnsweringModelOutput` with the positions of attention weights, see `ReformerHfModelOutput`."""

    attention_positions: tuple[Tensor, ...] | None = None


@dataclass
class ReformerHfMultipleChoiceOutput(MultipleChoiceModelOutput):
    """`MultipleChoiceModelOutput` with the positions of attention weights, see `ReformerHfModelOutput`."""

    attention_positions: tuple[Tensor, ...] | None = None


@dataclass
class ReformerHfSeq2SeqModelOutput(Seq2SeqModelOutput):
    """`Seq2SeqModelOutput` with the positions of attention weights, see `ReformerHfModelOutput`."""

    decoder_attention_positions: tuple[Tensor, ...] | None = None
    encoder_attention_positions: tuple[Tensor, ...] | None = None


@dataclass
class ReformerHfSeq2SeqLMOutput(Seq2SeqLMOutput):
    """`Seq2SeqLMOutput` with the positions of attention weights, see `ReformerHfModelOutput`."""

    decoder_attention_positions: tuple[Tensor, ...] | None = None
    encoder_attention_positions: tuple[Tensor, ...] | None = None
