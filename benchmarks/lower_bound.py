# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
Lower bounds on the time of a training step and of decoding.

Of a training step: its matrix products and fused chunk attention. No hashing, sorting, gathering, masks, merging of
rounds, norms, residuals or loss. The backward pass recomputes the forward pass, as in reversible layers. Of decoding:
the matrix-vector products of all linear layers.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .cases import Case
from .decoding import TOKENS_PER_RUN
from .reformers import our_model

_CHUNKS_PER_CALL = 32
# Positions per matrix product, few enough for the results to stay in the processor's cache.
_BLOCK = 1024


class Product:
    """`y = x W` and its two gradients, in blocks of positions, written to preallocated memory."""

    def __init__(self, length: int, in_features: int, out_features: int):
        self._shape = (in_features, out_features)
        self._weight = torch.randn(in_features, out_features)
        self._grad_weight = torch.empty(in_features, out_features)
        self._input = torch.randn(length, in_features)
        self._grad_output = torch.randn(length, out_features)
        self._output = torch.empty(length, out_features)
        self._grad_input = torch.empty(length, in_features)

    def forward(self, block: int) -> None:
        for x, y in zip(self._input.split(block), self._output.split(block), strict=True):
            torch.mm(x, self._weight, out=y)

    def backward(self, block: int) -> None:
        pieces = (self._input.split(block), self._grad_output.split(block), self._grad_input.split(block))
        for i, (x, grad_y, grad_x) in enumerate(zip(*pieces, strict=True)):
            torch.mm(grad_y, self._weight.t(), out=grad_x)
            torch.addmm(self._grad_weight, x.t(), grad_y, beta=float(i > 0), out=self._grad_weight)


class ChunkAttentions:
    """Fused attention of all chunks, rounds and heads of one layer, each time on the same chunks."""

    def __init__(self, case: Case):
        shape = case.shape
        chunk, window, size = shape.lsh_chunk, 2 * shape.lsh_chunk, shape.head_size
        total = case.num_hashes * case.length * shape.num_heads // chunk
        self._calls = [_CHUNKS_PER_CALL] * (total // _CHUNKS_PER_CALL)
        if total % _CHUNKS_PER_CALL:
            self._calls.append(total % _CHUNKS_PER_CALL)
        slots = (_CHUNKS_PER_CALL + 1) * chunk
        self._query = torch.randn(1, _CHUNKS_PER_CALL, chunk, size)
        # Overlapping views of the same slots.
        self._key, self._value = (
            torch.randn(1, slots, size).unfold(1, window, chunk).transpose(-1, -2) for _ in range(2)
        )
        self._mask = torch.zeros(1, _CHUNKS_PER_CALL, chunk, window)
        self._grad = torch.randn_like(self._query)
        self._out, self._lse = self._attend(_CHUNKS_PER_CALL)

    def _attend(self, chunks: int) -> tuple[Tensor, Tensor]:
        inputs = (x[:, :chunks] for x in (self._query, self._key, self._value))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *inputs, 0.0, False, attn_mask=self._mask[:, :chunks], scale=1.0
        )

    def forward(self) -> None:
        for chunks in self._calls:
            self._attend(chunks)

    def backward(self) -> None:
        tensors = (self._grad, self._query, self._key, self._value, self._out, self._lse)
        for chunks in self._calls:
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(x[:, :chunks] for x in tensors), 0.0, False, attn_mask=self._mask[:, :chunks], scale=1.0
            )


def lower_bound(case: Case, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that computes the lower bound of a training step or of decoding tokens."""
    return lower_bound_of_tokens(case, device) if case.workload == "tokens" else lower_bound_of_step(case, device)


def lower_bound_of_tokens(case: Case, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that computes the matrix-vector products of `TOKENS_PER_RUN` decoding steps."""
    model = our_model(case.shape, case.length, case.num_hashes).to(device)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    vectors = [torch.randn(1, 1, layer.in_features, device=device) for layer in layers]

    def run() -> Tensor:
        with torch.no_grad():
            for _ in range(TOKENS_PER_RUN):
                for layer, vector in zip(layers, vectors, strict=True):
                    out = linear(vector, layer.weight, layer.bias)
        return out

    return run


def lower_bound_of_step(case: Case, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that computes the lower bound of one step of a model with only LSH layers, on a CPU."""
    shape = case.shape
    if device.type != "cpu" or set(shape.layers) != {"lsh"}:
        raise ValueError(
            f"There is no lower bound for shape {shape.name!r} on {device}: it needs LSH layers only, and a CPU."
        )
    heads = shape.num_heads * shape.head_size
    products = [Product(case.length, shape.width, heads)] * 2  # shared query-key and value projections
    products += [
        Product(case.length, heads, shape.width),
        Product(case.length, shape.width, shape.feed_forward),
        Product(case.length, shape.feed_forward, shape.width),
    ]
    head = Product(case.length, 2 * shape.width, shape.vocab_size)
    attentions = ChunkAttentions(case)
    # Use the faster block size.
    block = min((case.length, _BLOCK), key=lambda block: _seconds(products, block))

    def run() -> Tensor:
        for _ in shape.layers:
            for product in products:
                product.forward(block)
            attentions.forward()
        head.forward(block)
        head.backward(block)
        for _ in shape.layers:
            for product in products:
                product.forward(block)
                product.backward(block)
            attentions.forward()
            attentions.backward()
        return torch.zeros(())

    return run


def _seconds(products: list[Product], block: int) -> float:
    """Return the lower of two times for the matrix products of one layer."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        for product in products:
            product.forward(block)
            product.backward(block)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
