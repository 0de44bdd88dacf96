# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Each head learns from what only LSH layers find: texts in which the answer is beyond the reach of local layers.

Accuracy on 512 other texts, of the model with an LSH layer and of its twin with local layers only:
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from reformer_hf import (
    ReformerHfByteTokenizer,
    ReformerHfConfig,
    ReformerHfForMaskedLM,
    ReformerHfForMultipleChoice,
    ReformerHfForQuestionAnswering,
    ReformerHfForSequenceClassification,
    ReformerHfForTokenClassification,
    ReformerHfModel,
)

pytestmark = pytest.mark.slow

LENGTH = 128
HALF = LENGTH // 2
# What a prediction depends on is at least that many tokens away from the tokens from which the head computes it.
FAR = 48
# Ids of filler, which says nothing, and the first id of names.
FILLER, FIRST_NAME = range(1, 17), 17
NUM_TEST_ROWS = 512

Rows = dict[str, Tensor]


def repeated_text(num_rows: int, generator: torch.Generator) -> Rows:
    """Random letters, twice. A masked letter stands in the other half."""
    half = torch.randint(ord("a"), ord("z") + 1, (num_rows, HALF), generator=generator) + 2
    return {"input_ids": torch.cat([half, half], dim=1)}


def colored_names(num_rows: int, generator: torch.Generator, num_colors: int = 4, block: int = 16) -> Rows:
    """Each half has all names, in 4 colors. The label of a token is the color of the other such token."""
    first = shuffled(num_rows, HALF, generator)
    # The other token of a name is in the same block of the other half.
    order = shuffled(num_rows * HALF // block, block, generator)
    second = first.view(-1, block).gather(1, order).view(num_rows, HALF)
    names = torch.cat([first, second], dim=1)
    colors = torch.randint(num_colors, names.shape, generator=generator)
    pairs = names.argsort(dim=1, stable=True).view(num_rows, HALF, 2)
    colors_of_others = colors.gather(1, pairs.flip(-1).flatten(1))
    labels = torch.empty_like(colors).scatter_(1, pairs.flatten(1), colors_of_others)
    return {"input_ids": 1 + num_colors * names + colors, "labels": labels}


def spans(num_rows: int, generator: torch.Generator, num_spans: int = 8) -> Rows:
    """8 spans, each from a name to another one. A question, at the beginning, consists of both names of a span."""
    text, rows = filler((num_rows, LENGTH), generator), torch.arange(num_rows)
    opening = FIRST_NAME + 2 * shuffled(num_rows, 16, generator)[:, :num_spans]
    size = (LENGTH - FAR - 1) // num_spans
    starts = FAR + 1 + size * torch.arange(num_spans) + torch.randint(3, (num_rows, num_spans), generator=generator)
    ends = starts + torch.randint(2, size - 2, (num_rows, num_spans), generator=generator)
    text.scatter_(1, starts, opening).scatter_(1, ends, opening + 1)
    asked = torch.randint(num_spans, (num_rows,), generator=generator)
    text[:, 0], text[:, 1] = opening[rows, asked], opening[rows, asked] + 1
    return {"input_ids": text, "start_positions": starts[rows, asked], "end_positions": ends[rows, asked]}


def mentioned_names(num_rows: int, generator: torch.Generator, num_choices: int = 4, num_mentioned: int = 8) -> Rows:
    """A passage that mentions 8 names. Each choice begins with a name and continues with the passage."""
    names = FIRST_NAME + shuffled(num_rows, 32, generator)
    choices, mentioned = names[:, :num_choices], names[:, num_choices : num_choices + num_mentioned]
    labels = torch.randint(num_choices, (num_rows,), generator=generator)
    mentioned[:, 0] = choices[torch.arange(num_rows), labels]
    passage = filler((num_rows, LENGTH - 1), generator)
    positions = FAR - 1 + shuffled(num_rows, LENGTH - FAR, generator)[:, :num_mentioned]
    passage.scatter_(1, positions, mentioned)
    return {
        "input_ids": torch.cat([choices[..., None], passage[:, None].expand(-1, num_choices, -1)], dim=-1),
        "labels": labels,
    }


def order_of_names(num_rows: int, generator: torch.Generator) -> Rows:
    """Two names, far from one another, in either order. The first token says which name must come first."""
    text = filler((num_rows, LENGTH), generator)
    names = FIRST_NAME + shuffled(num_rows, 16, generator)[:, :2]
    third = (LENGTH - FAR) // 3
    positions = torch.randint(third, (num_rows, 2), generator=generator) + torch.tensor([FAR, FAR + 2 * third])
    labels = torch.randint(2, (num_rows,), generator=generator)
    text.scatter_(1, positions, torch.where(labels[:, None] == 1, names, names.flip(1)))
    text[:, 0] = names[:, 0]
    return {"input_ids": text, "labels": labels}


def filler(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(FILLER.start, FILLER.stop, shape, generator=generator)


def shuffled(num_rows: int, size: int, generator: torch.Generator) -> Tensor:
    """Return random orders `[num_rows, size]` of the numbers below `size`."""
    return torch.rand((num_rows, size), generator=generator).argsort(1)


@dataclass(frozen=True)
class Task:
    """
    What a head learns.

    Args:
        rows: Returns the inputs and labels of some examples.
        steps, batch_size: Length of the training.
        chance: Accuracy of the best predictions from what local layers see.
        learned: Accuracy that a model with LSH layers exceeds.
        fields: Fields of the config.
        collator: Returns the data collator.
    """

    model_class: type[PreTrainedModel]
    rows: Callable[[int, torch.Generator], Rows]
    chance: float
    learned: float
    steps: int = 250
    batch_size: int = 16
    fields: tuple[tuple[str, Any], ...] = ()
    collator: Callable[[], Any] = lambda: default_data_collator


TASKS = {
    "masked": Task(
        ReformerHfForMaskedLM,
        repeated_text,
        chance=1 / 26,
        # Of the masked letters, 15 % are masked in both halves.
        learned=0.8,
        steps=300,
        # Positions at the same place of a half share most of their embedding.
        fields=(("axial_pos_shape", (2, HALF)), ("axial_norm_std", 0.4)),
        collator=lambda: DataCollatorForLanguageModeling(
            ReformerHfByteTokenizer(), mask_replace_prob=1.0, random_replace_prob=0.0, seed=0
        ),
    ),
    "tokens": Task(
        ReformerHfForTokenClassification,
        colored_names,
        chance=1 / 4,
        learned=0.7,
        steps=450,
        fields=(("num_labels", 4),),
    ),
    "span": Task(ReformerHfForQuestionAnswering, spans, chance=1 / 8, learned=0.9),
    "choice": Task(ReformerHfForMultipleChoice, mentioned_names, chance=1 / 4, learned=0.8, steps=150, batch_size=8),
    "sequence": Task(ReformerHfForSequenceClassification, order_of_names, chance=1 / 2, learned=0.9),
}


def small_config(attn_layers: list[str], fields: tuple[tuple[str, Any], ...] = ()) -> ReformerHfConfig:
    """A bidirectional model of width 64. Its initial weights are as large as this width needs."""
    defaults = {
        "attn_layers": attn_layers,
        "hidden_size": 64,
        "attention_head_size": 16,
        "feed_forward_size": 128,
        "max_position_embeddings": LENGTH,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_hashes": 4,
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.2,
        "axial_norm_std": 0.05,
    }
    return ReformerHfConfig(**{**defaults, **dict(fields)})


def train_and_evaluate(task: Task, attn_layers: list[str], folder: Any, seed: int = 0) -> float:
    """Train a model on new examples in each step, and return its accuracy on others."""
    set_seed(seed)
    trainer = Trainer(
        task.model_class(small_config(attn_layers, task.fields)),
        TrainingArguments(
            output_dir=str(folder),
            max_steps=task.steps,
            per_device_train_batch_size=task.batch_size,
            learning_rate=3e-3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=50,
            per_device_eval_batch_size=64,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        ),
        train_dataset=examples(task, task.steps * task.batch_size, seed),
        data_collator=task.collator(),
        compute_metrics=accuracy,
    )
    trainer.train()
    return trainer.evaluate(examples(task, NUM_TEST_ROWS, 1 << 20))["eval_accuracy"]


def examples(task: Task, num_rows: int, seed: int) -> list[Rows]:
    rows = task.rows(num_rows, torch.Generator().manual_seed(seed))
    return [dict(zip(rows, example, strict=True)) for example in zip(*rows.values(), strict=True)]


def accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    """Return the share of right predictions. Of a span, both ends must be right."""
    logits, labels = evaluated.predictions, evaluated.label_ids
    if isinstance(logits, tuple):
        right = np.logical_and(*(x.argmax(-1) == y for x, y in zip(logits, labels, strict=True)))
    else:
        right = (logits.argmax(-1) == labels)[labels != -100]
    return {"accuracy": right.mean().item()}


def local_reach(config: ReformerHfConfig) -> int:
    """Return the distance of the farthest token that changes a hidden state, in a model of local layers."""
    chunks = max(config.chunks_before("local"), config.chunks_after("local")) * len(config.attn_layers)
    return (chunks + 1) * config.local_attn_chunk_length - 1


def test_local_reach():
    """No hidden state of the twin depends on tokens that are farther away; some do depend on tokens that far."""
    torch.manual_seed(0)
    config = small_config(["local", "local"])
    embeds = torch.randn((1, LENGTH, config.hidden_size), requires_grad=True)
    states = ReformerHfModel(config)(inputs_embeds=embeds).last_hidden_state
    farthest = 0
    for position in range(LENGTH):
        (grad,) = torch.autograd.grad(states[0, position].square().sum(), embeds, retain_graph=True)
        seen = grad[0].abs().sum(-1).nonzero().flatten()
        farthest = max(farthest, (seen - position).abs().max().item())
    assert farthest == local_reach(config) < FAR


@pytest.mark.parametrize("name", TASKS)
def test_head_learns(name, tmp_path):
    task = TASKS[name]
    with_lsh, local = ["lsh", "local"], ["local", "local"]
    assert local_reach(small_config(local, task.fields)) < FAR
    assert train_and_evaluate(task, with_lsh, tmp_path) > task.learned > task.chance + 0.3
    assert train_and_evaluate(task, local, tmp_path) < task.chance + 0.1
