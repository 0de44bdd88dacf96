# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Text as bytes: the sources of the Python standard library, or a file."""

import math
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

# A byte is a token; no others exist.
VOCAB_SIZE = 256
_HELD_OUT_EVERY = 20


@cache
def load_text(path: str | None = None) -> tuple[Tensor, Tensor]:
    """
    Return training and held-out bytes, int64.

    Args:
        path: A file, whose last twentieth is held out. `None` for the standard library, of which every 20th module is
            held out.

    Raises:
        ValueError: If there is no such file.
    """
    if path is None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        # The packages of this environment are not part of the library.
        files = [file for file in sorted(folder.rglob("*.py")) if "site-packages" not in file.parts]
        train = b"".join(file.read_bytes() for i, file in enumerate(files) if i % _HELD_OUT_EVERY)
        held_out = b"".join(file.read_bytes() for file in files[::_HELD_OUT_EVERY])
    elif Path(path).is_file():
        text = Path(path).read_bytes()
        train, held_out = text[: len(text) * 19 // 20], text[len(text) * 19 // 20 :]
    else:
        raise ValueError(f"`path` is {path!r}, but there is no such file: give a text file, or None.")
    return _tokens(train), _tokens(held_out)


def _tokens(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def draw_text(text: Tensor, batch_size: int, length: int, seed: int) -> dict[str, Tensor]:
    """Draw slices of a text, as inputs and labels `[B, length]`."""
    starts = torch.randint(len(text) - length, (batch_size,), generator=torch.Generator().manual_seed(seed))
    input_ids = torch.stack([text[start : start + length] for start in starts.tolist()])
    return {"input_ids": input_ids, "labels": input_ids}


def bits_per_byte(model: PreTrainedModel, text: Tensor, length: int, num_bytes: int = 1 << 17) -> float:
    """Return the mean loss in bits, over slices of `length` bytes spread over a text, `num_bytes` in total."""
    number = max(1, num_bytes // length)
    starts = torch.linspace(0, len(text) - length, number).long().tolist()
    slices = [text[None, start : start + length].to(model.device) for start in starts]
    return sum(model(input_ids=each, labels=each).loss.item() for each in slices) / number / math.log(2)
