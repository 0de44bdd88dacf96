# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Muon for the weights of linear layers and AdamW for all other parameters, as one optimizer."""

from collections.abc import Callable
from typing import Any, overload

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
        model: The model. Parameters without `requires_grad` are left out.
        muon_lr: Learning rate of Muon.
        lr: Learning rate of AdamW.
        betas, eps: Of AdamW.
        weight_decay: Weight decay of parameters with two or more dimensions.

    Raises:
        `ValueError`: If no weight of a linear layer is to be trained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        muon_lr: float = 0.05,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        head = model.get_output_embeddings()
        linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
        matrices = [layer.weight for layer in linear if layer.weight.requires_grad]
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
        """Let the parts work on the groups, into which schedules write learning rates, and on the state of this one."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure=None):
        """Update all parameters. Returns the loss of `closure`."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, in the format of any optimizer."""
        super().load_state_dict(state_dict)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold."""
        return {**super().__getstate__(), "parts": self.parts}
