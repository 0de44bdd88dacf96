# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Measure training steps on short texts: next to GPT-2 of the same sizes, with and without dropout, padded and packed.

    python -m benchmarks.short_inputs

All models have their default dropout, GPT-2 that of Transformers (0.1) and ours that of new configs (0.05), unless the
name says otherwise. The models of a row run in turn; the tables show medians. Packed and padded batches hold the same
documents, and their losses are compared first.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from reformer_hf import ReformerHfConfig, ReformerHfForCausalLM

# Batch size and length.
SHAPES = ((32, 64), (16, 128), (8, 512), (1, 4096))

Step = Callable[[], Tensor]


def _ours(**fields) -> ReformerHfForCausalLM:
    torch.manual_seed(0)
    return ReformerHfForCausalLM(ReformerHfConfig(is_decoder=True, **fields)).train()


def _gpt2() -> GPT2LMHeadModel:
    config = ReformerHfConfig()
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_position_embeddings,
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_inner=config.feed_forward_size,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).train()


def _step(model: torch.nn.Module, **inputs: Tensor) -> Step:
    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(**inputs)["loss"]
        loss.backward()
        return loss.detach()

    return run


def _medians(steps: dict[str, Step], repeats: int, name: str) -> dict[str, float]:
    """Run the steps in turn and return the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in tqdm(range(repeats + 1), desc=name):
        for step_name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:
                seconds[step_name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare_models(repeats: int) -> None:
    """Print the seconds of steps of all models."""
    models = {
        "GPT-2": _gpt2(),
        "ours": _ours(),
        "ours, no dropout": _ours(hidden_dropout_prob=0.0),
        "ours, recomputed": _ours(max_kept_activations=0),
        "ours, recomputed, no dropout": _ours(max_kept_activations=0, hidden_dropout_prob=0.0),
    }
    print("| batch size × length |", " | ".join(models), "| ours / GPT-2 |")
    print("|---" * (len(models) + 2) + "|")
    for batch_size, length in SHAPES:
        ids = torch.randint(2, 258, (batch_size, length), generator=torch.Generator().manual_seed(1))
        steps = {name: _step(model, input_ids=ids, labels=ids) for name, model in models.items()}
        medians = _medians(steps, repeats, f"{batch_size} × {length}")
        cells = " | ".join(f"{seconds:.3f} s" for seconds in medians.values())
        print(f"| {batch_size} × {length} | {cells} | {medians['ours'] / medians['GPT-2']:.2f} |")


def compare_packing(repeats: int) -> None:
    """Print the throughput of documents of 16 to 1,024 tokens in padded and in packed batches."""
    generator = torch.Generator().manual_seed(2)
    lengths = (2 ** (4 + 6 * torch.rand(32, generator=generator))).long().tolist()
    documents = [torch.randint(2, 258, (length,), generator=generator) for length in lengths]
    labels = [torch.cat([torch.tensor([-100]), document[1:]]) for document in documents]
    num_targets = torch.tensor(sum(lengths) - len(lengths))
    model = _ours(hidden_dropout_prob=0.0, hash_seed=0, num_buckets=4)
    padded = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(documents, batch_first=True),
        "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in documents], batch_first=True),
    }
    packed = {
        "input_ids": torch.cat(documents)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    steps = {
        name: _step(model, **inputs, num_items_in_batch=num_targets)
        for name, inputs in (("padded", padded), ("packed", packed))
    }
    losses = [step() for step in steps.values()]
    if not torch.allclose(*losses, rtol=1e-5):
        raise ValueError(f"The losses of padded and packed documents differ: {losses}.")
    medians = _medians(steps, repeats, "documents")
    print(f"\n{len(lengths)} documents, {sum(lengths)} tokens:\n\n| batch | shape | seconds | tokens per second |")
    print("|---|---|---|---|")
    for name, inputs in (("padded", padded), ("packed", packed)):
        shape = " × ".join(map(str, inputs["input_ids"].shape))
        print(f"| {name} | {shape} | {medians[name]:.2f} | {sum(lengths) / medians[name]:,.0f} |")


def main() -> None:
    """Print both comparisons as Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="measured steps per model")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    compare_models(options.repeats)
    compare_packing(options.repeats)


if __name__ == "__main__":
    main()
