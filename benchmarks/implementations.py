# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The registry: what is measured, what it can do, and how its correctness is checked."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import checks, reformers
from .cases import WORKLOADS, Case, Shape
from .checks import Finding
from .dense import dense_model
from .floor import floor_of_step
from .workloads import Build, Run, prepare, prepare_compiled


@dataclass(frozen=True)
class Implementation:
    """
    Args:
        prepare: Builds what a case needs and returns what does its work once.
        check: Measures, for a shape and a number of rounds, what is wrong.
        workloads: What it can do.
    """

    prepare: Callable[[Case, torch.device], Run]
    check: Callable[[Shape, int], list[Finding]]
    workloads: frozenset[str] = frozenset(WORKLOADS)


def _of_modules(
    check: Callable[[Shape, int], list[Finding]],
    build_model: Build,
    build_attention: Build | None = None,
    workloads: frozenset[str] = frozenset(WORKLOADS),
) -> Implementation:
    return Implementation(lambda case, device: prepare(case, device, build_model, build_attention), check, workloads)


# Without a state of its own, or one that the workloads know.
_NO_STATE = frozenset(WORKLOADS) - {"tokens", "prefill", "last"}
_OF_MODEL = frozenset(WORKLOADS) - {"attention", "attention-step"}


IMPLEMENTATIONS = {
    "reformer_hf": _of_modules(checks.check_oracle, reformers.our_model, reformers.our_attention),
    "reformer_hf-wide": _of_modules(checks.check_oracle, reformers.our_default_model, reformers.our_default_attention),
    "reformer_hf-in-tree": _of_modules(
        checks.check_in_tree, reformers.our_in_tree_model, reformers.our_in_tree_attention
    ),
    "reformer_hf-compiled": Implementation(
        lambda case, device: prepare_compiled(case, device, reformers.our_model),
        checks.check_oracle,
        frozenset({"tokens"}),
    ),
    "transformers": _of_modules(
        checks.check_in_tree, reformers.in_tree_model, reformers.in_tree_attention, _NO_STATE | {"tokens"}
    ),
    "reformer-pytorch": _of_modules(
        checks.check_reformer_pytorch,
        reformers.reformer_pytorch_model,
        reformers.reformer_pytorch_attention,
        _NO_STATE,
    ),
    "dense": _of_modules(checks.check_dense, dense_model, workloads=_OF_MODEL),
    "floor": Implementation(floor_of_step, lambda shape, num_hashes: [], frozenset({"step"})),
}
