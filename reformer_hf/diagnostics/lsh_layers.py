# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The LSH layers of a model, and what they read in a forward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..lsh_attention import LSHSelfAttention
from ..pretrained_model import ReformerHfPreTrainedModel
from ..reformer_layer import ReformerHfLayer
from ..self_attention import AttentionCall

# Called with the name of a layer, the layer, the hidden states `[B, L, E]` that its attention reads, and its call.
Observer = Callable[[str, ReformerHfLayer, Tensor, AttentionCall], None]


def find_lsh_layers(model: nn.Module, layers: Sequence[int | str] | None = None) -> dict[str, ReformerHfLayer]:
    """
    Return the LSH layers of a model by the names of their modules, in order.

    Args:
        model: Any model that contains Reformer layers.
        layers: Names of layers, or indices in `attn_layers`. An encoder-decoder has two layers for an index. `None`
            means all.

    Raises:
        ValueError: If the model has no LSH layer, or none with a given name or index.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ReformerHfLayer)
        and isinstance(getattr(module.attention, "self_attention", None), LSHSelfAttention)
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no LSH layer: give a Reformer model whose `attn_layers` include 'lsh'."
        )
    if layers is None:
        return found
    indices = {name: layer.layer_idx for name, layer in found.items()}
    for layer in layers:
        if layer not in indices and layer not in indices.values():
            raise ValueError(f"Layer {layer!r} is not an LSH layer of the model, which has (name: index) {indices}.")
    return {name: layer for name, layer in found.items() if name in layers or indices[name] in layers}


def lsh_attention_of(layer: ReformerHfLayer) -> LSHSelfAttention:
    """Return the attention of an LSH layer."""
    return cast(LSHSelfAttention, layer.attention.self_attention)


@torch.no_grad()
def observe(model: nn.Module, observer: Observer, layers: dict[str, ReformerHfLayer], inputs: dict[str, Any]) -> None:
    """
    Run a forward pass in evaluation mode and call `observer` for each of some layers.

    Args:
        model: The model. Its mode is restored.
        observer: A function that only reads.
        layers: The result of `find_lsh_layers`.
        inputs: Arguments of the model.

    Raises:
        ValueError: If the model gets a KV cache, or rows that hold several documents.
    """

    def hook(name: str, layer: ReformerHfLayer, module: nn.Module, args: tuple) -> None:
        hidden_states, call, cache, _ = args
        if cache is not None or call.documents is not None:
            given = "a KV cache" if cache is not None else "several documents in a row"
            raise ValueError(f"The input has {given}, but diagnostics need whole texts, each in a row of its own.")
        observer(name, layer, hidden_states, call)

    with ExitStack() as stack:
        stack.enter_context(_evaluation(model))
        stack.enter_context(no_cache_by_default(model))
        for name, layer in layers.items():
            handle = layer.attention.self_attention.register_forward_pre_hook(partial(hook, name, layer))
            stack.callback(handle.remove)
        model(**inputs)


@contextmanager
def no_cache_by_default(model: nn.Module) -> Iterator[None]:
    """Let models create no KV cache unless a call says so, with or without gradients."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs if kwargs.get("use_cache") else {**kwargs, "use_cache": False}

    with ExitStack() as stack:
        for each in model.modules():
            if isinstance(each, ReformerHfPreTrainedModel) and each.base_model is each:
                stack.callback(each.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Set all modules to evaluation mode, and restore the mode of each."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
