# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""When callbacks stop training, and which handler receives signals afterwards."""

import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl
from transformers.trainer_callback import CallbackHandler

from reformer_hf.training import NonFiniteGradientsError, SaveOnSigterm, StopOnNonFinite

from ..helpers import assert_refused


def test_non_finite_gradients():
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    args = SimpleNamespace(fp16=False, output_dir="out", learning_rate=0.1)
    state = SimpleNamespace(global_step=4)
    callback = StopOnNonFinite()
    callback.on_pre_optimizer_step(args, state, None, model=model)

    def step(grad):
        model.weight.grad[0, 1] = grad
        callback.on_pre_optimizer_step(args, state, None, model=model)

    said = "step 5.*'out' are unchanged.*`learning_rate`.*0.1"
    bad = {str(grad): (grad, said) for grad in (float("nan"), float("inf"), -float("inf"))}
    assert_refused(step, bad, NonFiniteGradientsError)
    args.fp16 = True
    for grad, _ in bad.values():
        step(grad)


@pytest.fixture
def received():
    """The signals that the handler of the process has received."""
    numbers = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, previous)


def _train(callback, signals=0, fails=False):
    """Training as `Trainer` calls its callbacks: not at all when a step raises."""
    handler = CallbackHandler([callback], None, None, None, None)
    handler.on_train_begin(None, None, TrainerControl())
    for _ in range(signals):
        signal.raise_signal(signal.SIGTERM)
    if fails:
        raise RuntimeError("a step failed")
    control = handler.on_step_end(None, None, TrainerControl())
    handler.on_train_end(None, None, control)
    return control


def test_sigterm(received):
    before, callback = signal.getsignal(signal.SIGTERM), SaveOnSigterm()
    control = _train(callback, signals=1)
    assert callback.stopped and control.should_save and control.should_training_stop and not received
    assert signal.getsignal(signal.SIGTERM) is before
    control = _train(callback)
    assert not (callback.stopped or control.should_save)


def test_sigterm_while_processes_agree(received, monkeypatch):
    """A signal in the reduction counts at the next step, and one after the last step goes to the previous handler."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args: signal.raise_signal(signal.SIGTERM))
    args = SimpleNamespace(device="cpu")

    def train(steps):
        handler = CallbackHandler([callback := SaveOnSigterm()], None, None, None, None)
        handler.on_train_begin(args, None, TrainerControl())
        control = handler.on_step_end(args, None, TrainerControl())
        assert not (callback.stopped or control.should_save or received)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args: None)
        if steps == 2:
            control = handler.on_step_end(args, None, TrainerControl())
        handler.on_train_end(args, None, control)
        return callback.stopped and control.should_save

    assert train(steps=2) and not received
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args: signal.raise_signal(signal.SIGTERM))
    assert not train(steps=1) and received == [signal.SIGTERM]


def test_second_sigterm(received):
    """It is the previous handler's, as it is without the callback."""
    _train(callback := SaveOnSigterm(), signals=2)
    assert callback.stopped and received == [signal.SIGTERM]


@pytest.mark.parametrize("retries", [0, 1])
def test_sigterm_after_failed_training(retries, received):
    before, callback = signal.getsignal(signal.SIGTERM), SaveOnSigterm()
    for _ in range(1 + retries):
        with pytest.raises(RuntimeError, match="a step failed"):
            _train(callback, fails=True)
    signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM] and not callback.stopped
    assert signal.getsignal(signal.SIGTERM) is before
