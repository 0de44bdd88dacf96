# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""README and documentation: code runs, commands and messages exist, links lead somewhere."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from transformers.models.auto import configuration_auto

from benchmarks import model_sizes

from .processes import ROOT, run_python

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, *sorted((ROOT / "examples").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
# What a block needs stands before it, in a comment `<!-- setup: … -->`. Blocks that cannot run follow
# `<!-- not run: why -->`.
PYTHON = re.compile(
    r"(?:<!-- setup:\n(.*?)-->\n)?(<!-- not run: [^\n]+ -->\n+)?^( *)```python\n(.*?)^ *```$", re.DOTALL | re.MULTILINE
)
DOCTEST = """
import doctest
runner = doctest.DocTestRunner()
test = doctest.DocTestParser().get_doctest({block!r}, globals(), "block", None, 0)
runner.run(test, clear_globs=False)
assert not runner.failures
globals().update(test.globs)
"""
SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)


def _python_blocks(page):
    """The code of a page that runs."""
    blocks = []
    for setup, not_run, indent, code in PYTHON.findall(page.read_text()):
        if not not_run:
            block = "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True))
            blocks.append(setup + (DOCTEST.format(block=block) if block.startswith(">>>") else block))
    return blocks


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if _python_blocks(page)], ids=lambda page: page.name)
def test_python_blocks(page, tmp_path):
    """The blocks of a page run in their order, in one process."""
    code = "\n".join(_python_blocks(page))
    run_python(["-c", code], tmp_path, {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})


def test_few_blocks_are_not_run():
    skipped = sum(bool(not_run) for page in PAGES for _, not_run, *_ in PYTHON.findall(page.read_text()))
    assert skipped <= 10 and sum(len(_python_blocks(page)) for page in PAGES) > skipped


def _commands():
    """Commands of shell blocks and of indented code, without prompts and comments."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        blocks = SHELL.findall(text) + re.findall(r"^    (?:make|python|torchrun|accelerate) .*$", text, re.MULTILINE)
        blocks += re.findall(r"`((?:make|python|torchrun|accelerate) [^`\n]+)`", text)
        for line in "\n".join(blocks).splitlines():
            yield page.name, line.partition(" #")[0].strip()


def test_commands_exist():
    """Each script, module and target of `make`."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    found = 0
    for page, command in _commands():
        try:
            words = shlex.split(command)
        except ValueError:  # a command of several lines
            continue
        for word, following in zip(words, words[1:], strict=False):
            if word == "make" and words[0] == "make" and re.fullmatch(r"[a-z-]+", following):
                assert following in targets, f"{page}: {command}"
                found += 1
            elif word == "-m" and words[0] in ("python", "python3") and not following.endswith("NAME"):
                assert importlib.util.find_spec(following), f"{page}: {command}"
                found += 1
            elif re.fullmatch(r"(examples|docs|benchmarks|tests)/\S+\.(py|yaml)", following):
                assert (ROOT / following).exists(), f"{page}: {command}"
                found += 1
    assert found > 15


def _options_by_program():
    """The options that pages pass to each script of the examples and each module, `{program: {option: page}}`."""
    programs = {}
    for page, command in _commands():
        words = re.split(r"[;|&]", command)[0].split()
        for i, word in enumerate(words):
            following = words[i + 1] if i + 1 < len(words) else ""
            is_module = word == "-m" and following.startswith(("benchmarks", "experiments", "reformer_hf"))
            if is_module or re.fullmatch(r"examples/\S+\.py", word):
                program, rest = (("-m", following), words[i + 2 :]) if is_module else ((word,), words[i + 1 :])
                options = {each.partition("=")[0]: page for each in rest if each.startswith("--")}
                programs.setdefault(program, {}).update(options)
                break
    return {program: options for program, options in programs.items() if options}


@pytest.mark.slow
@pytest.mark.parametrize("program, options", _options_by_program().items(), ids=lambda x: "".join(x)[-30:])
def test_options_exist(program, options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    output = run_python([*program, "--help"], ROOT, environment).stdout
    known = set(re.findall(r"--\w[\w-]*", output))
    assert not {option: page for option, page in options.items() if option not in known}


def test_messages_exist():
    """The headings of troubleshooting are words of messages, of this package or of the Auto classes."""
    constants = []
    for path in [*(ROOT / "reformer_hf").rglob("*.py"), Path(configuration_auto.__file__)]:
        tree = ast.walk(ast.parse(path.read_text()))
        constants += [node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    headings = re.findall(r"^### (.+)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    missing = [heading for heading in headings if not any(heading in constant for constant in constants)]
    assert len(headings) >= 15 and not missing


@pytest.mark.slow
def test_sizes_are_those_of_the_code():
    page = model_sizes.PAGE.read_text()
    assert all(table in page for table in model_sizes.tables().split("\n\n"))


class _Links(HTMLParser):
    """The links, images and anchors of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.update(filter(None, (attributes.get("id"), attributes.get("name"))))
        link = attributes.get("href") if tag == "a" else attributes.get("src") if tag == "img" else None
        if link:
            self.links.append(link)


@pytest.mark.slow
def test_site(tmp_path):
    """It is built without warnings, and no link inside it is dead."""
    pytest.importorskip("sphinx"), pytest.importorskip("furo"), pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", ".", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    pages = {path: _Links(path) for path in tmp_path.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                dead.append(f"{path.relative_to(tmp_path)}: {link}")
    assert len(pages) > 25 and not dead


def test_links_in_the_repository():
    """Each relative link of a page leads to a file, and to a heading if it names one."""
    dead = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (page.parent / unquote(parts.path)) if parts.path else page
            if not target.exists():
                dead.append(f"{page.name}: {link}")
            elif parts.fragment and target.suffix == ".md":
                headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                if parts.fragment not in anchors:
                    dead.append(f"{page.name}: {link}")
    assert not dead
