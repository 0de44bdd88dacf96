# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Pack documents of any length into sequences of equal length, in constant memory."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..lm_head import IGNORED

Ids = Sequence[int] | np.ndarray


def pack(
    documents: Iterable[Ids],
    length: int,
    separator_id: int | None = None,
    across_documents: bool = True,
    keep_last: bool = True,
) -> Iterator[np.ndarray]:
    """
    Split documents into sequences of `length` tokens.

    Each sequence begins with the last token of the previous one. With the usual shift of labels, every token except
    the first is therefore predicted exactly once. Only one sequence and one document are in memory at a time;
    memory-mapped documents are read piece by piece.

    Args:
        documents (`Iterable`): Token ids of each document. Empty documents are skipped.
        length (`int`): Number of tokens per sequence, at least 2.
        separator_id (`int`, *optional*): Token inserted between documents, or after every document if
            `across_documents=False`. `None` inserts nothing.
        across_documents (`bool`, defaults to `True`): Whether a sequence may contain several documents. Otherwise
            every document starts a new sequence, and the last sequence of a document may be shorter.
        keep_last (`bool`, defaults to `True`): Whether to keep the last sequence, or the last sequence of each
            document, if it is shorter than `length`.

    Returns:
        `Iterator[np.ndarray]`: Sequences of token ids (`int32`).

    Raises:
        `ValueError`: If `length` is below 2.
    """
    if length < 2:
        raise ValueError(f"`length` is {length}, but a sequence needs at least 2 tokens: give a larger `length`.")
    if across_documents:
        return _cut(_join(documents, separator_id), length, keep_last)
    separator = [] if separator_id is None else [separator_id]
    pieces = ((document, separator) for document in documents if len(document))
    return (sequence for document in pieces for sequence in _cut(document, length, keep_last))


def _join(documents: Iterable[Ids], separator_id: int | None) -> Iterator[Ids]:
    first = True
    for document in documents:
        if len(document) == 0:
            continue
        if not first and separator_id is not None:
            yield [separator_id]
        first = False
        yield document


def _cut(pieces: Iterable[Ids], length: int, keep_last: bool) -> Iterator[np.ndarray]:
    """Yield sequences of the concatenated pieces."""
    sequence = np.empty(length, dtype=np.int32)
    filled = num_new = 0
    for piece in pieces:
        start = 0
        while start < len(piece):
            taken = min(length - filled, len(piece) - start)
            sequence[filled : filled + taken] = piece[start : start + taken]
            filled, num_new, start = filled + taken, num_new + taken, start + taken
            if filled == length:
                yield sequence.copy()
                sequence[0] = sequence[-1]
                filled, num_new = 1, 0
    if keep_last and num_new and filled > 1:
        yield sequence[:filled].copy()


def pack_to_file(path: str | os.PathLike, documents: Iterable[Ids], length: int, **options):
    """
    Pack documents into a memory-mapped `datasets.Dataset` with the column `input_ids`.

    The file is written under a temporary name and renamed when it is complete.

    Args:
        path (`str` or `os.PathLike`): Arrow file to write. Its folder is created if necessary.
        documents (`Iterable`): See `pack`.
        length (`int`): See `pack`.
        options: Other arguments of `pack`.

    Returns:
        `datasets.Dataset`: The sequences.
    """
    from datasets import Dataset, Features, Value
    from datasets import Sequence as SequenceOf
    from datasets.arrow_writer import ArrowWriter

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with ArrowWriter(path=str(partial), features=Features({"input_ids": SequenceOf(Value("int32"))})) as writer:
            # This many sequences are in memory at a time.
            writer.writer_batch_size = max((1 << 20) // length, 1)
            for sequence in pack(documents, length, **options):
                writer.write({"input_ids": sequence})
            writer.finalize()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return Dataset.from_file(str(path)).with_format("torch")


class CausalCollator:
    """
    Collate sequences into batches for causal language modeling.

    Batches have `input_ids` and `labels` `[B, L]`, and an `attention_mask` `[B, L]` if there is padding. Shorter
    sequences are padded on the right. The labels are those of the examples, for instance with -100 for a prompt, or
    else the ids. The loss ignores padding, including that of an example's own `attention_mask`.

    Args:
        pad_token_id (`int`): Id of the padding token.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [example["input_ids"] for example in examples]
        masks = [example.get("attention_mask", np.ones(len(example["input_ids"]))) for example in examples]
        labels = [example.get("labels", example["input_ids"]) for example in examples]
        for name, values in (("labels", labels), ("attention_mask", masks)):
            for row, of_row in zip(rows, values, strict=True):
                if len(row) != len(of_row):
                    raise ValueError(
                        f"An example has {len(row)} `input_ids`, but {len(of_row)} `{name}`: give one for each token, "
                        "or leave them out."
                    )
        is_token = _padded(masks, 0).bool()
        batch = {
            "input_ids": _padded(rows, self.pad_token_id),
            "labels": _padded(labels, IGNORED).masked_fill(~is_token, IGNORED),
        }
        if not is_token.all():
            batch["attention_mask"] = is_token.long()
        return batch


def _padded(rows: list, value: int) -> Tensor:
    tensors = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
