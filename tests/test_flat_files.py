# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""What `save_pretrained` copies next to a checkpoint: flat files that import one another as `.name`."""

import ast
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports

import reformer_hf

FOLDER = Path(reformer_hf.__file__).parent
NOT_SHIPPED = {"__init__", "conversion", "diagnostics", "hub", "in_tree", "training"}
FLAT_FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in NOT_SHIPPED)
PACKAGES = {"huggingface_hub", "numpy", "tokenizers", "torch", "transformers"} | sys.stdlib_module_names


def _imports(path: Path) -> tuple[list[ast.ImportFrom], set[str]]:
    """The relative imports of a file, and the packages that it imports."""
    relative, packages = [], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            relative.append(node)
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.partition(".")[0])
    return relative, packages


def test_package_is_flat():
    assert FLAT_FILES
    assert {path.parent.name for path in FOLDER.rglob("*.py")} == {FOLDER.name, "diagnostics", "training"}


def test_imports_of_flat_files():
    for path in FLAT_FILES:
        relative, packages = _imports(path)
        for node in relative:
            assert node.level == 1 and node.module and "." not in node.module, (path.name, ast.unparse(node))
            assert node.module not in NOT_SHIPPED, (path.name, ast.unparse(node))
        assert packages <= PACKAGES, path.name
        # The regular expression of Transformers reads docstrings too: it must find these imports and no others.
        assert set(get_relative_imports(path)) == {node.module for node in relative}, path.name
