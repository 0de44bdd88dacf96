# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""What operators a computation runs, and which of them make the host wait for a device."""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reformer_hf
from reformer_hf import ReformerHfForCausalLM

PACKAGE = Path(reformer_hf.__file__).parent

# They give the host a number, or a tensor whose size depends on numbers on the device.
_READS = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
# They list the elements that a boolean index selects.
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Allocation and what autograd needs, and views: no kernel of a device runs.
_FREE = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "promote_types"}

# The seeds of hashing and dropout are numbers of the CPU's generator, whatever the device.
HOST_FUNCTIONS = {"draw_seed"}
# What is drawn on the CPU is copied to the device; see `DevicePolicy.pin_uploads` for why this is no wait.
UPLOADS = {"_upload"}


class OperatorLog(TorchDispatchMode):
    """
    Counts what runs under it.

    `kernels` counts operators by name, views and allocations left out; `waits` names those that make the host wait,
    with the place in the package that they came from. The one-off trial of a fused kernel is to be over by then.
    """

    def __init__(self):
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _FREE:
            self.kernels[name] += 1
        if _makes_host_wait(name, args, kwargs):
            functions, place = _where()
            if not functions & (HOST_FUNCTIONS | (UPLOADS if name == "_to_copy" else set())):
                self.waits.append(f"{name} at {place}")
        return func(*args, **kwargs)

    @property
    def num_kernels(self) -> int:
        return self.kernels.total()


def logits_of(model: ReformerHfForCausalLM, inputs_embeds: Tensor, padding: Tensor | None) -> Tensor:
    """What is watched: the whole model, without a KV cache and the checks that look at values of the inputs."""
    model.reformer.checks_values = False
    attention_mask = None if padding is None else (~padding).long()
    return model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False).logits


def _makes_host_wait(name: str, args: tuple, kwargs: dict) -> bool:
    if name in _READS:
        return True
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in _INDEXING:
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "_to_copy":
        device = kwargs.get("device")
        return device is not None and device.type != args[0].device.type and not kwargs.get("non_blocking")
    return False


def _where() -> tuple[set[str], str]:
    """The names of the functions that are being run, and the innermost line of the package."""
    functions, place, frame = set(), "unknown", sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent == PACKAGE:
            if not functions:
                place = f"{path.name}:{frame.f_lineno}"
            functions.add(frame.f_code.co_name)
        frame = frame.f_back
    return functions, place
