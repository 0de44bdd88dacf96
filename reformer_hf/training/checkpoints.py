# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Find the last intact checkpoint of `Trainer`."""

import json
import os
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

logger = logging.get_logger(__name__)

# Transformers leaves this file in a checkpoint whose saving on SIGTERM did not finish.
_INCOMPLETE = "checkpoint-is-incomplete.txt"


def find_corruption(checkpoint: str | os.PathLike) -> str | None:
    """
    Describe what makes a checkpoint of `Trainer` unusable.

    Truncated files are detected by their format: the header of safetensors files contains their length, and files of
    `torch.save` end with a directory. The trainer state, which is written last, must exist.

    Args:
        checkpoint (`str` or `os.PathLike`): Checkpoint folder.

    Returns:
        `str` or `None`: The first problem found, or `None` for an intact checkpoint.
    """
    folder = Path(checkpoint)
    if (folder / _INCOMPLETE).exists():
        return f"`{_INCOMPLETE}` exists"
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return f"`{TRAINER_STATE_NAME}` is missing or truncated"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        if not _is_intact(path):
            return f"`{path.relative_to(folder)}` is truncated"
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
        if path.suffix in (".pt", ".pth", ".bin"):
            return zipfile.is_zipfile(path)
        if path.suffix == ".json":
            json.loads(path.read_text())
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def last_intact_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    Find the last intact checkpoint in `output_dir`, for `resume_from_checkpoint`.

    Corrupt checkpoints, for example after a full disk or a killed process, are skipped with a warning.

    Args:
        output_dir (`str` or `os.PathLike`): Output folder of `Trainer`.

    Returns:
        `str` or `None`: Path of the checkpoint, or `None` if there is no intact one.
    """
    folders = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if folder.is_dir() and number.isdecimal():
            folders[int(number)] = folder
    for step in sorted(folders, reverse=True):
        corruption = find_corruption(folders[step])
        if corruption is None:
            return str(folders[step])
        logger.warning(f"Skipping the corrupt checkpoint {folders[step]}: {corruption}.")
    return None
