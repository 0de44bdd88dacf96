# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Byte-level tokenizer with a fixed id for each byte and four special tokens."""

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
    """Return the character with which `ByteLevel` of `tokenizers` represents each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    replacements = count(256)
    return [chr(byte if byte in printable else next(replacements)) for byte in range(256)]


def _byte_backend() -> Tokenizer:
    byte_ids = {character: FIRST_BYTE_ID + byte for byte, character in enumerate(_byte_characters())}
    backend = Tokenizer(BPE(vocab=SPECIAL_TOKEN_IDS | byte_ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


class ReformerHfByteTokenizer(PreTrainedTokenizerFast):
    r"""
    Tokenizer over UTF-8 bytes with the ids of google/reformer-enwik8: byte `b` has the id `b + 2`.

    | id | token |
    |---|---|
    | 0 | `<pad>` |
    | 1 | `</s>` |
    | 2 … 257 | the bytes 0 … 255 |
    | 258 | `<s>` |
    | 259 | `<mask>` |

    Encoding is lossless: `decode(encode(text)) == text` for every text, including text that looks like a special
    token, which is encoded as bytes. Insert special tokens by id, or encode trusted text with
    `split_special_tokens=False`. Ids that are not valid UTF-8 decode to U+FFFD. `decode(…, errors="ignore")` omits
    them, and `decode_bytes` returns the bytes unchanged.

    Args:
        add_bos_token (`bool`, defaults to `False`): Whether to begin each sequence with `<s>`.
        add_eos_token (`bool`, defaults to `False`): Whether to end each sequence with `</s>`.
        split_special_tokens (`bool`, defaults to `True`): Whether to encode special tokens in a text as bytes instead
            of as one id. Each call can override it.
        kwargs: Other arguments of `PreTrainedTokenizerFast`, such as `padding_side` or `model_max_length`.

    ```python
    >>> from reformer_hf import ReformerHfByteTokenizer

    >>> tokenizer = ReformerHfByteTokenizer()
    >>> tokenizer("né")["input_ids"]
    [112, 197, 171]
    ```"""

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, **kwargs):
        # The vocabulary is fixed. Added tokens are read by the base class.
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
        """Encode bytes, which need not be valid UTF-8, without special tokens."""
        return [byte + FIRST_BYTE_ID for byte in data]

    def _decode(
        self,
        token_ids,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str = "replace",
        **kwargs,
    ) -> str:
        """
        Decode ids, as in Transformers.

        `errors` has the meaning of `bytes.decode`: `"ignore"` omits invalid UTF-8, such as a truncated character,
        instead of decoding it to U+FFFD.
        """
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
        """Decode one sequence of ids to bytes. Special tokens and other ids that are not bytes are omitted."""
        return bytes(i - FIRST_BYTE_ID for i in to_py_obj(token_ids) if self._is_byte(i))


ReformerHfByteTokenizer.register_for_auto_class()

__all__ = ["ReformerHfByteTokenizer"]
