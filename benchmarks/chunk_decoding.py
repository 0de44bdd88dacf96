# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
How far decoding in whole chunks of the sorted order is from the parallel pass: `python -m benchmarks.chunk_decoding`.

A new token moves the borders of chunks, and with them what earlier tokens gave to the layers above; a decoding state
keeps what they gave when they came. Each new token's logits are compared with the last row of a parallel pass over it
and all before it.
"""

import argparse

import torch
from torch import Tensor, nn
from tqdm import tqdm

from reformer_hf import ReformerHfForCausalLM

from .cases import SHAPES
from .checks import relative_rms
from .decoding import start_decoding
from .reformers import IN_TREE_PATTERN, in_tree_model, our_config

ROWS = {
    "ours, window": lambda shape, length, num_hashes: ReformerHfForCausalLM(
        our_config(shape, length, num_hashes, num_buckets=64)
    ),
    "ours, in-tree pattern": lambda shape, length, num_hashes: ReformerHfForCausalLM(
        our_config(shape, length, num_hashes, num_buckets=64, hash_seed=0, **IN_TREE_PATTERN)
    ),
    "ours, chunks of the own bucket": lambda shape, length, num_hashes: ReformerHfForCausalLM(
        our_config(shape, length, num_hashes, num_buckets=64, lsh_pattern="chunk")
    ),
    "in-tree": lambda shape, length, num_hashes: in_tree_model(shape, length, num_hashes, hash_seed=0, num_buckets=64),
}


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
    for name, build in ROWS.items():
        torch.manual_seed(0)
        model = build(shape, length, options.num_hashes).eval()
        for parameter in model.parameters():
            # Of trained size, so that attention matters.
            if parameter.dim() > 1:
                parameter.data.mul_(4.0)
        error, agree = compare(model, ids, options.prompt, name)
        print(f"| {name} | {len(shape.layers)} | {error:.1e} | {agree:.0%} |")


if __name__ == "__main__":
    main()
