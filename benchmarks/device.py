# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Benchmarks on a device other than the CPU: what can run there, and whether it gives what it gives on the CPU."""

import copy

import torch
from torch import nn

from . import reformers
from .cases import LOWER_BOUND, Entry, Shape
from .checks import Finding, relative_rms, worst
from .dense import dense_model
from .workloads import Build

# Made of the CPU's fused kernel.
CPU_ONLY = frozenset({LOWER_BOUND})

# The others draw their hash rotations on the device: in each place other ones.
_COMPARABLE: dict[str, Build] = {
    "reformer_hf": reformers.our_model,
    "reformer_hf-wide": reformers.our_default_model,
    "reformer_hf-in-tree": reformers.our_in_tree_model,
    "dense": dense_model,
}


def entries_for(device: torch.device, entries: list[Entry]) -> list[Entry]:
    """Return the entries without the implementations that a device cannot run."""
    if device.type == "cpu":
        return entries
    kept = [(case, tuple(name for name in names if name not in CPU_ONLY)) for case, names in entries]
    return [(case, names) for case, names in kept if names]


def check_device(name: str, shape: Shape, num_hashes: int, device: torch.device) -> list[Finding]:
    """
    Compare logits and gradients of an implementation on a device with those on the CPU, in fp32.

    The checks against definitions run on the CPU; from there to the device nothing may change but rounding.
    """
    if name not in _COMPARABLE:
        return []
    torch.manual_seed(0)
    model = _COMPARABLE[name](shape, shape.check_length, num_hashes)
    (actual, actual_grads), (expected, expected_grads) = (
        _logits_and_gradients(copy.deepcopy(model).to(where), reformers.random_ids(shape, shape.check_length, where))
        for where in (device, torch.device("cpu"))
    )
    return [
        Finding("logits, compared with the CPU", relative_rms(actual, expected), 1e-4),
        # Rounding may change the sign of a ReLU input, which changes gradients by up to 1e-3.
        Finding("gradients, compared with the CPU", worst(actual_grads, expected_grads), 5e-3),
    ]


def _logits_and_gradients(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    # In evaluation all calls hash alike.
    outputs = model.eval()(input_ids=ids, labels=ids)
    outputs["loss"].backward()
    return outputs["logits"].detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters()}
