# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
A page that continues your text and shows what LSH attention saw of it.

    make space
    python examples/space/app.py --model outputs/book --port 7861
    REFORMER_MODEL=me/my-reformer python examples/space/app.py

Needs gradio (`pip install '.[space]'`). Without `--model` and `REFORMER_MODEL`, the page takes the model that
`make demo` left in `outputs/demo`. README.md says how to publish it as a Space.
"""

import argparse
import html
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from attention_picture import BUCKETS, MAX_HASHES, MAX_TOKENS, draw_picture, encode_for_picture
from text_model import (
    MAX_NEW_TOKENS,
    MAX_TEMPERATURE,
    InputError,
    Progress,
    TextModel,
    continue_text,
    find_model,
    load_model,
)

logger = logging.getLogger(__name__)

EXAMPLE = '''def read(self, path):
    """Return the lines of a file."""
    with open(path) as file:
        return file.readlines()

def write(self, path, lines):
    """Write lines to a file."""
    with open(path, "w") as file:
'''
# Fonts of the device: nothing is loaded from elsewhere.
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "DejaVu Sans Mono", "monospace"]
)
CSS = Path(__file__).with_name("page.css")
# Tells the server which token of the picture was clicked.
ON_CLICK = """
element.addEventListener('click', event => {
    const token = event.target.closest('[data-token]');
    if (token) trigger('click', {token: Number(token.dataset.token)});
});
"""


def build_page(text_model: TextModel) -> gr.Blocks:
    """Lay out the page for a model, and connect its events."""
    config = text_model.model.config
    layers = text_model.lsh_layers
    with gr.Blocks(title="Reformer: what LSH attention sees", analytics_enabled=False) as page:
        gr.Markdown(_introduction(text_model))
        text = gr.Textbox(EXAMPLE, label="Your text", lines=7, max_lines=14, elem_id="text")
        with gr.Row():
            number = gr.Number(
                200, label="New tokens", info=f"1 to {MAX_NEW_TOKENS:,}", elem_id="number", min_width=140
            )
            temperature = gr.Number(
                0.7,
                label="Temperature",
                info=f"0 (most probable) to {MAX_TEMPERATURE:g}",
                step=0.1,
                elem_id="temperature",
                min_width=140,
            )
            with gr.Column(min_width=140):
                start = gr.Button("Continue the text", variant="primary", elem_id="continue")
                stop = gr.Button("Stop", elem_id="stop")
        status = gr.HTML(elem_id="status")
        continuation = gr.HTML(elem_id="continuation", visible=False, container=True, padding=True)

        gr.Markdown(_explanation(text_model))
        show = gr.Button("Show what its tokens saw", variant="primary", elem_id="show")
        with gr.Row():
            head = gr.Radio(
                [(str(i + 1), i) for i in range(config.num_attention_heads)],
                value=0,
                label="Head",
                scale=2,
                min_width=240,
            )
            layer = gr.Dropdown(
                [(f"layer {i + 1}", i) for i in layers],
                value=next(iter(layers), None),
                label="LSH layer",
                visible=len(layers) > 1,
                min_width=120,
            )
            rounds = gr.Dropdown(
                list(range(1, MAX_HASHES + 1)),
                value=min(max(config.num_hashes, 2), MAX_HASHES),
                label="Hash rounds",
                min_width=120,
            )
            buckets = gr.Dropdown(BUCKETS, value=8, label="Buckets per round", min_width=120)
            token = gr.Number(1, label="Token", info="or click one below", elem_id="token", min_width=120)
        picture = gr.HTML(js_on_load=ON_CLICK, elem_id="picture")
        shown_ids = gr.State([])

        def generate(*inputs: Any) -> Iterator[tuple[str, Any]]:
            try:
                for progress in continue_text(text_model, *inputs):
                    text = f"<div><b>{html.escape(inputs[0])}</b>{html.escape(progress.text)}</div>"
                    yield _speed(progress, text_model), gr.HTML(text, visible=True)
            except InputError as error:
                yield _message(error), gr.HTML(visible=False)

        def draw(input_ids: list[int], *settings: Any) -> str:
            if not input_ids:
                return _message("Press “Show what its tokens saw” first.")
            try:
                return draw_picture(text_model, input_ids, *settings)
            except InputError as error:
                return _message(error)

        def open_picture(text: str, *settings: Any) -> tuple[list[int], int, str]:
            try:
                input_ids = encode_for_picture(text_model, text)
            except InputError as error:
                return [], 1, _message(error)
            return input_ids, len(input_ids), draw(input_ids, len(input_ids), *settings)

        def choose(
            input_ids: list[int], layer: int, head: int, rounds: int, buckets: int, event: gr.EventData
        ) -> tuple[int, str]:
            return event.token, draw(input_ids, event.token, layer, head, rounds, buckets)

        settings: list[Any] = [layer, head, rounds, buckets]
        running = start.click(
            generate, [text, number, temperature], [status, continuation], show_progress="hidden", api_name="generate"
        )
        stop.click(None, cancels=[running])
        opened = [shown_ids, token, picture]
        gr.on([show.click, page.load], open_picture, [text, *settings], opened, show_progress="hidden", api_name=False)
        changes = [head.input, layer.input, rounds.input, buckets.input, token.input]
        gr.on(changes, draw, [shown_ids, token, *settings], picture, show_progress="hidden", api_name=False)
        picture.click(choose, [shown_ids, *settings], [token, picture], show_progress="hidden", api_name=False)
    return page


def _introduction(text_model: TextModel) -> str:
    config = text_model.model.config
    size = f"{text_model.model.num_parameters() / 1e6:.1f} million parameters"
    layers = ", ".join(config.attn_layers)
    return f"""# What does LSH attention see?

A [Reformer](https://arxiv.org/abs/2001.04451) does not compare each token with all earlier ones. It hashes them into
buckets and looks only inside its own bucket, which makes long texts affordable. Let it continue your text, then see
which tokens it looked at, and what it missed.

Model: **{html.escape(text_model.name)}**, {size}, layers {layers}, context {text_model.context_length:,} tokens."""


def _explanation(text_model: TextModel) -> str:
    config = text_model.model.config
    nearest = config.lsh_attn_chunk_length * config.chunks_before("lsh")
    reach = f", at most the nearest {nearest:,}" if config.lsh_pattern == "window" else ""
    return f"""## Which earlier tokens did a token see?

In each hash round, a token sees the tokens that hash to its own bucket{reach}. More rounds find more. More buckets
make each of them smaller: the model takes more buckets for longer texts, so 8 or 16 show on a short text (up to
{MAX_TOKENS} tokens) what happens in one of thousands. **Click a token to choose it.**"""


def _speed(progress: Progress, text_model: TextModel) -> str:
    speed = "" if progress.tokens_per_second is None else f" · <b>{progress.tokens_per_second:,.0f} tokens/s</b>"
    context = f"context {progress.context_length:,} of {text_model.context_length:,} tokens"
    return f'<div class="speed">{progress.num_new_tokens:,} new tokens{speed} · {context}</div>'


def _message(error: InputError | str) -> str:
    return f'<div class="message" role="alert">{html.escape(str(error))}</div>'


def main() -> None:
    """Load the model and serve the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a causal model")
    parser.add_argument("--host", help="address to listen on (default: this machine only; in a Space, all)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    args = parser.parse_args()
    try:
        text_model = load_model(find_model(args.model))
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    build_page(text_model).queue(max_size=32).launch(
        server_name=args.host, server_port=args.port, theme=THEME, css_paths=CSS
    )


if __name__ == "__main__":
    main()
