# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (https://arxiv.org/abs/2104.09864) with Llama 3's stretched wavelengths."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """How a model reaches beyond the context that it was first trained on.

    kind "llama3": wavelengths below original_context / high_freq_factor stay, those above original_context /
    low_freq_factor are stretched `factor` times, those between are blended. kind "linear": all are stretched. (Same as
    transformers' rope types.)"""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def apply(self, inv_freq: Tensor) -> Tensor:
        """inv_freq [d/2] fp32 -> the scaled frequencies."""
        if self.kind == "linear":
            return inv_freq / self.factor
        wavelength = 2 * math.pi / inv_freq
        low, high = self.original_context / self.low_freq_factor, self.original_context / self.high_freq_factor
        stretched = torch.where(wavelength > low, inv_freq / self.factor, inv_freq)
        blend = (self.original_context / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - blend) * stretched / self.factor + blend * stretched
        return torch.where((wavelength < high) | (wavelength > low), stretched, blended)


class RotaryEmbedding(nn.Module):
    """`rotate(x, p)_j = x_j cos(p f_j) - x_{j+d/2} sin(p f_j)` and `rotate(x, p)_{j+d/2} = x_{j+d/2} cos(p f_j) + x_j
    sin(p f_j)` with `f_j = theta^(-2j/d)`, scaled.

    cos_sin(positions [n] int64, dtype) -> (cos, sin), each [n, 1, d], once a forward; rotate(x [n, heads, d], cos, sin)
    -> [n, heads, d]."""

    inv_freq: Tensor

    def __init__(
        self,
        head_dim: int,
        theta: float = 10000.0,
        scaling: RopeScaling | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float, device=device) / head_dim)
        if scaling is not None:
            inv_freq = scaling.apply(inv_freq)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions[:, None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), dim=-1) * sin
