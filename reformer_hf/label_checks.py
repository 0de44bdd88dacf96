# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Checks of heads and their labels. Each raises a `ValueError` that says what to change.

`reads_values` says whether to read the values of labels, see `ReformerHfModel.reads_values`.
"""

import torch
from torch import Tensor
from transformers.utils import logging

from .configuration_reformer_hf import ReformerHfConfig
from .lm_head import IGNORED

logger = logging.get_logger(__name__)


def check_sees_both_sides(config: ReformerHfConfig, head: str, required: bool = False) -> None:
    """Warn that a causal model sees only one side of each token, or raise a `ValueError` if that is no use at all."""
    if not config.is_decoder:
        return
    if required:
        raise ValueError(
            f"`is_decoder` is True, but {head} needs attention in both directions: set `is_decoder=False` (and train "
            "the model, if its weights are those of a causal one), or use `ReformerHfForCausalLM`."
        )
    logger.warning_once(
        f"`is_decoder` is True, so {head} sees no token after the one that it labels: set `is_decoder=False` for "
        "attention in both directions."
    )


def check_token_labels(
    labels: Tensor,
    states: Tensor,
    num_classes: int,
    field: str,
    reads_values: bool,
    ignore_index: int = IGNORED,
    name: str = "labels",
) -> None:
    """
    Check labels `[B, L]` of the tokens of hidden states or logits `[B, L, …]`; `ignore_index` is allowed.

    Args:
        labels, states: See above.
        num_classes, field: The number of classes, and the field of the config that sets it.
        reads_values: See above.
        ignore_index: Label of tokens without loss.
        name: Name of the argument that holds the labels.
    """
    if labels.shape != states.shape[:2]:
        raise ValueError(
            f"`{name}` has shape {tuple(labels.shape)}, but must be {tuple(states.shape[:2])}, one entry for each "
            f"token ({ignore_index} for tokens without loss)."
        )
    if labels.dtype != torch.long:
        raise ValueError(f"`{name}` has dtype {labels.dtype}, but must be torch.int64: pass `{name}.long()`.")
    _check_indices(labels, num_classes, field, reads_values, ignore_index, name)


def check_sequence_labels(labels: Tensor, logits: Tensor, config: ReformerHfConfig, reads_values: bool) -> Tensor:
    """
    Check labels of sequences, as `config.problem_type` or their dtype says, and return them as the loss needs them.

    Args:
        labels: See `ReformerHfForSequenceClassification.forward`.
        logits: `[B, num_labels]`.
    """
    problem: str = config.problem_type or (
        "regression"
        if config.num_labels == 1
        else "multi_label_classification"
        if labels.is_floating_point()
        else "single_label_classification"
    )
    if problem == "single_label_classification":
        return check_class_indices(labels, logits, "num_labels", reads_values)
    shapes = [tuple(logits.shape)]
    if problem == "regression" and config.num_labels == 1:
        shapes = [*shapes, (len(logits),)]
    if tuple(labels.shape) not in shapes:
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)}, but `problem_type` {problem!r} with `num_labels` "
            f"{config.num_labels} needs {' or '.join(map(str, shapes))}: change the labels, `num_labels` or "
            "`problem_type`."
        )
    if problem == "multi_label_classification" and reads_values and ((labels < 0) | (labels > 1)).any():
        raise ValueError(
            f"`labels` holds {labels.min().item()} to {labels.max().item()}, but `problem_type` {problem!r} needs "
            "numbers from 0 to 1, one for each class: for class indices, set `problem_type` to "
            "'single_label_classification'; for other numbers, to 'regression'."
        )
    return labels.view_as(logits).to(logits.dtype)


def check_class_indices(labels: Tensor, logits: Tensor, limit_name: str, reads_values: bool) -> Tensor:
    """Check class indices `[B]` or `[B, 1]` for logits `[B, C]`, and return them as `[B]`; -100 is allowed."""
    batch_size, num_classes = logits.shape
    if tuple(labels.shape) not in ((batch_size,), (batch_size, 1)):
        multi_label = ", or set `problem_type='multi_label_classification'` for zeros and ones"
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)}, but must be {(batch_size,)}, one class index for each "
            f"sequence{multi_label if labels.shape == logits.shape else ''}."
        )
    _check_indices(labels, num_classes, limit_name, reads_values)
    return labels.flatten().to(logits.device, torch.long)


def check_choices(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> tuple[int, int]:
    """Check that all inputs have an axis of choices, and return their batch size and number of choices."""
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"Give one of `input_ids` and `inputs_embeds`, not {given}.")
    inputs, name, axes = input_ids, "input_ids", "[B, C, L]"
    if inputs_embeds is not None:
        inputs, name, axes = inputs_embeds, "inputs_embeds", "[B, C, L, E]"
    if inputs.dim() != axes.count(",") + 1:
        raise ValueError(
            f"`{name}` has shape {tuple(inputs.shape)}, but a multiple choice model needs {axes}, with an axis of "
            "choices after the batch: pad the choices of an example to one length and stack them."
        )
    shape = tuple(inputs.shape[:3])
    for name, tensor in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}, but must be {shape}, one entry for each token."
            )
    return shape[0], shape[1]


def check_span(start: Tensor | None, end: Tensor | None, logits: Tensor, reads_values: bool) -> bool:
    """Check the first and the last index of spans for logits `[B, L]`, and return whether they are given."""
    if start is None and end is None:
        return False
    if start is None or end is None:
        missing = "start_positions" if start is None else "end_positions"
        raise ValueError(f"`{missing}` is missing: give both ends of the span, or neither.")
    batch_size = len(logits)
    for name, positions in (("start_positions", start), ("end_positions", end)):
        if tuple(positions.shape) not in ((batch_size,), (batch_size, 1)):
            raise ValueError(
                f"`{name}` has shape {tuple(positions.shape)}, but must be {(batch_size,)}, one index for each "
                "sequence."
            )
        if positions.is_floating_point():
            raise ValueError(f"`{name}` has dtype {positions.dtype}, but must hold integers, such as `torch.long`.")
        if reads_values and (positions < 0).any():
            raise ValueError(
                f"`{name}` holds {positions.min().item()}, but indices of tokens start at 0. For an example without "
                f"an answer, use the first token (0), or the length of the input ({logits.shape[1]}) for no loss."
            )
    return True


def _check_indices(
    labels: Tensor,
    num_classes: int,
    limit_name: str,
    reads_values: bool,
    ignore_index: int = IGNORED,
    name: str = "labels",
) -> None:
    if labels.is_floating_point():
        raise ValueError(
            f"`{name}` has dtype {labels.dtype}, but class indices must be integers, such as `torch.long`."
        )
    if not reads_values:
        return
    wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"`{name}` holds {wrong[0].item()}, but must be in [0, {num_classes - 1}] (`{limit_name}` is "
            f"{num_classes}), or {ignore_index} for no loss: change the labels, or build the model with more classes."
        )
