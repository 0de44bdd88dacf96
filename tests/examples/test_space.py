# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The page in `examples/space`: its functions, its card, and a copy of it as a Space in headless Chromium."""

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from html import unescape

import pytest
import torch
from huggingface_hub import SpaceCard

from reformer_hf import ReformerHfByteTokenizer, ReformerHfForMaskedLM
from reformer_hf.diagnostics import seen_keys

from ..helpers import assert_refused, random_model
from .conftest import EXAMPLES

SPACE = EXAMPLES / "space"
sys.path.insert(0, str(SPACE))

import attention_picture  # noqa: E402
import text_model as text_model_file  # noqa: E402
from text_model import InputError, TextModel, continue_text, find_model, load_model  # noqa: E402

TEXT = "a <b> & the other,\nthe others."
CONTEXT = 512


def _model(**fields):
    return random_model(
        vocab_size=260,
        bos_token_id=258,
        eos_token_id=1,
        max_position_embeddings=CONTEXT,
        **{"attn_layers": ["local", "lsh"], **fields},
    )


@pytest.fixture(scope="module")
def tiny():
    return TextModel(_model(), ReformerHfByteTokenizer(), "tiny")


def _save(folder):
    model = _model()
    # Random weights must not end the text.
    model.lm_head.decoder.bias.data[:2] = -1e4
    model.save_pretrained(folder)
    ReformerHfByteTokenizer().save_pretrained(folder)


def test_continuation_is_that_of_generate(tiny):
    steps = list(continue_text(tiny, TEXT, 30, 0))
    inputs = tiny.tokenizer(TEXT, return_tensors="pt")
    expected = tiny.model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, len(TEXT) :]
    last = steps[-1]
    assert last.num_new_tokens == len(expected) and last.context_length == len(TEXT) + len(expected)
    assert last.text == tiny.tokenizer.decode(expected, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
    assert last.tokens_per_second > 0
    counts = [step.num_new_tokens for step in steps]
    assert counts == sorted(counts)


def test_sampling_has_a_seed(tiny):
    texts = [list(continue_text(tiny, TEXT, 20, 1.5, seed=seed))[-1].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_closing_stops_generation(tiny, monkeypatch):
    monkeypatch.setattr(text_model_file, "_SECONDS_BETWEEN_UPDATES", 0)
    steps = []
    hook = tiny.model.register_forward_pre_hook(lambda *_: steps.append(1))
    progress = continue_text(tiny, TEXT, 400, 1)
    next(progress)
    progress.close()
    stopped = len(steps)
    time.sleep(0.2)
    hook.remove()
    assert 0 < len(steps) == stopped < 400


def test_error_of_the_model_is_raised(tiny):
    def fail(*_):
        raise RuntimeError("no memory")

    hook = tiny.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        list(continue_text(tiny, TEXT, 5, 0))
    hook.remove()


def test_special_tokens_in_a_text_are_text(tiny):
    assert tiny.encode("</s>") == [2 + byte for byte in b"</s>"]


def test_bad_input(tiny):
    too_many = "The text has 500 tokens and you ask for 13 more, but the model reads 512 .* by 1 tokens"
    cases = {
        "empty": ("", 10, 1, "The text is empty"),
        "blank": (" \n", 10, 1, "The text is empty"),
        "none": (None, 10, 1, "The text is empty"),
        "too many tokens": ("x" * 500, 13, 1, too_many),
        "long text": ("x" * 100_001, 10, 1, "The text has 100,001 characters. Shorten it to 100,000"),
        "no number": (TEXT, None, 1, "Number of new tokens is empty. Give a number from 1 to 1,000"),
        "number in words": (TEXT, "many", 1, "Number of new tokens is 'many', which is not a number"),
        "fraction": (TEXT, 1.5, 1, "Number of new tokens is 1.5. Give a whole number"),
        "zero": (TEXT, 0, 1, "Number of new tokens is 0. Give a number from 1"),
        "cold": (TEXT, 10, -1, "Temperature is -1. Give a number from 0 to 2.0"),
        "not a number": (TEXT, 10, float("nan"), "Temperature is nan"),
        "temperature in words": (TEXT, 10, "hot", "Temperature is 'hot', which is not a number"),
    }
    assert_refused(lambda *arguments: next(continue_text(tiny, *arguments)), cases, InputError)


def _tokens(section):
    """Return number, kind and label of each token of a section."""
    pattern = r'<span class="(\w+)" data-token="(\d+)"[^>]*>(.*?)</span>'
    return [(int(number), kind, unescape(label)) for kind, number, label in re.findall(pattern, section, re.DOTALL)]


def test_picture_shows_seen_keys(tiny):
    input_ids = attention_picture.encode_for_picture(tiny, TEXT)
    picture = attention_picture.draw_picture(tiny, input_ids, 20, 1, 1, 3, 8)
    keys = seen_keys(tiny.model, torch.tensor([input_ids]), 1, queries=[19], num_hashes=3, num_buckets=8)
    full, *rounds = [_tokens(section) for section in re.findall(r"<section.*?</section>", picture, re.DOTALL)[:4]]
    assert [label for _, _, label in full] == [character.replace("\n", "↵\n") for character in TEXT]
    assert [kind for _, kind, _ in full] == ["all"] * 19 + ["chosen"] + ["later"] * (len(TEXT) - 20)
    for i, tokens in enumerate(rounds):
        seen = [number - 1 for number, kind, _ in tokens if kind == "seen"]
        assert seen == keys.seen[1, i, 0].nonzero()[:, 0].tolist()
        assert [number for number, *_ in tokens] == list(range(1, len(TEXT) + 1))
    assert any("seen" in str(tokens) for tokens in rounds) and any("missed" in str(tokens) for tokens in rounds)
    together = float((keys.weights[0, 0] * keys.seen[0, :, 0].any(0)).sum())
    row = re.search(r"<th>head 1</th>(.*?)</tr>", picture)[1]
    assert row.count("<td>") == 4 and f"<td>{together:.0%} <small>" in row.split("</td>")[3] + "</td>"


def test_picture_of_first_token_and_of_bytes(tiny):
    """A first token has no earlier ones, and a part of a character no text."""
    input_ids = attention_picture.encode_for_picture(tiny, "né")
    picture = attention_picture.draw_picture(tiny, input_ids, 1, 1, 0, 1, 2)
    assert "all 0 earlier tokens" in picture and "<small>197</small>" in picture


def test_bad_picture(tiny):
    input_ids = attention_picture.encode_for_picture(tiny, TEXT)
    cases = {
        "no token": (None, 2, 8, "Token is empty. Give a number from 1 to 30"),
        "letter": ("x", 2, 8, "Token is 'x', which is not a number"),
        "late token": (31, 2, 8, "Token is 31. Give a number from 1 to 30"),
        "rounds": (5, 9, 8, "Hash rounds is 9. Give a number from 1 to 8"),
        "buckets": (5, 2, 1, "Buckets is 1. Give a number from 2 to 32"),
    }

    def draw(token, rounds, buckets):
        attention_picture.draw_picture(tiny, input_ids, token, 1, 0, rounds, buckets)

    assert_refused(draw, cases, InputError)


def test_text_without_picture(tiny):
    for text, message in (("", "empty"), ("x", "has 1 tokens"), ("x" * 601, "has 601 tokens.* needs 2 to 600")):
        with pytest.raises(InputError, match=message):
            attention_picture.encode_for_picture(tiny, text)
    local = TextModel(_model(attn_layers=["local"]), tiny.tokenizer, "local")
    with pytest.raises(InputError, match="no LSH layer"):
        attention_picture.encode_for_picture(local, TEXT)


def test_find_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(text_model_file.MODEL_VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match="no model in outputs/demo. Run `make demo`"):
        find_model()
    _save("outputs/demo")
    assert find_model() == "outputs/demo"
    monkeypatch.setenv(text_model_file.MODEL_VARIABLE, "me/model")
    assert find_model() == "me/model" and find_model("mine") == "mine"
    loaded = load_model("outputs/demo")
    assert (loaded.name, loaded.context_length, loaded.lsh_layers) == ("demo", CONTEXT, [1])
    model = random_model(cls=ReformerHfForMaskedLM, attn_layers=["lsh"], is_decoder=False)
    model.save_pretrained("both-directions")
    with pytest.raises(ValueError, match="needs a causal model of type 'reformer_hf'"):
        load_model("both-directions")


def test_card_and_requirements():
    card = SpaceCard.load(SPACE / "README.md").data
    assert card.sdk == "gradio" and (SPACE / card.app_file).is_file()
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    requirements = sorted(line for line in lines if not line.startswith("#"))
    assert requirements == sorted(project["dependencies"] + project["optional-dependencies"]["space"])
    (minimum,) = re.findall(r"gradio>=([\d.]+)", " ".join(requirements))
    assert [int(part) for part in card.sdk_version.split(".")] >= [int(part) for part in minimum.split(".")]


def _chromium():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs Chromium (Debian: `apt install chromium`)")
    return path


def _serve(folder, port):
    """Start the Space in a folder, and wait until it answers."""
    command = [sys.executable, "app.py", "--port", str(port)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5)
            return process
        except OSError:
            time.sleep(0.5)
    process.kill()
    pytest.fail(f"the page does not start:\n{process.communicate()[0]}")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a Space: the files in one folder, with the package and a model beside them."""
    pytest.importorskip("gradio", reason="needs gradio (`pip install '.[space]'`)")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (`pip install playwright`)")
    chromium = _chromium()
    folder = tmp_path_factory.mktemp("space") / "app"
    shutil.copytree(SPACE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(EXAMPLES.parent / "reformer_hf", folder / "reformer_hf")
    _save(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = _serve(folder, port)
    try:
        with api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.errors = []
            page.on("pageerror", lambda error: page.errors.append(error))
            page.set_default_timeout(60_000)
            page.goto(f"http://127.0.0.1:{port}")
            yield page
            browser.close()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_page(page):
    """Loads with a picture, generates, draws another text, and answers bad input with a message."""
    picture = page.locator("#picture .lsh")
    picture.wait_for()
    assert "What does LSH attention see?" in page.inner_text("h1")

    page.fill("#text textarea", TEXT)
    page.fill("#number input", "60")
    page.click("#continue")
    page.wait_for_selector("#status :text('60 new tokens')")
    assert re.search(r"60 new tokens · [\d,]+ tokens/s · context 90 of 512 tokens", page.inner_text("#status"))
    assert page.inner_text("#continuation b") == TEXT
    assert len(page.inner_text("#continuation")) > len(TEXT)

    page.click("#show")
    page.wait_for_selector(f"#picture .full .chosen[data-token='{len(TEXT)}']")
    assert page.locator("#picture .round").count() == 2
    page.click("#picture .round >> nth=1 >> [data-token='20']")
    page.wait_for_selector("#picture .full .chosen[data-token='20']")
    assert page.input_value("#token input") == "20"
    page.click("label:has-text('2') >> input[type=radio]")
    page.wait_for_selector("#picture tr.current:has-text('head 2')")

    page.fill("#token input", "31")
    assert "Token is 31. Give a number from 1 to 30." in page.inner_text("#picture .message")
    page.fill("#token input", "3")
    page.wait_for_selector("#picture .full .chosen[data-token='3']")
    assert not page.errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("#text textarea", "", "The text is empty. Write something"),
        ("#text textarea", "x" * 600, "Shorten the text by"),
        ("#number input", "", "Number of new tokens is"),
        ("#number input", "1e9", "Give a number from 1 to 1,000."),
        ("#temperature input", "-1", "Temperature is -1. Give a number from 0 to 2.0."),
    ],
    ids=["empty", "too-long", "no-number", "large-number", "negative-temperature"],
)
def test_page_message(page, field, value, message):
    page.reload()
    page.locator("#picture .lsh").wait_for()
    page.fill(field, value)
    page.click("#continue")
    page.wait_for_selector("#status .message")
    assert message in page.inner_text("#status .message")
    if value == "":
        page.click("#show")
        if field.startswith("#text"):
            page.wait_for_selector("#picture .message:has-text('The text is empty')")
    assert "Traceback" not in page.inner_text("body") and not page.errors


@pytest.mark.slow
def test_page_fits_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.reload()
    page.locator("#picture .lsh").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
def test_without_model(tmp_path):
    """The command says what to run."""
    pytest.importorskip("gradio", reason="needs gradio (`pip install '.[space]'`)")
    shutil.copytree(SPACE, tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"PYTHONPATH": str(EXAMPLES.parent), "PATH": "/usr/bin"}
    command = [sys.executable, str(tmp_path / "app" / "app.py")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "Run `make demo`" in result.stderr and "Traceback" not in result.stderr
