# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Fake kernels: shapes and dtypes of the public ops, for tracing and torch.compile. ``empty`` has none: it is eager
only.

Every result is a new contiguous tensor. What the real ops refuse is refused here too, in their words: it is found when
a function is compiled. A call that mixes meta tensors with others ends here as well, and must not come back with
memory that nobody wrote. Imported after the library was loaded; importing registers them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

_REDUCTIONS = ("sum", "product", "min", "max", "avg")
# As base/dtype.h has it: what is reduced natively or by a process group, and what a communicator (NCCL) adds.
_REDUCED = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
_REDUCED |= {torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool}
_SUMMED = {torch.complex64, torch.complex128}
_BY_NCCL = {torch.uint32, torch.uint64}

_Shape = Sequence[int | torch.SymInt]


def _fail(op: str, what: str) -> NoReturn:
    raise ValueError(f"sglang_symm: {op}: {what}")


def _group(x: Tensor, name: str, op: str) -> dict[str, Any]:
    """_group_info of a group of this process that x may be sent through. Tensors that are all meta may, to ask for
    shapes."""
    info: dict[str, Any] = json.loads(torch.ops.sglang_symm._group_info(name))
    if str(x.device) not in (info["device"], "meta"):
        _fail(op, f"group '{name}' is on {info['device']}, the tensor is on {x.device} (rank {info['rank']})")
    if x.layout != torch.strided:
        _fail(op, f"expected a strided tensor, got layout {x.layout}")
    return info


def _check_reduction(x: Tensor, group: dict[str, Any], op: str, reduction: str = "sum") -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"sglang_symm: reduction '{reduction}', expected sum, product, min, max or avg")
    if reduction == "avg" and not (x.is_floating_point() or x.is_complex()):
        _fail(op, f"avg of {x.dtype}, expected a floating dtype")
    by_nccl = _BY_NCCL if group["settings"]["nccl"] != "0" else set()
    if group["world_size"] == 1 or x.dtype in _REDUCED | by_nccl:
        return
    if not (x.dtype in _SUMMED and reduction in ("sum", "avg")):
        raise ValueError(
            f"sglang_symm: {op} in group '{group['name']}': {reduction} of {x.dtype} is neither native nor done by "
            "its process group. Convert the tensor, to float32 or int64 say"
        )


def _check_writable(x: Tensor, op: str) -> None:
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        _fail(
            op,
            f"expected a tensor whose elements have memory of their own, got sizes {list(x.shape)} with strides "
            f"{list(x.stride())} (an expanded tensor?). clone() it first",
        )


def _checked_dim(x: Tensor, dim: int, op: str) -> int:
    if x.dim() == 0:
        _fail(op, "expected a tensor of at least one dimension, got a scalar")
    if not -x.dim() <= dim < x.dim():
        _fail(op, f"dim {dim} of a tensor of {x.dim()} dimensions")
    return dim % x.dim()


def _check_sizes(sizes: Sequence[int], group: dict[str, Any], op: str) -> None:
    if len(sizes) != group["world_size"]:
        _fail(op, f"{len(sizes)} sizes for the {group['world_size']} ranks of group '{group['name']}'")
    if any(n < 0 for n in sizes):
        _fail(op, f"sizes {list(sizes)}, expected no negative number")
    if all(isinstance(n, int) for n in sizes) and sum(sizes) >= 2**63:
        _fail(op, f"sizes {list(sizes)}, whose sum is more than a tensor can have")


def _what(x: Tensor) -> str:
    return f"{list(x.shape)} of {x.dtype} on {x.device}"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, op: str) -> list[int | torch.SymInt]:
    """The output's shape."""
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        _fail(
            op,
            f"expected x [..., K/P] and weight [N, K/P], got x {list(x.shape)} and weight {list(weight.shape)}",
        )
    if weight.dtype != x.dtype or weight.device != x.device:
        _fail(
            op,
            f"expected x and weight of one dtype and device, got {x.dtype} on {x.device} and {weight.dtype} on "
            f"{weight.device}",
        )
    if not x.is_floating_point():
        _fail(op, f"expected a floating dtype, got {x.dtype}")
    rows = weight.shape[0]
    if bias is not None and (list(bias.shape) != [rows] or bias.dtype != x.dtype or bias.device != x.device):
        _fail(
            op,
            f"expected bias [{rows}] of {x.dtype} on {x.device} (the whole of it on every rank), got {_what(bias)}",
        )
    return [*x.shape[:-1], rows]


def _check_norm(residual: Tensor, weight: Tensor, shape: _Shape, x: Tensor, op: str) -> None:
    """``shape``: of the sum that is normalised; its dtype and device are x's."""
    fits = len(shape) > 0 and list(residual.shape) == list(shape) and list(weight.shape) == [shape[-1]]
    alike = all(tensor.dtype == x.dtype and tensor.device == x.device for tensor in (residual, weight))
    if not fits or not alike or not x.is_floating_point():
        _fail(
            op,
            f"expected residual {list(shape)} and norm weight [{shape[-1] if shape else 0}] of {x.dtype} (a floating "
            f"dtype) on {x.device}, got {_what(residual)} and {_what(weight)}",
        )


def all_reduce(x: Tensor, group: str, op: str = "sum") -> Tensor:
    _check_reduction(x, _group(x, group, "all_reduce"), "all_reduce", op)
    return x.new_empty(x.shape)


def all_reduce_(x: Tensor, group: str, op: str = "sum") -> None:
    found = _group(x, group, "all_reduce_")
    _check_writable(x, "all_reduce_")
    _check_reduction(x, found, "all_reduce", op)


def reduce_scatter(x: Tensor, group: str, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    found = _group(x, group, "reduce_scatter")
    dim = _checked_dim(x, dim, "reduce_scatter")
    shape, ranks = list(x.shape), found["world_size"]
    if sizes is not None:
        _check_sizes(sizes, found, "reduce_scatter")
        if sum(sizes) != shape[dim]:
            _fail(
                "reduce_scatter",
                f"sizes {list(sizes)} sum to {sum(sizes)}, dimension {dim} has {shape[dim]}",
            )
    elif shape[dim] % ranks:
        _fail(
            "reduce_scatter",
            f"dimension {dim} of size {shape[dim]} does not divide by the {ranks} ranks of group '{group}'. "
            "Give sizes=",
        )
    _check_reduction(x, found, "reduce_scatter")
    shape[dim] = shape[dim] // ranks if sizes is None else sizes[found["rank"]]
    return x.new_empty(shape)


def all_gather(x: Tensor, group: str, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    found = _group(x, group, "all_gather")
    dim = _checked_dim(x, dim, "all_gather")
    shape, rank = list(x.shape), found["rank"]
    if sizes is not None:
        _check_sizes(sizes, found, "all_gather")
        if sizes[rank] != shape[dim]:
            _fail(
                "all_gather",
                f"sizes {list(sizes)} give rank {rank} {sizes[rank]} in dimension {dim}, the tensor has {shape[dim]}",
            )
    shape[dim] = shape[dim] * found["world_size"] if sizes is None else sum(sizes)
    return x.new_empty(shape)


def broadcast_(x: Tensor, src: int, group: str) -> None:
    last = _group(x, group, "broadcast_")["world_size"] - 1
    _check_writable(x, "broadcast_")
    if not 0 <= src <= last:
        _fail("broadcast_", f"src {src} in group '{group}', expected a rank in the group, 0 to {last}")


def barrier(token: Tensor, group: str) -> None:
    _group(token, group, "barrier")


def row_parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: str, symmetric: bool = True, static_weight: bool = False
) -> Tensor:
    shape = _linear(x, weight, bias, "row_parallel_linear")
    _check_reduction(x, _group(x, group, "row_parallel_linear"), "row_parallel_linear")
    return x.new_empty(shape)


def row_parallel_linear_out(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, out: Tensor) -> None:
    op = "row_parallel_linear_out"
    shape = _linear(x, weight, bias, op)
    contiguous = out.is_contiguous()
    if list(out.shape) != shape or out.dtype != x.dtype or out.device != x.device or not contiguous:
        _fail(
            op,
            f"expected a contiguous out {shape} of {x.dtype} on {x.device}, got {_what(out)}"
            + ("" if contiguous else ", not contiguous"),
        )
    _check_reduction(x, _group(x, group, op), "row_parallel_linear")


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    op = "all_reduce_add_rms_norm"
    _check_norm(residual, weight, x.shape, x, op)
    _check_reduction(x, _group(x, group, op), op)
    return x.new_empty(x.shape), residual.new_empty(x.shape)


def row_parallel_linear_add_rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    group: str,
    static_weight: bool = False,
    *,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor]:
    op = "row_parallel_linear_add_rms_norm"
    shape = _linear(x, weight, bias, op)
    _check_norm(residual, norm_weight, shape, x, op)
    _check_reduction(x, _group(x, group, op), op)
    return x.new_empty(shape), residual.new_empty(shape)


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
