# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
How far decoding in whole chunks of the sorted order is from the parallel pass: `python -m benchmarks.chunk_decoding`.

A new token moves the borders of chunks, and with them what earlier tokens gave to the layers above; a decoding state
keeps what they gave when they came. Each new token's logits are compared with the last row of a parallel pass over it
and all before it.
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

# Our patterns; in-tree weights in all of them.
PATTERNS = {
    "ours, window": {},
    "ours, in-tree pattern": IN_TREE_PATTERN,
    "ours, chunks of the own bucket": {"lsh_pattern": "chunk"},
}


def build_models(shape: Shape, length: int, num_hashes: int) -> Iterator[tuple[str, nn.Module]]:
    """The in-tree model, and ours of each pattern with its weights, of a size that lets attention matter."""
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
    """Relative difference of logits, and how often the most probable token is the same."""
    step = start_decoding(model, ids[:, :prompt])
    found, expected = [], []
    for position in tqdm(range(prompt, ids.shape[1]), desc=name):
        found.append(step(ids[:, position : position + 1], position)[0, -1])
        with torch.no_grad():
            expected.append(model(input_ids=ids[:, : position + 1])["logits"][0, -1])
    found, expected = torch.stack(found), torch.stack(expected)
    agree = (found.argmax(-1) == expected.argmax(-1)).double().mean().item()
    return relative_rms(found, expected), agree


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--prompt", type=int, default=1000, help="tokens before the first step")
    parser.add_argument("--tokens", type=int, default=64, help="steps")
    parser.add_argument("--num_hashes", type=int, default=4)
    options = parser.parse_args()
    shape, length = SHAPES["decoder"], 2048
    ids = torch.randint(2, 258, (1, options.prompt + options.tokens), generator=torch.Generator().manual_seed(1))
    print("| model | layers | relative difference of logits | same first choice |\n|---|---|---|---|")
    for name, model in build_models(shape, length, options.num_hashes):
        error, agree = compare(model, ids, options.prompt, name)
        print(f"| {name} | {len(shape.layers)} | {error:.1e} | {agree:.0%} |")


if __name__ == "__main__":
    main()
