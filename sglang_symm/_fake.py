"""Fake kernels: shapes and dtypes of the public ops, for tracing and torch.compile. ``empty`` has none: it is eager
only.

Every result is a new contiguous tensor. Wrong shapes are ValueErrors here too: they are found when a function is
compiled. Imported after the library was loaded; importing registers them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor


def _members(group: str) -> tuple[int, int]:
    """(rank, world size) of a group that exists in this process."""
    info = json.loads(torch.ops.sglang_symm._group_info(group))
    return info["rank"], info["world_size"]


def _normalised(dim: int, x: Tensor) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"sglang_symm: expected a dimension of a {x.dim()}-d tensor, got {dim}")
    return dim % x.dim()


def _like(x: Tensor, shape: Sequence[int | torch.SymInt]) -> Tensor:
    return x.new_empty(shape)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"sglang_symm: row_parallel_linear: x {list(x.shape)} does not fit weight {list(weight.shape)}"
        )
    return _like(x, [*x.shape[:-1], weight.shape[0]])


def all_reduce(x: Tensor, group: str, op: str = "sum") -> Tensor:
    return _like(x, x.shape)


def all_reduce_(x: Tensor, group: str, op: str = "sum") -> None:
    return None


def reduce_scatter(x: Tensor, group: str, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    rank, world_size = _members(group)
    dim = _normalised(dim, x)
    shape = list(x.shape)
    if sizes is None and shape[dim] % world_size:
        raise ValueError(
            f"sglang_symm: reduce_scatter: {shape[dim]} does not divide by {world_size} ranks; give sizes="
        )
    if sizes is not None and (len(sizes) != world_size or sum(sizes) != shape[dim]):
        raise ValueError(
            f"sglang_symm: reduce_scatter: expected {world_size} sizes that sum to {shape[dim]}, got {sizes}"
        )
    shape[dim] = shape[dim] // world_size if sizes is None else sizes[rank]
    return _like(x, shape)


def all_gather(x: Tensor, group: str, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    rank, world_size = _members(group)
    dim = _normalised(dim, x)
    shape = list(x.shape)
    if sizes is not None and (len(sizes) != world_size or sizes[rank] != shape[dim]):
        raise ValueError(
            f"sglang_symm: all_gather: expected {world_size} sizes, {shape[dim]} on rank {rank}, got {sizes}"
        )
    shape[dim] = shape[dim] * world_size if sizes is None else sum(sizes)
    return _like(x, shape)


def broadcast_(x: Tensor, src: int, group: str) -> None:
    return None


def barrier(token: Tensor, group: str) -> None:
    return None


def row_parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: str, symmetric: bool = True, static_weight: bool = False
) -> Tensor:
    return _linear(x, weight)


def row_parallel_linear_out(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, out: Tensor) -> None:
    return None


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    return _like(x, x.shape), _like(residual, residual.shape)


def row_parallel_linear_add_rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    group: str,
    static_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    return _linear(x, weight), _like(residual, residual.shape)


for _fake in (
    all_reduce,
    all_reduce_,
    reduce_scatter,
    all_gather,
    broadcast_,
    barrier,
    row_parallel_linear,
    row_parallel_linear_out,
    all_reduce_add_rms_norm,
    row_parallel_linear_add_rms_norm,
):
    torch.library.register_fake(f"sglang_symm::{_fake.__name__}", _fake)
