# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Byte-level tokenizer: a fixed id for each byte of UTF-8, and four special tokens."""

from collections.abc import Sequence
from itertools import count, groupby

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import to_py_obj

FIRST_BYTE_ID = 2
LAST_BYTE_ID = FIRST_BYTE_ID + 255
SPECIAL_TOKEN_IDS = {"<pad>": 0, "</s>": 1, "<s>": 258, "<mask>": 259}


def _byte_characters() -> list[str]:
    """The character by which the `ByteLevel` steps of `tokenizers` write each byte: printable Latin-1 as itself."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = count(256)
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def _byte_backend() -> Tokenizer:
    byte_ids = {character: FIRST_BYTE_ID + byte for byte, character in enumerate(_byte_characters())}
    backend = Tokenizer(BPE(vocab=SPECIAL_TOKEN_IDS | byte_ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


class ReformerHfByteTokenizer(PreTrainedTokenizerFast):
    r"""
    Tokenizer over the bytes of UTF-8, by the scheme of google/reformer-enwik8: byte `b` has the id `b + 2`.

    | id | token |
    |---|---|
    | 0 | `<pad>` |
    | 1 | `</s>` |
    | 2 … 257 | the bytes 0 … 255 |
    | 258 | `<s>` |
    | 259 | `<mask>` |

    Encoding is lossless: `decode(encode(text)) == text` for every text. This includes text that looks like a special
    token, which is read as its bytes; insert special tokens by id, or read them from text that you trust with
    `split_special_tokens=False`. Ids that form no valid UTF-8 decode to U+FFFD, or with `decode(…, errors="ignore")`
    to nothing; `decode_bytes` gives them unchanged.

    Args:
        add_bos_token, add_eos_token (`bool`, defaults to `False`): Whether each sequence begins with `<s>` and ends
            with `</s>`.
        split_special_tokens (`bool`, defaults to `True`): Whether special tokens in a text are read as their bytes,
            not as one id. Each call can override it.
        kwargs: The other arguments of `PreTrainedTokenizerFast`, such as `padding_side` or `model_max_length`.

    ```python
    >>> from reformer_hf import ReformerHfByteTokenizer

    >>> tokenizer = ReformerHfByteTokenizer()
    >>> tokenizer("né")["input_ids"]
    [112, 197, 171]
    ```"""

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, **kwargs):
        # A saved vocabulary can differ by added tokens alone, which the base class reads by itself.
        for name in ("vocab", "merges"):
            kwargs.pop(name, None)
        self._tokenizer = _byte_backend()
        defaults = {
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "bos_token": "<s>",
            "mask_token": "<mask>",
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        }
        super().__init__(**{**defaults, **kwargs})

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes, valid UTF-8 or not, without special tokens."""
        return [byte + FIRST_BYTE_ID for byte in data]

    def _decode(
        self,
        token_ids,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str = "replace",
        **kwargs,
    ) -> str:
        """As in Transformers; `errors` is that of `bytes.decode`: `"ignore"` leaves out what is no valid UTF-8, such
        as a character that was cut off, instead of giving U+FFFD."""
        options = {**kwargs, "clean_up_tokenization_spaces": clean_up_tokenization_spaces}
        if errors == "replace":
            return super()._decode(token_ids, skip_special_tokens, **options)
        ids = to_py_obj(token_ids)
        text = ""
        for is_byte, run in groupby([ids] if isinstance(ids, int) else ids, self._is_byte):
            if is_byte:
                text += self.decode_bytes(list(run)).decode("utf-8", errors)
            else:
                text += super()._decode(list(run), skip_special_tokens, **options)
        return text

    @staticmethod
    def _is_byte(token_id: int) -> bool:
        return FIRST_BYTE_ID <= token_id <= LAST_BYTE_ID

    def decode_bytes(self, token_ids: Sequence[int] | np.ndarray | Tensor) -> bytes:
        """Bytes of one sequence of ids. Ids that stand for no byte, such as special tokens, are left out."""
        return bytes(i - FIRST_BYTE_ID for i in to_py_obj(token_ids) if self._is_byte(i))


ReformerHfByteTokenizer.register_for_auto_class()

__all__ = ["ReformerHfByteTokenizer"]
