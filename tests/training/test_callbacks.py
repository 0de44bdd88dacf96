# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""When callbacks stop training."""

from types import SimpleNamespace

import pytest
import torch

from reformer_hf.training import NonFiniteGradientsError, StopOnNonFinite


@pytest.mark.parametrize("grad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients(grad):
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    args = SimpleNamespace(fp16=False, output_dir="out", learning_rate=0.1)
    state = SimpleNamespace(global_step=4)
    callback = StopOnNonFinite()
    callback.on_pre_optimizer_step(args, state, None, model=model)
    model.weight.grad[0, 1] = grad
    with pytest.raises(NonFiniteGradientsError, match="step 5.*'out' are unchanged.*`learning_rate`.*0.1"):
        callback.on_pre_optimizer_step(args, state, None, model=model)
    args.fp16 = True
    callback.on_pre_optimizer_step(args, state, None, model=model)
