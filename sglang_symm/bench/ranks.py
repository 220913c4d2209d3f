# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""What runs inside of the ranks: the world on a device, and the measurement of one case in turns."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from sglang_symm.bench.cases import Case
from sglang_symm.bench.clocks import Clock
from sglang_symm.bench.peers import Peer, Prepared
from sglang_symm.bench.report import Row


class World:
    """torch.distributed of the ranks on one kind of device.

    Args:
        bind: rank r to the (r modulo cores)-th core, as mpirun binds its processes.

    Attributes: rank, size, device (this rank's), cores (of the machine that ranks may use), shares_gpu (several ranks
    have one GPU: tools/mps_rig.py).
    """

    def __init__(self, device: str, bind: bool = False) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        cores = sorted(os.sched_getaffinity(0))
        self.cores = len(cores)
        self.device = torch.device("cpu")
        self.shares_gpu = False
        if device == "cpu":
            dist.init_process_group("gloo")
            if bind:  # after Gloo has made its threads: on one core they would be 2 to 5 times as slow
                os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
            return
        gpus = torch.cuda.device_count()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)) % gpus)
        self.shares_gpu = self.size > gpus
        torch.cuda.set_device(self.device)
        if self.shares_gpu:  # NCCL refuses two ranks on one GPU
            os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
            dist.init_process_group("gloo")
        else:
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=self.device)

    def close(self) -> None:
        """Collective: nobody ends while others still measure."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.destroy_process_group()


def measure(
    world: World, case: Case, peers: Sequence[Peer], places: Sequence[bool], clocks: Sequence[Clock], rounds: int
) -> list[Row]:
    """All implementations of one case: first right, then timed in turns. Collective, the same rows on all ranks."""
    rows: list[Row] = []
    prepared_of: list[Prepared] = []
    for in_place in places:
        for peer in peers:
            prepared = peer.prepare(case, world.rank, in_place)
            if prepared is None:
                continue
            prepared.reset()
            prepared.call()
            wrong = _wrong(prepared, case, world.rank)
            # From here on zeros: sums in place neither grow to infinity nor fall into denormals.
            prepared.value.zero_()
            prepared.reset()
            for clock in clocks:
                dtype = str(case.dtype).removeprefix("torch.")
                bus = case.bus_factor
                rows.append(Row(case.op, dtype, case.bytes, peer.name, in_place, bus, wrong, [], clock.mode))
                prepared_of.append(prepared)
    timers = [clocks[i % len(clocks)].lane(prepared) for i, prepared in enumerate(prepared_of)]
    times = torch.zeros(rounds, len(rows), dtype=torch.float64)
    for r in range(rounds):
        for lane in [(i + r) % len(rows) for i in range(len(rows))]:  # each begins a round in its turn
            times[r, lane] = timers[lane].run()
    host = torch.tensor([sorted(t.cpu_us)[len(t.cpu_us) // 2] if t.cpu_us else 0.0 for t in timers])
    dist.all_reduce(times, dist.ReduceOp.MAX)
    dist.all_reduce(host, dist.ReduceOp.MAX)
    for lane, row in enumerate(rows):
        row.us = times[:, lane].tolist()
        row.cpu_us = float(host[lane]) or None
    return rows


def _wrong(prepared: Prepared, case: Case, rank: int) -> int:
    """Elements of the result that are not the definition's, over all ranks."""
    result = prepared.result()
    wrong = (result != case.expected(rank, result.device)).sum().cpu().reshape(1)
    dist.all_reduce(wrong)
    return int(wrong)
