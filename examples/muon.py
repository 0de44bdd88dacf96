# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Muon for the matrices of a model and AdamW for its other parameters, as one optimizer for `Trainer`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel


class MuonWithAdamW(Optimizer):
    """
    Two optimizers of torch as one: `Muon` for matrices, `AdamW` for everything else.

    Args:
        matrices: Two-dimensional parameters.
        others: All other parameters, in groups with a `weight_decay` each.
        muon_learning_rate: Learning rate of Muon. Orthogonal updates do not depend on the scale of gradients, so it is
            larger than that of AdamW.
        weight_decay: Weight decay of Muon.
        **adamw: Options of `AdamW`.
    """

    def __init__(
        self,
        matrices: list[Tensor],
        others: list[dict[str, Any]],
        muon_learning_rate: float,
        weight_decay: float,
        **adamw: Any,
    ):
        self.parts = (Muon(matrices, lr=muon_learning_rate, weight_decay=weight_decay), AdamW(others, **adamw))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        # Schedules write learning rates into the groups of this optimizer, and the parts read them.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update all parameters. Returns the loss of `closure`."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both parts."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def matrices_of(model: PreTrainedModel) -> set[str]:
    """Return the names of the trainable weights of linear layers, without the output embeddings."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not model.get_output_embeddings()
        and module.weight.requires_grad
    }
