# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Who is measured, inside of the ranks: this library, Gloo, DeepSpeed's shared memory. MPI has processes of its own
(mpi.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sglang_symm.bench.cases import Case
from sglang_symm.bench.report import EMPTY_OP
from sglang_symm.distributed.group import Group


@dataclass
class Prepared:
    """Buffers and the call over them. ``call`` may change ``source``; ``reset`` restores it."""

    call: Callable[[], object]
    source: torch.Tensor
    result: Callable[[], torch.Tensor]
    value: torch.Tensor

    def reset(self) -> None:
        """Fresh input."""
        self.source.copy_(self.value)


class Peer:
    """One column. ``prepare`` returns None for what the peer does not do."""

    name: str

    def prepare(self, case: Case, rank: int, in_place: bool) -> Prepared | None:
        """Buffers and a call for one case."""
        raise NotImplementedError


class Symm(Peer):
    """torch.ops.sglang_symm, tensors in symmetric memory or outside of it, one algorithm or the library's choice."""

    def __init__(self, group: Group, algo: str, inside: bool) -> None:
        self.group, self.inside = group, inside
        self.name = "symm" + ("" if algo == "auto" else f"[{algo}]") + ("" if inside else ", outside")

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        if not self.inside:
            return torch.empty_like(like)
        name = self.group.unique_name
        return torch.ops.sglang_symm.empty(list(like.shape), name, dtype=like.dtype, device=like.device)

    def prepare(self, case: Case, rank: int, in_place: bool) -> Prepared | None:
        value, name, ops = case.value(rank, self.group.device), self.group.unique_name, torch.ops.sglang_symm
        x = self._empty(value)
        # Ops are found once, as the empty op's is.
        if case.op == "broadcast":
            broadcast_ = ops.broadcast_
            return Prepared(lambda: broadcast_(x, 0, name), x, lambda: x, value) if in_place else None
        if case.op == "all_reduce" and in_place:
            all_reduce_ = ops.all_reduce_
            return Prepared(lambda: all_reduce_(x, name), x, lambda: x, value)
        if in_place:
            return None
        kept: list[torch.Tensor] = []
        op = getattr(ops, case.op)

        def call() -> None:
            kept[:] = [op(x, name)]

        return Prepared(call, x, lambda: kept[0], value)


class Empty(Peer):
    """A call through torch.ops that does nothing, a barrier in a group of one rank: what Python and dispatch cost."""

    name = EMPTY_OP

    def __init__(self, rank: int) -> None:
        self.group = Group.of_ranks([rank], name=f"bench-alone-{rank}", communicator="process_group")

    def prepare(self, case: Case, rank: int, in_place: bool) -> Prepared | None:
        token, name, barrier = torch.zeros(1), self.group.unique_name, torch.ops.sglang_symm.barrier
        return Prepared(lambda: barrier(token, name), token, lambda: case.expected(rank), token.clone())


class Gloo(Peer):
    """torch.distributed with the gloo backend."""

    name = "gloo"

    def prepare(self, case: Case, rank: int, in_place: bool) -> Prepared | None:
        value = case.value(rank)
        x = torch.empty_like(value)
        if case.op == "broadcast":
            return Prepared(lambda: dist.broadcast(x, 0), x, lambda: x, value) if in_place else None
        if case.op == "all_reduce":
            if in_place:
                return Prepared(lambda: dist.all_reduce(x), x, lambda: x, value)
            out = torch.empty_like(x)
            return Prepared(lambda: dist.all_reduce(out.copy_(x)), x, lambda: out, value)
        if in_place:
            return None
        if case.op == "all_gather":
            out = x.new_empty(case.elements)
            return Prepared(lambda: dist.all_gather_into_tensor(out, x), x, lambda: out, value)
        out = x.new_empty(case.elements // case.world_size)
        return Prepared(lambda: dist.reduce_scatter_tensor(out, x), x, lambda: out, value)


class DeepSpeed(Peer):
    """DeepSpeed's shared-memory all-reduce. It returns unreduced data for dtypes that it lacks: the correctness column
    shows it."""

    name = "deepspeed"

    def __init__(self, rank: int, world_size: int) -> None:
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder  # type: ignore[import-not-found,unused-ignore]

        # Its launcher's variable: without it the shared memory is not made, and the first call a wild access.
        os.environ["LOCAL_SIZE"] = str(world_size)
        library = ShareMemCommBuilder().load(verbose=False)
        library.initialize(world_size, rank)
        # Up to 0.15 it is a function of the module, later an operator.
        self._all_reduce = getattr(library, "inference_all_reduce", None) or torch.ops.deepspeed.inference_all_reduce_

    def prepare(self, case: Case, rank: int, in_place: bool) -> Prepared | None:
        if case.op != "all_reduce" or not in_place:
            return None
        value = case.value(rank)
        x = torch.empty_like(value)
        return Prepared(lambda: self._all_reduce(x), x, lambda: x, value)
