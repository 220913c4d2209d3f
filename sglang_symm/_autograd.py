# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Gradients of layers across the ranks of a group. Activations between layers are replicated and so is the loss, which
counts once (Megatron-LM, https://arxiv.org/abs/1909.08053, section 3):

    copy_to_ranks       y = x                         dx = sum over ranks of dy_r
    sum_over_ranks      y = sum over ranks of x_r     dx_r = dy
    gather_from_ranks   y = concat over ranks of x_r  dx_r = its part of dy

torch.ops.sglang_symm.row_parallel_linear follows the same rule. The collectives among the ops do not: they know nothing
of what is replicated, so theirs is the gradient of the sum of all ranks' losses (csrc/ops/autograd.cpp).
Without gradients these functions cost a look at `x.requires_grad`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from sglang_symm.distributed.group import Group


def copy_to_ranks(x: Tensor, group: Group) -> Tensor:
    """x, replicated, on its way into a layer that each rank computes a part of."""
    if group.world_size == 1 or not _needs_gradient(x):
        return x
    return _Copy.apply(x, group.unique_name)


def sum_over_ranks(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' x [any shape], replicated."""
    if group.world_size == 1 or not _needs_gradient(x):
        return group.all_reduce(x)
    return _Sum.apply(x, group.unique_name)


def gather_from_ranks(x: Tensor, group: Group, dim: int) -> Tensor:
    """The ranks' x, of equal shapes, behind each other along `dim`: replicated."""
    if group.world_size == 1 or not _needs_gradient(x):
        return group.all_gather(x, dim=dim)
    return _Gather.apply(x, group.unique_name, dim, group.rank_in_group)


def without_gradient(x: Tensor, what: str) -> Tensor:
    """x; a backward that reaches it raises RuntimeError that names `what`."""
    return _Refuse.apply(x, what) if _needs_gradient(x) else x


def _needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return torch.ops.sglang_symm.all_reduce(dy, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return torch.ops.sglang_symm.all_reduce(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, dim: int, rank: int) -> Tensor:
        ctx.dim, ctx.rank, ctx.length = dim, rank, x.shape[dim]
        return torch.ops.sglang_symm.all_gather(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return dy.narrow(ctx.dim, ctx.rank * ctx.length, ctx.length), None, None, None


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, what: str) -> Tensor:
        ctx.what = what
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        raise RuntimeError(f"sglang_symm: {ctx.what} has no gradient")
