# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""`replace_in_tree`: the Auto classes load in-tree folders with the classes of this package."""

from typing import Any

from transformers import AutoConfig, ReformerConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_reformer_hf import ReformerHfConfig


class InTreeFolderConfig(ReformerConfig):
    """
    What `AutoConfig` finds for the model type `"reformer"`: the config of a folder is ours.

    The Auto classes select models by the type of a config, so this is all that they need. A call, as in
    `AutoConfig.for_model("reformer")`, still returns the in-tree config.
    """

    def __new__(cls, *args, **kwargs):
        return ReformerConfig(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        return ReformerHfConfig.from_dict(config_dict, **kwargs)


class InTreeReplacement:
    """What `replace_in_tree` returns: a context manager that replaces the in-tree classes in its block."""

    def __init__(self, was_replaced: bool):
        self._was_replaced = was_replaced

    def __enter__(self) -> "InTreeReplacement":
        _set_replaced(True)
        return self

    def __exit__(self, *exception) -> None:
        _set_replaced(self._was_replaced)


def replace_in_tree(replace: bool | None = None) -> InTreeReplacement:
    """
    Make `from_pretrained` of the Auto classes return our classes for in-tree folders (`model_type: "reformer"`).

    This applies to `AutoConfig`, to all `AutoModel` classes that have a Reformer of this package, and to `pipeline`.
    Tokenizers, the in-tree classes themselves, and configs and models that exist already do not change.

    Args:
        replace (`bool`, *optional*): Whether in-tree folders give our classes from now on. `None` changes it: a second
            call undoes the first.

    Returns:
        A context manager: in the block `with replace_in_tree():`, in-tree folders give our classes, and after it what
        they gave before.

    ```python
    >>> import reformer_hf
    >>> from transformers import AutoModelForCausalLM

    >>> with reformer_hf.replace_in_tree():
    ...     model = AutoModelForCausalLM.from_pretrained("google/reformer-enwik8")
    ```"""
    was_replaced = _is_replaced()
    _set_replaced(not was_replaced if replace is None else replace)
    return InTreeReplacement(was_replaced)


def _is_replaced() -> bool:
    return CONFIG_MAPPING._extra_content.get(ReformerConfig.model_type) is InTreeFolderConfig


def _set_replaced(replace: bool) -> None:
    if replace:
        AutoConfig.register(ReformerConfig.model_type, InTreeFolderConfig, exist_ok=True)
    elif _is_replaced():
        del CONFIG_MAPPING._extra_content[ReformerConfig.model_type]


__all__ = ["replace_in_tree"]
