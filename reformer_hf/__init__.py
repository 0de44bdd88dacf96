# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The Reformer as a Transformers plugin. Importing this package registers its classes with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .configuration_reformer_hf import ReformerHfConfig
from .modeling_reformer_hf import ReformerHfForCausalLM, ReformerHfModel, ReformerHfPreTrainedModel
from .tokenization_reformer_hf import ReformerHfByteTokenizer

__version__ = "0.1.0"

AutoConfig.register(ReformerHfConfig.model_type, ReformerHfConfig)
AutoModel.register(ReformerHfConfig, ReformerHfModel)
AutoModelForCausalLM.register(ReformerHfConfig, ReformerHfForCausalLM)
AutoTokenizer.register(ReformerHfConfig, tokenizer_class=ReformerHfByteTokenizer)

__all__ = [
    "ReformerHfByteTokenizer",
    "ReformerHfConfig",
    "ReformerHfForCausalLM",
    "ReformerHfModel",
    "ReformerHfPreTrainedModel",
]
