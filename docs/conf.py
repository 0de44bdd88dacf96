# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Sphinx configuration: `make docs` builds the site to `build/docs`.

The root of the sources is that of the repository, so that links between pages work on the site and in the repository.
"""

import re

from sphinx.application import Sphinx

import reformer_hf

project = "reformer_hf"
author = "The reformer_hf authors"
copyright = "2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0"
release = reformer_hf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/*.md",
    "examples/*.md",
    "examples/*/*.md",
    "benchmarks/*.md",
    "benchmarks/results/*.md",
    "model_cards/*.md",
    "model_cards/*/*.md",
]
exclude_patterns = [".*", "build", "dist", "outputs", "reformer_hf", "tests", "**/__pycache__"]

html_theme = "furo"
html_title = f"{project} {release}"
html_extra_path = ["site"]
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

# Headings get the anchors that GitHub gives them.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False


def markdown_to_rst(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Rewrite the Markdown of docstrings (backticks, fenced code) before napoleon reads their sections."""
    text = "\n".join(lines)
    text = re.sub(r"^( *)```python\n(.*?)\n *```$", _code_block, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^( +)`(\w+Error)`:", r"\1\2:", text, flags=re.MULTILINE)
    text = re.sub(r"(?<![`:])`([^`\n]+)`(?!`)", r"``\1``", text)
    lines[:] = text.split("\n")


def _code_block(match: re.Match[str]) -> str:
    indent, code = match.groups()
    lines = [f"    {line}".rstrip() for line in code.split("\n")]
    return "\n".join([f"{indent}.. code-block:: pycon", "", *lines])


def setup(app: Sphinx) -> None:
    # Before napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=400)
