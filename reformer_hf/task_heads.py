# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
The Reformer with heads for masked language modeling, classification and question answering.

The parameter names of heads that exist in-tree are the in-tree ones. The classes `GenericFor…` of Transformers do not
serve here: their heads read `hidden_size` features instead of the two concatenated streams, and their `AutoModel` does
not find the base model in the code of a saved folder.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.models.auto import modeling_auto
from transformers.utils.generic import can_return_tuple

from .configuration_reformer_hf import ReformerHfConfig
from .label_checks import (
    check_choices,
    check_class_indices,
    check_sees_both_sides,
    check_sequence_labels,
    check_span,
    check_token_labels,
)
from .modeling_outputs import (
    ReformerHfMaskedLMOutput,
    ReformerHfMultipleChoiceOutput,
    ReformerHfQuestionAnsweringOutput,
    ReformerHfSequenceClassifierOutput,
    ReformerHfTokenClassifierOutput,
)
from .modeling_reformer_hf import ReformerHfLMHeadModel, ReformerHfModel, ReformerHfPreTrainedModel
from .pooling import pool, tokens_to_pool


class ReformerHfForMaskedLM(ReformerHfLMHeadModel):
    """A bidirectional Reformer that predicts masked tokens."""

    _loss_name = "ForMaskedLM"

    def __init__(self, config: ReformerHfConfig):
        check_sees_both_sides(config, "a masked language model", required=True)
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_hashes: int | None = None,
        labels: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs,
    ) -> ReformerHfMaskedLMOutput:
        """
        Compute the logits of each token and, given labels, the loss.

        The other arguments and exceptions are those of `ReformerHfModel.forward`.

        Args:
            labels (`[B, L]`, *optional*): The tokens to predict, or -100 for positions without loss. In training with
                `chunk_size_lm_head`, the model then only returns the loss and no logits.
            **kwargs: Other arguments of `ReformerHfModel.forward`, and `num_items_in_batch` of the loss.

        Raises:
            ValueError: If labels do not match the input or the vocabulary.
        """
        documents = {"seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q}
        inputs = input_ids, attention_mask, position_ids, inputs_embeds, num_hashes
        outputs = self.reformer(*inputs, return_dict=True, **documents, **kwargs)
        logits, loss = self.logits_and_loss(outputs.last_hidden_state, labels, **kwargs)
        return ReformerHfMaskedLMOutput(loss=loss, logits=logits, **_more_outputs(outputs))


class ReformerHfTaskModel(ReformerHfPreTrainedModel):
    """Base class of the models that classify."""

    # Losses are means over a batch, which `Trainer` divides by the number of accumulated batches.
    accepts_loss_kwargs = False

    def __init__(self, config: ReformerHfConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.reformer = ReformerHfModel(config)


class ReformerHfClassificationHead(nn.Module):
    """Pooling over the tokens of a sequence, and two linear layers."""

    def __init__(self, config: ReformerHfConfig, num_labels: int):
        super().__init__()
        self.config = config
        self.dense = nn.Linear(config.output_size, config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def forward(self, hidden_states: Tensor, tokens: Tensor | None) -> Tensor:
        """Compute logits `[B, num_labels]` from hidden states `[B, L, 2 * hidden_size]` and a mask of tokens."""
        pooled = self.dropout(pool(hidden_states, tokens, self.config.pooled_tokens))
        return self.out_proj(self.dropout(torch.tanh(self.dense(pooled))))


class ReformerHfForSequenceClassification(ReformerHfTaskModel):
    """A Reformer that classifies whole sequences, or predicts numbers (`config.problem_type`)."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__(config)
        self.classifier = ReformerHfClassificationHead(config, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_hashes: int | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> ReformerHfSequenceClassifierOutput:
        """
        Compute the logits `[B, num_labels]` of sequences and, given labels, the loss.

        The other arguments and exceptions are those of `ReformerHfModel.forward`.

        Args:
            attention_mask (`[B, L]`, *optional*): 1 for tokens, 0 for padding. Pooling reads no padding. Without a
                mask, tokens with the id `pad_token_id` count as padding there.
            labels (*optional*): By `config.problem_type`: `[B]`, class indices (`"single_label_classification"`);
                `[B, num_labels]`, zeros and ones (`"multi_label_classification"`); `[B]` or `[B, num_labels]`, numbers
                (`"regression"`). As in Transformers, the first loss sets a `problem_type` of `None`, by `num_labels`
                and the dtype of the labels.

        Raises:
            ValueError: If labels do not match the input or `num_labels`, or if several sequences have neither a mask
                nor a `pad_token_id`.
        """
        tokens = tokens_to_pool(self.config, input_ids, attention_mask, inputs_embeds)
        inputs = input_ids, attention_mask, position_ids, inputs_embeds, num_hashes
        outputs = self.reformer(*inputs, return_dict=True, **{"use_cache": False, **kwargs})
        logits, loss = self.classifier(outputs.last_hidden_state, tokens), None
        if labels is not None:
            labels = check_sequence_labels(labels, logits, self.config, self.reformer.reads_values)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ReformerHfSequenceClassifierOutput(loss=loss, logits=logits, **_more_outputs(outputs))


class ReformerHfForMultipleChoice(ReformerHfTaskModel):
    """A Reformer that selects one of several sequences."""

    def __init__(self, config: ReformerHfConfig):
        super().__init__(config)
        self.classifier = ReformerHfClassificationHead(config, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_hashes: int | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> ReformerHfMultipleChoiceOutput:
        """
        Compute the logits `[B, C]` of C choices and, given labels, the loss.

        The other arguments and exceptions are those of `ReformerHfForSequenceClassification.forward`.

        Args:
            input_ids (`[B, C, L]`, *optional*): Token ids of each choice.
            attention_mask, position_ids (`[B, C, L]`, *optional*): As in `ReformerHfModel.forward`, for each choice.
            inputs_embeds (`[B, C, L, E]`, *optional*): Word embeddings instead of `input_ids`.
            labels (`[B]`, *optional*): Indices of the right choices.

        Raises:
            ValueError: If an input has another shape, or if labels do not match the choices.
        """
        batch_size, num_choices = check_choices(input_ids, attention_mask, position_ids, inputs_embeds)
        input_ids, attention_mask, position_ids, inputs_embeds = (
            None if x is None else x.flatten(0, 1) for x in (input_ids, attention_mask, position_ids, inputs_embeds)
        )
        tokens = tokens_to_pool(self.config, input_ids, attention_mask, inputs_embeds)
        inputs = input_ids, attention_mask, position_ids, inputs_embeds, num_hashes
        outputs = self.reformer(*inputs, return_dict=True, **{"use_cache": False, **kwargs})
        logits, loss = self.classifier(outputs.last_hidden_state, tokens).view(batch_size, num_choices), None
        if labels is not None:
            labels = check_class_indices(labels, logits, "num_choices", self.reformer.reads_values)
            loss = fixed_cross_entropy(logits, labels)
        return ReformerHfMultipleChoiceOutput(loss=loss, logits=logits, **_more_outputs(outputs))


class ReformerHfForTokenClassification(ReformerHfTaskModel):
    """A Reformer that classifies each token."""

    # The loss is a sum over all tokens of the accumulated batches, divided by `num_items_in_batch`.
    accepts_loss_kwargs = True

    def __init__(self, config: ReformerHfConfig):
        check_sees_both_sides(config, "a token classifier")
        super().__init__(config)
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.output_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_hashes: int | None = None,
        labels: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs,
    ) -> ReformerHfTokenClassifierOutput:
        """
        Compute the logits `[B, L, num_labels]` of tokens and, given labels, the loss.

        The other arguments and exceptions are those of `ReformerHfModel.forward`.

        Args:
            labels (`[B, L]`, *optional*): Class indices, or -100 for tokens without loss.
            **kwargs: Other arguments of `ReformerHfModel.forward`, and `num_items_in_batch` of the loss.

        Raises:
            ValueError: If labels do not match the input or `num_labels`.
        """
        documents = {"seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q}
        inputs = input_ids, attention_mask, position_ids, inputs_embeds, num_hashes
        outputs = self.reformer(*inputs, return_dict=True, **documents, **{"use_cache": False, **kwargs})
        logits, loss = self.classifier(self.dropout(outputs.last_hidden_state)), None
        if labels is not None:
            check_token_labels(labels, logits, self.num_labels, "num_labels", self.reformer.reads_values)
            loss = self.loss_function(logits, labels.contiguous(), self.config, **kwargs)
        return ReformerHfTokenClassifierOutput(loss=loss, logits=logits, **_more_outputs(outputs))


class ReformerHfForQuestionAnswering(ReformerHfTaskModel):
    """A Reformer that finds a span of its input, such as the answer to a question in a text."""

    def __init__(self, config: ReformerHfConfig):
        check_sees_both_sides(config, "a question answering model")
        if config.num_labels != 2:
            raise ValueError(
                f"`num_labels` is {config.num_labels}, but a question answering model has 2 outputs for each token, "
                "for the start and the end of the answer: set `num_labels=2`."
            )
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.output_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_hashes: int | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs,
    ) -> ReformerHfQuestionAnsweringOutput:
        """
        Compute the logits `[B, L]` of the start and of the end of a span and, given both, the loss.

        The other arguments and exceptions are those of `ReformerHfModel.forward`.

        Args:
            start_positions, end_positions (`[B]`, *optional*): Index of the first and of the last token of the span.
                As in Transformers, an index of L or more has no loss: the span is not part of a truncated input.

        Raises:
            ValueError: If only one of both is given, if their shapes do not match the input, or if one is negative.
        """
        inputs = input_ids, attention_mask, position_ids, inputs_embeds, num_hashes
        outputs = self.reformer(*inputs, return_dict=True, **{"use_cache": False, **kwargs})
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if check_span(start_positions, end_positions, start_logits, self.reformer.reads_values):
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return ReformerHfQuestionAnsweringOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, **_more_outputs(outputs)
        )


def _more_outputs(outputs: Any) -> dict[str, Any]:
    """Return the outputs of the base model that the outputs of all heads contain."""
    return {name: outputs[name] for name in ("hidden_states", "attentions", "attention_positions") if name in outputs}


def _register(task: str, model_class: type[ReformerHfPreTrainedModel]) -> None:
    """Register a head with its Auto class, and by its name with the pipelines of a task."""
    names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    names.setdefault(ReformerHfConfig.model_type, model_class.__name__)
    model_class.register_for_auto_class(model_class.__name__.replace("ReformerHf", "AutoModel"))


_register("MASKED_LM", ReformerHfForMaskedLM)
_register("SEQUENCE_CLASSIFICATION", ReformerHfForSequenceClassification)
_register("TOKEN_CLASSIFICATION", ReformerHfForTokenClassification)
_register("QUESTION_ANSWERING", ReformerHfForQuestionAnswering)
_register("MULTIPLE_CHOICE", ReformerHfForMultipleChoice)


__all__ = [
    "ReformerHfForMaskedLM",
    "ReformerHfForMultipleChoice",
    "ReformerHfForQuestionAnswering",
    "ReformerHfForSequenceClassification",
    "ReformerHfForTokenClassification",
]
