# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Measure how much decoding with `lsh_pattern="chunk"` differs from the parallel pass.

    python -m benchmarks.chunk_decoding

A new token shifts the chunk boundaries, which changes the outputs of earlier tokens in a parallel pass, while a KV
cache keeps their keys and values. The script compares the logits of each new token with the last row of a parallel
pass over all tokens so far.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from reformer_hf import ReformerHfForCausalLM

from .cases import SHAPES, Shape
from .checks import relative_rms
from .decoding import start_decoding
from .reformers import IN_TREE_PATTERN, in_tree_model, our_config

# Config fields of our models; all use the in-tree weights.
PATTERNS = {
    "reformer_hf, window": {},
    "reformer_hf, in-tree pattern": IN_TREE_PATTERN,
    "reformer_hf, chunk within buckets": {"lsh_pattern": "chunk"},
}


def build_models(shape: Shape, length: int, num_hashes: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield our model with each pattern, and the in-tree model, with weights that make attention matter."""
    torch.manual_seed(0)
    in_tree = in_tree_model(shape, length, num_hashes, hash_seed=0, num_buckets=64).eval()
    for parameter in in_tree.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4.0)
    for name, pattern in PATTERNS.items():
        model = ReformerHfForCausalLM(our_config(shape, length, num_hashes, num_buckets=64, hash_seed=0, **pattern))
        model.load_state_dict(in_tree.state_dict())
        yield name, model.eval()
    yield "in-tree", in_tree


def compare(model: nn.Module, ids: Tensor, prompt: int, name: str) -> tuple[float, float]:
    """Return the relative difference of the logits, and how often the most probable token is the same."""
    step = start_decoding(model, ids[:, :prompt])
    actual, expected = [], []
    for position in tqdm(range(prompt, ids.shape[1]), desc=name):
        actual.append(step(ids[:, position : position + 1], position)[0, -1])
        with torch.no_grad():
            expected.append(model(input_ids=ids[:, : position + 1])["logits"][0, -1])
    actual, expected = torch.stack(actual), torch.stack(expected)
    agreement = (actual.argmax(-1) == expected.argmax(-1)).double().mean().item()
    return relative_rms(actual, expected), agreement


def main() -> None:
    """Print the comparison as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--prompt", type=int, default=1000, help="number of tokens before the first step")
    parser.add_argument("--tokens", type=int, default=64, help="number of steps")
    parser.add_argument("--num_hashes", type=int, default=4)
    options = parser.parse_args()
    shape, length = SHAPES["decoder"], 2048
    ids = torch.randint(2, 258, (1, options.prompt + options.tokens), generator=torch.Generator().manual_seed(1))
    print("| model | layers | relative difference of logits | same most probable token |\n|---|---|---|---|")
    for name, model in build_models(shape, length, options.num_hashes):
        error, agreement = compare(model, ids, options.prompt, name)
        print(f"| {name} | {len(shape.layers)} | {error:.1e} | {agreement:.0%} |")


if __name__ == "__main__":
    main()
