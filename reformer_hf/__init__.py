# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The Reformer as a Transformers plugin. Importing this package registers its classes with the Auto classes."""

import transformers

from .configuration_encoder_decoder import ReformerHfEncoderDecoderConfig
from .configuration_reformer_hf import ReformerHfConfig
from .encoder_decoder import ReformerHfEncoderDecoderModel, ReformerHfForConditionalGeneration
from .in_tree import replace_in_tree
from .modeling_reformer_hf import ReformerHfForCausalLM, ReformerHfModel, ReformerHfPreTrainedModel
from .task_heads import (
    ReformerHfForMaskedLM,
    ReformerHfForMultipleChoice,
    ReformerHfForQuestionAnswering,
    ReformerHfForSequenceClassification,
    ReformerHfForTokenClassification,
)
from .tokenization_reformer_hf import ReformerHfByteTokenizer

__version__ = "0.2.0"

for config_class in (ReformerHfConfig, ReformerHfEncoderDecoderConfig):
    transformers.AutoConfig.register(config_class.model_type, config_class)
    transformers.AutoTokenizer.register(config_class, tokenizer_class=ReformerHfByteTokenizer)
for model_class in (
    ReformerHfModel,
    ReformerHfForCausalLM,
    ReformerHfForMaskedLM,
    ReformerHfForMultipleChoice,
    ReformerHfForQuestionAnswering,
    ReformerHfForSequenceClassification,
    ReformerHfForTokenClassification,
    ReformerHfEncoderDecoderModel,
    ReformerHfForConditionalGeneration,
):
    getattr(transformers, model_class._auto_class).register(model_class.config_class, model_class)
transformers.AutoModelForTextEncoding.register(ReformerHfConfig, ReformerHfModel)

__all__ = [
    "ReformerHfByteTokenizer",
    "ReformerHfConfig",
    "ReformerHfEncoderDecoderConfig",
    "ReformerHfEncoderDecoderModel",
    "ReformerHfForCausalLM",
    "ReformerHfForConditionalGeneration",
    "ReformerHfForMaskedLM",
    "ReformerHfForMultipleChoice",
    "ReformerHfForQuestionAnswering",
    "ReformerHfForSequenceClassification",
    "ReformerHfForTokenClassification",
    "ReformerHfModel",
    "ReformerHfPreTrainedModel",
    "replace_in_tree",
]
