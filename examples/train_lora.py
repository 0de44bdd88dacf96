# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Fine-tune a saved model on a text with LoRA: only small matrices next to the projections are trained.

    make demo
    python examples/train_lora.py --model outputs/demo --data book.txt --output_dir outputs/book-lora

The folder then holds the adapter alone. `--merge` adds a model into which it is merged, in `merged/`. Load them with

    peft.AutoPeftModelForCausalLM.from_pretrained("outputs/book-lora")
    AutoModelForCausalLM.from_pretrained("outputs/book-lora/merged")
"""

import argparse
import logging
import math
from pathlib import Path
from typing import Any

import torch
from byte_data import load_corpus
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import reformer_hf  # noqa: F401  registers the model with the Auto classes

logger = logging.getLogger(__name__)


def slices(ids: Any, length: int) -> list[dict[str, Tensor]]:
    """Cut a stream of token ids into inputs and labels of equal length."""
    ids = torch.from_numpy(ids.astype("int64"))
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not pieces:
        raise ValueError(f"The text has {len(ids)} tokens, fewer than one sequence of {length}: lower --length.")
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Fine-tune, save, and return the held-out bits per byte before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/demo", help="folder or name of the model on the Hub")
    parser.add_argument("--data", help="text file, folder, or dataset on the Hub; default: the standard library")
    parser.add_argument("--max_bytes", type=int, default=400_000, help="number of bytes to read")
    parser.add_argument("--length", type=int, default=4096, help="sequence length")
    parser.add_argument("--rank", type=int, default=8, help="rank of the matrices")
    parser.add_argument("--max_steps", type=int, default=100, help="number of training steps")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="maximum learning rate")
    parser.add_argument("--merge", action="store_true", help="also save a model with the adapter merged into it")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/lora"), help="output folder")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    set_seed(0)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    length = min(args.length, model.config.max_position_embeddings)
    corpus = load_corpus(args.data, max_bytes=args.max_bytes)
    # The package knows which layers to adapt.
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank))
    trained, total = adapted.get_nb_trainable_parameters()
    logger.info("LoRA trains %s of %s parameters.", f"{trained:,}", f"{total:,}")
    arguments = TrainingArguments(
        args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=1,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,
        logging_steps=25,
        save_strategy="no",
        report_to=[],
    )
    trainer = Trainer(
        adapted,
        arguments,
        train_dataset=slices(corpus.train, length),
        eval_dataset=slices(corpus.held_out, min(length, len(corpus.held_out))),
        processing_class=tokenizer,
    )
    # Tokens are bytes: the mean loss of a token, in bits.
    before = trainer.evaluate()["eval_loss"] / math.log(2)
    trainer.train()
    after = trainer.evaluate()["eval_loss"] / math.log(2)
    trainer.save_model()
    if args.merge:
        merged = adapted.merge_and_unload()
        merged.save_pretrained(args.output_dir / "merged")
        tokenizer.save_pretrained(args.output_dir / "merged")
    return {"before": before, "after": after}


if __name__ == "__main__":
    bits = main()
    print(f"Held-out bits per byte: {bits['before']:.3f} before, {bits['after']:.3f} after fine-tuning")
