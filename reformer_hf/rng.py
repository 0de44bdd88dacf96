# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Random number generator states, autocast settings and dropout seeds, for exact recomputation."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


def draw_seed() -> int:
    """Draw a seed for another generator from torch's global CPU generator."""
    return int(torch.randint(2**62, (), device="cpu"))


class Dropout:
    """Dropout factors for a sequence of tensors, reproducible from a seed."""

    def __init__(self, rate: float, seed: int, device: torch.device):
        self._keep_rate = 1.0 - rate
        self._generator = torch.Generator(device).manual_seed(seed)

    @classmethod
    def of(cls, rate: float, seed: int, device: torch.device) -> "Dropout | None":
        """Create a `Dropout`, or return `None` for a rate of zero."""
        return cls(rate, seed, device) if rate > 0 else None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the factors of the next tensor: zero, or the inverse of the keep rate."""
        keep = torch.empty_like(tensor).bernoulli_(self._keep_rate, generator=self._generator)
        return keep.div_(self._keep_rate)


class SharedDropout:
    """
    Dropout of a sum of tensors, computed in chunks of positions: all summands share one dropout mask.

    Create one object for each pass over the tensors. The same seed gives the same mask.
    """

    def __init__(self, rate: float, seed: int):
        self._rate, self._seed = rate, seed
        self._kept: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor, positions: slice) -> Tensor:
        """Apply dropout to the given positions `[B, …]` of one summand."""
        if positions.start not in self._kept:
            generator = torch.Generator(tensor.device).manual_seed(self._seed + positions.start)
            kept = torch.empty_like(tensor, dtype=torch.bool)
            self._kept[positions.start] = kept.bernoulli_(1.0 - self._rate, generator=generator)
        return torch.mul(tensor, self._kept[positions.start]) / (1.0 - self._rate)


class ReplayState:
    """
    Capture the generator states of the CPU and of `device`, and the autocast settings.

    Args:
        device: Device of the computation to replay.
        generators: Whether to capture the generator states. Not needed if the computation draws no random numbers.
    """

    def __init__(self, device: torch.device, generators: bool = True):
        self._cpu_state = torch.get_rng_state() if generators else None
        self._device_state = None
        if generators and device.type != "cpu":
            self._device_state = torch.get_device_module(device).get_rng_state(device)
        self._device = device
        self._autocasts = [
            (device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))
            for device_type in dict.fromkeys(("cpu", device.type))
            if torch.amp.is_autocast_available(device_type)
        ]

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Run the body under the captured state, then restore the current state."""
        with ExitStack() as stack:
            if self._cpu_state is not None:
                devices = [] if self._device_state is None else [self._device]
                stack.enter_context(torch.random.fork_rng(devices, device_type=self._device.type))
                torch.set_rng_state(self._cpu_state)
                if self._device_state is not None:
                    torch.get_device_module(self._device).set_rng_state(self._device_state, self._device)
            for device_type, enabled, dtype in self._autocasts:
                stack.enter_context(torch.autocast(device_type, enabled=enabled, dtype=dtype))
            yield
