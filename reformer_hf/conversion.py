# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Convert folders between this package and the in-tree Reformer of Transformers. A conversion is exact, or refused.

    python -m reformer_hf.conversion from-in-tree SRC DST
    python -m reformer_hf.conversion to-in-tree SRC DST
    python -m reformer_hf.conversion from-reformer-pytorch SRC DST

DST is written only if the conversion succeeds. The tokenizer and the generation config of SRC are carried over.
To load in-tree folders, no conversion is needed: `from_pretrained` of our classes accepts them. Models of the package
`reformer-pytorch` have no exact equivalent: the last command says why, for the arguments in `SRC/arguments.json`.
"""

import argparse
import json
import math
import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, ReformerConfig
from transformers.utils import logging

from .configuration_reformer_hf import ReformerHfConfig
from .modeling_reformer_hf import ReformerHfForCausalLM, ReformerHfModel
from .task_heads import ReformerHfForMaskedLM, ReformerHfForQuestionAnswering, ReformerHfForSequenceClassification

logger = logging.get_logger(__name__)

Folder = str | os.PathLike

# Our class of each in-tree class.
_CLASSES: dict[str, type[PreTrainedModel]] = {
    "ReformerModel": ReformerHfModel,
    "ReformerModelWithLMHead": ReformerHfForCausalLM,
    "ReformerForMaskedLM": ReformerHfForMaskedLM,
    "ReformerForSequenceClassification": ReformerHfForSequenceClassification,
    "ReformerForQuestionAnswering": ReformerHfForQuestionAnswering,
}

# The code of a tokenizer is part of it.
_CARRIED_OVER = (
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "generation_config.json",
)


def from_in_tree(source: Folder, destination: Folder) -> None:
    """
    Convert an in-tree folder to one of this package, with the code for `trust_remote_code=True`.

    The weights are those of the in-tree model, bit for bit. Of the two biases of an in-tree LM head, `lm_head.bias` is
    dropped if there is `lm_head.decoder.bias`: the in-tree model uses only the latter.

    Args:
        source: A folder with `model_type: "reformer"`, and weights in safetensors or `.bin` files.
        destination: A new or empty folder.

    Raises:
        ValueError: If the folder has no exact equivalent, if its weights are not those of its class, or if the
            destination is not empty.
    """
    with _new_folder(destination) as folder:
        config_dict = _read_config(source, "reformer")
        architecture = _architecture(config_dict, list(_CLASSES), source)
        if architecture == "ReformerForSequenceClassification" and config_dict.get("is_decoder"):
            raise ValueError(
                f"`is_decoder` of {source} is True, but in-tree sequence classification reads the first token, which "
                "sees no other token in a causal model, so that our model reads the last one: set it to False."
            )
        model = _load(_CLASSES[architecture], source)
        model.save_pretrained(folder)
        _carry_over(source, folder)


def to_in_tree(source: Folder, destination: Folder) -> None:
    """
    Convert a folder of this package to an in-tree folder that computes the same function.

    Both names of the LM head's bias are written with the same values, since the in-tree model has two parameters and
    uses only `lm_head.decoder.bias`.

    Args:
        source: A folder of this package.
        destination: A new or empty folder.

    Raises:
        ValueError: If the in-tree model cannot compute the function: the message lists the fields, their values and
            what to change. Or if the weights are not those of the class, or the destination is not empty.
    """
    with _new_folder(destination) as folder:
        ours = {cls.__name__: name for name, cls in _CLASSES.items()}
        config_dict = _read_config(source, ReformerHfConfig.model_type)
        architecture = ours[_architecture(config_dict, list(ours), source)]
        config = ReformerHfConfig.from_pretrained(source)
        obstacles = list(_obstacles(config, architecture))
        if obstacles:
            raise ValueError(f"{source} has no exact in-tree equivalent:\n" + "\n".join(f"- {x}" for x in obstacles))
        model = _load(_CLASSES[architecture], source)
        weights = model.state_dict()
        if "lm_head.bias" in weights:
            weights["lm_head.bias"] = weights["lm_head.bias"].clone()
        with torch.device("meta"):
            in_tree = getattr(transformers, architecture)(in_tree_config(config))
        in_tree.load_state_dict(weights, assign=True)
        in_tree.config.dtype = model.dtype
        if model.can_generate():
            in_tree.generation_config = model.generation_config
        in_tree.save_pretrained(folder)
        _carry_over(source, folder)
        _warn_of_limits(config)


def from_reformer_pytorch(source: Folder, destination: Folder) -> None:
    """
    Refuse a model of the package `reformer-pytorch` (1.4), with the arguments and weights that stand in the way.

    No `ReformerLM` has an exact equivalent, because of its final layer norm. With full attention, its layers compute
    what our `"full"` layers compute, apart from a bias and an epsilon.

    Args:
        source: A folder with `arguments.json`, the keyword arguments of `ReformerLM`.
        destination: Never written.

    Raises:
        ValueError: Always. The message lists what stands in the way.
    """
    path = Path(source) / "arguments.json"
    if not path.is_file():
        raise ValueError(f"{source} is no folder with an `arguments.json`, the keyword arguments of `ReformerLM`.")
    obstacles = "\n".join(f"- {x}" for x in _reformer_pytorch_obstacles(json.loads(path.read_text())))
    raise ValueError(f"The `ReformerLM` of {source} has no exact equivalent here:\n{obstacles}")


def in_tree_config(config: ReformerHfConfig) -> ReformerConfig:
    """Return the in-tree config with the values of ours, for a model that `to_in_tree` does not refuse."""
    values = config.to_dict()
    for name in _field_names(ReformerHfConfig) - _field_names(ReformerConfig) | {"auto_map", "model_type"}:
        values.pop(name, None)
    for kind in ("local", "lsh"):
        if kind in config.attn_layers:
            values[f"{kind}_num_chunks_after"] = config.chunks_after(kind)
        else:
            # They have no meaning, and in-tree fields allow fewer values.
            for field in ("attn_chunk_length", "num_chunks_before", "num_chunks_after"):
                values.pop(f"{kind}_{field}", None)
    values["lsh_attention_probs_dropout_prob"] = config.lsh_attention_probs_dropout_prob or 0.0
    # In-tree, it also limits the length after padding.
    values["max_position_embeddings"] = config.padded_length(config.max_position_embeddings)
    return ReformerConfig.from_dict(values)


def _obstacles(config: ReformerHfConfig, architecture: str) -> Iterator[str]:
    """Yield a message for each field that keeps the in-tree model from computing the same function."""
    if "full" in config.attn_layers:
        yield f"`attn_layers` is {list(config.attn_layers)}, but in-tree layers are 'local' or 'lsh'."
        return
    if "lsh" in config.attn_layers:
        yield from _lsh_obstacles(config)
    if not config.wrap_chunks:
        yield (
            "`wrap_chunks` is False, but in-tree chunks form a ring, and padding keeps its place in them: train the "
            "model with `wrap_chunks=True`, which requires `lsh_pattern='chunk'` and `lsh_across_buckets=True`."
        )
    for kind in sorted(set(config.attn_layers)):
        for side, number in (("before", config.chunks_before(kind)), ("after", config.chunks_after(kind))):
            if number > 2:
                yield (
                    f"`{kind}_num_chunks_{side}` is {number}, but an in-tree query that sees more than 2 chunks "
                    f"{side} its own sees other keys in inputs of fewer chunks: train the model with at most 2."
                )
    inner = config.feed_forward_dropout_prob
    if inner is not None and inner != config.hidden_dropout_prob:
        yield (
            f"`feed_forward_dropout_prob` is {inner}, but in-tree it equals `hidden_dropout_prob` "
            f"({config.hidden_dropout_prob}): set it to None in `config.json`. This changes only training."
        )
    if config.add_cross_attention:
        yield "`add_cross_attention` is True, but the in-tree model has no cross-attention."
    if config.tie_word_embeddings:
        yield "`tie_word_embeddings` is True, but the in-tree LM head has weights of its own: train the model untied."
    if architecture == "ReformerForSequenceClassification" and config.pooled_tokens != "first":
        yield (
            f"`pooling` is {config.pooling!r}, which reads the {config.pooled_tokens} token(s), but the in-tree model "
            "reads the first token: train a bidirectional model with `pooling='first'`."
        )
    if config.local_rope_theta is not None and "local" in config.attn_layers:
        yield (
            f"`local_rope_theta` is {config.local_rope_theta}, but the in-tree model has no rotary position "
            "embeddings: train the model with `local_rope_theta=None`."
        )
    yield from _position_obstacles(config)


def _lsh_obstacles(config: ReformerHfConfig) -> Iterator[str]:
    for name, value in (("lsh_pattern", "chunk"), ("lsh_across_buckets", True), ("lsh_deduplicate_keys", False)):
        if getattr(config, name) != value:
            yield f"`{name}` is {getattr(config, name)!r}, but in-tree it is {value!r}: train the model with that."
    if config.num_buckets in (1, [1]):
        yield f"`num_buckets` is {config.num_buckets}, but in-tree it must be even: set it to an even number or None."


def _position_obstacles(config: ReformerHfConfig) -> Iterator[str]:
    max_length = num_positions = config.max_position_embeddings
    if config.axial_pos_embds:
        if len(config.axial_pos_shape) != 2:
            yield f"`axial_pos_shape` is {config.axial_pos_shape}, but in-tree axial embeddings have 2 axes."
            return
        num_positions = config.axial_pos_shape[0] * config.axial_pos_shape[1]
    padded = config.padded_length(max_length)
    if padded > num_positions:
        multiple = math.lcm(*config.chunk_lengths)
        smaller = max(num_positions // multiple * multiple, min(config.chunk_lengths))
        yield (
            f"`max_position_embeddings` is {max_length}, but the in-tree model pads inputs to a multiple of "
            f"{multiple} tokens, {padded}, and there are only {num_positions} position embeddings: set it to "
            f"{smaller}{'' if config.axial_pos_embds else ', with that many position embeddings'}."
        )


# Arguments of `ReformerLM` that our model can follow, or that do not change what it computes.
_SUPPORTED = frozenset(
    "num_tokens dim depth max_seq_len heads dim_head bucket_size n_hashes ff_chunks attn_chunks causal lsh_dropout "
    "ff_mult ff_activation post_attn_dropout random_rotations_per_head use_full_attn full_attn_thres reverse_thres "
    "one_value_head emb_dim return_embeddings weight_tie_embedding fixed_position_emb absolute_position_emb "
    "axial_position_emb axial_position_shape pkm_num_keys".split()
)

# Arguments that our model can only follow where they are false or zero, and what they do.
_UNSUPPORTED = {
    "use_scale_norm": "scales vectors to a length where our layers have a layer norm",
    "use_rezero": "has no layer norm where our layers have one",
    "num_mem_kv": "adds learned keys and values to every sequence",
    "n_local_attn_heads": "mixes heads of local and of LSH attention in a layer",
    "pkm_layers": "replaces feed-forward layers by product-key memories",
    "ff_glu": "multiplies the activations of feed-forward layers by a gate",
    "layer_dropout": "leaves out layers in training",
    "ff_dropout": "drops activations after the activation function, and ours before it",
    "weight_tie": "shares weights among layers",
}


def _reformer_pytorch_obstacles(arguments: dict[str, Any]) -> Iterator[str]:
    unknown = sorted(arguments.keys() - _SUPPORTED - _UNSUPPORTED.keys())
    if unknown:
        yield f"`{'`, `'.join(unknown)}` are no arguments of ReformerLM."
    full = arguments.get("use_full_attn") or arguments.get("full_attn_thres", 0) >= arguments.get(
        "max_seq_len", math.inf
    )
    if not full:
        yield (
            "`use_full_attn` is false: LSH attention then draws hash rotations in each forward pass, the same for all "
            "heads, and has as many buckets as chunks. Our rotations have a seed and differ among heads, and the "
            "number of buckets is fixed or follows another rule."
        )
        if not any(arguments.get(f"{kind}_position_emb") for kind in ("absolute", "axial", "fixed")):
            yield (
                "`absolute_position_emb`, `axial_position_emb` and `fixed_position_emb` are false: LSH attention then "
                "has rotary position embeddings, which ours does not have."
            )
    for name, what in _UNSUPPORTED.items():
        if arguments.get(name):
            yield f"`{name}` is {arguments[name]}, which {what}."
    yield (
        "`norm.weight` and `norm.bias` belong to a layer norm of the mean of both residual streams. Ours normalizes "
        "their concatenation, as the in-tree model and trax do, which no weights make up for."
    )
    yield "`to_out.bias` is added to the output of attention, where our layers have no bias."
    yield "`toqk.weight` gives keys that are normalized without the in-tree epsilon of 1e-6, which ours have."


def _warn_of_limits(config: ReformerHfConfig) -> None:
    """Warn of errors and changes that inputs can cause in-tree and not here."""
    for name in ("chunk_size_feed_forward", "chunk_size_lm_head"):
        if getattr(config, name):
            logger.warning(
                f"`{name}` is {getattr(config, name)}: the in-tree model raises an error for lengths that are no "
                "multiple of it. Set it to 0 in the new `config.json` for other lengths."
            )
    if "lsh" in config.attn_layers and config.num_buckets is None:
        logger.warning(
            "`num_buckets` is None: the in-tree model keeps the number of buckets of its first input, also for inputs "
            "of other lengths."
        )
    if "lsh" in config.attn_layers and config.hash_seed is None:
        logger.warning(
            "`hash_seed` is None: the in-tree model draws other hash rotations in each call, also in `eval()`."
        )


def _field_names(cls: type[PreTrainedConfig]) -> set[str]:
    return {field.name for field in fields(cls)}


def _read_config(source: Folder, model_type: str) -> dict[str, Any]:
    if not (Path(source) / "config.json").is_file():
        raise ValueError(f"{source} is no folder with a `config.json`.")
    config_dict, _ = PreTrainedConfig.get_config_dict(source)
    if config_dict.get("model_type") != model_type:
        raise ValueError(
            f"`model_type` of {source} is {config_dict.get('model_type')!r}, but this conversion needs {model_type!r}."
        )
    return config_dict


def _architecture(config_dict: dict[str, Any], known: list[str], source: Folder) -> str:
    architectures = config_dict.get("architectures") or [None]
    if architectures[0] not in known:
        raise ValueError(
            f"`architectures` of {source} is {config_dict.get('architectures')}, but these classes can be converted: "
            f"{', '.join(known)}."
        )
    return architectures[0]


def _load(cls: type[PreTrainedModel], source: Folder) -> PreTrainedModel:
    """Load a model in the dtype of its folder. Raises a `ValueError` unless the weights are those of the class."""
    options: dict[str, Any] = {"dtype": "auto", "weights_only": True, "ignore_mismatched_sizes": True}
    loaded: Any = cls.from_pretrained(source, output_loading_info=True, **options)
    model, info = loaded
    wrong = {
        "are missing": info["missing_keys"],
        "are unknown": info["unexpected_keys"],
        "have other shapes": [key for key, *_ in info["mismatched_keys"]],
    }
    for what, keys in wrong.items():
        if keys:
            raise ValueError(f"Weights of {source} {what}, compared with {cls.__name__}: {', '.join(sorted(keys))}.")
    return model


def _carry_over(source: Folder, folder: Path) -> None:
    for pattern in _CARRIED_OVER:
        for path in Path(source).glob(pattern):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copy(path, folder / path.name)


@contextmanager
def _new_folder(destination: Folder) -> Iterator[Path]:
    """Yield a temporary folder that becomes `destination` at the end, or is removed after an error."""
    destination = Path(destination).resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not an empty folder: remove it, or give another one.")
    folder = destination.with_name(f".{destination.name}-{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        yield folder
        if destination.exists():
            destination.rmdir()
        folder.rename(destination)
    except BaseException:
        shutil.rmtree(folder)
        raise


_CONVERSIONS = {
    "from-in-tree": from_in_tree,
    "to-in-tree": to_in_tree,
    "from-reformer-pytorch": from_reformer_pytorch,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert a folder, as in the description of this file. Exits with status 1 and the reason if it is refused."""
    parser = argparse.ArgumentParser(
        prog="python -m reformer_hf.conversion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("conversion", choices=_CONVERSIONS)
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of the model")
    parser.add_argument("destination", metavar="DST", type=Path, help="new or empty folder")
    options = parser.parse_args(arguments)
    try:
        _CONVERSIONS[options.conversion](options.source, options.destination)
    except (ValueError, OSError, pickle.UnpicklingError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
