# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Layer norm from a residual stream, which is at least fp32, to the dtype of the layer that reads it."""

import torch
from torch import Tensor, nn


class StreamLayerNorm(nn.LayerNorm):
    """A layer norm that computes in the dtype of its input and returns the dtype of its weights."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if weight.dtype == input.dtype:
            return torch.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        normalized = torch.layer_norm(
            input, self.normalized_shape, weight.to(input.dtype), bias.to(input.dtype), self.eps
        )
        return normalized.to(weight.dtype)
