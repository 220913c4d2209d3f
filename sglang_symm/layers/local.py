# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""The matrix product of one rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# For these numbers of rows, in fp32 on the CPU, the transposed product reads the weight once, at the speed of one row.
# The plain one takes 2 to 4 times as long (docs/notes/cpu_generate.md; csrc/ops/row_parallel_linear.cpp does the same).
_FEW_ROWS = (2, 3)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`y = x @ W^T + b`: x [..., K], W [N, K], b [N] -> [..., N]; `torch.nn.functional.linear`, but for two or three
    rows in fp32 on the CPU, in torch.inference_mode, by `(W @ x^T)^T`. Compiled code is one graph for any number of
    rows, hence always plain; outside of inference mode both give the same bits."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return F.linear(x, weight, bias)
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[:-1].numel() not in _FEW_ROWS:
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu") or x.numel() == 0:
        return F.linear(x, weight, bias)
    y = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous().view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias
