# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""How a call is timed. A clock makes lanes, one for each implementation; the lanes of a case then take turns.

cpu          wall-clock time of a loop of calls, all ranks starting together
cuda, eager  events around a loop of calls; the host is ahead, the ranks start together on the GPUs
cuda, graph  the same around the replay of a CUDA graph of the calls
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from sglang_symm.bench.peers import Prepared
from sglang_symm.distributed.group import Group

MOST_CALLS = 20_000  # in a round
AHEAD_CYCLES = 200_000  # of the GPU: while it sleeps, the host launches what is timed


@dataclass
class Lane:
    """One implementation of a case. ``run`` is collective: microseconds of one call on this rank.

    ``cpu_us``: what a call of each run took on this rank's CPU, where that differs from its time.
    """

    run: Callable[[], float]
    cpu_us: list[float] = field(default_factory=list)


class Clock:
    """``mode`` is what its rows are called."""

    mode: str

    def lane(self, prepared: Prepared) -> Lane:
        """Collective: warms the call up and makes what it is timed with."""
        raise NotImplementedError


class HostClock(Clock):
    """Time of the calling thread; as many calls as fit in ``seconds``."""

    mode = "eager"

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def lane(self, prepared: Prepared) -> Lane:
        """Warmed up; the number of calls is the slowest rank's."""
        call = prepared.call
        calls = self.calls(call)
        return Lane(lambda: _loop(call, calls) * 1e6)

    def calls(self, call: Callable[[], object]) -> int:
        """Collective: how many fit, the same on all ranks."""
        for _ in range(3):
            call()
        calls = 3
        while True:  # until it takes long beside the milliseconds in which ranks leave the barrier
            one = torch.tensor([_loop(call, calls)], dtype=torch.float64)
            dist.all_reduce(one, dist.ReduceOp.MAX)
            if calls >= MOST_CALLS or calls * float(one) >= self._seconds / 2:
                break
            calls = min(MOST_CALLS, 4 * calls)
        return max(1, min(MOST_CALLS, int(self._seconds / float(one))))


def _loop(call: Callable[[], object], calls: int) -> float:
    """Seconds of one call."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


class GpuStart:
    """Brings the ranks together on their GPUs: hosts first, then a sleep, then a barrier in the stream."""

    def __init__(self, group: Group) -> None:
        self._group = group
        # A sum on the CPU: a barrier of a process group that has NCCL too would go there.
        self._hosts, self._word = group.cpu_group, torch.zeros(1)
        self._token = torch.zeros(1, device=group.device)
        # A rank of the rig stays in the stream of its green context, which is the only one that is its own.
        current = torch.cuda.current_stream()
        self.stream = torch.cuda.Stream() if current == torch.cuda.default_stream() else current

    def time(self, run: Callable[[], object]) -> float:
        """Microseconds of ``run`` on this rank's GPU. Collective."""
        torch.cuda.synchronize()
        dist.all_reduce(self._word, group=self._hosts)
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(AHEAD_CYCLES)
            torch.ops.sglang_symm.barrier(self._token, self._group.unique_name)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e3


class EagerClock(Clock):
    """Calls from Python, one after another."""

    mode = "eager"

    def __init__(self, start: GpuStart, calls: int) -> None:
        self._start, self._calls = start, calls

    def lane(self, prepared: Prepared) -> Lane:
        """Warmed up."""
        call, calls, stream = prepared.call, self._calls, self._start.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        lane = Lane(lambda: self._start.time(loop) / calls)

        def loop() -> None:
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            lane.cpu_us.append((time.perf_counter() - begin) / calls * 1e6)

        return lane


class GraphClock(Clock):
    """Replays of a CUDA graph of ``calls`` calls."""

    mode = "graph"

    def __init__(self, start: GpuStart, calls: int) -> None:
        self._start, self._calls = start, calls

    def lane(self, prepared: Prepared) -> Lane:
        """Captured, and replayed once."""
        call, calls, stream = prepared.call, self._calls, self._start.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                call()
        with torch.cuda.stream(stream):
            graph.replay()
        torch.cuda.synchronize()
        return Lane(lambda: self._start.time(graph.replay) / calls)
