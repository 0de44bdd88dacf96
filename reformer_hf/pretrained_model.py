# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The base class of all models: initialization, saving, more positions, recomputation of activations."""

from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import PreTrainedModel, initialization
from transformers.utils import logging

from .configuration_reformer_hf import ReformerHfConfig
from .embeddings import AxialPositionEmbeddings, AxialTables, PositionEmbeddings, resize_positions
from .hub_commit import commit_model
from .lm_head import ReformerHfLMHead
from .reformer_encoder import ReformerHfEncoder

logger = logging.get_logger(__name__)


class ReformerHfPreTrainedModel(PreTrainedModel):
    """Base class of the models, with weight initialization, saving and unsupported features."""

    config_class: type[ReformerHfConfig] = ReformerHfConfig
    config: ReformerHfConfig
    base_model_prefix = "reformer"
    supports_gradient_checkpointing = False
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["ReformerHfEmbeddings", "ReformerHfLayer"]
    _supports_context_parallel = False
    # Constants in checkpoints of old versions of Transformers.
    _keys_to_ignore_on_load_unexpected = [r"\.(self_)?mask_value_float(16|32)$"]
    # Entries of a saved config for the classes in the code files that are saved with it.
    _auto_map = {
        "AutoConfig": "configuration_reformer_hf.ReformerHfConfig",
        "AutoModel": "modeling_reformer_hf.ReformerHfModel",
        "AutoModelForTextEncoding": "modeling_reformer_hf.ReformerHfModel",
        "AutoModelForCausalLM": "modeling_reformer_hf.ReformerHfForCausalLM",
        "AutoModelForMaskedLM": "task_heads.ReformerHfForMaskedLM",
        "AutoModelForSequenceClassification": "task_heads.ReformerHfForSequenceClassification",
        "AutoModelForTokenClassification": "task_heads.ReformerHfForTokenClassification",
        "AutoModelForQuestionAnswering": "task_heads.ReformerHfForQuestionAnswering",
        "AutoModelForMultipleChoice": "task_heads.ReformerHfForMultipleChoice",
    }

    def __init__(self, config: ReformerHfConfig, *args, **kwargs):
        # Fields may have changed since the config was created.
        config.validate_reformer()
        super().__init__(config, *args, **kwargs)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        if str(attn_implementation).startswith("paged|"):
            raise ValueError(
                "Continuous batching (`generate_batch`, `cache_implementation='paged'`) is not supported by the KV "
                "caches of this model: use `generate` with a batch of padded prompts."
            )
        if attn_implementation not in (None, "eager"):
            raise ValueError(
                f"`attn_implementation` is {attn_implementation!r}, but this model computes attention in its own way: "
                "leave it out."
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, AxialTables):
            for weight in module:
                initialization.normal_(weight, std=self.config.axial_norm_std)
        elif isinstance(module, ReformerHfLMHead):
            initialization.zeros_(module.bias)

    @property
    def uses_cache_by_default(self) -> bool:
        """Whether the model creates a KV cache if a call does not say: in evaluation, without gradients."""
        decodes = self.config.is_decoder or self.config.is_encoder_decoder
        return decodes and self.config.use_cache and not self.training and not torch.is_grad_enabled()

    def get_position_embeddings(self) -> nn.Module:  # type: ignore[override]
        """Return the position embeddings: an `AxialPositionEmbeddings`, or an `nn.Embedding` if they are not axial."""
        positions = cast(Any, self.base_model).embeddings.position_embeddings
        return positions.embedding if isinstance(positions, PositionEmbeddings) else positions

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """
        Change the number of positions, and with it `max_position_embeddings` and `axial_pos_shape` of the config.

        Old positions keep their vectors bit for bit. New positions start with the vectors of the old ones, repeated in
        order, and have to be trained: text there first looks to the model like text that it knows, and training only
        has to tell the positions apart. Nothing is random, so that an adapter can be loaded to a model that was
        resized in the same way.

        Plain embeddings give the new position `p` the vector of `p % old`. Axial embeddings grow along the first axis
        only, because any other would move old positions, and repeat its complete rows: `p` starts as `p % (old // row
        * row)`, where a row has as many positions as all other axes together. The rest of an incomplete last row keeps
        the vectors that its coordinates already have. Entries of `axial_pos_shape` beyond the old maximum, which no
        input could train, are replaced in the same way.

        A smaller number removes the last positions, in axial embeddings only whole rows.

        Parameters whose size changes are new objects: create the optimizer afterwards. Set `model_max_length` of a
        tokenizer as well. With `num_buckets=None`, some lengths may be hashed by another factorization of the same
        number of buckets if more than `lsh_attn_chunk_length ** 3` positions are involved (in-tree formula).

        Args:
            new_num_position_embeddings (`int`): The new number of positions, at least 1.

        Raises:
            ValueError: If it is not an `int` of at least 1, or if other modules wrap or replace the position
                embeddings, as PEFT does with `modules_to_save`.
        """
        embeddings = cast(Any, self.base_model).embeddings
        resize_positions(embeddings, self.config.max_position_embeddings, new_num_position_embeddings)
        self.config.max_position_embeddings = new_num_position_embeddings
        if isinstance(embeddings.position_embeddings, AxialPositionEmbeddings):
            self.config.axial_pos_shape = embeddings.position_embeddings.axes

    def activation_checkpointing_enable(self, *args, **kwargs):
        """
        Accept `gradient_checkpointing=True`, whatever its options: reversible layers already recompute activations.

        With `reversible=False` in the config, the layers recompute them from now on, whatever their size, until
        `activation_checkpointing_disable`. They compute the same function.
        """
        if self.config.reversible:
            logger.warning_once(
                "`gradient_checkpointing=True` has no effect: reversible layers already recompute activations that "
                "take more than `max_kept_activations` bytes. To save more memory, lower it, or set "
                "`chunk_size_feed_forward` and `chunk_size_lm_head`."
            )
        self._set_recomputation(not self.config.reversible)

    def activation_checkpointing_disable(self):
        super().activation_checkpointing_disable()
        self._set_recomputation(False)

    def _set_recomputation(self, always: bool):
        for module in self.modules():
            if isinstance(module, ReformerHfEncoder):
                module.always_recomputes = always

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save the model as in Transformers, together with its code for `trust_remote_code=True`."""
        self.config.auto_map = dict(self._auto_map)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _upload_modified_files(
        self,
        working_dir,
        repo_id: str,
        files_timestamps: dict[str, float],
        commit_message: str | None = None,
        token: bool | str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        commit_description: str | None = None,
    ):
        """Upload what `save_pretrained` has written, for `push_to_hub`. See `commit_model` for what is different."""
        folder = Path(working_dir)
        changed = [each for each in folder.iterdir() if each.stat().st_mtime > files_timestamps.get(each.name, 0)]
        paths = [path for each in changed for path in (each.rglob("*") if each.is_dir() else [each]) if path.is_file()]
        if revision is not None and not create_pr and not revision.startswith("refs/pr"):
            HfApi(token=token).create_branch(repo_id, branch=revision, exist_ok=True)
        return commit_model(
            folder, paths, repo_id, commit_message or "Upload model", commit_description, token, revision, create_pr
        )
