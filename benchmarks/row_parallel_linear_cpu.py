#!/usr/bin/env python3
# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""row_parallel_linear on the CPU beside torch.nn.functional.linear + Gloo and + our all_reduce_, in one run.

y = sum over ranks of x_r @ weight_r.T; x_r [M, K/P], weight_r [N, K/P]. One thread a rank, ranks bound as mpirun binds
them. Every result is compared with the exact sum; the three take turns in every round; times are the slowest rank's.

    python benchmarks/row_parallel_linear_cpu.py [-n RANKS] [--dtype float32|bfloat16] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from sglang_symm.bench import commit, machine
from sglang_symm.bench.clocks import HostClock
from sglang_symm.bench.ranks import World
from sglang_symm.distributed.group import Group
from sglang_symm.distributed.launch import run_ranks, under_launcher

SHAPES = {  # name: (N, K)
    "SmolLM2 o_proj": (576, 576),
    "SmolLM2 down_proj": (576, 1536),
    "Llama-3-8B o_proj": (4096, 4096),
    "Llama-3-8B down_proj": (4096, 14336),
}
ROWS = (1, 16, 128, 1024)
WAYS = ("fused op", "linear + ours", "linear + gloo")


def ways(x: torch.Tensor, weight: torch.Tensor, group: Group) -> dict[str, Callable[[], torch.Tensor]]:
    """The three implementations; each returns y."""
    ops, name = torch.ops.sglang_symm, group.unique_name
    inside = ops.empty([x.shape[0], weight.shape[0]], name, dtype=x.dtype, device=x.device)

    def linear_and_ours() -> torch.Tensor:
        torch.mm(x, weight.t(), out=inside)
        ops.all_reduce_(inside, name)
        return inside

    def linear_and_gloo() -> torch.Tensor:
        y = F.linear(x, weight)
        dist.all_reduce(y)
        return y

    return dict(
        zip(
            WAYS,
            (lambda: ops.row_parallel_linear(x, weight, None, name), linear_and_ours, linear_and_gloo),
            strict=True,
        )
    )


def measure(group: Group, shape: str, m: int, dtype: torch.dtype, rounds: int, seconds: float) -> dict[str, Any]:
    """One row of the table."""
    n, k = SHAPES[shape]
    rank, world = dist.get_rank(), dist.get_world_size()
    part = k // world // 8 * 8
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(m, part, generator=generator).to(dtype)
    weight = (torch.randn(n, part, generator=generator) / k**0.5).to(dtype)
    exact = x.double() @ weight.double().t()
    dist.all_reduce(exact)
    calls: dict[str, int] = {}
    todo = ways(x, weight, group)
    for way, call in todo.items():
        error = float((call().double() - exact).abs().max())
        bound = (world + part**0.5) * float(exact.abs().max()) * torch.finfo(dtype).eps
        if error > bound:
            raise RuntimeError(f"{way}: {shape}, M={m}: error {error}, expected at most {bound}")
        calls[way] = HostClock(seconds).calls(call)
    times = torch.zeros(rounds, len(WAYS), dtype=torch.float64)
    for r in range(rounds):
        for i in range(len(WAYS)):
            lane = (i + r) % len(WAYS)
            call = todo[WAYS[lane]]
            dist.barrier()
            start = time.perf_counter()
            for _ in range(calls[WAYS[lane]]):
                call()
            times[r, lane] = (time.perf_counter() - start) / calls[WAYS[lane]] * 1e6
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return {
        "shape": shape,
        "M": m,
        "N": n,
        "K": part * world,
        "us": {way: times[:, i].tolist() for i, way in enumerate(WAYS)},
    }


def main() -> int:
    """Exit code 0; 1 if a result was wrong (raised)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--nproc", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.1, help="of calls in a round")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.rounds < 1 or not 2 <= args.nproc <= 16 or not 0 < args.seconds < 1e6:
        parser.error("expected --rounds >= 1, --nproc 2 to 16, --seconds > 0")
    if not under_launcher():
        command = [sys.executable, __file__, *sys.argv[1:]]
        return run_ranks(args.nproc, command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    world = World("cpu", bind=True)
    torch.set_num_threads(1)
    group = Group(name="linear", arena_bytes=256 << 20)
    rows = []
    try:
        for shape in SHAPES:
            for m in ROWS:
                if world.rank == 0:
                    print(f"{shape}, M={m}", file=sys.stderr, flush=True)
                rows.append(measure(group, shape, m, getattr(torch, args.dtype), args.rounds, args.seconds))
    finally:
        group.destroy()
        world.close()
    if world.rank != 0:
        return 0
    environment = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(world),
        "ranks": world.size,
        "dtype": args.dtype,
        "torch": torch.__version__,
        "rounds": args.rounds,
        "command": " ".join(["python benchmarks/row_parallel_linear_cpu.py", *sys.argv[1:]]),
    }
    print("# " + "  ".join(f"{k} {v}" for k, v in environment.items()))
    print(f"{'shape':22} {'M':>5} {'fused us':>10} {'p10':>10} {'p90':>10} {'/ +ours':>8} {'/ +gloo':>8}")
    for row in rows:
        us = {way: statistics.median(row["us"][way]) for way in WAYS}
        spread = sorted(row["us"]["fused op"])
        print(
            f"{row['shape']:22} {row['M']:5} {us['fused op']:10.1f} {spread[len(spread) // 10]:10.1f} "
            f"{spread[-1 - len(spread) // 10]:10.1f} {us['fused op'] / us['linear + ours']:8.2f} "
            f"{us['fused op'] / us['linear + gloo']:8.2f}"
        )
    if args.json:
        Path(args.json).write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
