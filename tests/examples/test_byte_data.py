# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Reading, splitting and cutting of text, and the two measures of it."""

import lzma
import math

import datasets
import numpy as np
import pytest
from bits_per_byte import BitsPerByte, bigram_bits_per_byte, xz_bits_per_byte
from byte_data import END_ID, count_bytes, documents_of, encode, load_corpus

from reformer_hf import ReformerHfByteTokenizer
from reformer_hf.tokenization_reformer_hf import FIRST_BYTE_ID

TEXT = "naïve text – 1, 2, 3\n" * 20


def test_encode_equals_tokenizer():
    assert encode([TEXT.encode()]).tolist() == ReformerHfByteTokenizer()(TEXT, add_special_tokens=False)["input_ids"]


def test_encode_documents_and_max_bytes():
    assert encode([b"ab", b"", b"c"]).tolist() == [99, 100, END_ID, 101]
    assert encode([b"ab", b"cd", b"ef"], max_bytes=3).tolist() == [99, 100, END_ID, 101]


def test_documents_of_undoes_encode(monkeypatch):
    documents = [b"abcd", b"e", b"fg"]
    for piece in (3, 1 << 22):
        monkeypatch.setattr("byte_data._PIECE", piece)
        stream = encode(documents)
        assert [bytes((ids - 2).astype(np.uint8)) for ids in documents_of(stream)] == documents, piece
        assert encode(documents, begin=True).tolist() == [END_ID, *stream], piece
        assert count_bytes(stream) == 7, piece


def test_file_split(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    corpus = load_corpus(str(path), validation_fraction=0.1)
    stream = encode([TEXT.encode()])
    assert np.array_equal(np.concatenate([corpus.train, corpus.held_out[1:]]), stream)
    assert corpus.held_out[0] == corpus.train[-1]
    assert corpus.num_held_out_bytes == round(len(stream) * 0.1)
    assert corpus.num_train_bytes + corpus.num_held_out_bytes == len(TEXT.encode())


def test_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("bbb")
    (tmp_path / "a.txt").write_text("aaa")
    (tmp_path / "sub" / "c.py").write_text("ccc")
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "image.bin").write_bytes(b"a\0b")
    (tmp_path / ".hidden").write_text("hidden")
    corpus = load_corpus(str(tmp_path), validation_fraction=0.2)
    stream = np.concatenate([corpus.train, corpus.held_out[1:]])
    assert stream.tolist() == encode([b"aaa", b"bbb", b"ccc"]).tolist()


def test_default_corpus():
    corpus = load_corpus(max_bytes=20_000)
    assert corpus.num_train_bytes + corpus.num_held_out_bytes == 20_000
    assert "standard library" in corpus.description
    assert b"import" in bytes((corpus.train[corpus.train > END_ID] - 2).astype(np.uint8))


@pytest.mark.parametrize("with_validation", [False, True])
def test_hub_data_set(monkeypatch, with_validation):
    splits = {"train": ["one", "two"], "validation": ["three"]}
    splits = splits if with_validation else {"train": splits["train"]}
    hub = datasets.DatasetDict({name: datasets.Dataset.from_dict({"body": texts}) for name, texts in splits.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: hub)
    corpus = load_corpus("owner/name", text_column="body")
    if with_validation:
        assert corpus.train.tolist() == encode([b"one", b"two"]).tolist()
        assert corpus.held_out.tolist() == [END_ID, *encode([b"three"])]
    else:
        assert [*corpus.train, *corpus.held_out[1:]] == encode([b"one", b"two"]).tolist()
    assert corpus.dataset_id == "owner/name"
    with pytest.raises(ValueError, match="no column 'text'.*body"):
        load_corpus("owner/name")


def test_bad_data(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    for data in ("empty.txt", "folder"):
        with pytest.raises(ValueError, match="too few"):
            load_corpus(str(tmp_path / data))
    with pytest.raises(ValueError, match="do not exist"):
        load_corpus(str(tmp_path / "missing.txt"))
    with pytest.raises(ValueError, match="`validation_fraction` is 1"):
        load_corpus(validation_fraction=1.0)
    with pytest.raises(ValueError, match="`max_bytes` is 0"):
        load_corpus(max_bytes=0)


def test_unreachable_hub_data_set(monkeypatch):
    def unreachable(name, config):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="neither a file nor a folder.*no network"):
        load_corpus("owner/name")


def test_bits_per_byte_by_hand():
    metric = BitsPerByte(keep_in_memory=True)
    # 3 bits and 5 bits for 1 byte and 3 bytes; a second call starts anew.
    for _ in range(2):
        result = metric.compute(predictions=[3 * math.log(2), 5 * math.log(2)], references=[1, 3])
        assert result["bits_per_byte"] == pytest.approx(2.0)
    with pytest.raises(ValueError, match="no byte"):
        metric.compute(predictions=[1.0], references=[0])


def test_bigram_by_hand():
    # After "a": "b" twice, "c" once, and 257 symbols with alpha = 1 beforehand; "b" is always followed by "a".
    train, held_out = encode([b"ababac"]), encode([b"abac"])
    bits = -math.log2(3 / 260) - math.log2(3 / 259) - math.log2(2 / 260)
    assert bigram_bits_per_byte(train, held_out, alpha=1.0) == pytest.approx(bits / 3)


def test_xz():
    """Sizes of `xz -9`, without special tokens."""
    words = np.random.default_rng(0).integers(65, 91, (64, 6), dtype=np.uint8)
    text = words.tobytes() * 3
    ids = np.frombuffer(text, np.uint8).astype(np.int16) + FIRST_BYTE_ID
    ids[100] = END_ID
    text = text[:100] + text[101:]
    found = xz_bits_per_byte(ids, np.concatenate([ids[:1], ids]), sequence_length=500)
    assert found["xz_bits_per_byte"] == 8 * len(lzma.compress(text, preset=9)) / len(text)
    # Short sequences repeat less, and the training text holds all of it.
    assert found["xz_sequences_bits_per_byte"] > found["xz_bits_per_byte"]
    assert found["xz_after_training_text_bits_per_byte"] < 0.2 * found["xz_bits_per_byte"]


def test_bigram_separators():
    train, held_out = encode([b"ab", b"ab"]), encode([b"ab", b"a"])
    assert count_bytes(held_out[1:]) == 2
    bits = -math.log2(3 / 259) - math.log2(2 / 258) - math.log2(2 / 258)
    assert bigram_bits_per_byte(train, held_out, alpha=1.0) == pytest.approx(bits / 2)
