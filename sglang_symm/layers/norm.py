# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Root-mean-square norm with the residual stream beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sglang_symm.layers.sharding import replicated, sharded_parameter


class RMSNorm(nn.Module):
    """`y = w * (r / sqrt(mean(r^2) + eps))` with `r = x + residual`; returns (y, r).

    As Hugging Face computes it: the sum in x's dtype, the norm in fp32, rounded to x's dtype, then times the weight.
    forward: x and residual [..., H] (residual None means zero) -> (y, r), both [..., H] in x's dtype."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = sharded_parameter((hidden_size,), {None: replicated(hidden_size)}, dtype, device)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r = x if residual is None else residual + x
        r32 = r.float()
        scale = torch.rsqrt(r32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (r32 * scale).to(x.dtype), r
