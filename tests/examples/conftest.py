# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Scripts in `examples/` import each other by name, as they do when run."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
