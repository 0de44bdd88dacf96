# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The state of a computation, captured to be replayed in a recomputation."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Attributes, parameters or buffers of a module, with the name and value of one of them.
_Held = tuple[dict[str, Any], str, Any]
# Parameters with whether they require gradients.
_Requirement = tuple[Tensor, bool]
# Functions that return and set the state of a random number generator.
_Generator = tuple[Callable[[], Any], Callable[[Any], Any]]


def trainable_parameters(module: nn.Module) -> list[Tensor]:
    """Return the parameters of a module that require gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class ReplayState:
    """
    Capture what a computation depends on besides its inputs: states of torch's generators, autocast settings, and the
    modes, parameters and buffers of a module. If it contains modules that are not of torch or of this package, their
    settings as well, such as which adapter is active, and the states of Python's, NumPy's and their own generators.

    Args:
        device: Device of the computation to replay. Its generator and that of the CPU are captured.
        module: The module that the computation uses.

    Attributes:
        has_foreign_modules: Whether the module contains others that are not of torch or of this package.
    """

    def __init__(self, device: torch.device, module: nn.Module):
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
        modules = list(module.modules())
        self._settings: list[_Held] = [(vars(each), "training", each.training) for each in modules]
        foreign = [each for each in modules if is_foreign(each)]
        self._settings += [setting for each in foreign for setting in _settings_of(each)]
        self._generators = [(get, set, get()) for get, set in _generators_of(foreign)]
        self.has_foreign_modules = bool(foreign)
        self._requirements = [(each, each.requires_grad) for each in module.parameters()]
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
            for get, set, state in self._generators:
                stack.callback(set, get())
                set(state)
            for device_type, enabled, dtype in self._autocasts:
                stack.enter_context(torch.autocast(device_type, enabled=enabled, dtype=dtype))
            yield


_BUILTIN = frozenset(vars(nn.Module()))
_PACKAGE = __name__.rpartition(".")[0]
_SCALARS = (bool, int, float, str, type(None))
_CONTAINERS = (list, tuple, dict, set)


def is_foreign(module: nn.Module) -> bool:
    """Return whether a module is neither of torch nor of this package, nor an activation function of Transformers."""
    return not type(module).__module__.startswith(("torch.nn.", f"{_PACKAGE}.", "transformers.activations"))


def _settings_of(module: nn.Module) -> list[_Held]:
    """Return the plain attributes of a module, and copies of its containers of plain values."""
    return [
        (vars(module), name, copy.copy(value) if isinstance(value, _CONTAINERS) else value)
        for name, value in vars(module).items()
        if name not in _BUILTIN and _is_plain(value)
    ]


def _is_plain(value: Any) -> bool:
    if isinstance(value, _CONTAINERS):
        values = value.values() if isinstance(value, dict) else value
        return all(isinstance(each, _SCALARS) for each in values)
    return isinstance(value, _SCALARS)


def _generators_of(modules: Sequence[nn.Module]) -> list[_Generator]:
    """Return the generators that modules may use, apart from the global ones of torch."""
    if not modules:
        return []
    generators: list[_Generator] = [
        (random.getstate, random.setstate),
        (np.random.get_state, np.random.set_state),
    ]
    for value in {id(value): value for each in modules for value in vars(each).values()}.values():
        if isinstance(value, torch.Generator):
            generators.append((value.get_state, value.set_state))
        elif isinstance(value, random.Random):
            generators.append((value.getstate, value.setstate))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            generators.append((partial(getattr, bits, "state"), partial(setattr, bits, "state")))
    return generators


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
