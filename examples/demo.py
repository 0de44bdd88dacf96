# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train a model, save it, load it in a new process, compare its logits bit for bit, and generate text.

    python examples/demo.py
    python examples/demo.py --data book.txt --output_dir outputs/book

The demo takes a few minutes on two CPU cores. It runs `train_causal_lm.py` with sequences of 4,096 bytes on the first
4 MB of the Python standard library or of `--data`, and passes further options to that script. It exits with status 1
if the model does not beat a byte bigram model on the held-out text, or if the new process computes different logits.
"""

import argparse
import logging
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar

import reformer_hf  # noqa: F401  registers the model with the Auto classes

logger = logging.getLogger(__name__)

CHECK_FILE = "demo_logits.safetensors"
SEQUENCE_LENGTH = 4096

# Short local chunks, and position embeddings that are small compared with token embeddings, learn fast in few steps.
OPTIONS = f"""
    --sequence_length {SEQUENCE_LENGTH} --max_bytes 4000000 --overwrite_output_dir
    --attn_layers local,lsh,local --hidden_size 128 --num_attention_heads 4 --attention_head_size 32
    --local_attn_chunk_length 4 --local_num_chunks_before 1
    --hidden_dropout_prob 0 --local_attention_probs_dropout_prob 0
    --config_overrides axial_norm_std=0.05,initializer_range=0.1
    --max_steps 700 --per_device_train_batch_size 1 --learning_rate 3e-3 --adam_beta2 0.95
    --logging_steps 25 --eval_steps 350 --save_strategy no --use_cpu
"""

NEXT = """
What to do next:
  look at the loss curve and the model card   {folder}/loss_curve.png, {folder}/README.md
  write with the model in a browser           make space
  train on your own text                      python examples/train_causal_lm.py --data book.txt
  train other tasks                           examples/README.md"""


def compute_logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Compute the logits of `input_ids` in `eval()` mode and without gradients."""
    with torch.inference_mode():
        return model.eval()(input_ids).logits


def train_and_save(output_dir: Path, options: list[str]) -> dict[str, float]:
    """Train, save the model and its logits for one held-out sequence, and return the metrics."""
    # Imported here, so that the new process needs only the package and the folder.
    from train_causal_lm import main as train_main

    if not sys.stdout.isatty():
        options = ["--disable_tqdm", "true", "--logging_steps", "350", *options]
    trainer, metrics = train_main([*OPTIONS.split(), *options, "--output_dir", str(output_dir)])
    input_ids = trainer.eval_dataset[:1]["input_ids"].long()
    save_file({"input_ids": input_ids, "logits": compute_logits(trainer.model, input_ids)}, output_dir / CHECK_FILE)
    return metrics


def verify(output_dir: Path) -> bool:
    """Load the model, generate text, and return whether its logits equal the saved ones."""
    model = AutoModelForCausalLM.from_pretrained(output_dir)
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    saved = load_file(output_dir / CHECK_FILE)
    logits = compute_logits(model, saved["input_ids"])
    equal = torch.equal(logits, saved["logits"])
    difference = (logits - saved["logits"]).abs().max().item()
    print(f"Logits of {tuple(logits.shape)}: {'bit-identical' if equal else f'differ by up to {difference:.3g}'}")
    set_seed(0)
    prompt = tokenizer("def read(self, path):\n", return_tensors="pt")
    max_new_tokens = model.config.max_position_embeddings - prompt["input_ids"].shape[1]
    generated = model.generate(**prompt, max_new_tokens=min(200, max_new_tokens))
    print(f"Generated:\n\n{tokenizer.decode(generated[0])}\n")
    return equal


def main() -> int:
    """Run the demo and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--verify", action="store_true", help="only load and check the model in the output folder")
    args, options = parser.parse_known_args()
    if not sys.stdout.isatty():
        disable_progress_bar()
    if args.verify:
        return 0 if verify(args.output_dir) else 1

    metrics = train_and_save(args.output_dir, options)
    command = [sys.executable, __file__, "--verify", "--output_dir", str(args.output_dir)]
    print("\nLoading the model in a new process:", flush=True)
    identical = subprocess.run(command, check=False).returncode == 0
    ours, bigram = metrics["eval_bits_per_byte"], metrics["bigram_bits_per_byte"]
    rows = {
        "Held-out bits per byte, reformer_hf": f"{ours:.3f}",
        "Held-out bits per byte, bigram model": f"{bigram:.3f}",
        "Lower than the bigram model": "yes" if ours < bigram else "NO",
        "Same logits in a new process": "yes" if identical else "NO",
        "Training time": f"{metrics['train_runtime']:.0f} s",
        "Output folder": str(args.output_dir),
    }
    for name, value in rows.items():
        print(f"{name:<40}{value}")
    print(NEXT.format(folder=args.output_dir))
    return 0 if ours < bigram and identical else 1


if __name__ == "__main__":
    sys.exit(main())
