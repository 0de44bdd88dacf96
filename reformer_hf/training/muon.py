# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Muon for the weights of linear layers and AdamW for all other parameters, as one optimizer."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel


class MuonWithAdamW(Optimizer):
    """
    `torch.optim.Muon` for the weights of linear layers, `torch.optim.AdamW` for embeddings, LM head, norms and biases.

    Muon (Jordan et al. 2024) makes the momentum of a matrix orthogonal before it takes a step, so that the step does
    not depend on the scale of the gradients. A byte-level model learns text in far fewer steps than with AdamW alone
    (`docs/defaults.md`). Use it with `Trainer(optimizers=(MuonWithAdamW(model), None))`. Weights may be sharded with
    FSDP2. DeepSpeed cannot use it: it flattens weights, and Muon needs matrices.

    Args:
        model: The model, with its adapters if it has any. Parameters without `requires_grad` are left out.
        muon_lr: Learning rate of Muon.
        lr: Learning rate of AdamW.
        betas, eps: Of AdamW.
        weight_decay: Weight decay of parameters with two or more dimensions.

    Raises:
        `ValueError`: If no weight of a linear layer is to be trained, or if `model` is not a module.
    """

    def __init__(
        self,
        model: nn.Module,
        muon_lr: float = 0.02,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"`model` is a {type(model).__name__}, but must be the model itself, whose modules tell which weights "
                "are those of linear layers: pass `optimizers=(MuonWithAdamW(model), None)` to `Trainer`, or "
                "`optimizer_cls_and_kwargs=(MuonWithAdamW, {'model': model})`."
            )
        # Adapters and other wrappers contain the model.
        heads = {id(each.get_output_embeddings()) for each in model.modules() if isinstance(each, PreTrainedModel)}
        linear = [each for each in model.modules() if isinstance(each, nn.Linear) and id(each) not in heads]
        # A weight that layers share is listed once.
        matrices = list({id(layer.weight): layer.weight for layer in linear if layer.weight.requires_grad}.values())
        if not matrices:
            raise ValueError(
                "`model` has no linear layer with a trainable weight, which Muon is for: use `torch.optim.AdamW`."
            )
        taken = {id(matrix) for matrix in matrices}
        others = [each for each in model.parameters() if each.requires_grad and id(each) not in taken]
        groups: list[dict[str, Any]] = [
            {"params": [each for each in others if each.dim() > 1], "weight_decay": weight_decay},
            {"params": [each for each in others if each.dim() <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.parts: list[Optimizer] = [Muon(matrices, lr=muon_lr, weight_decay=weight_decay)]
        if groups:
            self.parts.append(AdamW(groups, lr=lr, betas=betas, eps=eps))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts use the state of this optimizer and its groups, into which schedules write learning rates."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure=None):
        """
        Update all parameters. Returns the loss of `closure`.

        Raises:
            `ValueError`: If all parameters have been frozen since the optimizer was created.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not any(each.requires_grad for group in self.param_groups for each in group["params"]):
            raise ValueError(
                "All parameters of the optimizer have been frozen since it was created: create it after adapters have "
                "been added, as with `optimizer_cls_and_kwargs=(MuonWithAdamW, {'model': model})` of `Trainer`."
            )
        for part in self.parts:
            part.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise `ValueError`, once the optimizer is complete: it cannot tell which part is to train a new group."""
        if len(self.param_groups) == sum(len(part.param_groups) for part in self.parts):
            raise ValueError("`add_param_group` is not supported: create the optimizer when all parameters exist.")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Load what `state_dict` returned, in the format of any optimizer.

        Raises:
            `ValueError`: If it is the state of another optimizer or of other parameters.
        """
        super().load_state_dict(state_dict)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold."""
        return {**super().__getstate__(), "parts": self.parts}
