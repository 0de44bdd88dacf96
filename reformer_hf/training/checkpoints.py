# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Find the last checkpoint of `Trainer` that is intact."""

import json
import os
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

logger = logging.get_logger(__name__)

# Transformers leaves this file in a checkpoint that it started to save on SIGTERM and did not finish.
_INCOMPLETE = "checkpoint-is-incomplete.txt"


def find_corruption(checkpoint: str | os.PathLike) -> str | None:
    """
    What makes a checkpoint of `Trainer` unfit to go on from; `None` where nothing does.

    Files that were cut off while they were written are found by their own structure: the lengths in the header of
    safetensors, the directory at the end of what `torch.save` writes. The state of the trainer, which is written last,
    must be there.
    """
    folder = Path(checkpoint)
    if (folder / _INCOMPLETE).exists():
        return f"`{_INCOMPLETE}` is there"
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return f"`{TRAINER_STATE_NAME}` is missing or cut off"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        if not _is_intact(path):
            return f"`{path.relative_to(folder)}` is cut off"
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(names - {path.name for path in files})
        if missing:
            return f"`{missing[0]}` is missing"
    return None


def _is_intact(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return True
        if path.suffix in (".pt", ".pth"):
            return zipfile.is_zipfile(path)
        if path.suffix == ".json":
            json.loads(path.read_text())
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def last_intact_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    The last checkpoint below `output_dir` from which training can go on, for `resume_from_checkpoint`; `None` where
    there is none.

    A later one that was cut off, by a full disk or a killed process, is named in a warning and passed over.
    """
    folders = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if folder.is_dir() and number.isdecimal():
            folders[int(number)] = folder
    for step in sorted(folders, reverse=True):
        missing = find_corruption(folders[step])
        if missing is None:
            return str(folders[step])
        logger.warning(f"Passing over the checkpoint {folders[step]}: {missing}.")
    return None
