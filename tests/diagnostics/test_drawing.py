# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The picture of attention: what it shows, its files, and what is refused."""

import sys

import pytest
import torch
from matplotlib.figure import Figure

from reformer_hf import ReformerHfByteTokenizer, ReformerHfForMaskedLM
from reformer_hf.diagnostics import attention_coverage, draw_attention
from reformer_hf.diagnostics.drawing import observe_head

from ..helpers import assert_refused, random_model

IDS = torch.randint(3, 60, (50,), generator=torch.Generator().manual_seed(0))
PATTERNS = {
    "window": {},
    "chunk": {"lsh_pattern": "chunk"},
    "ring": {"lsh_pattern": "chunk", "lsh_across_buckets": True, "wrap_chunks": True},
}


@pytest.mark.parametrize(("name", "causal"), [("window", True), ("window", False), ("chunk", False), ("ring", True)])
def test_picture(name, causal):
    """It shows what `attention_coverage` counts."""
    fields = {**PATTERNS[name], "attn_layers": ["local", "lsh"], "is_decoder": causal}
    model = random_model(**fields) if causal else random_model(cls=ReformerHfForMaskedLM, **fields)
    picture = observe_head(model, IDS[None], layer=1, head=1, num_hashes=3, inputs={})
    # Of the hidden states for three hashes; that is the first LSH layer.
    found = attention_coverage(model, IDS[None], num_hashes=3)
    seen = picture.seen.any(0)
    assert (picture.weights * seen).sum() / 50 == pytest.approx(found.coverage[0, 0, 1].item(), rel=1e-5)
    share = (seen.sum(1) / picture.visible.sum(1)).mean()
    assert share == pytest.approx(found.visible_keys[0, 0, 1].item(), rel=1e-5)
    assert picture.seen.shape == (3, 50, 50) and not (seen & ~picture.visible).any()
    assert picture.order.sort().values.tolist() == list(range(50))
    if name == "window":
        # In sorted order, a query sees its own bucket.
        bucket = torch.zeros(50, dtype=torch.long)
        bucket[picture.starts] = 1
        bucket = bucket.cumsum(0)
        pairs = picture.seen[0][picture.order[:, None], picture.order]
        assert not (pairs & (bucket[:, None] != bucket)).any() and pairs.any()


def test_files(tmp_path):
    model = random_model(attn_layers=["lsh"])
    figure = draw_attention(model, IDS, 0, path=tmp_path / "attention.png", num_buckets=4)
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    titles = [panel.get_title(loc="left") for panel in figure.axes[:4]]
    assert [title[0] for title in titles] == ["1", "2", "3", "4"]
    assert all(panel.get_xlabel() and panel.get_ylabel() for panel in figure.axes[:4])
    draw_attention(model, IDS[None], "reformer.encoder.layers.0", 1, path=tmp_path / "attention.svg")
    assert "<svg" in (tmp_path / "attention.svg").read_text()


def test_own_axes():
    figure = Figure()
    axes = figure.subplots(1, 4)
    assert draw_attention(random_model(attn_layers=["lsh"]), IDS, 0, axes=axes) is figure
    assert all(panel.images for panel in axes) and len(figure.axes) == 4


def test_tokens_on_axes():
    text = "a b\n$x$"
    model = random_model(attn_layers=["lsh"], vocab_size=260)
    figure = draw_attention(model, text, 0, tokenizer=ReformerHfByteTokenizer())
    first, by_bucket, _, last = ([label.get_text() for label in panel.get_yticklabels()] for panel in figure.axes[:4])
    assert first == last == ["a", "␣", "b", "↵", r"\$", "x", r"\$"]
    assert sorted(by_bucket) == sorted(first)


def test_refused():
    model, long = random_model(attn_layers=["lsh", "local"]), torch.zeros(1025, dtype=torch.long)
    cases = {
        "string": ("some text", {}, "`text` is a string, but `tokenizer` is None"),
        "long text": (long, {}, r"shape \(1, 1025\), but must be one text of 1 to 1024 tokens"),
        "two texts": (torch.stack([IDS, IDS]), {}, r"shape \(2, 50\), but must be one text"),
        "head": (IDS, {"head": 2}, r"`heads` is \[2\], but the layer has 2 heads"),
        "layer": (IDS, {"layer": 1}, "Layer 1 is not an LSH layer of the model, which has"),
        "axes": (IDS, {"axes": [None]}, "`axes` has 1 entries"),
    }
    assert_refused(lambda text, options: draw_attention(model, text, **{"layer": 0, **options}), cases)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="needs matplotlib: install it"):
        draw_attention(random_model(attn_layers=["lsh"]), IDS, 0)
