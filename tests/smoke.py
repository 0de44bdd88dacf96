# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Use an installed package outside the repository: train, save, load, generate.

    python smoke.py    # in an empty folder
"""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import reformer_hf
from reformer_hf.hub import Metric, RunReport, write_model_card

package = Path(reformer_hf.__file__).parent
assert "site-packages" in package.parts, f"reformer_hf is imported from {package}, not from an installed package."
assert (package / "py.typed").exists() and not (package.parent / "tests").exists()

config = AutoConfig.for_model(
    "reformer_hf", is_decoder=True, attn_layers=["local", "lsh"], hidden_size=64, max_position_embeddings=256
)
tokenizer = reformer_hf.ReformerHfByteTokenizer()
ids = tokenizer("A text that is longer than a chunk. " * 5)["input_ids"]
arguments = TrainingArguments("out", max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[])
trainer = Trainer(
    AutoModelForCausalLM.from_config(config), arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 4
)
trainer.train()
trainer.save_model(), tokenizer.save_pretrained("out")
write_model_card(trainer, RunReport("A test.", "text-generation", "A sentence.", Metric("loss", "Loss", 1.0)))

model, tokenizer = AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
output = model.generate(**tokenizer("A text", return_tensors="pt"), max_new_tokens=8, min_new_tokens=8)
print(f"reformer_hf {reformer_hf.__version__} in {package}: generated {tokenizer.decode(output[0])!r}")
