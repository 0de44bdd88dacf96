# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""In-tree models of every class with random weights, and our models with the same weights."""

import pytest
import torch
from transformers import (
    ReformerConfig,
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerModel,
    ReformerModelWithLMHead,
)
from transformers.models.reformer import modeling_reformer

from reformer_hf import (
    ReformerHfForCausalLM,
    ReformerHfForMaskedLM,
    ReformerHfForQuestionAnswering,
    ReformerHfForSequenceClassification,
    ReformerHfModel,
)

# Training of the in-tree model takes the product of its axes for a length, no other.
AXES = (8, 32)
TRAINING_LENGTH = 256

LAYERS = {"local": ["local"], "lsh": ["lsh"], "mixed": ["local", "lsh", "local", "lsh"]}

# Our class of each in-tree class.
CLASSES = {
    ReformerModel: ReformerHfModel,
    ReformerModelWithLMHead: ReformerHfForCausalLM,
    ReformerForMaskedLM: ReformerHfForMaskedLM,
    ReformerForSequenceClassification: ReformerHfForSequenceClassification,
    ReformerForQuestionAnswering: ReformerHfForQuestionAnswering,
}
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__.removeprefix("Reformer"))


class TorchWithRotationsOfFp32:
    """What the in-tree module sees as `torch`: it draws in fp32, in which ours are drawn too, whatever it asks for."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def randn(*size, dtype=None, **kwargs):
        return torch.randn(*size, **kwargs).to(dtype or torch.float32)


def in_tree_model(causal, layers="mixed", bias=False, cls=None, **fields):
    """An in-tree model whose parameters are all random, the bias of the head too if wanted."""
    torch.manual_seed(0)
    after = 0 if causal else 1
    defaults = {
        "attn_layers": LAYERS[layers],
        "num_hashes": 2,
        "num_buckets": 8,
        "axial_pos_shape": AXES,
        "axial_pos_embds_dim": (8, 24),
        "max_position_embeddings": TRAINING_LENGTH,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "attention_head_size": 16,
        "feed_forward_size": 48,
        "is_decoder": causal,
        "local_num_chunks_after": after,
        "lsh_num_chunks_after": after,
        "lsh_attn_chunk_length": 16,
        "local_attn_chunk_length": 8,
        "vocab_size": 50,
        "hash_seed": 3,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    }
    cls = cls or (ReformerModelWithLMHead if causal else ReformerModel)
    model = cls(ReformerConfig(**{**defaults, **fields}))
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    if hasattr(model, "lm_head") and not bias:
        # In-tree does not add it before Transformers 5.24.
        model.lm_head.bias.data.zero_()
        if model.lm_head.decoder.bias is not None:
            model.lm_head.decoder.bias.data.zero_()
    return model.eval()


def in_tree_head(cls, **fields):
    """The same of a class, causal if the class is."""
    return in_tree_model(cls is ReformerModelWithLMHead, bias=True, cls=cls, **fields)


def load_ours(in_tree, folder):
    """What in-tree saved, loaded by our class."""
    in_tree.save_pretrained(folder)
    ours, info = CLASSES[type(in_tree)].from_pretrained(
        folder, dtype=in_tree.dtype, max_kept_activations=0, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[what], (what, info[what])
    return ours.eval()


def soften_self_mask(in_tree):
    """
    Score a position itself at -100 instead of -1e5.

    It is the same rule, since exp(-100) counts nothing beside real scores. But a logsumexp of -1e5 has a step of 1/128
    in fp32: rows that see only themselves in several rounds lose that much, and what follows may hash elsewhere.
    """
    for module in in_tree.modules():
        if isinstance(module, modeling_reformer.LSHSelfAttention):
            module.self_mask_value_float32.fill_(-100.0)
    return in_tree


def random_inputs(length, padded):
    """Two rows of tokens, the second one with three positions of padding if wanted."""
    torch.manual_seed(1)
    attention_mask = torch.ones(2, length, dtype=torch.long)
    if padded:
        attention_mask[1, -3:] = 0
    return {"input_ids": torch.randint(0, 50, (2, length)), "attention_mask": attention_mask}


def random_targets(cls, inputs):
    """The arguments of an in-tree class that give a loss; none for the model without a head."""
    if cls is ReformerModel:
        return {}
    if cls is ReformerForSequenceClassification:
        return {"labels": torch.tensor([1, 0])}
    if cls is ReformerForQuestionAnswering:
        # The second answer ends after its input.
        return {"start_positions": torch.tensor([3, 1]), "end_positions": torch.tensor([4, 10_000])}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if cls is ReformerForMaskedLM:
        labels[:, ::3] = -100
    return {"labels": labels}
