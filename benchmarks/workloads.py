# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""What a measured run does with a model or an attention module."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .cases import Case, Shape
from .reformers import random_ids

Build = Callable[[Shape, int, int], nn.Module]
Run = Callable[[], Tensor]


def prepare(case: Case, device: torch.device, build_model: Build, build_attention: Build | None) -> Run:
    """Build what the case needs; the function returned does the work once and returns a loss or output."""
    torch.manual_seed(0)
    sizes = (case.shape, case.length, case.num_hashes)
    if case.workload in ("forward", "step"):
        model = build_model(*sizes).to(device)
        ids = random_ids(case.shape, case.length, device)
        return _step(model.train(), ids) if case.workload == "step" else _forward(model.eval(), ids)
    if build_attention is None:
        raise ValueError(f"There is no attention module for the case {case.name!r}.")
    module = build_attention(*sizes).to(device).train(case.workload == "attention-step")
    hidden_states = torch.randn(1, case.length, case.shape.width, device=device)
    if case.workload == "attention":
        return _attention(module, hidden_states)
    return _attention_step(module, hidden_states, torch.randn(1, case.length, case.shape.width, device=device))


def _forward(model: nn.Module, ids: Tensor) -> Run:
    def run() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids)["logits"]

    return run


def _step(model: nn.Module, ids: Tensor) -> Run:
    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids)["loss"]
        loss.backward()
        return loss.detach()

    return run


def _attention(module: nn.Module, hidden_states: Tensor) -> Run:
    def run() -> Tensor:
        with torch.no_grad():
            return attention_output(module(hidden_states))

    return run


def _attention_step(module: nn.Module, hidden_states: Tensor, grad: Tensor) -> Run:
    hidden_states.requires_grad_()

    def run() -> Tensor:
        module.zero_grad(set_to_none=True)
        hidden_states.grad = None
        out = attention_output(module(hidden_states))
        out.backward(grad)
        return out.detach()

    return run


def attention_output(returned) -> Tensor:
    """The output among what an attention module returns: itself, or the first of several."""
    return returned if isinstance(returned, Tensor) else returned[0]
