# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train or fine-tune a Reformer encoder-decoder, and measure what it generates for held-out sources.

Train on a CSV or JSON file, or on a dataset on the Hub, with a column of sources and a column of targets, both read
as bytes:

    python examples/train_seq2seq.py --data letters.csv --source_column letter --target_column summary \
        --max_source_length 16384 --max_target_length 512 --output_dir outputs/letters --num_train_epochs 3

Train on a task whose examples are generated (see `sequence_tasks.py`): reverse 16 to 64 letters, or write letters as
capitals if they are capitals somewhere else in a source of 4,096 bytes:

    python examples/train_seq2seq.py --task reverse --output_dir outputs/reverse
    python examples/train_seq2seq.py --task capitals --output_dir outputs/capitals
    python examples/train_seq2seq.py --task capitals --model_name_or_path outputs/capitals --stages 4096:1600 \
        --per_device_train_batch_size 8 --learning_rate 1e-3 --warmup_steps 5 --output_dir outputs/capitals-4096

Fine-tune a saved model, with the tokenizer that was saved with it:

    python examples/train_seq2seq.py --model_name_or_path outputs/letters --data more.csv --output_dir outputs/more

`--config_overrides` sets any field of the config, and `--help` lists all options, such as `--label_smoothing_factor`
and `--generation_num_beams`. Running the same command again resumes from the last intact checkpoint. The script writes
weights, config, tokenizer, model card, learning curve (`curve.jsonl`), predictions for held-out sources
(`predictions.jsonl`) and `*_results.json` to `output_dir`.
"""

import importlib.util
import json
import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
from model_report import plot_learning_curve, read_curve
from sequence_tasks import GeneratedExamples, SequenceTask, draw_capitals, draw_reverse
from table_data import load_columns
from torch.utils.data import Dataset
from training_run import ScriptTrainer, ScriptTrainingArguments, find_checkpoint, parse_overrides, write_card_of_run
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from reformer_hf import ReformerHfByteTokenizer
from reformer_hf.configuration_encoder_decoder import ReformerHfEncoderDecoderConfig
from reformer_hf.encoder_decoder import ReformerHfForConditionalGeneration
from reformer_hf.hub import Metric, RunReport

logger = logging.getLogger(__name__)

IGNORED = -100
NUM_SAMPLES = 5
# Characters of a text to show.
SAMPLE_LENGTH = 200

RESULTS_NOTE = """\
Targets are generated, not predicted from the tokens before them in the true target. Token accuracy is the share of
target tokens, end tokens included, that are generated in their places. Held-out examples:"""

# Small models of few layers, whose hidden states learn to tell positions and tokens apart from the first steps.
_SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "attention_head_size": 32,
    "feed_forward_size": 128,
    "hidden_dropout_prob": 0.0,
    "initializer_range": 0.1,
    "decoder_attn_layers": ["local"],
}
_OPTIONS = {"per_device_train_batch_size": 32, "learning_rate": 3e-3, "adam_beta2": 0.98, "warmup_steps": 100}
TASKS = {
    "reverse": SequenceTask(
        draw_reverse,
        "16 to 64 random letters; the target is the source, reversed",
        max_length=65,
        max_target_length=65,
        stages=((65, 288000),),
        config=_SMALL | {"attn_layers": ["local", "full"], "axial_norm_std": 0.3},
        options=_OPTIONS,
    ),
    "capitals": SequenceTask(
        draw_capitals,
        "26 letters, and each of them once more among signs, in up to 4,096 bytes; the targets are the first letters, "
        "as capitals if they are capitals later",
        max_length=4096,
        max_target_length=27,
        stages=((128, 64000), (512, 12800)),
        config={
            "hidden_size": 64,
            "num_attention_heads": 4,
            "attention_head_size": 16,
            "feed_forward_size": 128,
            "hidden_dropout_prob": 0.0,
            "attn_layers": ["lsh", "local"],
            "decoder_attn_layers": ["local"],
            "lsh_attn_chunk_length": 8,
            "local_attn_chunk_length": 8,
            # Short sources need fewer; at 4,096, 4 miss one of six letters.
            "num_hashes": 8,
            # The same letter at other places should have a similar state in the first layer.
            "initializer_range": 0.2,
            "axial_norm_std": 0.1,
        },
        options={"per_device_train_batch_size": 32, "learning_rate": 3e-3, "warmup_steps": 50},
    ),
}

USAGE = """\
import reformer_hf  # registers the model with the Auto classes
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model_id}")
model = AutoModelForSeq2SeqLM.from_pretrained("{model_id}")
inputs = tokenizer("…", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))"""


@dataclass
class ModelArguments:
    """The model."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a model to fine-tune, with its tokenizer."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the config: key=value,key=[1,2],… with JSON values."}
    )
    max_source_length: int | None = field(
        default=None,
        metadata={"help": "Maximum tokens of a source; longer ones are truncated. Default: 4,096, or of the task."},
    )
    max_target_length: int | None = field(
        default=None,
        metadata={"help": "Maximum tokens of a target; longer ones are truncated. Default: 256, or of the task."},
    )


@dataclass
class DataArguments:
    """The data."""

    data: str | None = field(default=None, metadata={"help": "CSV or JSON file, or dataset on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    source_column: str = field(default="source", metadata={"help": "Column of sources."})
    target_column: str = field(default="target", metadata={"help": "Column of targets."})
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Fraction to hold out of data without a split `validation` or `test`."}
    )
    task: str = field(
        default="reverse", metadata={"help": "Generated examples, if there are no data: reverse or capitals."}
    )
    stages: str | None = field(
        default=None,
        metadata={
            "help": "Generated examples: lengths of sources and numbers of examples, in the order of training, such "
            "as 128:32000,4096:3200."
        },
    )
    num_held_out: int = field(default=200, metadata={"help": "Generated examples to hold out."})


@dataclass
class Seq2SeqScriptArguments(ScriptTrainingArguments, Seq2SeqTrainingArguments):
    """The arguments of `Seq2SeqTrainer`, with defaults for small models on long sequences."""

    predict_with_generate: bool = field(
        default=True, metadata={"help": "Generate targets in evaluations; the metrics need it."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.predict_with_generate:
            raise ValueError("`predict_with_generate` is False, but the metrics need generated targets: leave it out.")


class Seq2SeqScriptTrainer(ScriptTrainer, Seq2SeqTrainer):
    """A `Seq2SeqTrainer` with the time budget and the learning curve of the scripts."""


class GenerationMetrics(evaluate.Metric):
    """
    Exact match of generated texts, and chrF if the package sacrebleu is installed.

    `predictions` and `references` are texts. The metrics of `evaluate.load` are downloaded from the Hub; these need no
    network.
    """

    def _info(self) -> evaluate.MetricInfo:
        texts = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Exact match and chrF.",
            citation="",
            inputs_description="predictions and references: texts.",
            features=datasets.Features({"predictions": texts, "references": texts}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        equal = [found == right for found, right in zip(predictions, references, strict=True)]
        scores = {"exact_match": float(np.mean(equal))}
        if importlib.util.find_spec("sacrebleu"):
            from sacrebleu.metrics import CHRF

            scores["chrf"] = CHRF().corpus_score(predictions, [references]).score
        return scores


def token_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """
    Return the share of target tokens, end tokens included, that were generated in their places.

    Args:
        predicted: Generated ids `[N, T]`, without the start token.
        labels: Target ids `[N, L]`, or -100 for padding.
    """
    width = max(labels.shape[1] - predicted.shape[1], 0)
    predicted = np.pad(predicted, ((0, 0), (0, width)), constant_values=IGNORED)[:, : labels.shape[1]]
    counted = labels != IGNORED
    return float((predicted == labels)[counted].mean())


@dataclass
class Pairs:
    """Training and held-out examples, as model inputs, and what they are."""

    train: Dataset | datasets.Dataset
    validation: Dataset | datasets.Dataset
    description: str
    dataset_id: str | None = None


def encode_pair(
    source: str, target: str, tokenizer: PreTrainedTokenizerBase, max_source: int, max_target: int
) -> dict[str, list[int]]:
    """Encode a source and a target, each with one end token and truncated to its maximum length."""
    input_ids, labels = (
        [*(ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids)[: length - 1], tokenizer.eos_token_id]
        for ids, length in ((tokenizer(source)["input_ids"], max_source), (tokenizer(target)["input_ids"], max_target))
    )
    return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}


def parse_stages(text: str, longest: int) -> tuple[tuple[int, int], ...]:
    """Parse `length:examples,length:examples`. Raises `ValueError` for anything else, and for lengths out of range."""
    try:
        stages = tuple((int(length), int(number)) for length, number in (part.split(":") for part in text.split(",")))
    except ValueError:
        stages = ()
    if not stages or any(not 2 <= length <= longest or number < 1 for length, number in stages):
        raise ValueError(
            f"`stages` is {text!r}, but must be length:examples,… with lengths from 2 to {longest} "
            "(`max_source_length`) and at least one example each."
        )
    return stages


def load_pairs(args: DataArguments, tokenizer: PreTrainedTokenizerBase, lengths: tuple[int, int], seed: int) -> Pairs:
    """
    Load the data, or prepare the generation of examples.

    Args:
        lengths: Maximum lengths of a source and a target.
        seed: Seed of generated training examples.

    Raises:
        ValueError: If the data do not exist or have no such columns, or if an argument is out of range.
    """
    encode = partial(encode_pair, tokenizer=tokenizer, max_source=lengths[0], max_target=lengths[1])
    if args.data is None:
        task = TASKS[args.task]
        stages = task.stages if args.stages is None else parse_stages(args.stages, lengths[0])
        # Other examples than those of any training seed.
        held_out = GeneratedExamples(task.draw, ((stages[-1][0], args.num_held_out),), 1 << 32, encode)
        examples = GeneratedExamples(task.draw, stages, seed, encode)
        description = f"Generated: {task.description}. {len(held_out):,} other examples are held out."
        return Pairs(examples, held_out, description)
    columns = {"source": args.source_column, "target": args.target_column}
    splits = load_columns(args.data, columns, args.dataset_config, args.validation_fraction)
    name = Path(args.data).name if Path(args.data).exists() else args.data
    description = (
        f"{len(splits['train']):,} training examples of `{name}`; {len(splits['validation']):,} others are held out."
    )
    splits = splits.map(encode, input_columns=["source", "target"], remove_columns=["source", "target"])
    return Pairs(splits["train"], splits["validation"], description, None if Path(args.data).exists() else args.data)


def build_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model to fine-tune, or that of bytes."""
    if args.model_name_or_path is not None:
        return AutoTokenizer.from_pretrained(args.model_name_or_path)
    return ReformerHfByteTokenizer(add_eos_token=True)


def build_model(
    args: ModelArguments, tokenizer: PreTrainedTokenizerBase, lengths: tuple[int, int], task: SequenceTask | None
) -> PreTrainedModel:
    """Build a new model or load the one to fine-tune. Raises `ValueError` if it has too few positions."""
    given = parse_overrides(args.config_overrides, ReformerHfEncoderDecoderConfig)
    if args.model_name_or_path is not None:
        model = AutoModelForSeq2SeqLM.from_pretrained(args.model_name_or_path, **given)
    else:
        defaults = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": max(lengths),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        config = ReformerHfEncoderDecoderConfig(**{**defaults, **(task.config if task else {}), **given})
        model = ReformerHfForConditionalGeneration(config)
    longest = getattr(model.config, "max_position_embeddings", max(lengths))
    if longest < max(lengths):
        raise ValueError(
            f"`max_source_length` is {lengths[0]} and `max_target_length` is {lengths[1]}, but the model has "
            f"{longest} positions (`max_position_embeddings`): lower them."
        )
    # The start token is the first of the generated tokens.
    model.generation_config.max_length = lengths[1] + 1
    return model


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: Seq2SeqScriptArguments
) -> tuple[Seq2SeqTrainer, dict[str, Any]]:
    """
    Train and evaluate a model, and write everything to `training_args.output_dir`.

    Returns:
        The trainer with the trained model, and the metrics.
    """
    set_seed(training_args.seed)
    task = None if data_args.data else TASKS[data_args.task]
    lengths = (
        model_args.max_source_length or (task.max_length if task else 4096),
        model_args.max_target_length or (task.max_target_length if task else 256),
    )
    tokenizer = build_tokenizer(model_args)
    model = build_model(model_args, tokenizer, lengths, task)
    pairs = load_pairs(data_args, tokenizer, lengths, training_args.seed)
    logger.info("%s", pairs.description)
    checkpoint = find_checkpoint(training_args)
    metric = GenerationMetrics(keep_in_memory=True)

    def decode(ids: np.ndarray) -> list[str]:
        return tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predicted, labels = prediction.predictions[:, 1:], _without_padding(prediction.label_ids, tokenizer)
        scores = metric.compute(predictions=decode(predicted), references=decode(labels))
        return {**scores, "token_accuracy": token_accuracy(predicted, labels)}

    trainer = Seq2SeqScriptTrainer(
        model=model,
        args=training_args,
        train_dataset=pairs.train,
        eval_dataset=pairs.validation,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    metrics = trainer.train_or_exit(checkpoint)
    prediction = trainer.predict(pairs.validation, metric_key_prefix="eval")
    metrics |= prediction.metrics
    trainer.save_run(metrics)
    sources = (np.array([pairs.validation[i]["input_ids"]]) for i in range(len(pairs.validation)))
    targets = decode(_without_padding(prediction.label_ids, tokenizer))
    predictions = [
        {"source": decode(source)[0], "target": target, "prediction": predicted}
        for source, target, predicted in zip(sources, targets, decode(prediction.predictions[:, 1:]), strict=True)
    ]
    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir)
        lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in predictions)
        (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
        curve, label = {"held out": read_curve(folder)}, "token accuracy of generated targets"
        plot_learning_curve(curve, "eval_token_accuracy", label, folder / "learning_curve.png")
        write_card(trainer, pairs, metrics, predictions[:NUM_SAMPLES], model_args.model_name_or_path)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return trainer, metrics | {"predictions": predictions}


def _without_padding(label_ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return labels with -100 for all padding. `Seq2SeqTrainer` pads batches to one length with the padding token."""
    return np.where(label_ids == tokenizer.pad_token_id, IGNORED, label_ids)


def write_card(
    trainer: Seq2SeqTrainer,
    pairs: Pairs,
    metrics: dict[str, float],
    samples: list[dict[str, str]],
    base_model: str | None,
) -> None:
    """Write the model card."""
    results = {
        "Token accuracy, held out": f"{metrics['eval_token_accuracy']:.4f}",
        "Loss per token, held out": f"{metrics['eval_loss']:.4f}",
    }
    if "eval_chrf" in metrics:
        results["chrF, held out"] = f"{metrics['eval_chrf']:.2f}"
    report = RunReport(
        summary="A Reformer encoder-decoder from sequence to sequence.",
        pipeline_tag="text2text-generation",
        results=results,
        results_note=RESULTS_NOTE + "\n\n" + "\n\n".join(_sample(sample) for sample in samples),
        figures={"Learning curve": "learning_curve.png"},
        data=pairs.description,
        dataset_id=pairs.dataset_id,
        base_model=base_model,
        metric=Metric("exact_match", "Exact match", round(metrics["eval_exact_match"], 4)),
        usage=USAGE,
    )
    write_card_of_run(trainer, report)


def _sample(sample: dict[str, str]) -> str:
    """Return an example of the card, in which longer texts are cut."""
    lines = (f"{name + ':':<12}{text[:SAMPLE_LENGTH]}" for name, text in sample.items())
    return "\n".join(["````text", *lines, "````"])


def main(argv: list[str] | None = None) -> tuple[Seq2SeqTrainer, dict[str, Any]]:
    """Run the script with the options `argv`, or those of the command line. Returns the result of `train`."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    parser = HfArgumentParser((ModelArguments, DataArguments, Seq2SeqScriptArguments), description=__doc__)
    parser.set_defaults(output_dir="outputs/seq2seq")
    given, _ = parser.parse_known_args(argv)
    if given.data is None:
        if given.task not in TASKS:
            raise ValueError(f"`task` is {given.task!r}, but must be one of {sorted(TASKS)}; or give `data`.")
        # The stages have an order, and examples are random already.
        parser.set_defaults(train_sampling_strategy="sequential", **TASKS[given.task].options)
    return train(*parser.parse_args_into_dataclasses(argv))


if __name__ == "__main__":
    final_trainer, final_metrics = main()
    if final_trainer.is_world_process_zero():
        for example in final_metrics["predictions"][:NUM_SAMPLES]:
            print("\n".join(f"{name + ':':<12}{text[:SAMPLE_LENGTH]}" for name, text in example.items()), end="\n\n")
        print(f"Held-out exact match:    {final_metrics['eval_exact_match']:.3f}")
        print(f"Held-out token accuracy: {final_metrics['eval_token_accuracy']:.3f}")
        print(f"Model, model card and predictions: {final_trainer.args.output_dir}")
