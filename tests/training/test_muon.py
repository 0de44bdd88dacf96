# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""One optimizer takes the steps of Muon and AdamW on the parameters that each is for."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW, Muon

from reformer_hf import ReformerHfForCausalLM
from reformer_hf.training import MuonWithAdamW

from ..helpers import tiny_config


def _gradients(model, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def _steps(model, optimizers, steps: range) -> None:
    for step in steps:
        _gradients(model, step)
        for optimizer in optimizers:
            optimizer.step()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ReformerHfForCausalLM(tiny_config(is_decoder=True))


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_equals_both_optimizers(tied):
    torch.manual_seed(0)
    model = ReformerHfForCausalLM(tiny_config(is_decoder=True, tie_word_embeddings=tied))
    expected = copy.deepcopy(model)
    of_layers = {
        name: parameter
        for name, parameter in expected.named_parameters()
        if parameter.dim() == 2 and ".layers." in name
    }
    others = [parameter for name, parameter in expected.named_parameters() if name not in of_layers]
    optimizers = [
        Muon(list(of_layers.values()), lr=0.05, weight_decay=0.1),
        AdamW([each for each in others if each.dim() > 1], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1),
        AdamW([each for each in others if each.dim() == 1], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    _steps(expected, optimizers, range(3))
    _steps(model, [MuonWithAdamW(model, 0.05, weight_decay=0.1)], range(3))
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_resumed(model):
    """State and learning rates of a schedule survive saving and loading."""
    optimizer = MuonWithAdamW(model)
    _steps(model, [optimizer], range(2))
    resumed_model = copy.deepcopy(model)
    resumed = MuonWithAdamW(resumed_model)
    state = copy.deepcopy(optimizer.state_dict())
    # In the form that FSDP2 and the distributed checkpoints of torch read.
    assert state.keys() == {"state", "param_groups"}
    resumed.load_state_dict(state)
    for each in (optimizer, resumed):
        for group in each.param_groups:
            group["lr"] *= 0.5
    _steps(model, [optimizer], range(2, 4))
    _steps(resumed_model, [resumed], range(2, 4))
    assert all(map(torch.equal, model.parameters(), resumed_model.parameters()))


def test_copied(model):
    """A copy continues like the original, each with its own state."""
    optimizer = MuonWithAdamW(model)
    _steps(model, [optimizer], range(2))
    other_model, other = copy.deepcopy((model, optimizer))
    _steps(other_model, [other], range(2, 4))
    _steps(model, [optimizer], range(2, 4))
    assert all(map(torch.equal, model.parameters(), other_model.parameters()))


def test_schedule_reaches_both(model):
    optimizer = MuonWithAdamW(model)
    before = copy.deepcopy(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _steps(model, [optimizer], range(1))
    assert all(map(torch.equal, model.parameters(), before.parameters()))


def test_frozen_parameters(model):
    model.reformer.embeddings.requires_grad_(False)
    optimizer = MuonWithAdamW(model)
    trained = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert trained == {id(each) for each in model.parameters() if each.requires_grad}
    model.reformer.requires_grad_(False)
    with pytest.raises(ValueError, match="no linear layer with a trainable weight"):
        MuonWithAdamW(model)
    # As by adapters that are added after the optimizer.
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen since it was created.*adapters"):
        optimizer.step()


def test_refusals(model):
    with pytest.raises(ValueError, match="`model` is a list.*optimizer_cls_and_kwargs"):
        MuonWithAdamW(list(model.parameters()))
    with pytest.raises(ValueError, match="`add_param_group` is not supported"):
        MuonWithAdamW(model).add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="parameter groups"):
        MuonWithAdamW(model).load_state_dict(AdamW(model.parameters()).state_dict())


def test_shared_weight(model):
    """A weight that two layers share takes one step at a time."""
    first, second = (layer.feed_forward.dense for layer in model.reformer.encoder.layers[:2])
    second.dense.weight = first.dense.weight
    matrices = [each for group in MuonWithAdamW(model).param_groups for each in group["params"]]
    assert len(matrices) == len({id(each) for each in matrices})


def test_closure(model):
    """A step with a closure is that after its backward pass, and returns its loss."""
    ids, expected = torch.arange(1, 10)[None], copy.deepcopy(model.eval())

    def closure(model=model):
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss

    loss = closure(expected)
    MuonWithAdamW(expected).step()
    with torch.no_grad():
        assert torch.equal(MuonWithAdamW(model).step(closure), loss)
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_lm_head_of_adapters(model):
    """AdamW trains an LM head that adapters have copied."""
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["lm_head"]))
    names = {id(parameter): name for name, parameter in wrapped.named_parameters()}
    muon, adamw = (
        {names[id(each)] for group in part.param_groups for each in group["params"]}
        for part in MuonWithAdamW(wrapped).parts
    )
    head = "base_model.model.lm_head.modules_to_save.default.decoder.weight"
    assert head in adamw and muon and all(".lora_" in name for name in muon)
