# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Read text as one stream of byte tokens, from a file, a folder, a dataset on the Hub or the standard library."""

import logging
import os
import platform
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np

from reformer_hf.tokenization_reformer_hf import FIRST_BYTE_ID, LAST_BYTE_ID, SPECIAL_TOKEN_IDS

logger = logging.getLogger(__name__)

PAD_ID, END_ID = SPECIAL_TOKEN_IDS["<pad>"], SPECIAL_TOKEN_IDS["</s>"]

# Bytes or tokens in memory at a time.
_PIECE = 1 << 22

# Tests would be 60 % of the standard library and are not typical code.
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests"}


@dataclass
class Corpus:
    """
    Training and held-out text as two streams of token ids (`int16`, the ids of `ReformerHfByteTokenizer`).

    `held_out` starts with one token of context, the last token of `train`. All bytes of the held-out text are
    therefore predicted from at least one token.
    """

    train: np.ndarray
    held_out: np.ndarray
    description: str
    held_out_description: str
    dataset_id: str | None = None

    @property
    def num_train_bytes(self) -> int:
        """Number of bytes of the training text, without separators."""
        return count_bytes(self.train)

    @property
    def num_held_out_bytes(self) -> int:
        """Number of bytes of the held-out text, without separators and the context token."""
        return count_bytes(self.held_out[1:])

    def describe(self) -> str:
        """Return what a model card says about the data."""
        return (
            f"{self.description[0].upper()}{self.description[1:]}: {self.num_train_bytes:,} bytes. The held-out text, "
            f"which was not used for training, is {self.held_out_description} ({self.num_held_out_bytes:,} bytes). "
            "Tokens are the bytes of the text; `</s>` separates documents."
        )


@dataclass
class CorpusArguments:
    """The data. See `load_corpus`."""

    data: str | None = field(
        default=None,
        metadata={"help": "Text file, folder, or dataset on the Hub. Default: the Python standard library."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    text_column: str = field(default="text", metadata={"help": "Text column of the dataset on the Hub."})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Fraction of the text to hold out, from its end."}
    )
    max_bytes: int | None = field(default=None, metadata={"help": "Maximum number of bytes to read."})

    def load(self, sequence_length: int) -> Corpus:
        """Load the corpus. Raises `ValueError` as `load_corpus`, or if it is shorter than one sequence."""
        corpus = load_corpus(
            self.data,
            dataset_config=self.dataset_config,
            text_column=self.text_column,
            validation_fraction=self.validation_fraction,
            max_bytes=self.max_bytes,
        )
        logger.info(
            "Training on %s: %s bytes, with %s bytes held out.",
            corpus.description,
            f"{corpus.num_train_bytes:,}",
            f"{corpus.num_held_out_bytes:,}",
        )
        if len(corpus.train) < sequence_length:
            raise ValueError(
                f"The training text has {len(corpus.train)} tokens and is shorter than one sequence of "
                f"{sequence_length}: give more data or lower `sequence_length`."
            )
        return corpus


def count_bytes(ids: np.ndarray) -> int:
    """Count the ids that are bytes, not special tokens."""
    pieces = (ids[start : start + _PIECE] for start in range(0, len(ids), _PIECE))
    return sum(int(((piece >= FIRST_BYTE_ID) & (piece <= LAST_BYTE_ID)).sum()) for piece in pieces)


def load_corpus(
    data: str | None = None,
    dataset_config: str | None = None,
    text_column: str = "text",
    validation_fraction: float = 0.05,
    max_bytes: int | None = None,
) -> Corpus:
    """
    Read text and hold out the last `validation_fraction` of it.

    Args:
        data (`str`, *optional*): A file of any bytes, a folder (all UTF-8 files below it, sorted by path), or the name
            of a dataset on the Hub. `None` reads the source files of the Python standard library.
        dataset_config (`str`, *optional*): Configuration of a dataset on the Hub.
        text_column (`str`, defaults to `"text"`): Column of a dataset on the Hub. If the dataset has a split
            `validation`, that split is held out instead of a fraction of `train`.
        validation_fraction (`float`, defaults to 0.05): Fraction of the text to hold out, between 0 and 1.
        max_bytes (`int`, *optional*): Maximum number of bytes to read.

    Returns:
        `Corpus`: The training and the held-out text.

    Raises:
        `ValueError`: If the data do not exist or contain no text, or if an argument is out of range.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"`validation_fraction` is {validation_fraction}, but must be between 0 and 1.")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"`max_bytes` is {max_bytes}, but must be at least 1; leave it out to read everything.")
    limit = f" (the first {max_bytes:,} bytes)" if max_bytes else ""
    if data is None:
        documents = _read_files(Path(sysconfig.get_paths()["stdlib"]), suffix=".py")
        description = f"the source files of the Python {platform.python_version()} standard library"
    elif Path(data).is_dir():
        documents = _read_files(Path(data))
        description = f"the text files of the folder `{Path(data).resolve().name}`"
    elif Path(data).is_file():
        documents = _read_file(Path(data))
        description = f"the file `{Path(data).name}`"
    else:
        return _load_hub(data, dataset_config, text_column, validation_fraction, max_bytes)
    return _split(encode(documents, max_bytes), validation_fraction, description + limit, source=data or description)


def encode(documents: Iterable[bytes | np.ndarray], max_bytes: int | None = None, begin: bool = False) -> np.ndarray:
    """
    Convert documents to one array of token ids, separated by `</s>`.

    Args:
        documents (`Iterable[bytes | np.ndarray]`): Bytes of each document.
        max_bytes (`int`, *optional*): Maximum number of bytes to encode.
        begin (`bool`, defaults to `False`): Whether to put `</s>` before the first document too.

    Returns:
        `np.ndarray`: Token ids (`int16`), memory-mapped from a temporary file that is deleted with the array.
    """
    with tempfile.TemporaryFile() as file:
        remaining, empty, needs_separator = max_bytes, True, begin
        for document in documents:
            if remaining is not None and remaining <= 0:
                break
            if not len(document):
                continue
            if needs_separator:
                np.array([END_ID], dtype=np.int16).tofile(file)
            empty, needs_separator = False, True
            data = np.frombuffer(document, dtype=np.uint8)[:remaining]
            for start in range(0, len(data), _PIECE):
                (data[start : start + _PIECE].astype(np.int16) + FIRST_BYTE_ID).tofile(file)
            if remaining is not None:
                remaining -= len(document)
        file.flush()
        return np.empty(0, dtype=np.int16) if empty else np.memmap(file, dtype=np.int16, mode="r")


def documents_of(stream: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the documents of an array returned by `encode`, without separators."""
    start = 0
    for first in range(0, len(stream), _PIECE):
        for end in first + np.flatnonzero(stream[first : first + _PIECE] == END_ID):
            yield stream[start:end]
            start = end + 1
    yield stream[start:]


def _read_files(root: Path, suffix: str = "") -> Iterator[bytes]:
    """Yield the UTF-8 files below `root` whose names end with `suffix`, except hidden files and tests."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("."))
        for path in (Path(folder, name) for name in sorted(names)):
            if path.name.startswith(".") or not path.name.endswith(suffix) or not path.is_file():
                continue
            content = path.read_bytes()
            if _is_text(content):
                yield content
            else:
                logger.info("Skipping %s, which is not UTF-8 text.", path)


def _read_file(path: Path) -> Iterator[np.ndarray]:
    if path.stat().st_size:
        yield np.memmap(path, dtype=np.uint8, mode="r")


def _is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode("utf-8")
    except UnicodeDecodeError:
        return False


def _split(stream: np.ndarray, validation_fraction: float, description: str, source: str, **kwargs) -> Corpus:
    if len(stream) < 3:
        raise ValueError(
            f"The data {source!r} contain {len(stream)} bytes of text: too few to train on and to hold out. Give a "
            "non-empty text file, a folder with UTF-8 text files, or the name of a dataset on the Hub."
        )
    boundary = min(max(len(stream) - round(len(stream) * validation_fraction), 2), len(stream) - 1)
    held_out_description = f"the last {validation_fraction:.1%} of the stream"
    return Corpus(stream[:boundary], stream[boundary - 1 :], description, held_out_description, **kwargs)


def _load_hub(
    name: str, dataset_config: str | None, text_column: str, validation_fraction: float, max_bytes: int | None
) -> Corpus:
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).suffix in {".txt", ".md", ".py", ".json"}:
        raise ValueError(
            f"The data {name!r} do not exist: give a text file, a folder, or the name of a dataset on the Hub."
        )
    try:
        splits = datasets.load_dataset(name, dataset_config)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"The data {name!r} are neither a file nor a folder, and could not be loaded as a dataset from the Hub: "
            f"{error}"
        ) from error
    if "train" not in splits:
        raise ValueError(f"The dataset {name!r} has no split `train`, only {sorted(splits)}: choose another dataset.")
    if text_column not in splits["train"].column_names:
        raise ValueError(
            f"The dataset {name!r} has no column {text_column!r}: set `text_column` to one of "
            f"{splits['train'].column_names}."
        )

    def stream_of(split: str, **options) -> np.ndarray:
        return encode((text.encode("utf-8") for text in splits[split][text_column]), max_bytes, **options)

    description = f"the dataset `{name}`" + (f", configuration `{dataset_config}`" if dataset_config else "")
    if max_bytes:
        description += f" (the first {max_bytes:,} bytes of each split)"
    train = stream_of("train")
    if "validation" not in splits:
        return _split(train, validation_fraction, description, source=name, dataset_id=name)
    held_out = stream_of("validation", begin=True)
    if len(train) < 2 or len(held_out) < 2:
        raise ValueError(f"The dataset {name!r} contains no text in column {text_column!r}: choose another one.")
    return Corpus(train, held_out, description, "the split `validation`", dataset_id=name)
