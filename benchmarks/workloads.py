# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The workloads: functions that run a model or an attention module once."""

import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from reformer_hf.tokenization_reformer_hf import FIRST_BYTE_ID

from .cases import Case, Shape
from .decoding import MAX_NEW_TOKENS, decode
from .reformers import random_ids

Build = Callable[[Shape, int, int], nn.Module]
Run = Callable[[], Tensor]


def prepare(case: Case, device: torch.device, build_model: Build, build_attention: Build | None) -> Run:
    """Build the model of a case. Return a function that runs the workload once and returns a loss or an output."""
    torch.manual_seed(0)
    sizes = (case.shape, case.length, case.num_hashes)
    if case.workload == "tokens":
        model = build_model(case.shape, case.length + MAX_NEW_TOKENS, case.num_hashes).to(device).eval()
        return decode(model, random_ids(case.shape, case.length, device))
    if case.workload in ("last", "prefill"):
        model = build_model(*sizes).to(device).eval()
        return _last(model, random_ids(case.shape, case.length, device), case.workload == "prefill")
    if case.workload in ("forward", "step", "training"):
        model = build_model(*sizes).to(device)
        if case.workload == "training":
            return _training(model.train(), text_ids(case.length, device))
        ids = random_ids(case.shape, case.length, device)
        if case.workload == "step":
            labels = random_ids(case.shape, case.shape.target_length, device) if case.shape.decoder_layers else ids
            return _step(model.train(), ids, labels)
        return _forward(model.eval(), ids)
    if build_attention is None:
        raise ValueError(f"This implementation has no attention module for the case {case.name!r}.")
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


def _last(model: nn.Module, ids: Tensor, use_cache: bool) -> Run:
    def run() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=use_cache, logits_to_keep=1)["logits"]

    return run


def prepare_compiled(case: Case, device: torch.device, build_model: Build) -> Run:
    """Like `prepare`, for decoding with a static KV cache and a compiled step."""
    torch.manual_seed(0)
    model = build_model(case.shape, case.length + MAX_NEW_TOKENS, case.num_hashes).to(device).eval()
    return decode(model, random_ids(case.shape, case.length, device), compiled=True)


def _step(model: nn.Module, ids: Tensor, labels: Tensor) -> Run:
    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=labels)["loss"]
        loss.backward()
        return loss.detach()

    return run


def _training(model: nn.Module, ids: Tensor) -> Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step = _step(model, ids, labels=ids)

    def run() -> Tensor:
        loss = step()
        optimizer.step()
        return loss

    return run


def text_ids(length: int, device: torch.device) -> Tensor:
    """Return byte tokens `[1, length]` of the source files of the Python standard library."""
    text = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= length:
            break
    if len(text) < length:
        raise ValueError(f"The modules of the standard library have only {len(text)} bytes, fewer than {length}.")
    return torch.frombuffer(bytearray(text[:length]), dtype=torch.uint8).to(device).long()[None] + FIRST_BYTE_ID


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
    """Return the output of an attention module, which returns a tensor or a tuple that begins with it."""
    return returned if isinstance(returned, Tensor) else returned[0]
