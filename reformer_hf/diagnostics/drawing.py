# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Draw what LSH attention does to the attention matrix of a text, as in figure 2 of Kitaev et al. 2020."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attention_pattern import AttentionPattern
from .seen_keys import seen_keys

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A pixel for each pair of tokens.
_MAX_LENGTH = 1024
# Texts of at most that many tokens have their tokens on the axes.
_MAX_LABELS = 48

# From a weight of 0 to a weight of 1, for keys that are seen and keys that are missed: a blue and a vermilion that
# color-blind people can tell apart (Okabe and Ito), also by their lightness.
_SEEN = ("#e3edf7", "#0072b2", "#00243f")
_MISSED = ("#f2f2f2", "#d55e00")
_LINES = "#b0b0b0"
_DPI = 100


@dataclass(frozen=True)
class HeadPicture:
    """
    Attention of one head to a text of L tokens.

    Args:
        weights: Weights of full attention, `[L, L]`.
        visible: Which keys a query of full attention sees, `[L, L]`.
        seen: Which keys it sees in each round of LSH attention, `[R, L, L]`.
        order: The positions in the sorted order of the first round, `[L]`.
        starts: Slots of this order at which a bucket begins.
        pattern: The pattern of the layer.
    """

    weights: Tensor
    visible: Tensor
    seen: Tensor
    order: Tensor
    starts: list[int]
    pattern: AttentionPattern


def draw_attention(
    model: nn.Module,
    text: str | Tensor | Sequence[int],
    layer: int | str,
    head: int = 0,
    path: str | Path | None = None,
    axes: "Sequence[Axes] | None" = None,
    tokenizer: Any = None,
    num_hashes: int | None = None,
    **inputs: Any,
) -> "Figure":
    """
    Draw the attention of one head to a text in four panels: as it is, sorted by bucket, in chunks, and what is found.

    Args:
        model: Any model of this package that has LSH layers, except an encoder-decoder; take one of its stacks.
        text: The text, or the ids `[L]` or `[1, L]` of its tokens, up to 1,024.
        layer: Name of an LSH layer, or its index in `attn_layers`.
        head: The head.
        path: File to write, in a format that matplotlib knows by its name, such as PNG.
        axes: Four axes of a figure to draw to. `None` makes a new figure with a legend.
        tokenizer: Tokenizer of a text. Given with ids, it labels them. Short texts have their tokens on the axes.
        num_hashes: Number of hash rounds. `None` means that of the config.
        **inputs: Other arguments of the model, such as `num_buckets`.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If the layer or the head does not exist, if the text is too long, or if a text has no tokenizer.
    """
    _check_matplotlib()
    input_ids = _ids_of(text, tokenizer)
    picture = observe_head(model, input_ids, layer, head, num_hashes, inputs)
    labels = None
    if tokenizer is not None and input_ids.shape[1] <= _MAX_LABELS:
        labels = [_label(tokenizer.decode([token])) for token in input_ids[0].tolist()]
    return _draw(picture, labels, path, axes)


def observe_head(
    model: nn.Module, input_ids: Tensor, layer: int | str, head: int, num_hashes: int | None, inputs: dict[str, Any]
) -> HeadPicture:
    """Compute what `draw_attention` draws, for ids `[1, L]`."""
    keys = seen_keys(model, input_ids, layer, [head], num_hashes=num_hashes, **inputs)
    sorted_buckets, order = keys.buckets[0, 0].sort(stable=True)
    return HeadPicture(
        weights=keys.weights[0],
        visible=keys.visible,
        seen=keys.seen[0],
        order=order,
        starts=[0, *(sorted_buckets.diff().nonzero()[:, 0] + 1).tolist()],
        pattern=keys.pattern,
    )


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "`draw_attention` needs matplotlib: install it, or the extra `train` (`pip install 'reformer-hf[train]'`)."
        ) from error


def _ids_of(text: str | Tensor | Sequence[int], tokenizer: Any) -> Tensor:
    """Return ids `[1, L]`."""
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("`text` is a string, but `tokenizer` is None: pass the tokenizer of the model, or ids.")
        text = tokenizer(text)["input_ids"]
    input_ids = torch.as_tensor(text)
    input_ids = input_ids[None] if input_ids.dim() == 1 else input_ids
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or not 0 < input_ids.shape[1] <= _MAX_LENGTH:
        raise ValueError(
            f"`text` has ids of shape {tuple(input_ids.shape)}, but must be one text of 1 to {_MAX_LENGTH} tokens."
        )
    return input_ids


def _label(token: str) -> str:
    """Return a token as a visible label without markup."""
    visible = {" ": "␣", "\n": "↵", "\t": "⇥", "$": r"\$"}
    return "".join(visible.get(character, character) for character in token)


def _draw(
    picture: HeadPicture, labels: list[str] | None, path: str | Path | None, axes: "Sequence[Axes] | None"
) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if axes is None:
        figure = Figure(figsize=(10, 11.9), layout=ConstrainedLayoutEngine(h_pad=0.12))
        grid: Any = figure.subplots(2, 2)
        panels: Sequence[Any] = list(grid.flat)
        _draw_scales(figure, panels)
    else:
        panels = list(axes)
        if len(panels) != 4:
            raise ValueError(f"`axes` has {len(panels)} entries, but the drawing has four panels.")
        figure = panels[0].figure
    everything, first_round, any_round = picture.visible, picture.seen[0], picture.seen.any(0)
    by_text, by_bucket = torch.arange(len(picture.order)), picture.order
    _draw_panel(panels[0], picture, by_text, everything, labels)
    _draw_panel(panels[1], picture, by_bucket, everything, labels)
    _draw_panel(panels[2], picture, by_bucket, first_round, labels)
    _draw_panel(panels[3], picture, by_text, any_round, labels)
    for panel in panels[1:3]:
        _draw_buckets(panel, picture)
    _draw_chunks(panels[2], picture)
    if picture.pattern.causal:
        panels[0].text(0.97, 0.97, "later tokens\n(masked)", ha="right", va="top", transform=panels[0].transAxes)
    rounds = "1 hash round" if len(picture.seen) == 1 else f"{len(picture.seen)} hash rounds"
    titles = {
        "1. Full attention": "each row: the attention weights of one query",
        "2. The same weights, sorted by bucket": f"1 hash round; lines separate the {len(picture.starts)} buckets",
        f"3. LSH attention: {_reach(picture.pattern)}": f"1 hash round: {_share(picture, first_round)}",
        "4. LSH attention, in the order of the text": f"{rounds}: {_share(picture, any_round)}",
    }
    for panel, (title, subtitle) in zip(panels, titles.items(), strict=True):
        panel.set_title(title, fontsize=11, loc="left", pad=18)
        panel.text(0, 1.015, subtitle, fontsize=9, color="#444444", transform=panel.transAxes)
    if path is not None:
        figure.savefig(path, dpi=_DPI)
    return figure


def _reach(pattern: AttentionPattern) -> str:
    """Describe which keys in sorted order a query sees."""
    before, after = pattern.chunks_before, pattern.chunks_after
    if pattern.window:
        before, after = before * pattern.chunk_length, after * pattern.chunk_length
    around = [f"{number} {where}" for number, where in ((before, "before"), (after, "after")) if number]
    if pattern.window:
        return f"{' and '.join(around)}, in its bucket"
    return " and ".join([f"own chunk of {pattern.chunk_length}", *around])


def _share(picture: HeadPicture, seen: Tensor) -> str:
    weight = (picture.weights * seen).sum() / len(picture.weights)
    keys = (seen.sum(1) / picture.visible.sum(1)).mean()
    return f"{weight:.0%} of the weight on {keys:.0%} of the keys"


def _draw_panel(panel: "Axes", picture: HeadPicture, order: Tensor, seen: Tensor, labels: list[str] | None) -> None:
    """Draw a matrix of queries (rows) and keys (columns) in some order."""
    pairs = (order[:, None], order[None, :])
    weights = picture.weights[pairs].numpy()
    image = np.where(seen[pairs].numpy()[..., None], _scale(_SEEN).to_rgba(weights), _scale(_MISSED).to_rgba(weights))
    image[~picture.visible[pairs].numpy()] = 1.0
    panel.imshow(image, interpolation="nearest")
    is_sorted = not torch.equal(order, torch.arange(len(order)))
    by = "sorted by bucket, then by position" if is_sorted else "in the order of the text"
    panel.set_xlabel(f"keys, {by}")
    panel.set_ylabel(f"queries, {by}")
    if labels is not None:
        names = [labels[position] for position in order.tolist()]
        font: dict[str, Any] = {"fontsize": min(9, 300 / len(names)), "family": "monospace"}
        panel.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 1 else 0, **font)
        panel.set_yticks(range(len(names)), names, **font)
        panel.tick_params(length=0)


def _draw_buckets(panel: "Axes", picture: HeadPicture) -> None:
    """Draw lines between buckets."""
    for start in picture.starts[1:]:
        panel.axhline(start - 0.5, color=_LINES, linewidth=0.4)
        panel.axvline(start - 0.5, color=_LINES, linewidth=0.4)


def _draw_chunks(panel: "Axes", picture: HeadPicture) -> None:
    """Draw the outlines of what is computed: chunks of queries times the chunks of keys that they see."""
    from matplotlib.patches import Rectangle

    pattern, length = picture.pattern, len(picture.order)
    if pattern.window:
        return
    for start in range(0, length, pattern.chunk_length):
        first = max(start - pattern.chunk_length * pattern.chunks_before, 0)
        end = min(start + pattern.chunk_length * (1 + pattern.chunks_after), length)
        size = end - first, min(pattern.chunk_length, length - start)
        panel.add_patch(Rectangle((first - 0.5, start - 0.5), *size, fill=False, linewidth=0.8))


def _scale(colors: Sequence[str]) -> Any:
    """Return the color scale of weights from 0 to 1."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    # Square roots make small weights visible, and few levels make files small.
    return ScalarMappable(PowerNorm(0.5, 0, 1), LinearSegmentedColormap.from_list("weights", colors, N=24))


def _draw_scales(figure: "Figure", panels: Sequence[Any]) -> None:
    """Draw both color scales below the panels."""
    scales = {"seen": _SEEN, "missed": _MISSED}
    for panel, (name, colors) in zip(panels[2:], scales.items(), strict=True):
        bar = figure.colorbar(_scale(colors), ax=panel, location="bottom", aspect=40, format="{x:g}")
        bar.set_ticks([0, 0.01, 0.1, 0.25, 0.5, 1])
        bar.set_label(f"attention weight of a key that is {name}")
