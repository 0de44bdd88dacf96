# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Registry of the implementations: how to build them, how to check them, and their workloads."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import checks, reformers
from .cases import WORKLOADS, Case, Shape
from .checks import Finding
from .dense import dense_model, t5_model
from .lower_bound import lower_bound
from .workloads import Build, Run, prepare, prepare_compiled


@dataclass(frozen=True)
class Implementation:
    """
    An implementation to measure.

    Args:
        prepare: Builds the model of a case and returns a function that runs the workload once.
        check: Measures the errors for a shape and a number of hash rounds.
        workloads: Names of the supported workloads.
    """

    prepare: Callable[[Case, torch.device], Run]
    check: Callable[[Shape, int], list[Finding]]
    workloads: frozenset[str] = frozenset(WORKLOADS)


def _implementation(
    check: Callable[[Shape, int], list[Finding]],
    build_model: Build,
    build_attention: Build | None = None,
    workloads: frozenset[str] = frozenset(WORKLOADS),
) -> Implementation:
    return Implementation(lambda case, device: prepare(case, device, build_model, build_attention), check, workloads)


# Without a KV cache, or with one that only the workload `tokens` supports.
_WITHOUT_CACHE = frozenset(WORKLOADS) - {"tokens", "prefill", "last"}
_WITHOUT_ATTENTION = frozenset(WORKLOADS) - {"attention", "attention-step"}


IMPLEMENTATIONS = {
    "reformer_hf": _implementation(checks.check_ours, reformers.our_model, reformers.our_attention),
    "reformer_hf-wide": _implementation(
        checks.check_ours, reformers.our_default_model, reformers.our_default_attention
    ),
    "reformer_hf-in-tree": _implementation(
        checks.check_in_tree, reformers.our_in_tree_model, reformers.our_in_tree_attention
    ),
    "reformer_hf-compiled": Implementation(
        lambda case, device: prepare_compiled(case, device, reformers.our_model),
        checks.check_reference,
        frozenset({"tokens"}),
    ),
    "transformers": _implementation(
        checks.check_in_tree, reformers.in_tree_model, reformers.in_tree_attention, _WITHOUT_CACHE | {"tokens"}
    ),
    "reformer-pytorch": _implementation(
        checks.check_reformer_pytorch,
        reformers.reformer_pytorch_model,
        reformers.reformer_pytorch_attention,
        _WITHOUT_CACHE,
    ),
    "dense": _implementation(checks.check_dense, dense_model, workloads=_WITHOUT_ATTENTION),
    "t5": _implementation(checks.check_t5, t5_model, workloads=frozenset({"step"})),
    "lower-bound": Implementation(lower_bound, lambda shape, num_hashes: [], frozenset({"step", "tokens"})),
}
