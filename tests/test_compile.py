# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""`torch.compile`: right results, no compilation anew at each step. `torch.export`: a clear refusal."""

import re

import pytest
import torch

from .helpers import assert_close, gradients, random_model

pytestmark = pytest.mark.slow

LAYERS = ["local", "lsh", "full"]


NOT_COMPILED = "Only decoding steps with a static cache are compiled: set `fullgraph=False`"


@pytest.fixture
def count_compilations():
    """Counts the graphs that were compiled since."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _ids(seed, length=45):
    return torch.randint(1, 60, (2, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_evaluation(padded, count_compilations):
    model = random_model(attn_layers=LAYERS)
    compiled = torch.compile(model, backend="aot_eager")
    mask = torch.ones(2, 45, dtype=torch.long)
    if padded:
        mask[0, :9] = 0
    with torch.no_grad():
        for seed in range(4):
            ids = _ids(seed)
            assert_close(compiled(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits, 1e-5)
            if seed == 1:
                warm = count_compilations()
    assert count_compilations() == warm > 0


@pytest.mark.parametrize("reversible", [True, False], ids=["reversible", "plain"])
def test_training(reversible, count_compilations):
    fields = {"attn_layers": LAYERS, "reversible": reversible, "hidden_dropout_prob": 0.1}
    model, twin = (random_model(torch.float64, **fields).train() for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(4):
        for call in (compiled, twin):
            torch.manual_seed(seed)
            call.zero_grad()
            call(_ids(seed), labels=_ids(seed)).loss.backward()
        expected = gradients(twin)
        for name, grad in gradients(model).items():
            assert_close(grad, expected[name], 1e-10, name)
        if seed == 1:
            warm = count_compilations()
    assert count_compilations() == warm > 0
    # One for the encoder, counted again in each function around it; nothing else is left out.
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert all("torch.compiler.disable" in reason for reason in breaks) and sum(breaks.values()) <= 6


def test_whole_graph(count_compilations):
    compiled = torch.compile(random_model(attn_layers=LAYERS).train(), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=re.escape(NOT_COMPILED)):
        compiled(_ids(0), labels=_ids(0))


def test_inductor():
    """The default backend, which makes kernels."""
    torch._dynamo.reset()
    model = random_model(attn_layers=["local", "lsh"])
    compiled = torch.compile(model)
    ids = _ids(0)
    with torch.no_grad():
        assert_close(compiled(ids).logits, model(ids).logits, 1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_refused(strict):
    """A program that was exported would keep the order of the input that it was traced with."""
    model = random_model(attn_layers=LAYERS).requires_grad_(False)
    with pytest.raises(Exception, match="torch.export.*use.*torch.compile"):
        torch.export.export(model, (_ids(0),), strict=strict)


def test_trace_is_refused():
    with pytest.raises(ValueError, match="`torch.jit.trace` and exports to ONNX.*use.*torch.compile"):
        torch.jit.trace(random_model(attn_layers=LAYERS), _ids(0))
