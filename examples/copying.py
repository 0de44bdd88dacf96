# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train one LSH layer to copy, and show that it needs its buckets.

    python examples/copying.py --output_dir outputs/copying --figure docs/results/diagnostics/copying.png

The task is the one of the Reformer paper, shortened: sequences 0w0w of 256 tokens, w random, with the loss on the
second w. To predict a token of it, the model has to find the same place in the first w, 127 tokens earlier. The script
takes about a minute on a CPU. It evaluates the model as it is, with random buckets, without attention, and with full
attention; compares LSH attention with full attention for 1 to 8 hashes; and draws a head.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

from reformer_hf import ReformerHfConfig, ReformerHfForCausalLM
from reformer_hf.diagnostics import attention_coverage, draw_attention, replace_lsh

LENGTH, SYMBOLS = 256, 128
BATCH_SIZE, TEST_ROWS, TEST_SEED = 8, 64, 1 << 20


def copies(num_rows: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return `input_ids` 0w0w, and labels that are -100 except on the second w."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(1, SYMBOLS, (num_rows, LENGTH // 2), generator=generator)
    half[:, 0] = 0
    input_ids = torch.cat([half, half], dim=1)
    labels = input_ids.clone()
    labels[:, : LENGTH // 2 + 1] = -100
    return [{"input_ids": ids, "labels": label} for ids, label in zip(input_ids, labels, strict=True)]


def build(lsh_pattern: str) -> ReformerHfForCausalLM:
    """Build one LSH layer of width 128, with one learned embedding per position."""
    config = ReformerHfConfig(
        attn_layers=["lsh"],
        hidden_size=128,
        num_attention_heads=2,
        attention_head_size=32,
        vocab_size=SYMBOLS,
        max_position_embeddings=LENGTH,
        axial_pos_embds=False,
        hidden_dropout_prob=0.0,
        is_decoder=True,
        lsh_pattern=lsh_pattern,
        # Buckets as long as a chunk, or as long as a window of two chunks.
        num_buckets=32 if lsh_pattern == "chunk" else 16,
        lsh_attn_chunk_length=8,
        num_hashes=4,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return ReformerHfForCausalLM(config)


def train(output_dir: Path, lsh_pattern: str, steps: int, seed: int) -> Trainer:
    """Train on new sequences in each step. The trainer evaluates on others."""
    set_seed(seed)
    trainer = Trainer(
        build(lsh_pattern),
        TrainingArguments(
            output_dir=str(output_dir),
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=TEST_ROWS,
            learning_rate=1e-3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=50,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=100,
            use_cpu=True,
            seed=seed,
        ),
        train_dataset=copies(steps * BATCH_SIZE, seed),
        eval_dataset=copies(TEST_ROWS, TEST_SEED),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=accuracy,
    )
    trainer.train()
    return trainer


def accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    """Return the share of right tokens on the second w."""
    predicted, labels = evaluated.predictions[:, :-1], evaluated.label_ids[:, 1:]
    return {"accuracy": (predicted == labels)[labels != -100].mean().item()}


def evaluate(trainer: Trainer) -> dict[str, dict[str, float]]:
    """Evaluate the model as it is, and with its LSH attention replaced."""
    results = {"intact": trainer.evaluate()}
    for replacement in ("random", "skip", "full"):
        with replace_lsh(trainer.model, replacement):
            results[replacement] = trainer.evaluate()
    return results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, draw, and return the metrics by what replaces LSH attention."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--figure", type=Path, help="file of the figure; the default is in the folder of the model")
    parser.add_argument("--lsh_pattern", default="chunk", choices=["chunk", "window"])
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    trainer = train(options.output_dir, options.lsh_pattern, options.steps, options.seed)
    trainer.save_model()
    results = evaluate(trainer)
    print("\n| LSH attention | accuracy | loss |\n|---|---|---|")
    for name, metrics in results.items():
        print(f"| {name} | {metrics['eval_accuracy']:.3f} | {metrics['eval_loss']:.3f} |")
    input_ids = torch.stack([row["input_ids"] for row in trainer.eval_dataset])
    print(f"\n{attention_coverage(trainer.model, input_ids[:8]).to_markdown(per_head=False)}")
    figure = options.figure or options.output_dir / "attention.png"
    figure.parent.mkdir(parents=True, exist_ok=True)
    draw_attention(trainer.model, input_ids[0], layer=0, path=figure)
    return results


if __name__ == "__main__":
    main()
