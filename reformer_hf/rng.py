# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Dropout, and the state to replay in a recomputation: of generators, autocast and modules."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Attributes, parameters or buffers of a module, with the name and value of one of them.
_Held = tuple[dict[str, Any], str, Any]
# Parameters with whether they require gradients.
_Requirement = tuple[Tensor, bool]


def draw_seed() -> int:
    """Draw a seed for another generator from torch's global CPU generator."""
    return int(torch.randint(2**62, (), device="cpu"))


@dataclass(frozen=True)
class DropoutMask:
    """
    Which elements dropout keeps.

    Args:
        keep: 1 for elements to keep and 0 for others, int8.
        scale: The factor for kept elements, the inverse of their share.
    """

    keep: Tensor
    scale: float

    @classmethod
    def draw(cls, like: Tensor, rate: float, generator: torch.Generator | None = None) -> "DropoutMask":
        """
        Draw a mask. A random number of 64 bits decides for several elements, which is much faster than `bernoulli_`.

        Args:
            like: A tensor of the shape and on the device of the mask.
            rate: Dropout rate, rounded to a multiple of 1/256 if that changes it and its complement by at most
                2 %, else of 2^-16.
            generator: A generator; `None` uses the global one of the device.
        """
        bits = 8 if abs(round(rate * 256) / 256 - rate) <= 0.02 * min(rate, 1 - rate) else 16
        num_levels = 1 << bits
        dropped = min(max(round(rate * num_levels), 1), num_levels - 1)
        drawn = torch.empty(math.ceil(like.numel() * bits / 64), dtype=torch.int64, device=like.device)
        drawn.random_(-(2**63), None, generator=generator)
        levels = drawn.view(torch.int8 if bits == 8 else torch.int16)[: like.numel()].view(like.shape)
        # 0 below the lowest level to keep and 1 from there on. Clamping is ten times as fast as a comparison.
        lowest_kept = dropped - num_levels // 2
        keep = levels.clamp_(lowest_kept - 1, lowest_kept).sub_(lowest_kept - 1).to(torch.int8)
        return cls(keep, num_levels / (num_levels - dropped))

    def apply(self, tensor: Tensor, positions: slice = slice(None)) -> Tensor:
        """Scale the elements to keep at some positions of `[B, L, …]` and set the others to zero."""
        return self.keep[:, positions].to(tensor.dtype).mul_(tensor).mul_(self.scale)


class ApplyMask(torch.autograd.Function):
    """Save a mask of one byte per element instead of factors."""

    @staticmethod
    def forward(ctx, tensor, keep, scale):
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return DropoutMask(keep, scale).apply(tensor)

    @staticmethod
    def backward(ctx, grad):
        (keep,) = ctx.saved_tensors
        return ApplyMask.apply(grad, keep, ctx.scale), None, None


def dropout(tensor: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """Apply dropout to `[B, L, …]`, with the global random number generator of the device unless one is given."""
    if not rate:
        return tensor
    mask = DropoutMask.draw(tensor, rate, generator)
    return ApplyMask.apply(tensor, mask.keep, mask.scale)


class RateDropout(nn.Dropout):
    """
    The rate of a dropout, in the current mode. Parts of the model read it where a tensor is computed in pieces.

    Code that looks for `nn.Dropout` to change rates or modes, such as `disable_dropout` of TRL, finds it.
    """

    @property
    def rate(self) -> float:
        return self.p if self.training else 0.0

    def forward(self, tensor: Tensor) -> Tensor:
        """Apply dropout to `[B, L, …]`."""
        return dropout(tensor, self.rate)


class Dropout:
    """Dropout factors for a sequence of tensors, reproducible from a seed."""

    def __init__(self, rate: float, seed: int, device: torch.device):
        self._rate = rate
        self._generator = torch.Generator(device).manual_seed(seed)

    @classmethod
    def of(cls, rate: float, seed: int, device: torch.device) -> "Dropout | None":
        """Create a `Dropout`, or return `None` for a rate of zero."""
        return cls(rate, seed, device) if rate > 0 else None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the factors of the next tensor `[g, n, …]`: zero, or the inverse of the keep rate."""
        mask = DropoutMask.draw(tensor, self._rate, self._generator)
        return mask.keep.to(tensor.dtype).mul_(mask.scale)


@dataclass(frozen=True)
class SeededDropout:
    """Dropout of a tensor that is computed in chunks of positions and as a sum: all summands share one mask."""

    rate: float
    seed: int

    def of(self, tensor: Tensor) -> Callable[[Tensor, slice], Tensor]:
        """Return a function that applies the dropout of `[B, L, …]` to a summand at some positions."""
        return DropoutMask.draw(tensor, self.rate, self._generator(tensor)).apply

    def __call__(self, tensor: Tensor) -> Tensor:
        """Apply the dropout to all positions, differentiably."""
        return dropout(tensor, self.rate, self._generator(tensor))

    def _generator(self, tensor: Tensor) -> torch.Generator:
        return torch.Generator(tensor.device).manual_seed(self.seed)


class ReplayState:
    """
    Capture what a computation depends on besides its inputs: generator states, autocast settings, and the modes,
    parameters, buffers and, in modules of others, settings of a module, such as which adapter is active.

    Args:
        device: Device of the computation to replay. Its generator and that of the CPU are captured.
        module: The module that the computation uses.
    """

    def __init__(self, device: torch.device, module: nn.Module | None = None):
        self._cpu_state = torch.get_rng_state()
        self._device_state = None
        if device.type not in ("cpu", "meta"):
            self._device_state = torch.get_device_module(device).get_rng_state(device)
        self._device = device
        self._autocasts = [
            (device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))
            for device_type in dict.fromkeys(("cpu", device.type))
            if torch.amp.is_autocast_available(device_type)
        ]
        modules = [] if module is None else list(module.modules())
        self._settings = [setting for each in modules for setting in _settings_of(each)]
        self._requirements = [(each, each.requires_grad) for each in (module.parameters() if module else ())]
        # A buffer and its values, in modules that may change them, such as the vectors of spectral normalization.
        self._buffers = [
            [(tensor, tensor._version, tensor.clone()) for tensor in each._buffers.values() if tensor is not None]
            for each in modules
            if each._buffers and each.training
        ]
        # `torch.func.functional_call` replaces the tensors of a module during its forward pass only.
        self._tensors = [
            (tensors, name, tensor)
            for each in modules
            for tensors in (each._parameters, each._buffers)
            for name, tensor in tensors.items()
        ]

    def keep_changed_buffers(self) -> None:
        """
        After the computation: if it has changed a buffer, let `replay` start from the values before.

        A replay then works on copies, so that a computation changes the buffers of a module once.
        """
        old_values = {
            id(tensor): value
            for of_module in self._buffers
            if any(tensor._version != version for tensor, version, _ in of_module)
            for tensor, _, value in of_module
        }
        self._tensors = [(held, name, old_values.get(id(tensor), tensor)) for held, name, tensor in self._tensors]
        self._buffers = []

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Run the body under the captured state, then restore the current state."""
        with ExitStack() as stack:
            stack.callback(_swap([*self._settings, *self._tensors]))
            stack.callback(_require(self._requirements))
            devices = [] if self._device_state is None else [self._device]
            stack.enter_context(torch.random.fork_rng(devices, device_type=self._device.type))
            torch.set_rng_state(self._cpu_state)
            if self._device_state is not None:
                torch.get_device_module(self._device).set_rng_state(self._device_state, self._device)
            for device_type, enabled, dtype in self._autocasts:
                stack.enter_context(torch.autocast(device_type, enabled=enabled, dtype=dtype))
            yield


_BUILTIN = frozenset(vars(nn.Module()))
_PACKAGE = __name__.rpartition(".")[0]


def _settings_of(module: nn.Module) -> list[_Held]:
    """Return the mode of a module and, unless it is of torch or of this package, its plain attributes."""
    attributes = vars(module)
    settings: list[_Held] = [(attributes, "training", module.training)]
    if not type(module).__module__.startswith(("torch.nn.", f"{_PACKAGE}.")):
        settings += [
            (attributes, name, list(value) if isinstance(value, list) else value)
            for name, value in attributes.items()
            if name not in _BUILTIN and isinstance(value, (bool, int, float, str, list, tuple))
        ]
    return settings


def _swap(held: Sequence[_Held]) -> Callable[[], None]:
    """Set attributes, parameters and buffers where they differ, and return a function that restores them."""
    changed = [each for each in held if _differs(each[0].get(each[1]), each[2])]
    old = [(holder, name, holder.get(name)) for holder, name, _ in changed]
    for holder, name, value in changed:
        holder[name] = value

    def restore() -> None:
        for holder, name, value in old:
            holder[name] = value

    return restore


def _differs(now: Any, then: Any) -> bool:
    return now is not then and (then is None or isinstance(then, Tensor) or now != then)


def _require(requirements: Sequence[_Requirement]) -> Callable[[], None]:
    """Let parameters require gradients as captured, and return a function that restores what they did."""
    changed = [each for each, required in requirements if each.is_leaf and each.requires_grad != required]
    for parameter in changed:
        parameter.requires_grad_(not parameter.requires_grad)

    def restore() -> None:
        for parameter in changed:
            parameter.requires_grad_(not parameter.requires_grad)

    return restore
