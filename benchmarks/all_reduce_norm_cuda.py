"""All-reduce, residual and RMSNorm on GPUs: our one kernel beside collectives and then PyTorch's kernels, in one run.

    torchrun --nproc-per-node 2 benchmarks/all_reduce_norm_cuda.py [--json FILE] [--ops 20] [--repeats 20]

Microseconds of one op in a CUDA graph of `ops`: the median over repeats of the slowest rank, bf16. The ranks start
together on the GPU. Columns: `ours` (all_reduce_add_rms_norm), then an all-reduce (ours, NCCL, torch one-shot) with
PyTorch's add and rms_norm behind it. `linear`: row_parallel_linear_add_rms_norm, beside row_parallel_linear with
PyTorch's add and rms_norm, and alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
import torch.nn.functional as F

from sglang_symm.bench import commit, launched
from sglang_symm.distributed.group import Group
from sglang_symm.distributed.launch import require_gpu_ranks

EPS = 1e-5
Function = Callable[[], Any]


class Clock:
    def __init__(self, group: Group, ops: int, repeats: int) -> None:
        self.ops, self.repeats, self.group = ops, repeats, group
        self.cpu = dist.new_group(backend="gloo")
        self.stream = torch.cuda.Stream()

    def measure(self, f: Function) -> float:
        """The slowest rank's median, microseconds an op."""
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                f()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for _ in range(self.ops):
                f()
        times = []
        with torch.cuda.stream(self.stream):
            for repeat in range(self.repeats + 3):
                dist.barrier(group=self.cpu)
                torch.cuda.synchronize()
                torch.cuda._sleep(200_000)  # the host gets ahead
                self.group.barrier()  # the ranks start together
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                if repeat >= 3:
                    times.append(begin.elapsed_time(end) * 1000 / self.ops)
        slowest = torch.tensor(times)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=self.cpu)
        return round(statistics.median(slowest.tolist()), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--ops", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    require_gpu_ranks("all_reduce_norm_cuda")
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    ops, world = torch.ops.sglang_symm, dist.group.WORLD.group_name
    group = Group(device="cuda")
    clock, name = Clock(group, args.ops, args.repeats), group.unique_name
    new = {"dtype": torch.bfloat16, "device": "cuda"}
    buffer = symm_mem.empty(256 * 8192, **new)
    symm_mem.rendezvous(buffer, world)
    rows: list[dict[str, Any]] = []

    def say(row: dict[str, Any]) -> None:
        rows.append(row)
        if rank == 0:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    for columns in (4096, 8192):
        weight = torch.ones(columns, **new)
        for m in (1, 16, 64, 256):
            x, residual = torch.ones(m, columns, **new), torch.ones(m, columns, **new)
            view = buffer[: m * columns].view(m, columns)

            def norm(total: torch.Tensor, r=residual, w=weight) -> torch.Tensor:
                return F.rms_norm(total.add_(r), (w.numel(),), w, EPS)

            def nccl(x=x) -> torch.Tensor:
                dist.all_reduce(x)
                return x

            timed: dict[str, Function] = {
                "ours": lambda x=x, r=residual, w=weight: ops.all_reduce_add_rms_norm(x, r, w, EPS, name),
                "our_all_reduce": lambda x=x: ops.all_reduce(x, name),
                "our_all_reduce+torch": lambda x=x, norm=norm: norm(ops.all_reduce(x, name)),
                "nccl+torch": lambda f=nccl, norm=norm: norm(f()),
                "torch_one_shot+torch": lambda v=view, norm=norm: norm(
                    torch.ops.symm_mem.one_shot_all_reduce(v, "sum", world)
                ),
            }
            say({"op": "all_reduce", "m": m, "h": columns, **{k: clock.measure(f) for k, f in timed.items()}})
            # NCCL's in-place sums grow without bound.
            x.fill_(1)

    k, n = 4096, 8192
    weights = [torch.randn(n, k, **new) * 0.01 for _ in range(4)]  # more than L2 holds
    norm_weight = torch.ones(n, **new)
    for m in (1, 16, 64):
        x, residual = torch.randn(m, k, **new), torch.ones(m, n, **new)
        turn = iter(range(1 << 30))

        def next_weight(turn=turn) -> torch.Tensor:
            return weights[next(turn) % len(weights)]

        def fused(x=x, r=residual, w=next_weight) -> Any:
            return ops.row_parallel_linear_add_rms_norm(x, w(), None, r, norm_weight, EPS, name)

        def alone(x=x, w=next_weight) -> Any:
            return ops.row_parallel_linear(x, w(), None, name)

        def separate(x=x, r=residual, w=next_weight) -> Any:
            return F.rms_norm(ops.row_parallel_linear(x, w(), None, name).add_(r), (n,), norm_weight, EPS)

        say(
            {
                "op": "linear",
                "m": m,
                "h": n,
                "k": k,
                "ours": clock.measure(fused),
                "linear alone": clock.measure(alone),
                "linear+torch": clock.measure(separate),
            }
        )
    if rank == 0 and args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            head = {
                "date": time.strftime("%Y-%m-%d"),
                "commit": commit(),
                "device": torch.cuda.get_device_name(),
                "ranks": dist.get_world_size(),
                "torch": torch.__version__,
                "command": launched(*sys.argv),
            }
            json.dump({**head, "rows": rows}, file, indent=1)
    torch.cuda.synchronize()
    group.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
