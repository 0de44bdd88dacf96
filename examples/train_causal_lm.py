# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train a byte-level causal Reformer, or fine-tune one, and measure bits per byte on held-out text.

On the Python standard library's own source files, which every machine has:

    python examples/train_causal_lm.py --output_dir outputs/stdlib

On a text file, a folder or a data set of the Hub, with a model of your own shape:

    python examples/train_causal_lm.py --data book.txt --output_dir outputs/book --sequence_length 16384 \
        --attn_layers local,lsh,local,lsh --num_hashes 2 --hidden_size 256 --max_steps 500 --learning_rate 1e-3

Continue from a saved model:

    python examples/train_causal_lm.py --model_name_or_path outputs/book --data letters.txt \
        --output_dir outputs/letters

On two processes of one machine without a GPU:

    torchrun --nproc_per_node 2 examples/train_causal_lm.py --use_cpu --output_dir outputs/stdlib

The same command again goes on from the last checkpoint in `output_dir`; `--resume_from_checkpoint FOLDER` from another
one, and `--overwrite_output_dir` from the start. `--help` lists all options, each field of `TrainingArguments` among
them. The folder then holds weights, config, generation config, tokenizer, model card, loss curve and `*_results.json`.
"""

import json
import logging
import re
import shutil
import signal
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from bits_per_byte import BitsPerByte, bigram_bits_per_byte
from byte_data import END_ID, PAD_ID, Corpus, count_bytes, documents_of, load_corpus
from model_report import plot_loss_curve, write_model_card
from torch import Tensor
from transformers import EvalPrediction, GenerationConfig, HfArgumentParser, Trainer, TrainingArguments, set_seed

from reformer_hf import ReformerHfByteTokenizer, ReformerHfConfig, ReformerHfForCausalLM
from reformer_hf.tokenization_reformer_hf import LAST_BYTE_ID
from reformer_hf.training import (
    CausalCollator,
    SaveOnSigterm,
    StopOnNonFinite,
    find_corruption,
    last_intact_checkpoint,
    pack_to_file,
)

logger = logging.getLogger(__name__)

PROMPT_LENGTH = 128

_CONFIG_FIELDS = {config_field.name for config_field in fields(ReformerHfConfig)}


@dataclass
class ModelArguments:
    """Fields of `ReformerHfConfig`. What is left out has the loaded model's value, or the config's default."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a byte-level model to fine-tune, instead of a new one."}
    )
    sequence_length: int = field(default=4096, metadata={"help": "Tokens in a sequence; a new model reads so many."})
    attn_layers: str | None = field(
        default=None, metadata={"help": "Kinds of layers, with commas between: local, lsh, full."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Width of one residual stream."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Number of heads."})
    attention_head_size: int | None = field(default=None, metadata={"help": "Size of a head."})
    feed_forward_size: int | None = field(default=None, metadata={"help": "Inner width of the feed-forward."})
    num_hashes: int | None = field(default=None, metadata={"help": "Hash rounds of LSH layers."})
    num_buckets: str | None = field(
        default=None, metadata={"help": "Buckets per round: an even number, or factors with commas between."}
    )
    hash_seed: int | None = field(default=None, metadata={"help": "Seed of the hash rotations."})
    lsh_pattern: str | None = field(default=None, metadata={"help": "What a query sees: window or chunk."})
    lsh_attn_chunk_length: int | None = field(default=None, metadata={"help": "Chunk length of LSH layers."})
    lsh_num_chunks_before: int | None = field(default=None, metadata={"help": "Chunks before, in LSH layers."})
    local_attn_chunk_length: int | None = field(default=None, metadata={"help": "Chunk length of local layers."})
    local_num_chunks_before: int | None = field(default=None, metadata={"help": "Chunks before, in local layers."})
    hidden_dropout_prob: float | None = field(default=None, metadata={"help": "Dropout of embeddings and branches."})
    lsh_attention_probs_dropout_prob: float | None = field(default=None, metadata={"help": "Dropout in LSH layers."})
    local_attention_probs_dropout_prob: float | None = field(
        default=None, metadata={"help": "Dropout of the attention weights of local layers."}
    )
    chunk_size_feed_forward: int | None = field(default=None, metadata={"help": "Positions at a time; 0 for all."})
    chunk_size_lm_head: int | None = field(default=None, metadata={"help": "Positions at a time; 0 for all."})
    reversible: bool | None = field(default=None, metadata={"help": "Recompute activations instead of storing them."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Any other field of the config: key=value,key=[1,2],… with values written as in JSON."},
    )


@dataclass
class DataArguments:
    """What to read. See `byte_data.load_corpus`."""

    data: str | None = field(
        default=None,
        metadata={"help": "Text file, folder, or data set on the Hub; left out: the Python standard library."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set on the Hub."})
    text_column: str = field(default="text", metadata={"help": "Column of the data set on the Hub."})
    validation_fraction: float = field(default=0.05, metadata={"help": "Share of the text, its end, to hold out."})
    max_bytes: int | None = field(default=None, metadata={"help": "Stop reading after so many bytes."})
    across_documents: bool = field(
        default=True, metadata={"help": "Go on with the next document in the same sequence; else each begins one."}
    )
    sample_length: int = field(default=256, metadata={"help": "Bytes to generate at the end; 0 for none."})


@dataclass
class ScriptTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for small models on long sequences."""

    output_dir: str | None = field(default="outputs/causal_lm", metadata={"help": "Where everything is written."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the checkpoints in `output_dir` and start anew."}
    )
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Sequences per device in training."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Sequences per device in evaluation."})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Page-locked memory, for faster copies to a GPU."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training text."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, or below 1 a share of all steps."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs of the loss."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float | None = field(default=200, metadata={"help": "Steps between two evaluations."})
    save_steps: float = field(default=200, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})


class ByteTrainer(Trainer):
    """A Trainer that leaves the model card to the script, on `push_to_hub` too."""

    def create_model_card(self, *args, **kwargs):
        """Keep the card that is in the folder."""


def build_config(args: ModelArguments) -> ReformerHfConfig:
    """The config of a new causal model, or of the one to fine-tune. Raises `ValueError` where it does not fit."""
    given = {name: value for name, value in vars(args).items() if value is not None and name in _CONFIG_FIELDS}
    if args.attn_layers is not None:
        given["attn_layers"] = [layer.strip() for layer in args.attn_layers.split(",")]
    if args.num_buckets is not None:
        factors = [int(factor) for factor in args.num_buckets.split(",")]
        given["num_buckets"] = factors if len(factors) > 1 else factors[0]
    given |= parse_overrides(args.config_overrides)
    if args.sequence_length < 2:
        raise ValueError(f"`sequence_length` is {args.sequence_length}, but a sequence needs at least 2 tokens.")
    if args.model_name_or_path is None:
        config = ReformerHfConfig(**{"max_position_embeddings": args.sequence_length, **given, "is_decoder": True})
    else:
        config = ReformerHfConfig.from_pretrained(args.model_name_or_path, **given, is_decoder=True)
    if config.max_position_embeddings < args.sequence_length:
        raise ValueError(
            f"`sequence_length` is {args.sequence_length}, but the model reads at most "
            f"{config.max_position_embeddings} tokens (`max_position_embeddings`): lower `sequence_length`."
        )
    if config.vocab_size <= LAST_BYTE_ID:
        raise ValueError(
            f"The model has {config.vocab_size} token ids, but a byte-level one has at least {LAST_BYTE_ID + 1}: "
            "choose another model."
        )
    return config


def parse_overrides(text: str | None) -> dict[str, Any]:
    """`{"key": value}` of `key=value,key=value`. Raises `ValueError` for what is no field of the config."""
    overrides = {}
    for item in re.split(r",(?=\s*\w+=)", text) if text else []:
        name, separator, value = item.strip().partition("=")
        if not separator or name not in _CONFIG_FIELDS:
            raise ValueError(
                f"`config_overrides` holds {item!r}, but each entry must be key=value, with a field of "
                "`ReformerHfConfig` as the key."
            )
        try:
            overrides[name] = json.loads(value)
        except json.JSONDecodeError:
            overrides[name] = value
    return overrides


def packed(stream: np.ndarray, path: Path, length: int, across_documents: bool, keep_last: bool) -> datasets.Dataset:
    """Sequences of a stream of documents, memory-mapped from a file."""
    if across_documents:
        # What is between documents is a token among others.
        return pack_to_file(path, [stream], length, keep_last=keep_last)
    return pack_to_file(path, documents_of(stream), length, separator_id=END_ID, across_documents=False)


def sum_nll(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Negative log-likelihood of each sequence `[B]`, so that the logits `[B, L, vocab_size]` are never gathered."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")
    return nll.sum(dim=1)


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: ScriptTrainingArguments
) -> tuple[Trainer, dict[str, Any]]:
    """
    Train, measure, and fill `training_args.output_dir`.

    Returns:
        The trainer (its `model` is the trained one), and what came out: `eval_bits_per_byte`, `bigram_bits_per_byte`,
        the other metrics of `Trainer`, and the generated `sample`.
    """
    set_seed(training_args.seed)
    config = build_config(model_args)
    corpus = load_corpus(
        data_args.data,
        dataset_config=data_args.dataset_config,
        text_column=data_args.text_column,
        validation_fraction=data_args.validation_fraction,
        max_bytes=data_args.max_bytes,
    )
    logger.info(
        "Training on %s: %s bytes, and %s held out.",
        corpus.description,
        f"{corpus.num_train_bytes:,}",
        f"{corpus.num_held_out_bytes:,}",
    )
    if len(corpus.train) < model_args.sequence_length:
        raise ValueError(
            f"The training text, {len(corpus.train)} tokens, is shorter than one sequence of "
            f"{model_args.sequence_length}: give more data, or lower `sequence_length`."
        )
    checkpoint = find_checkpoint(training_args)
    if model_args.model_name_or_path is None:
        model = ReformerHfForCausalLM(config)
    else:
        model = ReformerHfForCausalLM.from_pretrained(model_args.model_name_or_path, config=config)
    tokenizer = ReformerHfByteTokenizer(model_max_length=config.max_position_embeddings)
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=data_args.sample_length or None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    sizes = (model_args.sequence_length, data_args.across_documents)
    # Each process maps a file of its own. Names with an underscore are not pushed to the Hub.
    folder = Path(training_args.output_dir, "_data", f"rank-{training_args.process_index}")
    train_dataset = packed(corpus.train, folder / "train.arrow", *sizes, keep_last=False)
    eval_dataset = packed(corpus.held_out, folder / "held_out.arrow", *sizes, keep_last=True)
    on_sigterm = SaveOnSigterm()
    metric = BitsPerByte(keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        num_bytes = [count_bytes(labels[1:]) for labels in prediction.label_ids]
        return metric.compute(predictions=prediction.predictions, references=num_bytes)

    trainer = ByteTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=CausalCollator(PAD_ID),
        callbacks=[StopOnNonFinite(), on_sigterm],
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=sum_nll,
    )
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if on_sigterm.stopped:
        logger.warning("Stopped after step %d; the same command goes on from there.", trainer.state.global_step)
        raise SystemExit(128 + signal.SIGTERM)
    metrics |= trainer.evaluate()
    metrics["bigram_bits_per_byte"] = bigram_bits_per_byte(corpus.train, corpus.held_out)
    trainer.save_model()
    trainer.save_state()
    for split, prefixes in {"train": ("train_", "epoch"), "eval": ("eval_", "bigram_", "epoch")}.items():
        trainer.save_metrics(split, {name: value for name, value in metrics.items() if name.startswith(prefixes)})

    prompt, sample = generate_sample(trainer, corpus, data_args.sample_length)
    if trainer.is_world_process_zero():
        plot_loss_curve(trainer.state.log_history, metrics["bigram_bits_per_byte"], Path(training_args.output_dir))
        write_model_card(
            trainer,
            corpus,
            metrics,
            sequence_length=model_args.sequence_length,
            base_model=model_args.model_name_or_path,
            prompt=prompt,
            sample=sample,
        )
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return trainer, metrics | {"sample": sample}


def find_checkpoint(args: ScriptTrainingArguments) -> str | None:
    """The checkpoint to go on from: the one asked for, else the last one in `output_dir`."""
    output_dir = Path(args.output_dir)
    if args.overwrite_output_dir:
        if args.should_save:
            for folder in output_dir.glob("checkpoint-*"):
                shutil.rmtree(folder)
        return None
    wanted = args.resume_from_checkpoint
    if wanted is not None and str(wanted).lower() not in {"true", "last"}:
        if not Path(wanted).is_dir():
            raise ValueError(f"`resume_from_checkpoint` is {wanted!r}, which is not a folder: give a checkpoint's.")
        missing = find_corruption(wanted)
        if missing:
            raise ValueError(f"`resume_from_checkpoint` is {wanted!r}, where {missing}: give a whole checkpoint.")
        return wanted
    checkpoint = last_intact_checkpoint(output_dir)
    if wanted is not None and checkpoint is None:
        raise ValueError(f"`resume_from_checkpoint` is {wanted!r}, but there is no checkpoint in {args.output_dir!r}.")
    if checkpoint is not None:
        logger.info("Going on from %s; `--overwrite_output_dir` would start anew.", checkpoint)
    return checkpoint


def generate_sample(trainer: Trainer, corpus: Corpus, length: int) -> tuple[str, str]:
    """A prompt from the held-out text, and what the model makes of it."""
    tokenizer, model = trainer.processing_class, trainer.model
    room = model.config.max_position_embeddings
    prompt = corpus.held_out[1 : 1 + min(PROMPT_LENGTH, room // 2)]
    length = min(length, room - len(prompt))
    if length < 1:
        return tokenizer.decode(prompt), ""
    # The same draws on every process, which matters where the weights are sharded.
    set_seed(trainer.args.seed)
    input_ids = torch.tensor(prompt[None].astype("int64"), device=trainer.args.device)
    model.eval()
    output = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), tokenizer=tokenizer, max_new_tokens=length
    )
    decoded = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, output[0, len(prompt) :]))
    return tuple(decoded)


def main(argv: list[str] | None = None) -> tuple[Trainer, dict[str, Any]]:
    """Run the script with the options `argv`, or those of the command line. Returns what `train` does."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    parser = HfArgumentParser((ModelArguments, DataArguments, ScriptTrainingArguments), description=__doc__)
    return train(*parser.parse_args_into_dataclasses(argv))


if __name__ == "__main__":
    final_trainer, final_metrics = main()
    if final_trainer.is_world_process_zero():
        print(f"\n{final_metrics['sample']}\n")
        print(f"Held-out bits per byte: {final_metrics['eval_bits_per_byte']:.3f}")
        print(f"Byte bigram model:      {final_metrics['bigram_bits_per_byte']:.3f}")
        print(f"Model, card and loss curve: {final_trainer.args.output_dir}")
