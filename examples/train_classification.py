# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train a Reformer to classify sequences, and measure accuracy and macro F1 on held-out examples.

Train on ListOps, nested expressions of 500 to 2,000 tokens that the script generates (see `listops.py`):

    python examples/train_classification.py --output_dir outputs/listops --max_minutes 20

Train on a CSV or JSON file, or on a dataset on the Hub, with a column of texts and a column of labels. Texts are read
as bytes:

    python examples/train_classification.py --data reviews.csv --text_column review --label_column stars \
        --output_dir outputs/reviews --num_train_epochs 3

Train a dense model of the same size for comparison (BERT with fused attention):

    python examples/train_classification.py --architecture bert --output_dir outputs/listops-bert --max_minutes 20

`--config_overrides` sets any field of the config. Running the same command again resumes from the last intact
checkpoint. The script writes weights, config, tokenizer, model card, learning curve (`curve.jsonl`), confusion matrix
and `*_results.json` to `output_dir`, a folder for `pipeline("text-classification")`.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
from listops import baselines, listops_tokenizer, load_listops, majority
from model_report import plot_confusion_matrix, plot_learning_curve, read_curve
from table_data import load_columns
from training_run import ScriptTrainer, ScriptTrainingArguments, find_checkpoint, parse_overrides, write_card_of_run
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from reformer_hf import ReformerHfByteTokenizer, ReformerHfConfig
from reformer_hf.hub import Metric, RunReport

logger = logging.getLogger(__name__)

CONFIGS: dict[str, type[PreTrainedConfig]] = {"reformer": ReformerHfConfig, "bert": BertConfig}

USAGE = """\
import reformer_hf  # registers the model with the Auto classes
from transformers import pipeline

classify = pipeline("text-classification", "{model_id}")
print(classify("…"))"""

# Fewer lengths of batches, so that memory is reused.
PADDING_MULTIPLE = 64


@dataclass
class ModelArguments:
    """The model."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a model to fine-tune, with its tokenizer."}
    )
    architecture: str = field(
        default="reformer", metadata={"help": "Of a new model: reformer, or bert for comparison."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the config: key=value,key=[1,2],… with JSON values."}
    )
    max_length: int = field(default=2048, metadata={"help": "Maximum number of tokens; longer texts are truncated."})


@dataclass
class DataArguments:
    """The data."""

    data: str | None = field(
        default=None, metadata={"help": "CSV or JSON file, or dataset on the Hub. Default: ListOps, generated."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    text_column: str = field(default="text", metadata={"help": "Column of texts."})
    label_column: str = field(default="label", metadata={"help": "Column of labels: names or numbers of classes."})
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Fraction to hold out of data without a split `validation` or `test`."}
    )
    num_train: int = field(default=20000, metadata={"help": "ListOps: number of training examples."})
    num_held_out: int = field(default=1000, metadata={"help": "ListOps: number of held-out examples."})
    min_tokens: int = field(default=500, metadata={"help": "ListOps: minimum number of tokens."})
    max_tokens: int = field(default=2000, metadata={"help": "ListOps: maximum number of tokens."})


class ClassificationMetrics(evaluate.Metric):
    """
    Accuracy, and the F1 score averaged over the classes that occur.

    `predictions` and `references` are class indices. The metrics of `evaluate.load` are downloaded from the Hub; this
    one needs no network.
    """

    def _info(self) -> evaluate.MetricInfo:
        integers = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Accuracy and macro F1.",
            citation="",
            inputs_description="predictions and references: class indices.",
            features=datasets.Features({"predictions": integers, "references": integers}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        found, right = np.array(predictions), np.array(references)
        scores = []
        for label in np.union1d(found, right):
            true_positives = ((found == label) & (right == label)).sum()
            scores.append(2 * true_positives / ((found == label).sum() + (right == label).sum()))
        return {"accuracy": float((found == right).mean()), "macro_f1": float(np.mean(scores))}


@dataclass
class Task:
    """The splits `train` and `validation` with the columns `text` and `label` (class indices), and what they are."""

    examples: datasets.DatasetDict
    description: str
    dataset_id: str | None = None

    @property
    def label_names(self) -> list[str]:
        return self.examples["train"].features["label"].names


def load_task(args: DataArguments, max_length: int) -> Task:
    """
    Load the data, or generate ListOps expressions.

    Raises:
        ValueError: If the data do not exist or have no such columns, or if an argument is out of range.
    """
    if args.data is None:
        if not 1 <= args.min_tokens <= args.max_tokens <= max_length:
            raise ValueError(
                f"`min_tokens` is {args.min_tokens}, `max_tokens` is {args.max_tokens} and `max_length` is "
                f"{max_length}, but they must be at least 1 and ascend."
            )
        description = (
            f"ListOps: {args.num_train:,} generated expressions of {args.min_tokens:,} to {args.max_tokens:,} tokens; "
            f"{args.num_held_out:,} others are held out."
        )
        return Task(load_listops(args.num_train, args.num_held_out, 0, args.min_tokens, args.max_tokens), description)
    columns = {"text": args.text_column, "label": args.label_column}
    examples = load_columns(args.data, columns, args.dataset_config, args.validation_fraction)
    if not isinstance(examples["train"].features["label"], datasets.ClassLabel):
        examples = examples.class_encode_column("label")
    name = Path(args.data).name if Path(args.data).exists() else args.data
    num_train, num_held_out = len(examples["train"]), len(examples["validation"])
    description = f"{num_train:,} training examples of `{name}`; {num_held_out:,} others are held out."
    return Task(examples, description, None if Path(args.data).exists() else args.data)


def build_tokenizer(args: ModelArguments, data_args: DataArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model to fine-tune, or that of the data: of ListOps tokens, or of bytes."""
    if args.model_name_or_path is not None:
        return AutoTokenizer.from_pretrained(args.model_name_or_path)
    if data_args.data is None:
        return listops_tokenizer(args.max_length)
    return ReformerHfByteTokenizer(model_max_length=args.max_length)


def build_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, label_names: list[str]) -> PreTrainedModel:
    """Build a new model or load the one to fine-tune. Raises `ValueError` for unknown options."""
    labels = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: i for i, name in enumerate(label_names)},
        "problem_type": "single_label_classification",
    }
    if args.architecture not in CONFIGS:
        raise ValueError(f"`architecture` is {args.architecture!r}, but must be one of {sorted(CONFIGS)}.")
    config_class = CONFIGS[args.architecture]
    given = parse_overrides(args.config_overrides, config_class)
    if args.model_name_or_path is not None:
        return AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, **given, **labels)
    defaults = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": args.max_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return AutoModelForSequenceClassification.from_config(config_class(**{**defaults, **given, **labels}))


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: ScriptTrainingArguments
) -> tuple[Trainer, dict[str, Any]]:
    """
    Train and evaluate a model, and write everything to `training_args.output_dir`.

    Returns:
        The trainer with the trained model, and the metrics, with the accuracy of baselines.
    """
    set_seed(training_args.seed)
    task = load_task(data_args, model_args.max_length)
    logger.info("%s", task.description)
    tokenizer = build_tokenizer(model_args, data_args)
    model = build_model(model_args, tokenizer, task.label_names)
    checkpoint = find_checkpoint(training_args)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        return {
            **tokenizer(batch["text"], truncation=True, max_length=model_args.max_length),
            "labels": batch["label"],
        }

    encoded = task.examples.map(encode, batched=True, remove_columns=["text", "label"], desc="Tokenizing")
    metric = ClassificationMetrics(keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return metric.compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)

    trainer = ScriptTrainer(
        model=model,
        args=training_args,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=PADDING_MULTIPLE),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    metrics = trainer.train_or_exit(checkpoint)
    prediction = trainer.predict(encoded["validation"], metric_key_prefix="eval")
    metrics |= prediction.metrics
    guesses = baselines(task.examples) if data_args.data is None else {"majority": majority(task.examples)}
    metrics |= {f"baseline_{name}": accuracy for name, accuracy in guesses.items()}
    trainer.save_run(metrics)
    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir)
        plot_confusion_matrix(prediction.predictions.argmax(-1), prediction.label_ids, task.label_names, folder)
        plot_learning_curve(
            {"held out": read_curve(folder)}, "eval_accuracy", "accuracy", folder / "learning_curve.png", guesses
        )
        write_card(trainer, task, metrics, model_args.model_name_or_path)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return trainer, metrics


def write_card(trainer: Trainer, task: Task, metrics: dict[str, float], base_model: str | None) -> None:
    """Write the model card."""
    results = {
        "Macro F1, held out": f"{metrics['eval_macro_f1']:.4f}",
        "Accuracy of the most frequent class": f"{metrics['baseline_majority']:.4f}",
    }
    if "baseline_root_operator" in metrics:
        results["Accuracy of the best guess from the first operator"] = f"{metrics['baseline_root_operator']:.4f}"
    report = RunReport(
        summary=f"A {type(trainer.model).__name__} for {len(task.label_names)} classes.",
        pipeline_tag="text-classification",
        results=results,
        figures={"Learning curve": "learning_curve.png", "Confusion matrix": "confusion_matrix.png"},
        data=task.description,
        dataset_id=task.dataset_id,
        base_model=base_model,
        metric=Metric("accuracy", "Accuracy", round(metrics["eval_accuracy"], 4)),
        usage=USAGE,
    )
    write_card_of_run(trainer, report)


def main(argv: list[str] | None = None) -> tuple[Trainer, dict[str, Any]]:
    """Run the script with the options `argv`, or those of the command line. Returns the result of `train`."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    parser = HfArgumentParser((ModelArguments, DataArguments, ScriptTrainingArguments), description=__doc__)
    parser.set_defaults(output_dir="outputs/classification", per_device_train_batch_size=16)
    return train(*parser.parse_args_into_dataclasses(argv))


if __name__ == "__main__":
    final_trainer, final_metrics = main()
    if final_trainer.is_world_process_zero():
        print(f"\nHeld-out accuracy: {final_metrics['eval_accuracy']:.3f}")
        print(f"Most frequent class: {final_metrics['baseline_majority']:.3f}")
        print(f"Model, model card and figures: {final_trainer.args.output_dir}")
