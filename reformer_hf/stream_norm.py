# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Layer norm between a residual stream, in fp32 at least, and the layers that read it."""

from torch import Tensor, nn
from torch.nn.functional import layer_norm


class StreamLayerNorm(nn.LayerNorm):
    """Normalises in the dtype of the stream and returns the dtype of its own weights, which is that of the reader."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return layer_norm(input, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)
