# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Documents cut into sequences: every token predicted once, files memory-mapped and intact, batches padded."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from reformer_hf.training import CausalCollator, pack, pack_to_file

END = 1
DOCUMENTS = st.lists(st.lists(st.integers(2, 9), max_size=30), max_size=8)


def _targets(sequences):
    """What is predicted, given the usual shift of labels."""
    return [int(token) for sequence in sequences for token in sequence[1:]]


@given(DOCUMENTS, st.integers(2, 12))
def test_across_documents(documents, length):
    sequences = list(pack(documents, length, END))
    stream = []
    for document in filter(None, documents):
        stream += [*([END] if stream else []), *document]
    assert _targets(sequences) == stream[1:]
    assert all(len(sequence) == length for sequence in sequences[:-1])
    for before, after in zip(sequences, sequences[1:], strict=False):
        assert before[-1] == after[0]
    whole = list(pack(documents, length, END, keep_last=False))
    assert [x.tolist() for x in whole] == [x.tolist() for x in sequences if len(x) == length]


@given(DOCUMENTS, st.integers(2, 12))
def test_separate_documents(documents, length):
    sequences = list(pack(documents, length, END, across_documents=False))
    documents = [document for document in documents if document]
    assert _targets(sequences) == [token for document in documents for token in [*document[1:], END]]
    firsts = [sequence for sequence in sequences if len(sequence)]
    assert sum(END in sequence[1:] for sequence in firsts) == len(documents)
    assert all(END not in sequence[:-1] for sequence in sequences)


def test_length_of_one():
    with pytest.raises(ValueError, match="`length` is 1.*at least 2"):
        pack([[2, 3]], 1)


def test_pack_to_file(tmp_path):
    documents = [np.arange(2, 40), [7], np.arange(2, 9)]
    dataset = pack_to_file(tmp_path / "data" / "train.arrow", documents, 8, separator_id=END)
    assert [x.tolist() for x in dataset["input_ids"]] == [x.tolist() for x in pack(documents, 8, END)]
    assert dataset.cache_files == [{"filename": str(tmp_path / "data" / "train.arrow")}]


def test_streaming():
    """Without a file: what `pack` gives, as it gives it."""
    documents = [list(range(2, 40)), [7], list(range(2, 9))]
    stream = IterableDataset.from_generator(lambda: ({"input_ids": ids} for ids in pack(documents, 8, END)))
    batches = DataLoader(stream, batch_size=2, collate_fn=CausalCollator(0))
    rows = [row[row != 0].tolist() for batch in batches for row in batch["input_ids"]]
    assert rows == [x.tolist() for x in pack(documents, 8, END)]


def test_failed_file_leaves_old_one(tmp_path):
    path = tmp_path / "train.arrow"
    pack_to_file(path, [[2, 3, 4]], 2)
    before = path.read_bytes()

    def failing():
        yield [2, 3, 4, 5]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        pack_to_file(path, failing(), 2)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["train.arrow"]


# Packs 64 million tokens of a memory map, and says how much more memory that took at its peak.
_LONG = """
import resource, sys
import numpy as np
from reformer_hf.training import pack_to_file
stream = np.memmap(sys.argv[1], dtype=np.int16, mode="w+", shape=(1 << 26,))
pack_to_file(sys.argv[2], [np.arange(2, 1 << 20)], 1 << 16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dataset = pack_to_file(sys.argv[2], [stream], 1 << 16)
assert len(dataset) == 1025, len(dataset)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
# Pages of the two maps are counted although they can go at any time: they are not written to by us.
with open("/proc/self/status") as status:
    anonymous = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
print(anonymous, before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_long_text(tmp_path):
    code = [sys.executable, "-c", _LONG, str(tmp_path / "ids"), str(tmp_path / "train.arrow")]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    anonymous, before = map(int, done.stdout.split())
    # The text is 256 MiB as int32.
    assert anonymous < before + (64 << 10)


def test_collator():
    batch = CausalCollator(pad_token_id=0)([{"input_ids": torch.tensor(ids)} for ids in ([5, 6, 7, 8], [5, 0])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 0, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7, 8], [5, 0, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert all(x.dtype == torch.long for x in batch.values())
    assert "attention_mask" not in CausalCollator(0)([{"input_ids": [5, 6]}, {"input_ids": [7, 8]}])


def test_collator_keeps_labels():
    """Of a prompt without loss, and of rows that the tokenizer has padded."""
    examples = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    assert CausalCollator(0)(examples)["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    batch = CausalCollator(0)([{"input_ids": [5, 6, 7, 8]}, {"input_ids": [0, 9, 9], "attention_mask": [0, 1, 1]}])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7, 8], [-100, 9, 9, -100]]
    with pytest.raises(ValueError, match="2 `input_ids`.*1 `labels`"):
        CausalCollator(0)([{"input_ids": [5, 6], "labels": [1]}])
