# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Which group a layer belongs to, and which rectangle of a checkpoint's tensor each rank holds. Pure data, no tensor is
touched here but in `load_shard`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sglang_symm.distributed.group import Group
    from sglang_symm.distributed.parallel_state import ParallelState


class WeightError(ValueError):
    """A checkpoint does not fit the model: a weight is missing, unknown or of another shape."""


class WeightSource(Protocol):
    """A whole tensor of a checkpoint of which only the asked rectangle is read: a torch.Tensor, or a slice of a
    safetensors file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor: ...


@dataclass(frozen=True)
class Shard:
    """`whole[start : start + size]` along `dim` goes to `parameter[offset : offset + size]` along `dim`.

    shape: of the whole tensor in the checkpoint; start and size: this rank's part of it; offset: where it lands in the
    parameter."""

    shape: tuple[int, ...]
    dim: int
    start: int
    size: int
    offset: int = 0

    def read(self, source: WeightSource, name: str) -> Tensor:
        """This rank's part of `source`. Raises WeightError if the whole has another shape than the model needs."""
        if tuple(source.shape) != self.shape:
            raise WeightError(f"{name}: expected shape {list(self.shape)}, found {list(source.shape)}")
        return source[
            tuple(
                slice(self.start, self.start + self.size) if d == self.dim else slice(None)
                for d in range(len(self.shape))
            )
        ]


def replicated(*shape: int) -> Shard:
    """Every rank holds all of a tensor of this shape."""
    return Shard(shape, dim=0, start=0, size=shape[0])


def sharded_parameter(
    shape: tuple[int, ...], shards: Mapping[Any, Shard], dtype: torch.dtype | None, device: torch.device | str | None
) -> nn.Parameter:
    """An uninitialised parameter that knows its parts: `parameter.shards[part]` (part None where it has only one)."""
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
    parameter.shards = dict(shards)  # type: ignore[attr-defined]
    return parameter


def load_shard(parameter: nn.Parameter, source: WeightSource, part: Any = None, name: str = "weight") -> None:
    """Copy this rank's shard of the checkpoint's tensor `source` into `parameter` (converted to its dtype and device).

    part: which of the tensors that the parameter is made of (q, k or v; gate or up). Raises WeightError on a wrong
    shape."""
    shard: Shard = parameter.shards[part]  # type: ignore[attr-defined]
    parameter.data.narrow(shard.dim, shard.offset, shard.size).copy_(shard.read(source, name))


def divide(what: str, size: int, tp_size: int) -> int:
    """size / tp_size; a ValueError that names the numbers if it is no whole number."""
    if size % tp_size:
        raise ValueError(f"{what} {size} does not divide by the {tp_size} ranks of the tensor-parallel group")
    return size // tp_size


def resolve_state(parallel_state: ParallelState | None) -> ParallelState:
    """The given state, or else the process default."""
    if parallel_state is not None:
        return parallel_state
    from sglang_symm.distributed.parallel_state import get_parallel_state

    return get_parallel_state()


def resolve_group(
    state: ParallelState, use_dp_attention_reduce: bool, tp_rank: int | None = None, tp_size: int | None = None
) -> Group:
    """The one group that shards and reduces a layer: attention-TP if `use_dp_attention_reduce`, else TP.

    tp_rank, tp_size: what the caller believes. Sharding by one group and reducing over another is silently wrong, so a
    difference is a ValueError."""
    kind, group = ("attention-TP", state.attn_tp) if use_dp_attention_reduce else ("TP", state.tp)
    rank = group.rank_in_group if tp_rank is None else tp_rank
    size = group.world_size if tp_size is None else tp_size
    if (rank, size) != (group.rank_in_group, group.world_size):
        raise ValueError(
            f"tp_rank={rank}, tp_size={size} do not match the {kind} group '{group.unique_name}' over which the layer "
            f"reduces (rank {group.rank_in_group} of {group.world_size}, "
            f"use_dp_attention_reduce={use_dp_attention_reduce}): a layer must be sharded and reduced by one group"
        )
    return group
