# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The byte tokenizer: fixed ids, nothing lost on any text, and the same again after saving."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import reformer_hf
from reformer_hf.tokenization_reformer_hf import ReformerHfByteTokenizer

from .helpers import CHATML

TOKENIZER = ReformerHfByteTokenizer()
SPECIAL_TEXT = "<s>a</s> <pad> <mask>\0é\U0001f600"


def test_ids():
    assert len(TOKENIZER) == reformer_hf.ReformerHfConfig().vocab_size == 260
    special_ids = (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.bos_token_id, TOKENIZER.mask_token_id)
    assert special_ids == (0, 1, 258, 259)
    assert sorted(TOKENIZER.all_special_ids) == [0, 1, 258, 259]
    for byte in range(128):
        assert TOKENIZER(chr(byte))["input_ids"] == [byte + 2]
    assert TOKENIZER.decode_bytes(range(2, 258)) == bytes(range(256))


def test_special_tokens_of_config():
    config = reformer_hf.ReformerHfConfig()
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        assert getattr(config, name) == getattr(TOKENIZER, name), name


@given(st.text() | st.sampled_from([SPECIAL_TEXT, " a ,b . ", "\r\n\t", "e\u0301"]))
def test_text_is_lossless(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text
    input_ids = TOKENIZER(text, split_special_tokens=True)["input_ids"]
    assert input_ids == TOKENIZER.encode_bytes(text.encode())
    assert TOKENIZER.decode(input_ids) == text
    assert TOKENIZER.decode(input_ids, skip_special_tokens=True) == text
    assert TOKENIZER.decode_bytes(input_ids) == text.encode()


@given(st.binary())
def test_bytes_are_lossless(data):
    input_ids = TOKENIZER.encode_bytes(data)
    assert TOKENIZER.decode_bytes(input_ids) == data
    assert TOKENIZER.decode(input_ids) == data.decode(errors="replace")


def test_long_text_is_lossless():
    text = "Раскольников, née R.\n\0" * 5_000
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_decode_bytes_skips_special_tokens():
    for container in (list, np.array, torch.tensor):
        assert TOKENIZER.decode_bytes(container([258, 0, 257, 259, 2, 1])) == b"\xff\x00"


def test_special_tokens_in_text():
    text = "<s>a</s>"
    assert TOKENIZER(text)["input_ids"] == [258, ord("a") + 2, 1]
    assert TOKENIZER(text, split_special_tokens=True)["input_ids"] == TOKENIZER.encode_bytes(text.encode())
    assert TOKENIZER(text)["input_ids"] == [258, ord("a") + 2, 1]
    assert TOKENIZER.decode([258, ord("a") + 2, 1]) == text
    assert TOKENIZER.decode([258, ord("a") + 2, 1], skip_special_tokens=True) == "a"


def test_split_special_tokens(tmp_path):
    ReformerHfByteTokenizer(split_special_tokens=True).save_pretrained(tmp_path)
    for loaded in (ReformerHfByteTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded("</s>")["input_ids"] == loaded.encode_bytes(b"</s>")


def test_added_tokens(tmp_path):
    tokenizer = ReformerHfByteTokenizer()
    added = ["<|é|>", "<two words>", "\U0001f600"]
    assert tokenizer.add_special_tokens({"eos_token": added[0], "extra_special_tokens": added[1:]}) == 3
    tokenizer.save_pretrained(tmp_path)
    text = "ü".join(added)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert each.eos_token_id == 260
        ids = each(text)["input_ids"]
        assert ids == [260, 197, 190, 261, 197, 190, 262]
        assert each.decode(ids) == each.decode(ids, errors="ignore") == text
        assert each.batch_decode([ids], skip_special_tokens=True) == ["üü"]


def test_other_names_of_special_tokens():
    tokenizer = ReformerHfByteTokenizer(eos_token="<|end|>", pad_token="<|end|>", bos_token=None)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (260, 260, None)
    assert tokenizer("<s></s><|end|>")["input_ids"] == [258, 1, 260]
    assert tokenizer.decode([258, 1, 260]) == "<s></s><|end|>"


def test_byte_character_as_token():
    """As a token, it would stand for a byte of other characters as well."""
    tokenizer = ReformerHfByteTokenizer()
    with pytest.raises(ValueError, match="'ö' cannot be added.*byte 246: leave it out, or add a longer token"):
        tokenizer.add_tokens(["ö"])
    tokenizer.add_tokens(["öö", "a"])
    assert tokenizer("aöö")["input_ids"] == [99, 260]


def test_chat_template(tmp_path):
    tokenizer = ReformerHfByteTokenizer(chat_template=CHATML)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "né<|im_end|>"}]
    rendered = "<|im_start|>user\nné<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == rendered
    assert [i for i in ids if i >= 260] == [261, 260, 260, 261]
    safe = tokenizer.apply_chat_template(messages, add_generation_prompt=True, sanitize_control_tokens=True)
    assert tokenizer.decode(safe["input_ids"]) == rendered
    assert [i for i in safe["input_ids"] if i >= 260] == [261, 260, 261]


def test_bos_and_eos(tmp_path):
    for bos, eos in itertools.product((False, True), repeat=2):
        tokenizer = ReformerHfByteTokenizer(add_bos_token=bos, add_eos_token=eos)
        tokenizer.save_pretrained(tmp_path)
        expected = [258] * bos + [ord("a") + 2] + [1] * eos
        assert tokenizer("a")["input_ids"] == expected
        assert ReformerHfByteTokenizer.from_pretrained(tmp_path)("a")["input_ids"] == expected


def test_padding():
    texts = ["abc", "é", ""]
    for side in ("left", "right"):
        batch = TOKENIZER(texts, padding=True, padding_side=side, return_tensors="np")
        assert batch.keys() == {"input_ids", "attention_mask"}
        for ids, mask, text in zip(batch["input_ids"], batch["attention_mask"], texts, strict=True):
            length = len(text.encode())
            tokens, padding = [1] * length, [0] * (3 - length)
            assert mask.tolist() == (padding + tokens if side == "left" else tokens + padding), (side, text)
            assert (ids[mask == 0] == 0).all(), (side, text)
            assert TOKENIZER.decode(ids[mask == 1]) == text, (side, text)


def test_truncation():
    tokenizer = ReformerHfByteTokenizer(model_max_length=4)
    assert tokenizer.decode(tokenizer("abcdef", truncation=True)["input_ids"]) == "abcd"


def test_offsets():
    assert TOKENIZER("aé b", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (1, 2), (1, 2), (2, 3), (3, 4)]


def test_words(tmp_path):
    """Words get spaces between them, or are refused: joined, they would not be what the model reads later."""
    words = ["Füße", "and", " shoes"]
    with pytest.raises(ValueError, match="join the words.*add_prefix_space=True"):
        ReformerHfByteTokenizer()(words, is_split_into_words=True)
    ReformerHfByteTokenizer(add_prefix_space=True).save_pretrained(tmp_path / "prefix")
    ReformerHfByteTokenizer().save_pretrained(tmp_path / "plain")
    for name, options in (("prefix", {}), ("plain", {"add_prefix_space": True})):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name, **options)
        encoded = tokenizer([words, words[1:]], is_split_into_words=True)
        assert tokenizer.batch_decode(encoded["input_ids"]) == [" Füße and shoes", " and shoes"]
        assert encoded.word_ids(0) == [0] * 7 + [1] * 4 + [2] * 6
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")("and")["input_ids"] == [99, 112, 102]


def test_pickle():
    assert pickle.loads(pickle.dumps(TOKENIZER))(SPECIAL_TEXT) == TOKENIZER(SPECIAL_TEXT)


@pytest.mark.parametrize("auto_class", [ReformerHfByteTokenizer, AutoTokenizer])
def test_round_trip(tmp_path, auto_class):
    saved = ReformerHfByteTokenizer(padding_side="left", model_max_length=4096)
    saved.add_tokens("<extra>", special_tokens=True)
    saved.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is ReformerHfByteTokenizer
    assert (loaded.padding_side, loaded.model_max_length) == ("left", 4096)
    assert loaded.get_vocab() == saved.get_vocab()
    assert loaded.convert_tokens_to_ids("<extra>") == 260
    assert loaded(SPECIAL_TEXT) == saved(SPECIAL_TEXT)


def test_changed_normalizer(tmp_path):
    saved = ReformerHfByteTokenizer()
    saved.backend_tokenizer.normalizer = normalizers.Lowercase()
    saved.save_pretrained(tmp_path)
    for loaded in (ReformerHfByteTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.decode(loaded("NÉ")["input_ids"]) == "né"


def test_retrained_tokenizer(tmp_path):
    """It has other ids, so it is a plain fast tokenizer, which loads as saved next to a model and its code."""
    TOKENIZER.save_pretrained(tmp_path)
    retrained = AutoTokenizer.from_pretrained(tmp_path).train_new_from_iterator([["the cat sat"] * 100], 280)
    ids = retrained("the cat</s>")["input_ids"]
    assert type(retrained) is PreTrainedTokenizerFast
    assert len(ids) < len(TOKENIZER("the cat</s>")["input_ids"]) and ids[-1] == retrained.eos_token_id
    reformer_hf.ReformerHfConfig().save_pretrained(tmp_path)
    retrained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is PreTrainedTokenizerFast
    assert loaded("the cat</s>")["input_ids"] == ids and loaded.decode(ids) == "the cat</s>"
    with pytest.raises(ValueError, match="tokenizer.json` has other ids for bytes.*PreTrainedTokenizerFast"):
        ReformerHfByteTokenizer.from_pretrained(tmp_path)


def test_auto_tokenizer_with_model_config(tmp_path):
    reformer_hf.ReformerHfConfig().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is ReformerHfByteTokenizer


def test_pairs():
    """A separator tells where the first text ends; it is there after loading, too."""
    for options, expected in (
        ({}, [99, 1, 100]),
        ({"add_eos_token": True}, [99, 1, 100, 1]),
        ({"add_bos_token": True}, [258, 99, 1, 258, 100]),
        ({"add_bos_token": True, "add_eos_token": True}, [258, 99, 1, 258, 100, 1]),
    ):
        tokenizer = ReformerHfByteTokenizer(**options)
        assert tokenizer("a", "b")["input_ids"] == expected
        assert tokenizer("a", "b", return_token_type_ids=True)["token_type_ids"][-1] == 1
        assert tokenizer("a", "b", add_special_tokens=False)["input_ids"] == [99, 100]


def test_saved_pairs(tmp_path):
    ReformerHfByteTokenizer().save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a", "b")["input_ids"] == [99, 1, 100]
