# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Byte-level tokenizer with a fixed id for each byte and four special tokens."""

from collections.abc import Sequence
from itertools import count, groupby

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.utils import to_py_obj

FIRST_BYTE_ID = 2
LAST_BYTE_ID = FIRST_BYTE_ID + 255
SPECIAL_TOKEN_IDS = {"<pad>": 0, "</s>": 1, "<s>": 258, "<mask>": 259}


def _byte_characters() -> list[str]:
    """Return the character with which `ByteLevel` of `tokenizers` represents each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    replacements = count(256)
    return [chr(byte if byte in printable else next(replacements)) for byte in range(256)]


BYTE_IDS = {character: FIRST_BYTE_ID + byte for byte, character in enumerate(_byte_characters())}


def _byte_backend() -> Tokenizer:
    backend = Tokenizer(BPE(vocab=SPECIAL_TOKEN_IDS | BYTE_IDS, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKEN_IDS))
    return backend


class ReformerHfByteTokenizer(PreTrainedTokenizerFast):
    r"""
    Tokenizer over UTF-8 bytes with the ids of google/reformer-enwik8: byte `b` has the id `b + 2`, from 2 to 257.

    The other ids are those of `<pad>` (0), `</s>` (1), `<s>` (258) and `<mask>` (259).

    Encoding is lossless: `decode(encode(text)) == text` for every text. Ids that are not valid UTF-8 decode to U+FFFD.
    `decode(…, errors="ignore")` omits them, and `decode_bytes` returns the bytes unchanged.

    As in other tokenizers, a special token in a text, such as `</s>` or a token of a chat template, is encoded as its
    id. Encode untrusted text with `split_special_tokens=True`, so that it cannot end a document or a turn, and
    untrusted messages with `apply_chat_template(…, sanitize_control_tokens=True)`.

    It knows no words: `whole_word_mask` of `DataCollatorForLanguageModeling` masks whole texts. Mask spans of bytes
    instead, as `examples/span_masking.py` does.

    Args:
        add_bos_token (`bool`, defaults to `False`): Whether to begin each sequence with `<s>`.
        add_eos_token (`bool`, defaults to `False`): Whether to end each sequence with `</s>`. It separates a pair
            of texts in any case.
        split_special_tokens (`bool`, defaults to `False`): Whether to encode special tokens in a text as bytes. Each
            call can override it.
        add_prefix_space (`bool`, defaults to `False`): Whether to begin each text and, with `is_split_into_words`,
            each word with a space, unless it has one. Encoding is then no longer lossless.
        kwargs: Other arguments of `PreTrainedTokenizerFast`, such as `padding_side` or `model_max_length`.

    Raises:
        ValueError: If a saved vocabulary does not have the ids above, or in a call with `is_split_into_words=True`
            without `add_prefix_space`, which would join the words.

    ```python
    >>> from reformer_hf import ReformerHfByteTokenizer

    >>> tokenizer = ReformerHfByteTokenizer()
    >>> tokenizer("né")["input_ids"]
    [112, 197, 171]
    ```"""

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, **kwargs):
        if not (kwargs.get("tokenizer_file") or kwargs.get("tokenizer_object")):
            kwargs["tokenizer_object"] = _byte_backend()
        defaults = {
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "bos_token": "<s>",
            "mask_token": "<mask>",
            "clean_up_tokenization_spaces": False,
        }
        super().__init__(**{**defaults, **kwargs})
        if not BYTE_IDS.items() <= self.get_vocab().items():
            raise ValueError(
                f"`{kwargs.get('tokenizer_file') or 'tokenizer_object'}` has other ids for bytes than the ids from "
                f"{FIRST_BYTE_ID} to {LAST_BYTE_ID} of `{type(self).__name__}`: load it with "
                "`PreTrainedTokenizerFast`."
            )
        if "add_prefix_space" in kwargs:
            pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kwargs["add_prefix_space"], use_regex=False)
            self.backend_tokenizer.pre_tokenizer = pre_tokenizer

    @classmethod
    def convert_to_native_format(cls, trust_remote_code=False, **kwargs):
        """Load the saved file unchanged. Without `trust_remote_code`, Transformers only takes its vocabulary."""
        return super().convert_to_native_format(trust_remote_code=True, **kwargs)

    def update_post_processor(self) -> None:
        """Set the special tokens of a text and of a pair, as in Transformers, but with `</s>` between two texts."""
        super().update_post_processor()
        if self.add_eos_token or self.eos_token is None:
            return
        tokens = [(self.eos_token, self.eos_token_id)]
        first = second = ""
        if self.add_bos_token:
            tokens.append((self.bos_token, self.bos_token_id))
            first, second = f"{self.bos_token}:0 ", f"{self.bos_token}:1 "
        self.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first}$A:0", pair=f"{first}$A:0 {self.eos_token}:0 {second}$B:1", special_tokens=tokens
        )

    def _encode_plus(self, *args, **kwargs) -> BatchEncoding:
        if kwargs.get("is_split_into_words") and not self.add_prefix_space:
            raise ValueError(
                "`is_split_into_words` is True, but this tokenizer would join the words without a space between them: "
                "create it with `add_prefix_space=True`."
            )
        return super()._encode_plus(*args, **kwargs)

    def _add_tokens(self, new_tokens, special_tokens=False) -> int:
        for token in map(str, new_tokens):
            if token in BYTE_IDS and not token.isascii():
                raise ValueError(
                    f"The token {token!r} cannot be added, because the vocabulary uses this character for the byte "
                    f"{BYTE_IDS[token] - FIRST_BYTE_ID}: leave it out, or add a longer token."
                )
        return super()._add_tokens(new_tokens, special_tokens)

    def train_new_from_iterator(self, *args, **kwargs) -> PreTrainedTokenizerFast:
        """
        Train a BPE tokenizer as in Transformers.

        The new ids do not stand for bytes, so the new tokenizer is a plain fast one. Its tokens may span words, unless
        you set `backend_tokenizer.pre_tokenizer` first.
        """
        options = {name: value for name, value in self.init_kwargs.items() if name != "auto_map"}
        plain = PreTrainedTokenizerFast(**{**options, "tokenizer_object": self.backend_tokenizer})
        return plain.train_new_from_iterator(*args, **kwargs)

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
        instead of decoding it to U+FFFD. `clean_up_tokenization_spaces` has no effect.
        """
        # Not by the decoder of `tokenizers`, which maps characters of added tokens to bytes.
        ids = to_py_obj(token_ids["input_ids"] if isinstance(token_ids, dict) else token_ids)
        added = self.added_tokens_decoder
        skipped = {i for i, token in added.items() if token.special} if skip_special_tokens else set()
        kept = (i for i in ([ids] if isinstance(ids, int) else ids) if i not in skipped)
        text = ""
        for is_byte, run in groupby(kept, self._is_byte):
            if is_byte:
                text += self.decode_bytes(list(run)).decode("utf-8", errors)
            else:
                text += "".join(added[i].content for i in run if i in added)
        return text

    @staticmethod
    def _is_byte(token_id: int) -> bool:
        return FIRST_BYTE_ID <= token_id <= LAST_BYTE_ID

    def decode_bytes(self, token_ids: Sequence[int] | np.ndarray | Tensor) -> bytes:
        """Decode one sequence of ids to bytes. Special tokens and other ids that are not bytes are omitted."""
        return bytes(i - FIRST_BYTE_ID for i in to_py_obj(token_ids) if self._is_byte(i))


ReformerHfByteTokenizer.register_for_auto_class()

__all__ = ["ReformerHfByteTokenizer"]
