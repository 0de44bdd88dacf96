# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Tables that commands write into pages of the documentation."""

import re
from pathlib import Path


def write_tables(page: Path, name: str, report: str) -> None:
    """
    Write tables to a page that shows them, each between `<!-- table 1 of NAME -->` and `<!-- end -->`.

    Args:
        page: A Markdown file. It is left alone if nothing changes.
        name: Whose tables they are.
        report: The tables, separated by empty lines.
    """
    tables = report.strip().split("\n\n")
    before = page.read_text(encoding="utf-8")
    text = re.sub(
        rf"(<!-- table (\d+) of {re.escape(name)} -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{tables[int(match[2]) - 1]}\n{match[3]}",
        before,
        flags=re.DOTALL,
    )
    if text != before:
        page.write_text(text, encoding="utf-8")
