# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Sequences of one length from documents of any length, in memory that does not grow with the text."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Ids = Sequence[int] | np.ndarray


def pack(
    documents: Iterable[Ids],
    length: int,
    separator_id: int | None = None,
    across_documents: bool = True,
    keep_last: bool = True,
) -> Iterator[np.ndarray]:
    """
    Cut documents into sequences of `length` tokens, each beginning with the last token of the one before, so that,
    given the usual shift of labels, every token but the first is predicted once.

    No more than one sequence and one document exist at a time; a document that is a memory map is read as it is cut.

    Args:
        documents: Token ids; empty ones are left out.
        length: Tokens in a sequence, at least 2.
        separator_id: Put after a document, where another one follows in the same sequence, or at its end where
            `across_documents` is False. `None` for nothing.
        across_documents: Whether a sequence goes on with the next document. Otherwise every document begins a
            sequence, and its last one is as short as it is.
        keep_last: Whether to give the last sequence of all, or of each document, where it is shorter than `length`.

    Raises:
        `ValueError`: for a `length` below 2.
    """
    if length < 2:
        raise ValueError(f"`length` is {length}, but a sequence needs at least 2 tokens, one to predict the other.")
    if across_documents:
        return _cut(_joined(documents, separator_id), length, keep_last)
    separator = [] if separator_id is None else [separator_id]
    pieces = ((document, separator) for document in documents if len(document))
    return (sequence for document in pieces for sequence in _cut(document, length, keep_last))


def _joined(documents: Iterable[Ids], separator_id: int | None) -> Iterator[Ids]:
    first = True
    for document in documents:
        if len(document) == 0:
            continue
        if not first and separator_id is not None:
            yield [separator_id]
        first = False
        yield document


def _cut(pieces: Iterable[Ids], length: int, keep_last: bool) -> Iterator[np.ndarray]:
    """Sequences of the tokens of all pieces, one after the other."""
    sequence = np.empty(length, dtype=np.int32)
    filled = fresh = 0
    for piece in pieces:
        start = 0
        while start < len(piece):
            taken = min(length - filled, len(piece) - start)
            sequence[filled : filled + taken] = piece[start : start + taken]
            filled, fresh, start = filled + taken, fresh + taken, start + taken
            if filled == length:
                yield sequence.copy()
                sequence[0] = sequence[-1]
                filled, fresh = 1, 0
    if keep_last and fresh and filled > 1:
        yield sequence[:filled].copy()


def pack_to_file(path: str | os.PathLike, documents: Iterable[Ids], length: int, **options):
    """
    What `pack` gives as a `datasets.Dataset` with the column `input_ids`, memory-mapped from the Arrow file `path`.

    The file is written under another name and renamed when it is whole.

    Args:
        path: File to be written; its folder is made.
        documents, length, options: See `pack`.
    """
    from datasets import Dataset, Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with ArrowWriter(path=str(partial), features=Features({"input_ids": Sequence(Value("int32"))})) as writer:
            # A batch of so many sequences is in memory before it is written.
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
    Batches for causal language modelling: `input_ids` and `labels` `[B, L]`, and `attention_mask` where sequences are
    of several lengths. What pads a shorter one is at its end and has no part in the loss.

    Args:
        pad_token_id: The id that stands for padding.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        rows = [torch.as_tensor(example["input_ids"], dtype=torch.long) for example in examples]
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        is_token = torch.arange(input_ids.shape[1]) < lengths[:, None]
        batch = {"input_ids": input_ids, "labels": input_ids.masked_fill(~is_token, -100)}
        if not is_token.all():
            batch["attention_mask"] = is_token.long()
        return batch
