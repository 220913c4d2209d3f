# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Ranks that are threads of one process, with groups that add in rank order: layers and models run without the native
library.

`run_threads(layout, body)` calls `body(state)` once a rank, each with a real ParallelState over `ThreadGroup`s.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_symm.distributed.parallel_state import ParallelState

T = TypeVar("T")


class Meeting:
    """Where the threads of one group swap values."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


class ThreadGroup:
    """A Group whose ranks are threads; `calls` lists what this rank did with it."""

    def __init__(self, name: str, rank: int, meeting: Meeting) -> None:
        self.unique_name, self.rank_in_group, self.world_size = name, rank, len(meeting.values)
        self.device, self.communicator = torch.device("cpu"), "symm"
        self.meeting, self.calls = meeting, []

    def _exchange(self, what: str, value: Any) -> list[Any]:
        self.calls.append(what)
        return self.meeting.exchange(self.rank_in_group, value)

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        parts = self._exchange("all_reduce", x)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def all_reduce_(self, x: Tensor, op: str = "sum") -> Tensor:
        return x.copy_(self.all_reduce(x.clone(), op))

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Any = None) -> Tensor:
        return torch.cat(self._exchange("all_gather", x), dim)

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        return x.copy_(self._exchange("broadcast", x.clone())[src])

    def broadcast_object(self, obj: Any = None, src: int = 0) -> Any:
        return self._exchange("broadcast_object", obj)[src]

    def check(self) -> None:
        self.calls.append("check")


class FakeOps:
    """Stands for torch.ops.sglang_symm; finds the calling thread's group by its name."""

    def __init__(self) -> None:
        self.local = threading.local()

    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        return self.local.groups[group].all_reduce(x)

    def all_gather(self, x: Tensor, group: str, dim: int = 0) -> Tensor:
        return self.local.groups[group].all_gather(x, dim)

    def row_parallel_linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: str,
        symmetric: bool = True,
        static_weight: bool = False,
    ) -> Tensor:
        mine: ThreadGroup = self.local.groups[group]
        mine.calls.append(f"row_parallel_linear symmetric={symmetric}" + static_weight * " static_weight")
        y = mine.all_reduce(F.linear(x, weight))
        mine.calls.pop()
        return y if bias is None else y + bias


@dataclass(frozen=True)
class Layout:
    """attention-DP x attention-TP ranks."""

    attn_dp: int
    attn_tp: int
    enable_symm_mem: bool = True

    @property
    def tp(self) -> int:
        return self.attn_dp * self.attn_tp


def make_states(layout: Layout) -> list[ParallelState]:
    """One ParallelState a rank; groups with equal members are one object, as in the real one."""
    meetings: dict[tuple[int, ...], Meeting] = {}

    def group(cache: dict[tuple[int, ...], ThreadGroup], role: str, rank: int, ranks: range) -> Any:
        key = tuple(ranks)
        meeting = meetings.setdefault(key, Meeting(len(ranks)))
        return cache.setdefault(key, ThreadGroup(f"{role}{list(key)}", ranks.index(rank), meeting))

    states = []
    for rank in range(layout.tp):
        cache: dict[tuple[int, ...], ThreadGroup] = {}
        dp, tp = rank // layout.attn_tp, rank % layout.attn_tp
        everyone = range(layout.tp)
        states.append(
            ParallelState(
                world=group(cache, "tp", rank, everyone),
                tp=group(cache, "tp", rank, everyone),
                attn_tp=group(cache, "attn_tp", rank, range(dp * layout.attn_tp, (dp + 1) * layout.attn_tp)),
                attn_dp=group(cache, "attn_dp", rank, range(tp, layout.tp, layout.attn_tp)),
                enable_symm_mem=layout.enable_symm_mem,
            )
        )
    return states


def run_threads(layout: Layout, body: Callable[[ParallelState], T]) -> list[T]:
    """body(state) on every rank at once; their results in rank order. The first error of a rank is raised."""
    ops = FakeOps()

    def run(state: ParallelState) -> T:
        ops.local.groups = {group.unique_name: group for group in state.groups}
        state.use_symmetric_memory = lambda *_args, **_kwargs: contextlib.nullcontext()  # type: ignore[method-assign]
        try:
            return body(state)
        except BaseException:
            for group in state.groups:
                group.meeting.barrier.abort()
            raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(layout.tp) as pool:
        patch.setattr(torch.ops, "sglang_symm", ops)
        futures = [pool.submit(run, state) for state in make_states(layout)]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        if errors:
            raise (real or errors)[0]
        return [future.result() for future in futures]
