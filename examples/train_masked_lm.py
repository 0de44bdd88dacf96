# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train or fine-tune a byte-level masked Reformer, and measure bits per masked byte on held-out text.

Train on the source files of the Python standard library:

    python examples/train_masked_lm.py --output_dir outputs/stdlib-masked

Train a model with your own settings on a text file, a folder or a dataset on the Hub:

    python examples/train_masked_lm.py --data book.txt --output_dir outputs/book-masked --sequence_length 16384 \
        --masked_share 0.2 --mean_span 5 --config_overrides 'hidden_size=128,attn_layers=["local","lsh"]' \
        --max_minutes 20

Attention is bidirectional. The script masks spans of bytes, of geometrically distributed lengths, and the model
predicts the masked bytes. In training, 80 % of them are replaced with `<mask>`, 10 % with random tokens, and 10 % stay
(`DataCollatorForLanguageModeling`), with other spans in each epoch. In evaluation all of them are replaced with
`<mask>`, and the spans are always the same ones.

Running the same command again resumes from the last intact checkpoint. The script writes weights, config, tokenizer,
model card, learning curve (`curve.jsonl`) and `*_results.json` to `output_dir`, a folder for `pipeline("fill-mask")`.
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from bits_per_byte import BitsPerByte, sum_nll, unigram_bits_per_byte
from byte_data import Corpus, CorpusArguments, count_bytes
from model_report import plot_learning_curve, read_curve
from span_masking import NewMasksEachEpoch, SpanMaskingCollator
from training_run import (
    ScriptTrainer,
    ScriptTrainingArguments,
    check_byte_config,
    find_checkpoint,
    parse_overrides,
    write_card_of_run,
)
from transformers import EvalPrediction, HfArgumentParser, Trainer, pipeline, set_seed

from reformer_hf import ReformerHfByteTokenizer, ReformerHfConfig, ReformerHfForMaskedLM
from reformer_hf.hub import Metric, RunReport
from reformer_hf.training import pack_to_file

logger = logging.getLogger(__name__)

SAMPLE_LENGTH = 100
# Independent of the seed of the run, so that runs are evaluated on the same bytes.
EVALUATION_SEED = 0

USAGE = """\
import reformer_hf  # registers the model with the Auto classes
from transformers import pipeline

fill = pipeline("fill-mask", "{model_id}")
print(fill("Once upon a t<mask>me"))"""


@dataclass
class ModelArguments:
    """The model."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a byte-level model to fine-tune."}
    )
    sequence_length: int = field(
        default=4096, metadata={"help": "Sequence length in tokens; a new model reads at most this many."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the config: key=value,key=[1,2],… with JSON values."}
    )


@dataclass
class DataArguments(CorpusArguments):
    """The data and the masks."""

    masked_share: float = field(default=0.15, metadata={"help": "Fraction of the bytes to mask."})
    mean_span: float = field(default=3.0, metadata={"help": "Mean length of a masked span, in bytes."})


def build_model(args: ModelArguments) -> ReformerHfForMaskedLM:
    """Build a new model or load the one to fine-tune. Raises `ValueError` if its config does not fit."""
    given = parse_overrides(args.config_overrides, ReformerHfConfig)
    if args.model_name_or_path is not None:
        model = ReformerHfForMaskedLM.from_pretrained(args.model_name_or_path, **given)
    else:
        model = ReformerHfForMaskedLM(ReformerHfConfig(**{"max_position_embeddings": args.sequence_length, **given}))
    check_byte_config(model.config, args.sequence_length)
    return model


def mask_held_out(sequences: datasets.Dataset, collator: SpanMaskingCollator, path: Path) -> datasets.Dataset:
    """Mask each sequence once and for all. The result, with `input_ids` and `labels`, is memory-mapped from `path`."""

    def mask(example: dict[str, Any]) -> dict[str, Any]:
        batch = collator([example])
        return {name: batch[name][0] for name in ("input_ids", "labels")}

    # Spans may change with options that the fingerprint of the data set does not contain.
    return sequences.map(mask, cache_file_name=str(path), load_from_cache_file=False, desc="Masking")


def masked_bytes(masked: datasets.Dataset) -> np.ndarray:
    """Return the ids of all masked bytes."""
    labels = (example["labels"].numpy() for example in masked)
    return np.concatenate([row[row != -100] for row in labels])


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: ScriptTrainingArguments
) -> tuple[Trainer, dict[str, Any]]:
    """
    Train and evaluate a model, and write everything to `training_args.output_dir`.

    Returns:
        The trainer with the trained model, and a dictionary of the metrics of `Trainer`,
        `eval_bits_per_masked_byte` and `unigram_bits_per_masked_byte`.
    """
    set_seed(training_args.seed)
    tokenizer = ReformerHfByteTokenizer()
    masks = {"masked_share": data_args.masked_share, "mean_span": data_args.mean_span}
    collator = SpanMaskingCollator(tokenizer, seed=training_args.seed, **masks)
    evaluation_collator = SpanMaskingCollator(
        tokenizer, seed=EVALUATION_SEED, mask_replace_prob=1.0, random_replace_prob=0.0, **masks
    )
    model = build_model(model_args)
    tokenizer.model_max_length = model.config.max_position_embeddings
    length = model_args.sequence_length
    corpus = data_args.load(length)
    checkpoint = find_checkpoint(training_args)

    # Each process writes its own file. Names that begin with an underscore are not pushed to the Hub.
    folder = Path(training_args.output_dir, "_data", f"rank-{training_args.process_index}")
    train_dataset = pack_to_file(folder / "train.arrow", [corpus.train], length, keep_last=False)
    held_out = pack_to_file(folder / "held_out.arrow", [corpus.held_out], length)
    eval_dataset = mask_held_out(held_out, evaluation_collator, folder / "held_out_masked.arrow")
    metric = BitsPerByte(keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        num_masked = [count_bytes(labels) for labels in prediction.label_ids]
        found = metric.compute(predictions=prediction.predictions, references=num_masked)
        return {"bits_per_masked_byte": found["bits_per_byte"]}

    trainer = ScriptTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        callbacks=[NewMasksEachEpoch(collator)],
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=partial(sum_nll, shift=False),
        muon_by_default=model_args.model_name_or_path is None,
    )
    metrics = trainer.train_or_exit(checkpoint)
    metrics |= trainer.evaluate()
    unigram = unigram_bits_per_byte(corpus.train, masked_bytes(eval_dataset))
    metrics["unigram_bits_per_masked_byte"] = unigram
    trainer.save_run(metrics)
    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir)
        plot_learning_curve(
            {"held out": read_curve(folder)},
            "eval_bits_per_masked_byte",
            "bits per masked byte",
            folder / "learning_curve.png",
            {"byte unigram model": unigram},
        )
        write_card(trainer, corpus, data_args, metrics, model_args.model_name_or_path)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return trainer, metrics


def fill_sample(trainer: Trainer, corpus: Corpus) -> str:
    """Return a held-out text with one masked byte and what `pipeline("fill-mask")` predicts, as Markdown."""
    tokenizer = trainer.processing_class
    ids = corpus.held_out[1 : 1 + min(SAMPLE_LENGTH, tokenizer.model_max_length)]
    # The names of special tokens in the text would be encoded as such.
    text = tokenizer.decode(ids, errors="ignore", skip_special_tokens=True).replace(tokenizer.mask_token, "")
    # Only characters of one byte leave valid text around the mask.
    positions = [position for position, character in enumerate(text) if character.isascii()]
    if not positions:
        return ""
    position = positions[len(positions) // 2]
    masked = text[:position] + tokenizer.mask_token + text[position + 1 :]
    fill = pipeline("fill-mask", trainer.args.output_dir, device=trainer.args.device)
    guesses = [f"{guess['token_str']!r} ({guess['score']:.3f})" for guess in fill(masked, top_k=3)]
    return (
        f"Held-out text with one masked byte:\n\n````text\n{masked}\n````\n\n"
        f'Predictions of `pipeline("fill-mask")`, with probabilities:\n\n````text\n{", ".join(guesses)}\n````\n\n'
        f"The masked byte is:\n\n````text\n{text[position]!r}\n````"
    )


def write_card(
    trainer: Trainer, corpus: Corpus, data_args: DataArguments, metrics: dict[str, float], base_model: str | None
) -> None:
    """Write the model card."""
    bits = metrics["eval_bits_per_masked_byte"]
    report = RunReport(
        summary="A byte-level masked language model: a bidirectional Reformer.",
        pipeline_tag="fill-mask",
        results={
            "Bits per masked byte of a byte unigram model": f"{metrics['unigram_bits_per_masked_byte']:.4f}",
        },
        results_note=(
            f"About {data_args.masked_share:.0%} of the bytes are masked, in spans of {data_args.mean_span:g} bytes "
            "on average. All evaluations mask the same held-out bytes. The unigram model is fitted to the same "
            "training text, with a pseudocount of 0.1."
        ),
        figures={"Learning curve": "learning_curve.png"},
        data=corpus.describe(),
        dataset_id=corpus.dataset_id,
        dataset_name=corpus.description.replace("`", ""),
        base_model=base_model,
        metric=Metric("bits_per_masked_byte", "Bits per masked byte", round(bits, 4)),
        usage=USAGE,
        sample=fill_sample(trainer, corpus),
    )
    write_card_of_run(trainer, report)


def main(argv: list[str] | None = None) -> tuple[Trainer, dict[str, Any]]:
    """Run the script with the options `argv`, or those of the command line. Returns the result of `train`."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    parser = HfArgumentParser((ModelArguments, DataArguments, ScriptTrainingArguments), description=__doc__)
    parser.set_defaults(output_dir="outputs/masked_lm")
    return train(*parser.parse_args_into_dataclasses(argv))


if __name__ == "__main__":
    final_trainer, final_metrics = main()
    if final_trainer.is_world_process_zero():
        print(f"\nHeld-out bits per masked byte: {final_metrics['eval_bits_per_masked_byte']:.3f}")
        print(f"Byte unigram model: {final_metrics['unigram_bits_per_masked_byte']:.3f}")
        print(f"Model, model card and figures: {final_trainer.args.output_dir}")
