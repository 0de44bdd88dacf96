# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Low precision: autocast in the recomputation too, streams in fp32, masks without NaN, loss scaling."""

import pytest
import torch

from reformer_hf import ReformerHfForCausalLM
from reformer_hf.reversible import logger

from .helpers import assert_close, gradients, random_model, relative_rms, tiny_config

LAYERS = ["local", "lsh", "full", "lsh"]
# Nothing that jumps where rounding differs, but buckets.
SMOOTH = {"attn_layers": LAYERS, "hidden_act": "gelu", "hash_seed": 0}
LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def _batch(length=61):
    torch.manual_seed(1)
    ids = torch.randint(1, 60, (2, length))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :25] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


class _Observed(torch.nn.Linear):
    """Appends the dtype of its output, and whether autocast is on, to `seen`."""

    seen: list

    def forward(self, input):
        out = super().forward(input)
        self.seen.append((out.dtype, torch.is_autocast_enabled("cpu")))
        return out


def test_recomputation_under_autocast():
    """The backward pass runs outside autocast; what it recomputes does not."""
    model = random_model(attn_layers=LAYERS, num_parallel_heads=1).train()
    # An attribute of a module would be that of the forward pass, in the recomputation too.
    _Observed.seen = seen = []
    for name, module in model.named_modules():
        if name.endswith("dense") and isinstance(module, torch.nn.Linear):
            # A layer with hooks or other functions inside would not recompute.
            module.__class__ = _Observed
    for dtype in (torch.bfloat16, torch.float16):
        seen.clear()
        with torch.autocast("cpu", dtype):
            loss = model(**_batch()).loss
        forward = len(seen)
        loss.backward()
        assert not torch.is_autocast_enabled("cpu"), dtype
        assert len(seen) > forward > 0, dtype
        assert set(seen) == {(dtype, True)}


@LOW
def test_reversible_gradients(dtype):
    """The plain gradient itself is off by the noise of the dtype; inverting adds little to that."""
    grads = {}
    for name, reversible, autocast in (("exact", False, False), ("plain", False, True), ("reversible", True, True)):
        model = random_model(reversible=reversible, **SMOOTH).train()
        with torch.autocast("cpu", dtype, enabled=autocast):
            loss = model(**_batch()).loss
        loss.backward()
        grads[name] = torch.cat([grad.flatten() for grad in gradients(model).values()])
    noise = relative_rms(grads["plain"], grads["exact"])
    assert 0 < noise < {torch.bfloat16: 0.08, torch.float16: 0.025}[dtype]
    assert relative_rms(grads["reversible"], grads["plain"]) < noise / 4


@LOW
def test_weights_of_low_precision(dtype):
    """Streams stay in fp32; output and gradients are those of the fp32 model within the noise of its weights."""
    # With more than one bucket, noise moves some tokens to others.
    model, low = (random_model(attn_layers=LAYERS, num_buckets=1) for _ in range(2))
    low.to(dtype)
    batch = _batch()
    with torch.no_grad():
        output = low(**batch, output_hidden_states=True)
        expected = model(**batch).logits
    assert {state.dtype for state in output.hidden_states} == {torch.float32}
    real = batch["attention_mask"].bool()
    output_limit, gradient_limit = {torch.bfloat16: (0.012, 0.09), torch.float16: (0.0015, 0.035)}[dtype]
    assert_close(output.logits[real], expected[real], output_limit)
    for each in (model, low):
        each.train()(**batch).loss.backward()
    expected_grads = gradients(model)
    for name, grad in gradients(low).items():
        assert grad.dtype == dtype
        assert_close(grad, expected_grads[name], gradient_limit, name)


@pytest.mark.parametrize("pattern", ["window", "chunk"])
def test_row_of_padding_finite(pattern):
    """And without effect: the other row has the loss and gradients that it has alone."""
    batch = _batch()
    batch["attention_mask"][0] = 0
    batch["labels"][0] = -100
    alone = {name: tensor[1:] for name, tensor in batch.items()}
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    for dtype, autocast in [*((dtype, False) for dtype in dtypes), (torch.bfloat16, True), (torch.float16, True)]:
        found = []
        for inputs in (batch, alone):
            model = random_model(lsh_pattern=pattern, **SMOOTH).train()
            model = model if autocast else model.to(dtype)
            with torch.autocast("cpu", dtype if autocast else torch.bfloat16, enabled=autocast):
                output = model(**inputs)
            output.loss.backward()
            assert output.logits.isfinite().all()
            found.append({"loss": output.loss.detach(), "logits": output.logits[-1:].detach(), **gradients(model)})
        limit = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.005}[dtype]
        for name, tensor in found[0].items():
            assert_close(tensor, found[1][name], limit, f"{name}, {dtype}, autocast {autocast}")


@pytest.mark.slow
def test_training_in_bf16():
    """Two hundred steps on one text; the weights are in bf16, the optimizer's copies in fp32 are not kept."""
    ids = torch.randint(1, 60, (8, 64), generator=torch.Generator().manual_seed(0))
    ids = ids[:, :16].repeat(1, 4)
    losses = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("autocast", torch.float32)):
        torch.manual_seed(0)
        model = ReformerHfForCausalLM(tiny_config(attn_layers=LAYERS)).to(dtype).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses[name] = []
        for step in range(200):
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
                loss = model(ids[step % 4 * 2 :][:2], labels=ids[step % 4 * 2 :][:2]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    mean = {name: sum(values[-20:]) / 20 for name, values in losses.items()}
    assert mean["fp32"] < losses["fp32"][0] - 2
    # Of a fall of more than two nats, a tenth.
    for name in ("bf16", "autocast"):
        assert mean[name] < mean["fp32"] + 0.2, mean


def test_grad_scaler_skips_overflow():
    model = random_model(attn_layers=LAYERS).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    expected = random_model(attn_layers=LAYERS).train()
    with torch.autocast("cpu", torch.float16):
        loss, expected_loss = model(**_batch()).loss, expected(**_batch()).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    expected_loss.backward()
    scaled, unscaled = (torch.cat([grad.flatten() for grad in gradients(m).values()]) for m in (model, expected))
    assert_close(scaled, unscaled, 0.001)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scaler.step(optimizer)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    overflowing = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = model(**_batch()).loss
    overflowing.scale(loss).backward()
    overflowing.step(optimizer)
    overflowing.update()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert overflowing.get_scale() < 2.0**40


def test_cast_streams_warn(monkeypatch):
    """As FSDP2 casts the inputs of a layer, unless told otherwise."""
    messages = []
    monkeypatch.setattr(logger, "warning_once", messages.append)
    model = random_model(attn_layers=LAYERS).train()
    model(**_batch())
    assert not messages
    layer = model.reformer.encoder.layers[0]
    layer.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(), args[1].bfloat16(), *args[2:]))
    model(**_batch())
    assert messages and all("bfloat16" in text and "cast_forward_inputs=False" in text for text in messages)
