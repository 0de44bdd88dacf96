# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the Reformer: the fields of the in-tree model under the same names, and our own fields."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .config_checks import MAX_LAYERS, MAX_NUMBER, check_given, check_numbers, check_weight
from .peft_defaults import register_peft_defaults

ATTENTION_LAYER_TYPES = ("local", "lsh", "full")
LSH_PATTERNS = ("chunk", "window")
POOLINGS = ("first", "last", "mean")

# Defaults of an in-tree `config.json`, and the values of our own fields that give the in-tree behavior.
_IN_TREE_DEFAULTS: dict[str, Any] = {
    "axial_pos_shape": (64, 64),
    "axial_pos_embds_dim": (64, 192),
    "axial_norm_std": 1.0,
    "local_rope_theta": None,
    "local_num_chunks_after": 0,
    "lsh_num_chunks_before": 1,
    "lsh_num_chunks_after": 0,
    "local_attention_probs_dropout_prob": 0.05,
    "feed_forward_dropout_prob": None,
    "bos_token_id": None,
    "eos_token_id": 2,
    "num_attention_heads": 12,
    "vocab_size": 320,
    "lsh_pattern": "chunk",
    "lsh_deduplicate_keys": False,
    "lsh_across_buckets": True,
    "wrap_chunks": True,
    # Of a folder without `tokenizer_config.json`. By the type of our config, `AutoTokenizer` would take ours.
    "tokenizer_class": "ReformerTokenizer",
}

# Names of other models' configs, and the fields that have their place here.
_NAMES_ELSEWHERE = {
    "attention_dropout": "local_attention_probs_dropout_prob` and `lsh_attention_probs_dropout_prob",
    "attention_probs_dropout_prob": "local_attention_probs_dropout_prob` and `lsh_attention_probs_dropout_prob",
    "head_dim": "attention_head_size",
    "num_key_value_heads": "num_attention_heads",
    "rms_norm_eps": "layer_norm_eps",
    "rope_theta": "local_rope_theta",
    "sliding_window": "local_attn_chunk_length",
}


def _balanced_factors(length: int) -> tuple[int, int]:
    """Return two factors of similar size whose product is at least `length`."""
    columns = 1 << math.ceil(math.log2(math.sqrt(length))) if length > 1 else 1
    return math.ceil(length / columns), columns


@strict
class ReformerHfConfig(PreTrainedConfig):
    r"""
    Configuration of a Reformer model (Kitaev, Kaiser, Levskaya 2020, arXiv 2001.04451).

    Fields that exist in the in-tree `ReformerConfig` keep their name and meaning. `from_pretrained` and `from_dict`
    also accept an in-tree `config.json` (`model_type: "reformer"`) and then set the in-tree behavior: the pattern
    `"chunk"` across buckets, duplicate keys counted, chunks wrapped.

    Args:
        vocab_size (`int`, defaults to 260): Vocabulary size. The default is that of `ReformerHfByteTokenizer`.
        hidden_size (`int`, defaults to 256): Width of one residual stream, of word embeddings and of `hidden_states`.
            The encoder output `last_hidden_state` is twice as wide (`config.output_size`).
        attn_layers (`list[str]`): Type of each layer: `"local"`, `"lsh"` or `"full"`. `"full"` is exact attention with
            shared queries and keys, quadratic in the sequence length.
        num_attention_heads (`int`, defaults to 4): Number of attention heads.
        attention_head_size (`int`, *optional*, defaults to 64): Head dimension. `None` means
            `hidden_size / num_attention_heads`.
        feed_forward_size (`int`, defaults to 512): Inner width of the feed-forward layers.
        hidden_act (`str`, defaults to `"relu"`): Activation function of the feed-forward layers.
        hidden_dropout_prob (`float`, defaults to 0.05): Dropout rate of the embeddings and of the outputs of
            attention, feed-forward and encoder.
        feed_forward_dropout_prob (`float`, *optional*, defaults to 0.0): Dropout rate inside feed-forward layers,
            before the activation function. `None` means `hidden_dropout_prob`, as in-tree.
        local_attention_probs_dropout_prob (`float`, defaults to 0.0): Dropout rate of the attention weights of local
            layers. The fused kernels have no such dropout: a rate above 0 makes training slower. The in-tree default
            is 0.05.
        lsh_attention_probs_dropout_prob (`float`, defaults to 0.0): The same for LSH and full layers, and for
            cross-attention.
        classifier_dropout (`float`, *optional*): Dropout rate before the output layers of classification heads. `None`
            means `hidden_dropout_prob`, as in-tree.
        pooling (`str`, *optional*): Which tokens a sequence head reads: the `"first"` one (in-tree), the `"last"` one,
            or the `"mean"` over all. `None` means `"first"`, or `"last"` if attention is causal. It never reads
            padding.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights and word embeddings.
        is_decoder (`bool`, defaults to `False`): Whether attention is causal.
        add_cross_attention (`bool`, defaults to `False`): Whether the layers of a causal model also attend to the
            output of an encoder, `encoder_hidden_states`.
        max_position_embeddings (`int`, defaults to 4096): Maximum sequence length.
        axial_pos_embds (`bool`, defaults to `True`): Whether to use axial position embeddings. `False` uses one
            learned vector per position.
        axial_pos_shape (`list[int]`, *optional*): Sizes of the axes, of any number. Their product must be at least
            `max_position_embeddings`. `None` selects two axes of similar size.
        axial_pos_embds_dim (`list[int]`, *optional*): Embedding width of each axis. Their sum must be `hidden_size`.
            `None` gives a quarter to the first of two axes, and splits `hidden_size` evenly for any other number.
        axial_norm_std (`float`, defaults to 0.02): Standard deviation of the initial axial position embeddings. The
            in-tree default is 1, which dominates the word embeddings for many training steps.
        local_rope_theta (`float`, *optional*, defaults to 10000.0): Base of the wavelengths of rotary position
            embeddings (Su et al. 2021), which turn the queries and keys of local layers, in addition to the position
            embeddings of the input. `None` means none, as in the paper and in-tree.
        local_attn_chunk_length (`int`, defaults to 64): Chunk length of local layers.
        local_num_chunks_before (`int`, defaults to 1): Number of chunks before its own that a query of a local layer
            sees.
        local_num_chunks_after (`int`, *optional*): Number of chunks after its own that a query of a local layer sees.
            `None` means 0 if attention is causal, else `local_num_chunks_before`. The in-tree default is 0.
        lsh_attn_chunk_length (`int`, defaults to 64): Chunk length of LSH layers, in sorted order.
        lsh_num_chunks_before (`int`, *optional*): Number of chunks before that a query of an LSH layer sees, see
            `lsh_pattern`. `None` means 2 for the pattern `"window"` and 1 for `"chunk"`.
        lsh_num_chunks_after (`int`, *optional*): Number of chunks after that a query of an LSH layer sees. `None`
            means 0 if attention is causal, else as many as before. The in-tree default is 0.
        num_hashes (`int`, defaults to 1): Number of hash rounds. `forward(num_hashes=…)` overrides it for one call.
        num_buckets (`int` or `list[int]`, *optional*): Number of buckets per round: an even number, 1 (no hashing), or
            a list of even factors. `None` derives it from the sequence length of each call, including padding (in
            `generate`, from the planned length), and never writes it to the config: buckets as long as the window to
            both sides, or, for the pattern `"chunk"`, buckets of half a chunk by the in-tree formula.
        hash_seed (`int`, *optional*): Seed of the hash rotations. `None` means 0 in `eval()` mode, and in `train()`
            mode a seed drawn from torch's global generator for each layer and call.
        lsh_pattern (`str`, defaults to `"window"`): Which keys a query sees in one round. `"chunk"` means its own
            chunk of the sorted order and the chunks around it (the paper, in-tree). `"window"` means the
            `lsh_attn_chunk_length * lsh_num_chunks_before` preceding positions of its own bucket and, if attention is
            bidirectional, the next `lsh_attn_chunk_length * lsh_num_chunks_after` ones. With `"window"`, later
            tokens never change earlier outputs of a causal model.
        lsh_across_buckets (`bool`, defaults to `False`): For the pattern `"chunk"`, whether a query sees keys of all
            buckets in its chunks (in-tree) or only keys of its own bucket (equation 2 of the paper).
        lsh_deduplicate_keys (`bool`, defaults to `False`): Whether a key that a query sees in several rounds counts
            once (equation 4 of the paper) instead of once per round (in-tree).
        wrap_chunks (`bool`, defaults to `False`): Whether the first chunk also sees the last chunk, as in-tree. The
            chunks of a local layer then form a ring, and so do the chunks of all rounds of an LSH layer, at a length
            padded to a multiple of every chunk length. (If a query reaches further than the ring is long, it sees keys
            of the ring again, where the in-tree model uses the query's own chunk.) Requires the pattern `"chunk"`
            across buckets without deduplication.
        reversible (`bool`, defaults to `True`): Whether the backward pass may recompute the activations of a layer
            from its output, see `max_kept_activations`. `False` always keeps them. Both compute the same function.
        max_kept_activations (`int`, *optional*): A training step whose activations take at most this many bytes keeps
            them, which is faster. Longer inputs recompute them, with memory that does not grow with the number of
            layers. 0 always recomputes, and `None` selects a number for the device.
        num_parallel_heads (`int`, *optional*): Number of heads that attention computes at a time, including their
            projections. A small number reduces memory for queries, keys and values. `None` selects a number for the
            device. (`n_parallel_heads` in trax)
        chunk_size_feed_forward (`int`, defaults to 0): Number of positions that a feed-forward layer processes at a
            time. 0 selects a number for the device.
        chunk_size_lm_head (`int`, defaults to 0): Number of positions that the LM head processes at a time. 0 means
            all.
        tie_word_embeddings (`bool`, defaults to `False`): Whether the LM head shares the word embeddings. It then
            reads the mean of both streams instead of their concatenation.

    Numbers must be finite. Sizes, lengths and token ids must be below 2^31, a weight must have at most 2^48 elements
    (a petabyte), and the config at most 65,536 layers and 4,194,304 labels: a file with larger numbers is damaged or
    hostile, and is refused before memory is allocated.

    Raises:
        `ValueError`: If fields are of the wrong type, are out of range or contradict each other. The message names
            the field, its value and how to fix it.

    ```python
    >>> from reformer_hf import ReformerHfConfig

    >>> config = ReformerHfConfig(is_decoder=True, max_position_embeddings=65536)
    >>> config.axial_pos_shape
    (256, 256)
    ```"""

    model_type = "reformer_hf"
    attribute_map = {"intermediate_size": "feed_forward_size"}
    keys_to_ignore_at_inference = ["attentions", "attention_positions", "hidden_states", "cache"]
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
    feed_forward_dropout_prob: float | int | None = 0.0
    classifier_dropout: float | int | None = None
    pooling: str | None = None
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    is_decoder: bool = False
    add_cross_attention: bool = False
    max_position_embeddings: int = 4096
    axial_pos_embds: bool = True
    axial_pos_shape: list[int] | tuple[int, ...] | None = None
    axial_pos_embds_dim: list[int] | tuple[int, ...] | None = None
    axial_norm_std: float | int = 0.02
    local_rope_theta: float | int | None = 10000.0
    local_attn_chunk_length: int | None = 64
    local_num_chunks_before: int = 1
    local_num_chunks_after: int | None = None
    local_attention_probs_dropout_prob: float | int = 0.0
    lsh_attn_chunk_length: int | None = 64
    lsh_num_chunks_before: int | None = None
    lsh_num_chunks_after: int | None = None
    lsh_attention_probs_dropout_prob: float | int | None = 0.0
    num_hashes: int = 1
    num_buckets: int | list[int] | tuple[int, ...] | None = None
    hash_seed: int | None = None
    lsh_pattern: str = "window"
    lsh_across_buckets: bool = False
    lsh_deduplicate_keys: bool = False
    wrap_chunks: bool = False
    reversible: bool = True
    max_kept_activations: int | None = None
    num_parallel_heads: int | None = None
    chunk_size_lm_head: int = 0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 258
    # Fields of every config, again: the types that Transformers gives them are not checked.
    transformers_version: str | None = None
    architectures: list[str] | None = None
    output_hidden_states: bool | None = False
    return_dict: bool | None = True
    dtype: str | torch.dtype | None = None
    chunk_size_feed_forward: int = 0
    is_encoder_decoder: bool = False
    id2label: dict | None = None
    label2id: dict | None = None
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None

    def __new__(cls, *args, **kwargs):
        # Before the fields are set: `strict` checks types too, but does not raise a `ValueError`.
        check_given(cls, kwargs)
        return super().__new__(cls)

    def __post_init__(self, **kwargs):
        num_hidden_layers = kwargs.pop("num_hidden_layers", None)
        self.attn_layers = tuple(self.attn_layers)
        if num_hidden_layers is not None:
            self.num_hidden_layers = num_hidden_layers
        # A saved config has a version, and may hold whatever was added to it.
        for name in _NAMES_ELSEWHERE.keys() & kwargs.keys() if self.transformers_version is None else ():
            raise ValueError(f"`{name}` is not a field of this config: use `{_NAMES_ELSEWHERE[name]}`.")
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
        # `strict` calls it too, but would wrap the `ValueError` in an exception of another type.
        self.validate_reformer()

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers, the length of `attn_layers`."""
        return len(self.attn_layers)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int):
        if value != len(self.attn_layers):
            raise ValueError(
                f"`num_hidden_layers` is {value}, but `attn_layers` has {len(self.attn_layers)} entries: give one "
                "entry for each layer, such as `attn_layers=['local', 'lsh'] * 6`, and leave `num_hidden_layers` out."
            )

    @property
    def output_size(self) -> int:
        """Width of the encoder output, which concatenates both residual streams: `2 * hidden_size`."""
        return 2 * self.hidden_size

    @property
    def classifier_dropout_prob(self) -> float:
        """Dropout rate of classification heads: `classifier_dropout`, or `hidden_dropout_prob` if it is `None`."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    @property
    def pooled_tokens(self) -> str:
        """Which tokens a sequence head reads: `pooling`, or its default if it is `None`."""
        return self.pooling or ("last" if self.is_decoder else "first")

    @property
    def layer_types(self) -> list[str]:
        """Names by which the caches of Transformers find the cache layer of each layer."""
        kinds = {"lsh": "lsh_chunk"} if self.lsh_pattern == "chunk" else {}
        return [f"reformer_hf_{kinds.get(kind, kind)}" for kind in self.attn_layers]

    def padded_length(self, length: int) -> int:
        """
        Return the length to which the in-tree model pads an input of `length` tokens.

        Inputs up to the shortest chunk length are not padded, longer ones to a multiple of all chunk lengths.
        """
        chunk_lengths = self.chunk_lengths
        if not chunk_lengths or length <= min(chunk_lengths):
            return length
        multiple = math.lcm(*chunk_lengths)
        return math.ceil(length / multiple) * multiple

    @property
    def chunk_lengths(self) -> list[int]:
        """Chunk lengths of the layer types of this config that use chunks."""
        return [self.chunk_length(layer_type) for layer_type in set(self.attn_layers) - {"full"}]

    def chunk_length(self, layer_type: str) -> int:
        """Return the chunk length of `"local"` or `"lsh"` layers."""
        return getattr(self, f"{layer_type}_attn_chunk_length")

    def chunks_before(self, layer_type: str) -> int:
        """Return the number of chunks before its own that a query of `"local"` or `"lsh"` layers sees."""
        return getattr(self, f"{layer_type}_num_chunks_before")

    def chunks_after(self, layer_type: str) -> int:
        """Return the number of chunks after its own that a query of `"local"` or `"lsh"` layers sees."""
        chunks_after = getattr(self, f"{layer_type}_num_chunks_after")
        if chunks_after is None:
            return 0 if self.is_decoder else self.chunks_before(layer_type)
        return chunks_after

    @property
    def ring(self) -> dict[str, Any]:
        """Fields of `AttentionPattern` for the rings of `wrap_chunks`; empty without it."""
        if not self.wrap_chunks:
            return {}
        return {"ring_multiple": math.lcm(*self.chunk_lengths), "ring_min_length": min(self.chunk_lengths)}

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        return cls._adopt_older(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        config_dict = cls._adopt_older(config_dict)
        # Apply overrides before the config is built, so that derived fields and checks use them.
        names = (cls.__dataclass_fields__.keys() | {"num_hidden_layers"}) & kwargs.keys() - {"dtype"}
        overrides = {name: kwargs.pop(name) for name in names}
        built = super().from_dict({**config_dict, **overrides}, **kwargs)
        cls._check_growth(config_dict, built[0] if isinstance(built, tuple) else built)
        return built

    @classmethod
    def _check_growth(cls, saved: dict[str, Any], config: "ReformerHfConfig"):
        """Raise a `ValueError` if overrides let inputs reach entries of saved axial tables that no input trained."""
        old, new = saved.get("max_position_embeddings", cls.max_position_embeddings), config.max_position_embeddings
        same_tables = config.axial_pos_embds and list(config.axial_pos_shape) == list(
            saved.get("axial_pos_shape") or ()
        )
        if new > old and same_tables:
            raise ValueError(
                f"`max_position_embeddings` is {new}, but the saved config has {old}: `axial_pos_shape` "
                f"{config.axial_pos_shape} has embeddings for more positions, but they are untrained. Load the model "
                f"without this argument and call `model.resize_position_embeddings({new})`. For a new model, create a "
                "new config."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as in Transformers. PEFT calls this before it looks up the default target modules."""
        register_peft_defaults(self.model_type)
        return super().to_dict()

    @classmethod
    def _adopt_older(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """Check `config_dict` and return a copy, with what an in-tree one or one of version 0.1 means."""
        check_given(cls, config_dict)
        if config_dict.get("model_type") != "reformer":
            # Version 0.1 had no rotary position embeddings, and a saved config has all fields of its version.
            older = "transformers_version" in config_dict and "local_rope_theta" not in config_dict
            return {**config_dict, "local_rope_theta": None} if older else dict(config_dict)
        adopted = {**_IN_TREE_DEFAULTS, **config_dict, "model_type": cls.model_type}
        # The in-tree models ignore them.
        for name in ("num_hidden_layers", *_NAMES_ELSEWHERE):
            adopted.pop(name, None)
        adopted["tie_word_embeddings"] = adopted["add_cross_attention"] = False
        if adopted.get("axial_pos_embds", True):
            # The in-tree model takes, and in training requires, inputs of all positions of the axes. It uses the field
            # only for the number of buckets, which its first input fixes.
            num_positions = math.prod(adopted["axial_pos_shape"])
            has_hashed = adopted.get("num_buckets") is not None or "lsh" not in adopted.get("attn_layers", ["lsh"])
            limit = num_positions if has_hashed else adopted.get("max_position_embeddings", 4096)
            adopted["max_position_embeddings"] = min(limit, num_positions)
        return adopted

    def _divided_head_size(self) -> int:
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`attention_head_size` is None, but `hidden_size` ({self.hidden_size}) is not a multiple of "
                f"`num_attention_heads` ({self.num_attention_heads}): change one of them or set `attention_head_size`."
            )
        return self.hidden_size // self.num_attention_heads

    def _axial_dims(self, num_axes: int) -> tuple[int, ...]:
        if num_axes == 2:
            return self.hidden_size // 4, self.hidden_size - self.hidden_size // 4
        share, rest = divmod(self.hidden_size, max(num_axes, 1))
        return tuple(share + (axis < rest) for axis in range(num_axes))

    def validate_layer_type(self):
        """Skip the check of Transformers, which does not know our layer types; `validate_reformer` checks them."""

    def validate_reformer(self):
        """Check all fields. Raises `ValueError` if one is out of range or contradicts another."""
        check_numbers({each.name: getattr(self, each.name) for each in fields(self)})
        self._check_sizes()
        self._check_pooling()
        self._check_layers()
        self._check_positions()
        self._check_rotation()
        self._check_attention()

    def _check_sizes(self):
        positive = ("vocab_size", "hidden_size", "num_attention_heads", "attention_head_size", "feed_forward_size")
        for name in (*positive, "max_position_embeddings", "num_hashes"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least 1.")
        if self.num_parallel_heads is not None and self.num_parallel_heads < 1:
            raise ValueError(
                f"`num_parallel_heads` is {self.num_parallel_heads}, but must be at least 1, or None to select a "
                "number for the device."
            )
        if self.max_kept_activations is not None and self.max_kept_activations < 0:
            raise ValueError(
                f"`max_kept_activations` is {self.max_kept_activations}, but must be at least 0 (bytes), or None to "
                "select a number for the device."
            )
        for name in ("chunk_size_feed_forward", "chunk_size_lm_head"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least 1, or 0 for all positions.")
        if not self.layer_norm_eps > 0.0:
            raise ValueError(f"`layer_norm_eps` is {self.layer_norm_eps}, but must be above 0, such as 1e-12.")
        for name in ("initializer_range", "axial_norm_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but a standard deviation must be at least 0.")
        hidden = ("hidden_size", self.hidden_size)
        for name in ("hidden_size", "vocab_size", "feed_forward_size"):
            check_weight(hidden, (name, getattr(self, name)))
        heads = ("num_attention_heads", self.num_attention_heads)
        check_weight(hidden, heads, ("attention_head_size", self.attention_head_size))
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` is {self.hidden_act!r}, but must be one of {sorted(ACT2FN)}.")
        attention_rates = ("local_attention_probs_dropout_prob", "lsh_attention_probs_dropout_prob")
        for name in ("hidden_dropout_prob", "feed_forward_dropout_prob", "classifier_dropout", *attention_rates):
            if not 0.0 <= (getattr(self, name) or 0.0) < 1.0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but a dropout rate must be in [0, 1).")

    def _check_pooling(self):
        if self.pooling not in (None, *POOLINGS):
            raise ValueError(f"`pooling` is {self.pooling!r}, but must be one of {list(POOLINGS)}, or None.")
        if self.pooling == "first" and self.is_decoder:
            raise ValueError(
                "`pooling` is 'first', but the first token of a causal model (`is_decoder=True`) sees no other token: "
                "set it to 'last', 'mean' or None, or `is_decoder=False`."
            )

    def _check_layers(self):
        if self.add_cross_attention and not self.is_decoder:
            raise ValueError(
                "`add_cross_attention` is True, but only a causal model attends to the output of an encoder: set "
                "`is_decoder=True`, or use `ReformerHfForConditionalGeneration`."
            )
        self._check_layer_types("attn_layers")

    def _check_layer_types(self, name: str):
        layer_types = getattr(self, name)
        if not layer_types:
            raise ValueError(f"`{name}` is empty, but needs at least one of {list(ATTENTION_LAYER_TYPES)}.")
        if len(layer_types) > MAX_LAYERS:
            raise ValueError(f"`{name}` has {len(layer_types)} entries, but at most {MAX_LAYERS} are allowed.")
        for layer_type in layer_types:
            if layer_type not in ATTENTION_LAYER_TYPES:
                raise ValueError(
                    f"`{name}` holds {layer_type!r}, but each entry must be one of {list(ATTENTION_LAYER_TYPES)}."
                )

    def _check_rotation(self):
        theta = self.local_rope_theta
        if theta is None:
            return
        if theta <= 0.0:
            raise ValueError(
                f"`local_rope_theta` is {theta}, but must be a number above 0, such as 10000.0, or None for no rotary "
                "position embeddings."
            )
        if self.attention_head_size % 2 and "local" in self.attn_layers:
            raise ValueError(
                f"`attention_head_size` is {self.attention_head_size}, but rotary position embeddings turn pairs of "
                "features: choose an even size, or set `local_rope_theta` to None."
            )

    def _check_positions(self):
        if not self.axial_pos_embds:
            positions = ("max_position_embeddings", self.max_position_embeddings)
            check_weight(("hidden_size", self.hidden_size), positions)
            return
        shape, dims = self.axial_pos_shape, self.axial_pos_embds_dim
        if len(shape) != len(dims) or not shape or min(*shape, *dims) < 1:
            raise ValueError(
                f"`axial_pos_shape` {shape} and `axial_pos_embds_dim` {dims} must have the same number of axes, each "
                "of size at least 1: set both to None for a default."
            )
        if sum(dims) != self.hidden_size:
            raise ValueError(
                f"`axial_pos_embds_dim` {dims} sums to {sum(dims)}, but must sum to `hidden_size` "
                f"({self.hidden_size}): set it to None for a default."
            )
        for length, dim in zip(shape, dims, strict=True):
            check_weight(("axial_pos_shape", length), ("axial_pos_embds_dim", dim))
        if math.prod(shape) < self.max_position_embeddings:
            raise ValueError(
                f"`axial_pos_shape` {shape} holds {math.prod(shape)} positions, fewer than `max_position_embeddings` "
                f"({self.max_position_embeddings}): enlarge the first axis, to "
                f"{(math.ceil(self.max_position_embeddings / math.prod(shape[1:])), *shape[1:])}, or lower "
                "`max_position_embeddings`. To continue a trained model, load it with its own config and call "
                f"`model.resize_position_embeddings({self.max_position_embeddings})`."
            )

    def _check_attention(self):
        for kind in {"local", "lsh"} & set(self.attn_layers):
            chunk_length = self.chunk_length(kind)
            if chunk_length is None or chunk_length < 1:
                raise ValueError(f"`{kind}_attn_chunk_length` is {chunk_length}, but {kind} layers need at least 1.")
            for side, number in (("before", self.chunks_before(kind)), ("after", self.chunks_after(kind))):
                if number is None or number < 0:
                    raise ValueError(f"`{kind}_num_chunks_{side}` is {number}, but must be at least 0.")
            if self.is_decoder and self.chunks_after(kind) > 0:
                raise ValueError(
                    f"`{kind}_num_chunks_after` is {self.chunks_after(kind)}, but a causal model (`is_decoder=True`) "
                    "sees no later positions: set it to None or 0, or `is_decoder=False`."
                )
        if self.lsh_pattern not in LSH_PATTERNS:
            raise ValueError(f"`lsh_pattern` is {self.lsh_pattern!r}, but must be one of {list(LSH_PATTERNS)}.")
        chunk_only = [name for name in ("lsh_across_buckets", "wrap_chunks") if getattr(self, name)]
        if self.lsh_pattern == "window" and chunk_only:
            raise ValueError(
                f"`lsh_pattern` is 'window' and {' and '.join(f'`{name}` is True' for name in chunk_only)}, but a "
                "query of this pattern sees only keys of its own bucket: set "
                f"{', '.join(f'`{name}=False`' for name in chunk_only)}, or `lsh_pattern='chunk'`."
            )
        if self.lsh_pattern == "window" and "lsh" in self.attn_layers and self.lsh_num_chunks_before < 1:
            raise ValueError(
                f"`lsh_num_chunks_before` is {self.lsh_num_chunks_before}, but a query of the pattern 'window' sees "
                "`lsh_attn_chunk_length * lsh_num_chunks_before` preceding positions: set it to at least 1."
            )
        in_tree = self.lsh_pattern == "chunk" and self.lsh_across_buckets and not self.lsh_deduplicate_keys
        if self.wrap_chunks and not in_tree:
            raise ValueError(
                "`wrap_chunks` is True, which requires the in-tree behavior `lsh_pattern='chunk'`, "
                "`lsh_across_buckets=True`, `lsh_deduplicate_keys=False`, not "
                f"{self.lsh_pattern!r}, {self.lsh_across_buckets}, {self.lsh_deduplicate_keys}: set it to False."
            )
        if self.num_buckets is not None:
            self.check_num_buckets(self.num_buckets)

    @staticmethod
    def check_num_buckets(num_buckets: int | Sequence[int]):
        """Check a number of buckets or a list of factors. Raises `ValueError`."""
        factors = [num_buckets] if isinstance(num_buckets, int) else list(num_buckets)
        if factors == [1]:
            return
        if not factors or any(factor < 2 or factor % 2 for factor in factors):
            raise ValueError(
                f"`num_buckets` is {num_buckets}, but random rotations give an even number of buckets: use an "
                "even number, a list of even factors, 1 for a single bucket, or None to derive it from the length."
            )
        if math.prod(factors) > MAX_NUMBER:
            raise ValueError(f"`num_buckets` is {num_buckets}, but there may be at most {MAX_NUMBER} in all.")


__all__ = ["ReformerHfConfig"]
