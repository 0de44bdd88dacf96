# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""How well LSH attention approximates full attention, and whether a model needs it. Models do not depend on this."""

from .coverage import AttentionCoverage, attention_coverage
from .drawing import draw_attention
from .replacement import replace_lsh
from .seen_keys import SeenKeys, seen_keys

__all__ = ["AttentionCoverage", "SeenKeys", "attention_coverage", "draw_attention", "replace_lsh", "seen_keys"]
