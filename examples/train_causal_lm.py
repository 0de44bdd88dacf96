# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train or fine-tune a byte-level causal Reformer, and measure bits per byte on held-out text.

Train on the source files of the Python standard library:

    python examples/train_causal_lm.py --output_dir outputs/stdlib

Train a model with your own settings on a text file, a folder or a dataset on the Hub:

    python examples/train_causal_lm.py --data book.txt --output_dir outputs/book --sequence_length 16384 \
        --attn_layers local,lsh,local,lsh --num_hashes 2 --hidden_size 256 --max_steps 500 --learning_rate 1e-3

Fine-tune a saved model:

    python examples/train_causal_lm.py --model_name_or_path outputs/book --data letters.txt \
        --output_dir outputs/letters

Train a dense model of the same width, depth and heads for comparison (Llama with fused attention):

    python examples/train_causal_lm.py --architecture llama --output_dir outputs/stdlib-llama --max_minutes 120

Train with two processes on one machine without a GPU:

    torchrun --nproc_per_node 2 examples/train_causal_lm.py --use_cpu --output_dir outputs/stdlib

Running the same command again resumes from the last intact checkpoint in `output_dir`. To resume from another
checkpoint, use `--resume_from_checkpoint FOLDER`; to start over, use `--overwrite_output_dir`. `--help` lists all
options, including every field of `TrainingArguments`. The script writes weights, config, generation config, tokenizer,
model card, loss curve and `*_results.json` to `output_dir`.
"""

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from bits_per_byte import BitsPerByte, bigram_bits_per_byte, sum_nll, xz_bits_per_byte
from byte_data import END_ID, PAD_ID, Corpus, CorpusArguments, count_bytes, documents_of
from model_report import plot_loss_curve
from training_run import (
    ScriptTrainer,
    ScriptTrainingArguments,
    check_byte_config,
    find_checkpoint,
    parse_overrides,
    write_card_of_run,
)
from transformers import (
    EvalPrediction,
    GenerationConfig,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    set_seed,
)

from reformer_hf import ReformerHfByteTokenizer, ReformerHfConfig, ReformerHfForCausalLM
from reformer_hf.hub import Metric, RunReport
from reformer_hf.training import CausalCollator, pack_to_file

logger = logging.getLogger(__name__)

PROMPT_LENGTH = 128

USAGE = """\
import reformer_hf  # registers the model with the Auto classes
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model_id}")
model = AutoModelForCausalLM.from_pretrained("{model_id}")
inputs = tokenizer("Once upon a time", add_special_tokens=False, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""

_CONFIG_FIELDS = {config_field.name for config_field in fields(ReformerHfConfig)}


@dataclass
class ModelArguments:
    """Fields of `ReformerHfConfig`. Omitted fields keep the value of the loaded model or the default of the config."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a byte-level model to fine-tune."}
    )
    architecture: str = field(
        default="reformer",
        metadata={"help": "Of a new model: reformer, or llama of the same width, depth and heads, for comparison."},
    )
    sequence_length: int = field(
        default=4096, metadata={"help": "Sequence length in tokens; a new model reads at most this many."}
    )
    attn_layers: str | None = field(default=None, metadata={"help": "Comma-separated layer types: local, lsh, full."})
    hidden_size: int | None = field(default=None, metadata={"help": "Width of one residual stream."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Number of attention heads."})
    attention_head_size: int | None = field(default=None, metadata={"help": "Head dimension."})
    feed_forward_size: int | None = field(default=None, metadata={"help": "Inner width of the feed-forward layers."})
    num_hashes: int | None = field(default=None, metadata={"help": "Number of hash rounds of LSH layers."})
    num_buckets: str | None = field(
        default=None, metadata={"help": "Buckets per round: an even number, or comma-separated even factors."}
    )
    hash_seed: int | None = field(default=None, metadata={"help": "Seed of the hash rotations."})
    lsh_pattern: str | None = field(default=None, metadata={"help": "Which keys a query sees: window or chunk."})
    lsh_attn_chunk_length: int | None = field(default=None, metadata={"help": "Chunk length of LSH layers."})
    lsh_num_chunks_before: int | None = field(
        default=None, metadata={"help": "Chunks before its own that a query sees in LSH layers."}
    )
    local_attn_chunk_length: int | None = field(default=None, metadata={"help": "Chunk length of local layers."})
    local_num_chunks_before: int | None = field(
        default=None, metadata={"help": "Chunks before its own that a query sees in local layers."}
    )
    hidden_dropout_prob: float | None = field(
        default=None,
        metadata={"help": "Dropout rate of the embeddings and the outputs of sublayers."},
    )
    lsh_attention_probs_dropout_prob: float | None = field(
        default=None, metadata={"help": "Dropout rate of the attention weights of LSH layers."}
    )
    local_attention_probs_dropout_prob: float | None = field(
        default=None, metadata={"help": "Dropout rate of the attention weights of local layers."}
    )
    chunk_size_feed_forward: int | None = field(
        default=None, metadata={"help": "Positions that a feed-forward layer processes at a time; 0 for the default."}
    )
    chunk_size_lm_head: int | None = field(
        default=None, metadata={"help": "Positions that the LM head processes at a time; 0 for all."}
    )
    reversible: bool | None = field(default=None, metadata={"help": "Recompute activations instead of storing them."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Other fields of the config: key=value,key=[1,2],… with JSON values."},
    )


@dataclass
class DataArguments(CorpusArguments):
    """The data."""

    across_documents: bool = field(
        default=True,
        metadata={"help": "Continue sequences across documents. False starts one for each document."},
    )
    sample_length: int = field(default=256, metadata={"help": "Bytes to generate after training; 0 for none."})


def build_config(args: ModelArguments) -> ReformerHfConfig:
    """Build the config of a new causal model or of the model to fine-tune. Raises `ValueError` if it does not fit."""
    given = {name: value for name, value in vars(args).items() if value is not None and name in _CONFIG_FIELDS}
    if args.attn_layers is not None:
        given["attn_layers"] = [layer.strip() for layer in args.attn_layers.split(",")]
    if args.num_buckets is not None:
        factors = [int(factor) for factor in args.num_buckets.split(",")]
        given["num_buckets"] = factors if len(factors) > 1 else factors[0]
    given |= parse_overrides(args.config_overrides, ReformerHfConfig)
    if args.model_name_or_path is None:
        config = ReformerHfConfig(**{"max_position_embeddings": args.sequence_length, **given, "is_decoder": True})
    else:
        config = ReformerHfConfig.from_pretrained(args.model_name_or_path, **given, is_decoder=True)
    check_byte_config(config, args.sequence_length)
    return config


def build_model(args: ModelArguments, config: ReformerHfConfig) -> PreTrainedModel:
    """Build a new model, or load the one to fine-tune. Raises `ValueError` for an unknown architecture."""
    if args.architecture not in ("reformer", "llama"):
        raise ValueError(f"`architecture` is {args.architecture!r}, but must be 'reformer' or 'llama'.")
    if args.model_name_or_path is not None:
        return ReformerHfForCausalLM.from_pretrained(args.model_name_or_path, config=config)
    if args.architecture == "reformer":
        return ReformerHfForCausalLM(config)
    dense = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=len(config.attn_layers),
        num_attention_heads=config.num_attention_heads,
        head_dim=config.attention_head_size,
        # Three matrices instead of two.
        intermediate_size=config.feed_forward_size * 2 // 3 // 8 * 8,
        max_position_embeddings=config.max_position_embeddings,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )
    return LlamaForCausalLM._from_config(dense, attn_implementation="sdpa")


def pack_stream(
    stream: np.ndarray, path: Path, length: int, across_documents: bool, keep_last: bool
) -> datasets.Dataset:
    """Pack a stream of documents into sequences, memory-mapped from the file `path`."""
    if across_documents:
        # Separators between documents are part of the sequences.
        return pack_to_file(path, [stream], length, keep_last=keep_last)
    return pack_to_file(path, documents_of(stream), length, separator_id=END_ID, across_documents=False)


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: ScriptTrainingArguments
) -> tuple[Trainer, dict[str, Any]]:
    """
    Train and evaluate a model, and write everything to `training_args.output_dir`.

    Returns:
        The trainer with the trained model, and a dictionary of the metrics of `Trainer`, `eval_bits_per_byte`, those
        of the byte bigram model and of xz, and the generated `sample`.
    """
    set_seed(training_args.seed)
    config = build_config(model_args)
    corpus = data_args.load(model_args.sequence_length)
    checkpoint = find_checkpoint(training_args)
    model = build_model(model_args, config)
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
    # Each process writes its own file. Names that begin with an underscore are not pushed to the Hub.
    folder = Path(training_args.output_dir, "_data", f"rank-{training_args.process_index}")
    train_dataset = pack_stream(corpus.train, folder / "train.arrow", *sizes, keep_last=False)
    eval_dataset = pack_stream(corpus.held_out, folder / "held_out.arrow", *sizes, keep_last=True)
    metric = BitsPerByte(keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        num_bytes = [count_bytes(labels[1:]) for labels in prediction.label_ids]
        return metric.compute(predictions=prediction.predictions, references=num_bytes)

    trainer = ScriptTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=CausalCollator(PAD_ID),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=sum_nll,
        muon_by_default=model_args.model_name_or_path is None,
    )
    metrics = trainer.train_or_exit(checkpoint)
    metrics |= trainer.evaluate()
    metrics["bigram_bits_per_byte"] = bigram_bits_per_byte(corpus.train, corpus.held_out)
    metrics |= xz_bits_per_byte(corpus.train, corpus.held_out, model_args.sequence_length)
    trainer.save_run(metrics)

    prompt, sample = generate_sample(trainer, corpus, data_args.sample_length)
    if trainer.is_world_process_zero():
        plot_loss_curve(trainer.state.log_history, metrics["bigram_bits_per_byte"], Path(training_args.output_dir))
        report = describe(trainer, corpus, metrics, model_args, prompt, sample)
        write_card_of_run(trainer, report)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return trainer, metrics | {"sample": sample}


def describe(
    trainer: Trainer, corpus: Corpus, metrics: dict[str, float], args: ModelArguments, prompt: str, sample: str
) -> RunReport:
    """Return what the model card says."""
    bits, bigram = metrics["eval_bits_per_byte"], metrics["bigram_bits_per_byte"]
    summary = "A byte-level causal language model: a Reformer."
    if args.architecture == "llama":
        summary = "A byte-level Llama with fused attention, to compare a Reformer with."
    compressed = {
        "xz_sequences_bits_per_byte": "each sequence by itself",
        "xz_bits_per_byte": "the whole text",
        "xz_after_training_text_bits_per_byte": "the whole text after the training text",
    }
    batch_size = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    num_tokens = trainer.state.global_step * batch_size * args.sequence_length
    return RunReport(
        summary=summary,
        pipeline_tag="text-generation",
        data=corpus.describe(),
        metric=Metric("bits_per_byte", "Bits per byte", round(bits, 4)),
        results={
            "Bits per byte of a byte bigram model, held out": f"{bigram:.4f}",
            **{
                f"Bits per byte of `xz -9`, held out, {how}": f"{metrics[name]:.4f}"
                for name, how in compressed.items()
                if name in metrics
            },
            "Training tokens, including repetitions": f"{num_tokens:,}",
            "Epochs": f"{trainer.state.epoch:.2f}",
        },
        results_note=(
            "Bits per byte is computed over every byte of the held-out text once, in sequences of "
            f"{args.sequence_length:,} bytes. The first bytes of each sequence are predicted from a short context. "
            "The bigram model is fitted to the same training text, with a pseudocount of 0.1."
        ),
        figures={"Loss curve": "loss_curve.png"},
        usage=USAGE,
        sample=f"Prompt, from the held-out text:\n\n{_fenced(prompt)}\n\nContinuation:\n\n{_fenced(sample)}",
        dataset_id=corpus.dataset_id,
        dataset_name=corpus.description.replace("`", ""),
        base_model=args.model_name_or_path,
    )


def _fenced(text: str) -> str:
    return f"````text\n{text}\n````"


def generate_sample(trainer: Trainer, corpus: Corpus, length: int) -> tuple[str, str]:
    """Return a prompt from the held-out text and the generated continuation."""
    tokenizer, model = trainer.processing_class, trainer.model
    max_length = model.config.max_position_embeddings
    prompt = corpus.held_out[1 : 1 + min(PROMPT_LENGTH, max_length // 2)]
    length = min(length, max_length - len(prompt))
    if length < 1:
        return tokenizer.decode(prompt), ""
    # With sharded weights, all processes must sample the same tokens.
    set_seed(trainer.args.seed)
    input_ids = torch.tensor(prompt[None].astype("int64"), device=trainer.args.device)
    model.eval()
    output = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), tokenizer=tokenizer, max_new_tokens=length
    )
    decoded = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, output[0, len(prompt) :]))
    return tuple(decoded)


def main(argv: list[str] | None = None) -> tuple[Trainer, dict[str, Any]]:
    """Run the script with the options `argv`, or those of the command line. Returns the result of `train`."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    parser = HfArgumentParser((ModelArguments, DataArguments, ScriptTrainingArguments), description=__doc__)
    parser.set_defaults(output_dir="outputs/causal_lm")
    return train(*parser.parse_args_into_dataclasses(argv))


if __name__ == "__main__":
    final_trainer, final_metrics = main()
    if final_trainer.is_world_process_zero():
        print(f"\n{final_metrics['sample']}\n")
        print(f"Held-out bits per byte: {final_metrics['eval_bits_per_byte']:.3f}")
        print(f"Byte bigram model:      {final_metrics['bigram_bits_per_byte']:.3f}")
        print(f"xz -9 of the same text: {final_metrics['xz_bits_per_byte']:.3f}")
        print(f"Model, model card and loss curve: {final_trainer.args.output_dir}")
