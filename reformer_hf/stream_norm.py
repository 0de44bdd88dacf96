# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Layer norm between a residual stream, in fp32 at least, and the layers that read it."""

import torch
from torch import Tensor, nn


class StreamLayerNorm(nn.LayerNorm):
    """Normalises in the dtype of the stream and returns the dtype of its own weights, which is that of the reader."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if weight.dtype == input.dtype:
            return torch.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        normalized = torch.layer_norm(
            input, self.normalized_shape, weight.to(input.dtype), bias.to(input.dtype), self.eps
        )
        return normalized.to(weight.dtype)
