# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""The byte tokenizer: fixed ids, nothing lost on any text, and the same again after saving."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import reformer_hf
from reformer_hf.tokenization_reformer_hf import ReformerHfByteTokenizer

TOKENIZER = ReformerHfByteTokenizer()
SPECIAL_TEXT = "<s>a</s> <pad> <mask>\0é\U0001f600"

# The package may be installed, so its import is blocked.
LOAD_WITHOUT_PACKAGE = """
import json
import sys

sys.modules["reformer_hf"] = None

from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
input_ids = tokenizer(sys.argv[2])["input_ids"]
tokenizer.save_pretrained(sys.argv[3])
print(json.dumps([type(tokenizer).__module__, input_ids, tokenizer.decode_bytes(input_ids).decode()]))
"""


def test_ids_are_those_of_enwik8():
    assert len(TOKENIZER) == reformer_hf.ReformerHfConfig().vocab_size == 260
    special_ids = (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.bos_token_id, TOKENIZER.mask_token_id)
    assert special_ids == (0, 1, 258, 259)
    assert sorted(TOKENIZER.all_special_ids) == [0, 1, 258, 259]
    for byte in range(128):
        assert TOKENIZER(chr(byte))["input_ids"] == [byte + 2]
    assert TOKENIZER.decode_bytes(range(2, 258)) == bytes(range(256))


def test_config_defaults_name_the_same_special_tokens():
    config = reformer_hf.ReformerHfConfig()
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        assert getattr(config, name) == getattr(TOKENIZER, name), name


@given(st.text() | st.sampled_from([SPECIAL_TEXT, " a ,b . ", "\r\n\t", "e\u0301"]))
@settings(deadline=None)
def test_text_is_lossless(text):
    input_ids = TOKENIZER(text)["input_ids"]
    assert input_ids == TOKENIZER.encode_bytes(text.encode())
    assert TOKENIZER.decode(input_ids) == text
    assert TOKENIZER.decode(input_ids, skip_special_tokens=True) == text
    assert TOKENIZER.decode_bytes(input_ids) == text.encode()


@given(st.binary())
@settings(deadline=None)
def test_bytes_are_lossless_and_decode_with_replacement(data):
    input_ids = TOKENIZER.encode_bytes(data)
    assert TOKENIZER.decode_bytes(input_ids) == data
    assert TOKENIZER.decode(input_ids) == data.decode(errors="replace")


def test_long_text_is_lossless():
    text = "Раскольников, née R.\n\0" * 5_000
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


@pytest.mark.parametrize("container", [list, np.array, torch.tensor])
def test_decode_bytes_leaves_out_special_tokens(container):
    assert TOKENIZER.decode_bytes(container([258, 0, 257, 259, 2, 1])) == b"\xff\x00"


def test_special_tokens_in_text_are_bytes_unless_asked_for():
    text = "<s>a</s>"
    assert TOKENIZER(text)["input_ids"] == TOKENIZER.encode_bytes(text.encode())
    assert TOKENIZER(text, split_special_tokens=False)["input_ids"] == [258, ord("a") + 2, 1]
    assert TOKENIZER(text)["input_ids"] == TOKENIZER.encode_bytes(text.encode())
    assert TOKENIZER.decode([258, ord("a") + 2, 1]) == text
    assert TOKENIZER.decode([258, ord("a") + 2, 1], skip_special_tokens=True) == "a"


@pytest.mark.parametrize("bos", [False, True], ids=["", "bos"])
@pytest.mark.parametrize("eos", [False, True], ids=["", "eos"])
def test_bos_and_eos_are_added_where_asked_for(tmp_path, bos, eos):
    tokenizer = ReformerHfByteTokenizer(add_bos_token=bos, add_eos_token=eos)
    tokenizer.save_pretrained(tmp_path)
    expected = [258] * bos + [ord("a") + 2] + [1] * eos
    assert tokenizer("a")["input_ids"] == expected
    assert ReformerHfByteTokenizer.from_pretrained(tmp_path)("a")["input_ids"] == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    batch = TOKENIZER(["abc", "é", ""], padding=True, padding_side=side, return_tensors="np")
    assert batch.keys() == {"input_ids", "attention_mask"}
    for ids, mask, text in zip(batch["input_ids"], batch["attention_mask"], ["abc", "é", ""], strict=True):
        length = len(text.encode())
        assert mask.tolist() == (
            [0] * (3 - length) + [1] * length if side == "left" else [1] * length + [0] * (3 - length)
        )
        assert (ids[mask == 0] == 0).all()
        assert TOKENIZER.decode(ids[mask == 1]) == text


def test_truncation_to_model_max_length():
    tokenizer = ReformerHfByteTokenizer(model_max_length=4)
    assert tokenizer.decode(tokenizer("abcdef", truncation=True)["input_ids"]) == "abcd"


def test_offsets_name_the_characters_of_bytes():
    assert TOKENIZER("aé b", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (1, 2), (1, 2), (2, 3), (3, 4)]


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


def test_auto_tokenizer_beside_a_model_config(tmp_path):
    reformer_hf.ReformerHfConfig().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is ReformerHfByteTokenizer


def test_saved_code_works_without_the_package(tmp_path):
    saved, cwd = tmp_path / "saved", tmp_path / "cwd"
    cwd.mkdir()
    TOKENIZER.save_pretrained(saved)
    text = SPECIAL_TEXT.replace("\0", "")
    process = subprocess.run(
        [sys.executable, "-I", "-c", LOAD_WITHOUT_PACKAGE, saved, text, tmp_path / "saved_again"],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    module, input_ids, decoded = json.loads(process.stdout)
    assert module.startswith("transformers_modules.")
    assert input_ids == TOKENIZER(text)["input_ids"]
    assert decoded == text
    assert {path.name for path in (tmp_path / "saved_again").iterdir()} == {path.name for path in saved.iterdir()}
