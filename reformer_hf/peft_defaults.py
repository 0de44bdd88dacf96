# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Default target modules of the adapters of PEFT, which keeps a table of model types for each adapter type."""

import sys

# The projections to queries (`query_key` in LSH and full layers) and values.
_PROJECTIONS = ["query_key", "query", "value"]
_FEED_FORWARD = ["feed_forward.output.dense"]
# Of the adapter types that do not adapt these projections. The projections have no bias for BEFT to train.
_TARGETS = {
    "IA3": ["query_key", "key", "value", *_FEED_FORWARD],
    "LNTUNING": ["layer_norm"],
    "OSF": [*_PROJECTIONS, "key", "dense.dense", "output.dense"],
    "BEFT": _FEED_FORWARD,
}


def register_peft_defaults(model_type: str) -> None:
    """Add a model type to the tables of PEFT if PEFT has been imported; an entry that exists is kept."""
    peft = sys.modules.get("peft")
    for name, table in vars(peft.utils.constants).items() if hasattr(peft, "utils") else ():
        prefix, _, rest = name.partition("TRANSFORMERS_MODELS_TO_")
        adapter, _, kind = rest.partition("_")
        if not prefix and kind == "TARGET_MODULES_MAPPING":
            table.setdefault(model_type, _TARGETS.get(adapter, _PROJECTIONS))
        elif not prefix and kind == "FEEDFORWARD_MODULES_MAPPING":
            table.setdefault(model_type, _FEED_FORWARD)
