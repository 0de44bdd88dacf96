# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Checks of config fields as they come from a file that may be hostile, before anything is computed from them.

The limits are far above every model that exists, so that they only stop what no machine can hold.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import fields
from inspect import getattr_static
from typing import Any

import torch
from huggingface_hub.dataclasses import type_validator

# Of sizes, lengths, token ids and entries of lists.
MAX_NUMBER = 2**31 - 1
# Of fields that are no sizes: a number of bytes, a seed and a base of wavelengths.
_MAX_INT64 = 2**63 - 1
_INT64_FIELDS = ("max_kept_activations", "hash_seed", "local_rope_theta")
# Elements of one weight: a petabyte in fp32. More overflows the sizes of tensors.
MAX_WEIGHT_ELEMENTS = 2**48
MAX_LAYERS = 2**16
# Transformers names each label in two dictionaries.
MAX_LABELS = 2**22

# What Transformers accepts in a config although it is not a field.
_TYPES_OF_OTHERS: dict[str, Any] = {
    "num_hidden_layers": int | None,
    "num_labels": int,
    "model_type": str,
    "auto_map": dict | None,
    "torch_dtype": str | torch.dtype | None,
    "attn_implementation": str | None,
    "_attn_implementation": str | None,
    "experts_implementation": str | None,
    "_experts_implementation": str | None,
    "per_layer_config": None,
    "rope_parameters": None,
    "rope_scaling": None,
}


def check_given(cls: type, given: Mapping[str, Any]):
    """
    Check the arguments of a config class: types, numbers, and names that are no fields.

    Raises `ValueError`.
    """
    _check_types(cls, given)
    check_numbers({each.name: given[each.name] for each in fields(cls) if each.name in given})
    if not 1 <= given.get("num_labels", 1) <= MAX_LABELS:
        raise ValueError(f"`num_labels` is {_short(given['num_labels'])}, but must be in [1, {MAX_LABELS}].")
    for name in ("dtype", "torch_dtype"):
        value = given.get(name)
        if isinstance(value, str) and not isinstance(getattr(torch, value, None), torch.dtype):
            raise ValueError(f"`{name}` is {_short(value)}, but must be the name of a dtype, such as 'bfloat16'.")
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        # Transformers would download a kernel from there.
        if "/" in (given.get(name) or ""):
            raise ValueError(f"`{name}` is {_short(given[name])}, but must not name a repository: leave it out.")
    for key in given.get("id2label") or ():
        if not str(key).isdecimal() or int(key) > MAX_NUMBER:
            raise ValueError(f"`id2label` has the key {_short(key)}, but its keys must be numbers of labels.")
    quantization = given.get("quantization_config")
    if not (quantization is None or isinstance(quantization, dict) or hasattr(quantization, "to_dict")):
        raise ValueError(f"`quantization_config` is {_short(quantization)}, but must be a dictionary.")


def _check_types(cls: type, given: Mapping[str, Any]):
    types = {**_TYPES_OF_OTHERS, **{each.name: each.type for each in fields(cls)}}
    for name, value in given.items():
        if name in types:
            try:
                type_validator(name, value, types[name])
            except TypeError:
                expected = getattr(types[name], "__name__", types[name])
                raise ValueError(f"`{name}` is {_short(value)}, but must be of type `{expected}`.") from None
        elif not _is_free(cls, name):
            raise ValueError(
                f"`{name[:80]}` is not a field of the config, but the name of something that `{cls.__name__}` "
                "defines: leave it out."
            )


def _is_free(cls: type, name: str) -> bool:
    """Whether an instance may have a value of its own under this name."""
    missing = object()
    attribute = getattr_static(cls, name, missing)
    return attribute is missing or isinstance(attribute, property) and attribute.fset is not None


def check_numbers(values: Mapping[str, Any]):
    """Check that numbers and numbers in lists are finite, and integers not beyond all sizes. Raises `ValueError`."""
    for name, value in values.items():
        limit = _MAX_INT64 if name in _INT64_FIELDS else MAX_NUMBER
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"`{name}` is {value}, but must be finite.")
            if isinstance(number, int) and abs(number) > limit:
                raise ValueError(f"`{name}` is {_short(value)}, but no integer there may exceed {limit}.")


def check_weight(*sizes: tuple[str, int]):
    """Check the size of a weight, the product of sizes with their names. Raises `ValueError`."""
    if math.prod(size for _, size in sizes) > MAX_WEIGHT_ELEMENTS:
        product = " * ".join(f"`{name}` ({size})" for name, size in sizes)
        raise ValueError(f"A weight of size {product} has more than {MAX_WEIGHT_ELEMENTS} elements: reduce them.")


def _short(value: Any) -> str:
    return reprlib.repr(value)
