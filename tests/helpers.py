# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""What tests share: closeness relative to the size of the reference, and small configurations."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from reformer_hf import ReformerHfConfig, ReformerHfForCausalLM

# Of every kind, for `tiny_config`.
DROPOUT = {
    "hidden_dropout_prob": 0.1,
    "feed_forward_dropout_prob": 0.1,
    "local_attention_probs_dropout_prob": 0.1,
    "lsh_attention_probs_dropout_prob": 0.1,
}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`. Where that is zero, only zeros are close."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.double() - expected.double()).square().mean().sqrt().item()
    size = expected.double().square().mean().sqrt().item()
    return difference / size if size else float("inf") if difference else 0.0


def assert_close(actual: Tensor, expected: Tensor, limit: float, name: str = "output") -> None:
    """Fail, naming the tensor, where the relative root mean square difference is above `limit`, or not a number."""
    error = relative_rms(actual, expected)
    assert error <= limit, f"{name}: relative RMS difference {error:.3g} > {limit:.3g}"


def assert_refused(call: Callable[..., object], cases: dict[str, tuple], error: type = ValueError) -> None:
    """
    Each case `(*arguments, pattern)` is refused with a message in which the pattern is found; fail with the names of
    those that are not, and what was said instead.
    """
    failed = {}
    for name, (*arguments, pattern) in cases.items():
        try:
            call(*arguments)
            failed[name] = "was accepted"
        except error as refusal:
            if not re.search(pattern, str(refusal)):
                failed[name] = str(refusal)
    assert not failed, failed


def tiny_config(cls=ReformerHfConfig, **fields) -> ReformerHfConfig:
    """A causal model of three kinds of layers that runs in milliseconds, and recomputes activations."""
    defaults = {
        "attn_layers": ["local", "lsh", "full"],
        "hidden_size": 32,
        "num_attention_heads": 2,
        "attention_head_size": 16,
        "feed_forward_size": 48,
        "vocab_size": 60,
        "bos_token_id": 2,
        "max_position_embeddings": 256,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_hashes": 2,
        "num_buckets": 8,
        "is_decoder": cls is ReformerHfConfig,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "lsh_attention_probs_dropout_prob": 0.0,
        "max_kept_activations": 0,
    }
    return cls(**{**defaults, **fields})


def random_model(dtype=torch.float32, cls=ReformerHfForCausalLM, **fields) -> torch.nn.Module:
    """A tiny model in evaluation, all of whose parameters are random, so that none that gets lost is missed."""
    torch.manual_seed(0)
    model = cls(tiny_config(cls.config_class, **fields)).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters, by name; each must have one."""
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"without gradient: {missing}"
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def memory_of(function: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the tensors that a function allocates: those alive at its end, with its result, and at the peak."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    del result
    return alive, peak
