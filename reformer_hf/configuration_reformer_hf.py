# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the Reformer: every field of the in-tree model under its name, and the ones that are ours."""

import math
from collections.abc import Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

ATTENTION_LAYER_TYPES = ("local", "lsh", "full")
LSH_PATTERNS = ("chunk", "window")

# What an in-tree `config.json` means by a field that it leaves out, and the in-tree behaviour of our own fields.
_IN_TREE_DEFAULTS: dict[str, Any] = {
    "axial_pos_shape": (64, 64),
    "axial_pos_embds_dim": (64, 192),
    "axial_norm_std": 1.0,
    "lsh_num_chunks_before": 1,
    "bos_token_id": None,
    "eos_token_id": 2,
    "num_attention_heads": 12,
    "vocab_size": 320,
    "lsh_pattern": "chunk",
    "lsh_deduplicate_keys": False,
    "lsh_across_buckets": True,
    "wrap_chunks": True,
}


def _balanced_factors(length: int) -> tuple[int, int]:
    """Two factors of about equal size whose product is the least one not below `length`."""
    columns = 1 << math.ceil(math.log2(math.sqrt(length))) if length > 1 else 1
    return math.ceil(length / columns), columns


@strict
class ReformerHfConfig(PreTrainedConfig):
    r"""
    Configuration of a Reformer (Kitaev, Kaiser, Levskaya 2020, arXiv 2001.04451).

    Fields that the in-tree `ReformerConfig` has keep its name and meaning. An in-tree `config.json`
    (`model_type: "reformer"`) is accepted by `from_pretrained` and `from_dict` and then gets the in-tree behaviour:
    the pattern `"chunk"` across buckets, duplicates counted, chunks wrapped.

    Args:
        vocab_size (`int`, defaults to 260): Number of token ids; the default is that of `ReformerHfByteTokenizer`.
        hidden_size (`int`, defaults to 256): Width of one residual stream. The encoder's output is twice as wide.
        attn_layers (`list[str]`): One of `"local"`, `"lsh"`, `"full"` for each layer. `"full"` is exact shared
            query-key attention, quadratic in the length.
        num_attention_heads (`int`, defaults to 4): Number of heads.
        attention_head_size (`int`, *optional*, defaults to 64): Size of a head; `None` divides `hidden_size`.
        feed_forward_size (`int`, defaults to 512): Inner width of the feed-forward.
        hidden_act (`str`, defaults to `"relu"`): Activation of the feed-forward.
        hidden_dropout_prob, local_attention_probs_dropout_prob, lsh_attention_probs_dropout_prob (`float`): Dropout of
            embeddings and branches, and of the attention weights. `"full"` layers take the rate of `"lsh"` ones.
        is_decoder (`bool`, defaults to `False`): Whether attention is causal.
        max_position_embeddings (`int`, defaults to 4096): Longest input, in tokens.
        axial_pos_embds (`bool`, defaults to `True`): Axial position embeddings, else one learned vector a position.
        axial_pos_shape (`list[int]`, *optional*): Sizes of the axes, at least `max_position_embeddings` in product;
            any number of axes. `None` takes two of about equal size.
        axial_pos_embds_dim (`list[int]`, *optional*): Widths of the axes' embeddings, `hidden_size` in sum. `None`
            gives the first axis a quarter (two axes) or splits evenly.
        axial_norm_std (`float`, defaults to 0.02): Standard deviation at which axial embeddings start. In-tree it
            is 1, which drowns the word embeddings for a long time.
        local_attn_chunk_length, local_num_chunks_before, local_num_chunks_after (`int`): A position of a local layer
            sees its own chunk and so many before and after it.
        lsh_attn_chunk_length, lsh_num_chunks_before, lsh_num_chunks_after (`int`): The same in sorted order, see
            `lsh_pattern`. `None` chunks before are two for the pattern `"window"`, one for `"chunk"`.
        num_hashes (`int`, defaults to 1): Hash rounds; `forward(num_hashes=…)` overrides it for one call.
        num_buckets (`int` or `list[int]`, *optional*): Buckets per round: an even number, 1 (no hashing), or a list
            of even factors. `None` derives it from the length of each call, padding included, and is never written
            anywhere: buckets as long as the window, or for the pattern `"chunk"` the in-tree formula, half a chunk.
        hash_seed (`int`, *optional*): Seed of the hash rotations. `None` means 0 in `eval()` and, in `train()`, one
            draw of torch's global generator for each layer and call.
        lsh_pattern (`str`, defaults to `"window"`): Which keys a query sees in one round. `"chunk"`: its chunk of the
            sorted order and the chunks around it (the paper, in-tree). `"window"`: the
            `lsh_attn_chunk_length * lsh_num_chunks_before` positions of its own bucket that precede it (and so many
            chunks after it where bidirectional), so that no later token changes an earlier output.
        lsh_across_buckets (`bool`, defaults to `False`): Pattern `"chunk"` only: whether a query sees keys of other
            buckets in its chunks (in-tree) or of its own alone (the paper's equation 2).
        lsh_deduplicate_keys (`bool`, defaults to `False`): Whether a key that a query sees in several rounds counts
            once (the paper's equation 4), or once per round (in-tree).
        wrap_chunks (`bool`, defaults to `False`): Whether the first chunk sees the last one, as in-tree: the chunks of
            a local layer form a ring, and so do the chunks of all rounds of an LSH layer, over the length padded to a
            multiple of every chunk length. (A ring shorter than a query's reach is walked again, where in-tree takes
            the query's own chunk.) Needs the pattern `"chunk"` across buckets with duplicates counted.
        reversible (`bool`, defaults to `True`): Whether training recomputes activations from the layer's output.
            `False` computes the same function and stores them.
        num_parallel_heads (`int`, *optional*): Heads that attention computes at a time, projections included; queries,
            keys and values of the others do not exist meanwhile. `None` takes as many as suit the device. (trax's
            `n_parallel_heads`)
        chunk_size_feed_forward, chunk_size_lm_head (`int`, defaults to 0): Positions that the feed-forward and the
            head process at a time. 0 means all, or for the feed-forward as many as suit the device.
        tie_word_embeddings (`bool`, defaults to `False`): Whether the head shares the word embeddings. It then reads
            the mean of both streams instead of the two side by side.

    Raises:
        `ValueError`: for fields that do not fit together; the message names field, value and remedy.

    ```python
    >>> from reformer_hf import ReformerHfConfig

    >>> config = ReformerHfConfig(is_decoder=True, max_position_embeddings=65536)
    >>> config.axial_pos_shape
    (256, 256)
    ```"""

    model_type = "reformer_hf"
    keys_to_ignore_at_inference = ["attentions", "hidden_states", "cache"]
    base_model_fsdp_plan = {
        "embeddings": "free_full_weight",
        "encoder.layers.*": "free_full_weight",
        "encoder.layer_norm": "keep_full_weight",
    }

    vocab_size: int = 260
    hidden_size: int = 256
    attn_layers: list[str] | tuple[str, ...] = ("local", "lsh", "local", "lsh", "local", "lsh")
    num_attention_heads: int = 4
    attention_head_size: int | None = 64
    feed_forward_size: int = 512
    hidden_act: str = "relu"
    hidden_dropout_prob: float | int = 0.05
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    is_decoder: bool = False
    max_position_embeddings: int = 4096
    axial_pos_embds: bool = True
    axial_pos_shape: list[int] | tuple[int, ...] | None = None
    axial_pos_embds_dim: list[int] | tuple[int, ...] | None = None
    axial_norm_std: float | int = 0.02
    local_attn_chunk_length: int | None = 64
    local_num_chunks_before: int = 1
    local_num_chunks_after: int = 0
    local_attention_probs_dropout_prob: float | int = 0.05
    lsh_attn_chunk_length: int | None = 64
    lsh_num_chunks_before: int | None = None
    lsh_num_chunks_after: int | None = 0
    lsh_attention_probs_dropout_prob: float | int | None = 0.0
    num_hashes: int = 1
    num_buckets: int | list[int] | tuple[int, ...] | None = None
    hash_seed: int | None = None
    lsh_pattern: str = "window"
    lsh_across_buckets: bool = False
    lsh_deduplicate_keys: bool = False
    wrap_chunks: bool = False
    reversible: bool = True
    num_parallel_heads: int | None = None
    chunk_size_lm_head: int = 0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 258

    def __post_init__(self, **kwargs):
        kwargs.pop("num_hidden_layers", None)
        self.attn_layers = tuple(self.attn_layers)
        if self.attention_head_size is None:
            self.attention_head_size = self._divided_head_size()
        if self.lsh_num_chunks_before is None:
            self.lsh_num_chunks_before = 2 if self.lsh_pattern == "window" else 1
        if self.axial_pos_shape is None:
            self.axial_pos_shape = _balanced_factors(self.max_position_embeddings)
        self.axial_pos_shape = tuple(self.axial_pos_shape)
        if self.axial_pos_embds_dim is None:
            self.axial_pos_embds_dim = self._axial_dims(len(self.axial_pos_shape))
        self.axial_pos_embds_dim = tuple(self.axial_pos_embds_dim)
        if self.num_buckets is not None and not isinstance(self.num_buckets, int):
            self.num_buckets = list(self.num_buckets)
        super().__post_init__(**kwargs)
        # Called here as well as by `strict`, which would wrap the `ValueError` in an exception of another type.
        self.validate_reformer()

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers: the length of `attn_layers`."""
        return len(self.attn_layers)

    @property
    def layer_types(self) -> list[str]:
        """Names by which the caches of Transformers find the cache layer of each layer."""
        kinds = {"lsh": "lsh_chunk"} if self.lsh_pattern == "chunk" else {}
        return [f"reformer_hf_{kinds.get(kind, kind)}" for kind in self.attn_layers]

    def padded_length(self, length: int) -> int:
        """Length of the in-tree computation for an input of `length` tokens: as it is up to the shortest chunk, else a
        multiple of the chunk lengths of all layers."""
        chunk_lengths = self.chunk_lengths
        if not chunk_lengths or length <= min(chunk_lengths):
            return length
        multiple = math.lcm(*chunk_lengths)
        return math.ceil(length / multiple) * multiple

    @property
    def chunk_lengths(self) -> list[int]:
        """Those of the kinds of layers that there are and that have chunks."""
        return [self.chunk_length(layer_type) for layer_type in set(self.attn_layers) - {"full"}]

    def chunk_length(self, layer_type: str) -> int:
        """Chunk length of `"local"` or `"lsh"` layers."""
        return getattr(self, f"{layer_type}_attn_chunk_length")

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        return cls._adopt_in_tree(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        config_dict = cls._adopt_in_tree(config_dict)
        # Overrides join the dictionary before the config is built, so that derived fields and checks see them.
        fields = cls.__dataclass_fields__.keys() & kwargs.keys() - {"dtype"}
        config_dict.update({name: kwargs.pop(name) for name in fields})
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _adopt_in_tree(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of `config_dict`, an in-tree one completed to what it means in our fields."""
        if config_dict.get("model_type") != "reformer":
            return dict(config_dict)
        adopted = {**_IN_TREE_DEFAULTS, **config_dict, "model_type": cls.model_type}
        if adopted.get("axial_pos_embds", True):
            # In-tree fails in forward, not here, where the axes hold fewer positions than the config promises.
            held = math.prod(adopted["axial_pos_shape"])
            adopted["max_position_embeddings"] = min(adopted.get("max_position_embeddings", 4096), held)
        return adopted

    def _divided_head_size(self) -> int:
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`attention_head_size` is None, but `hidden_size` ({self.hidden_size}) is not a multiple of "
                f"`num_attention_heads` ({self.num_attention_heads}): change one of them or give the head size."
            )
        return self.hidden_size // self.num_attention_heads

    def _axial_dims(self, num_axes: int) -> tuple[int, ...]:
        if num_axes == 2:
            return self.hidden_size // 4, self.hidden_size - self.hidden_size // 4
        share, rest = divmod(self.hidden_size, max(num_axes, 1))
        return tuple(share + (axis < rest) for axis in range(num_axes))

    def validate_layer_type(self):
        """Replaces the check of Transformers, which knows none of `attn_layers`; see `validate_reformer`."""

    def validate_reformer(self):
        """Check every rule between fields. Raises `ValueError`."""
        self._check_sizes()
        self._check_layers()
        self._check_positions()
        self._check_attention()

    def _check_sizes(self):
        positive = ("vocab_size", "hidden_size", "num_attention_heads", "attention_head_size", "feed_forward_size")
        for name in (*positive, "max_position_embeddings", "num_hashes"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least 1.")
        if self.num_parallel_heads is not None and self.num_parallel_heads < 1:
            raise ValueError(
                f"`num_parallel_heads` is {self.num_parallel_heads}; give at least 1, or None for as many as suit the "
                "device."
            )
        for name in ("chunk_size_feed_forward", "chunk_size_lm_head"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give a number of positions, or 0 for all.")
        if not self.layer_norm_eps > 0.0:
            raise ValueError(f"`layer_norm_eps` is {self.layer_norm_eps}, but must be above 0, such as 1e-12.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` is {self.hidden_act!r}, but must be one of {sorted(ACT2FN)}.")
        rates = ("hidden_dropout_prob", "local_attention_probs_dropout_prob", "lsh_attention_probs_dropout_prob")
        for name in rates:
            if not 0.0 <= (getattr(self, name) or 0.0) < 1.0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but a dropout rate lies in [0, 1).")

    def _check_layers(self):
        if not self.attn_layers:
            raise ValueError(f"`attn_layers` is empty; give at least one of {list(ATTENTION_LAYER_TYPES)}.")
        for layer_type in self.attn_layers:
            if layer_type not in ATTENTION_LAYER_TYPES:
                raise ValueError(
                    f"`attn_layers` holds {layer_type!r}; each entry must be one of {list(ATTENTION_LAYER_TYPES)}."
                )

    def _check_positions(self):
        if not self.axial_pos_embds:
            return
        shape, dims = self.axial_pos_shape, self.axial_pos_embds_dim
        if len(shape) != len(dims) or not shape or min(*shape, *dims) < 1:
            raise ValueError(
                f"`axial_pos_shape` {shape} and `axial_pos_embds_dim` {dims} must name the same number of axes, each "
                "of size at least 1; leave both None to have them chosen."
            )
        if sum(dims) != self.hidden_size:
            raise ValueError(
                f"`axial_pos_embds_dim` {dims} sums to {sum(dims)}, but must sum to `hidden_size` "
                f"({self.hidden_size}); leave it None to have it chosen."
            )
        if math.prod(shape) < self.max_position_embeddings:
            raise ValueError(
                f"`axial_pos_shape` {shape} holds {math.prod(shape)} positions, fewer than `max_position_embeddings` "
                f"({self.max_position_embeddings}): enlarge an axis, for instance to "
                f"{_balanced_factors(self.max_position_embeddings)}, or lower `max_position_embeddings`."
            )

    def _check_attention(self):
        for kind in {"local", "lsh"} & set(self.attn_layers):
            chunk_length = self.chunk_length(kind)
            if chunk_length is None or chunk_length < 1:
                raise ValueError(f"`{kind}_attn_chunk_length` is {chunk_length}, but {kind} layers need at least 1.")
            for name in (f"{kind}_num_chunks_before", f"{kind}_num_chunks_after"):
                if getattr(self, name) is None or getattr(self, name) < 0:
                    raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least 0.")
            if self.is_decoder and getattr(self, f"{kind}_num_chunks_after") > 0:
                raise ValueError(
                    f"`{kind}_num_chunks_after` is {getattr(self, f'{kind}_num_chunks_after')}, but a causal model "
                    "(`is_decoder=True`) sees nothing that comes after: set it to 0, or `is_decoder=False`."
                )
        if self.lsh_pattern not in LSH_PATTERNS:
            raise ValueError(f"`lsh_pattern` is {self.lsh_pattern!r}, but must be one of {list(LSH_PATTERNS)}.")
        if self.lsh_pattern == "window" and self.lsh_across_buckets:
            raise ValueError(
                "`lsh_across_buckets` is True, but the pattern 'window' sees a query's own bucket only: set it to "
                "False, or `lsh_pattern='chunk'`."
            )
        if self.lsh_pattern == "window" and "lsh" in self.attn_layers and self.lsh_num_chunks_before < 1:
            raise ValueError(
                f"`lsh_num_chunks_before` is {self.lsh_num_chunks_before}, but the pattern 'window' sees "
                "`lsh_attn_chunk_length * lsh_num_chunks_before` positions before a query: give at least 1."
            )
        in_tree = self.lsh_pattern == "chunk" and self.lsh_across_buckets and not self.lsh_deduplicate_keys
        if self.wrap_chunks and not in_tree:
            raise ValueError(
                "`wrap_chunks` is True, which needs the in-tree behaviour `lsh_pattern='chunk'`, "
                "`lsh_across_buckets=True`, `lsh_deduplicate_keys=False`, not "
                f"{self.lsh_pattern!r}, {self.lsh_across_buckets}, {self.lsh_deduplicate_keys}: set it to False."
            )
        if self.num_buckets is not None:
            self.check_num_buckets(self.num_buckets)

    @staticmethod
    def check_num_buckets(num_buckets: int | Sequence[int]):
        """Whether there can be so many buckets. Raises `ValueError`."""
        factors = [num_buckets] if isinstance(num_buckets, int) else list(num_buckets)
        if factors == [1]:
            return
        if not factors or any(factor < 2 or factor % 2 for factor in factors):
            raise ValueError(
                f"`num_buckets` is {num_buckets}, but random rotations give an even number of buckets: use even "
                "numbers (one, or a list of factors), 1 for a single bucket, or None to derive it from the length."
            )


__all__ = ["ReformerHfConfig"]
