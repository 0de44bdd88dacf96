# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The picture of LSH attention as HTML: a text whose tokens are colored by what a chosen token saw of them."""

import html
from typing import Any

import torch
from text_model import InputError, TextModel, whole_number
from torch import Tensor

from reformer_hf.diagnostics import SeenKeys, seen_keys

# The page stays readable, and a phone fast.
MAX_TOKENS = 600
MAX_HASHES = 8
BUCKETS = [2, 4, 8, 16, 32]


def encode_for_picture(text_model: TextModel, text: Any) -> list[int]:
    """
    Tokenize the text of a picture.

    Raises:
        InputError: If the text is empty or too long, or if the model has no LSH layer.
    """
    if not text_model.lsh_layers:
        raise InputError("This model has no LSH layer, so there is nothing to show.")
    input_ids = text_model.encode(text)
    if not 2 <= len(input_ids) <= MAX_TOKENS:
        raise InputError(f"The text has {len(input_ids):,} tokens. The picture needs 2 to {MAX_TOKENS}.")
    return input_ids


def draw_picture(
    text_model: TextModel, input_ids: list[int], token: Any, layer: int, head: int, num_hashes: Any, num_buckets: Any
) -> str:
    """
    Draw what one token saw, and what full attention would have looked at.

    Args:
        text_model: The model.
        input_ids: The tokens, from `encode_for_picture`.
        token: Number of the chosen token, from 1.
        layer: Index of an LSH layer.
        head: The head whose texts are drawn. The table has all heads.
        num_hashes: Number of hash rounds.
        num_buckets: Number of buckets in each round.

    Returns:
        HTML. Elements of tokens have their number in the attribute `data-token`.

    Raises:
        InputError: If a number cannot be used; the message says what to change.
    """
    query = whole_number(token, "Token", 1, len(input_ids)) - 1
    rounds = whole_number(num_hashes, "Hash rounds", 1, MAX_HASHES)
    buckets = whole_number(num_buckets, "Buckets", min(BUCKETS), max(BUCKETS))
    ids = torch.tensor([input_ids])
    keys = seen_keys(text_model.model, ids, layer, queries=[query], num_hashes=rounds, num_buckets=buckets)
    labels = [_label(text_model.tokenizer.decode([token_id]), token_id) for token_id in input_ids]
    weights, seen = keys.weights[head, 0], keys.seen[head, :, 0]
    name = f"<mark>{labels[query].strip() or '&nbsp;'}</mark> (token {query + 1})"
    panels = [
        _panel(
            "Full attention",
            f"what {name} would look at in head {head + 1} if it compared itself with all {query} earlier tokens",
            _text(labels, query, weights, None),
            "full",
        )
    ]
    for i in range(rounds):
        bucket = keys.buckets[head, i]
        size = int((bucket == bucket[query]).sum())
        found = f"{_count(seen[i], query)} of {query} earlier tokens, with {_share(weights, seen[i])} of the weight"
        caption = f"its bucket holds {size} of {len(labels)} tokens; it saw {found}"
        panels.append(_panel(f"Hash round {i + 1}", caption, _text(labels, query, weights, seen[i]), "round"))
    return f'<div class="lsh">{_legend()}{"".join(panels)}{_table(keys, head, query)}</div>'


def _count(seen: Tensor, query: int) -> int:
    """Count the earlier tokens that a query saw, `[L]`."""
    return int(seen[:query].sum())


def _share(weights: Tensor, seen: Tensor) -> str:
    return f"{float((weights * seen).sum()):.0%}"


def _label(token: str, token_id: int) -> str:
    """Return a token as escaped text that is visible."""
    if "\N{REPLACEMENT CHARACTER}" in token or not token:
        # A part of a character.
        return f"<small>{token_id}</small>"
    visible = {"\n": "↵\n", "\r": "␍", "\t": "⇥"}
    return "".join(visible.get(character, html.escape(character)) for character in token)


def _text(labels: list[str], query: int, weights: Tensor, seen: Tensor | None) -> str:
    """Mark up a text: which tokens are seen (all, if `None`), missed, later, and how much weight they have."""
    # Square roots make small weights visible. The largest one has the full color.
    strengths = (weights / weights[:query].max().clamp(min=1e-9)).sqrt().tolist() if query else [0.0] * len(labels)
    parts = []
    for i, label in enumerate(labels):
        if i == query:
            kind, style, title = "chosen", "", "the chosen token"
        elif i > query:
            kind, style, title = "later", "", "a later token, which it cannot see"
        else:
            is_seen = seen is None or bool(seen[i])
            kind = "all" if seen is None else "seen" if is_seen else "missed"
            style = f' style="--weight:{strengths[i]:.2f}"'
            title = f"token {i + 1}, {float(weights[i]):.1%} of full attention{'' if is_seen else ', missed'}"
        parts.append(f'<span class="{kind}" data-token="{i + 1}" title="{title}"{style}>{label}</span>')
    return "".join(parts)


def _panel(title: str, caption: str, text: str, kind: str) -> str:
    return f'<section class="{kind}"><h4>{title}</h4><p>{caption}</p><div class="tokens">{text}</div></section>'


def _legend() -> str:
    entries = {
        "chosen": "the chosen token: click another one",
        "all": "weight in full attention: the darker, the more",
        "seen": "seen by LSH attention (underlined)",
        "missed": "missed: full attention would have looked here",
        "later": "comes later, cannot be seen",
    }
    items = [f'<li><span class="{kind}" style="--weight:0.8">abc</span> {text}</li>' for kind, text in entries.items()]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _table(keys: SeenKeys, chosen: int, query: int) -> str:
    """Tabulate for all heads what each round found."""
    rounds = keys.seen.shape[1]
    header = "".join(f"<th>round {i + 1}</th>" for i in range(rounds))
    rows = []
    for head in range(len(keys.heads)):
        weights, seen = keys.weights[head, 0], keys.seen[head, :, 0]
        masks = [*seen, seen.any(0)]
        cells = "".join(
            f"<td>{_share(weights, mask)} <small>in {_count(mask, query)} tokens</small></td>" for mask in masks
        )
        kind = ' class="current"' if head == chosen else ""
        rows.append(f"<tr{kind}><th>head {head + 1}</th>{cells}</tr>")
    caption = (
        "share of the weight of full attention that the chosen token found, and in how many tokens it looked for it"
    )
    return (
        f'<section class="table"><h4>All heads</h4><p>{caption}</p><div><table>'
        f"<tr><td></td>{header}<th>together</th></tr>{''.join(rows)}</table></div></section>"
    )
