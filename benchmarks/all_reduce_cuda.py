"""All-reduce on GPUs, beside NCCL, NCCL on its registered memory, and torch's symmetric memory, in one run.

    torchrun --nproc-per-node 2 benchmarks/all_reduce_cuda.py [--json FILE] [--dtype bf16] [--ops 20] [--repeats 20]

Microseconds of one call: the median over repeats of the slowest rank, in a CUDA graph of `ops` calls and in eager code,
and the quartiles. `limit`: bytes over the link's bandwidth (--bandwidth, GB/s a direction), or the flag's flight.
`cpu`: CPU time of an eager call from Python, the best of a few rounds of 200 calls.

`ours` takes x in symmetric memory, as torch's peers must and as our layers do; `ours_outside` takes ordinary memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

from sglang_symm.distributed.group import Group

SIZES = [2 << 10, 8 << 10, 32 << 10, 128 << 10, 512 << 10, 2 << 20, 8 << 20, 32 << 20]
CPU_CALLS = 200
Function = Callable[[], Any]


def measure(run: Function, ops: int, repeats: int) -> list[float]:
    """Microseconds of one op, the slowest rank's, for each repeat."""
    times = []
    for repeat in range(repeats + 3):
        dist.barrier()
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000)  # the host gets ahead
        START()  # the ranks start together
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 3:
            times.append(begin.elapsed_time(end) * 1000 / ops)
    slowest = torch.tensor(times)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=CPU)
    return slowest.tolist()


def in_graph(f: Function, ops: int, repeats: int) -> list[float]:
    # A rank of the rig stays in the stream of its green context.
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream() if current == torch.cuda.default_stream() else current
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(ops):
            f()
    with torch.cuda.stream(stream):
        return measure(graph.replay, ops, repeats)


def eager(f: Function, ops: int, repeats: int) -> tuple[list[float], float]:
    def run() -> None:
        for _ in range(ops):
            f()

    for _ in range(3):
        run()
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CPU_CALLS):
            f()
        best = min(best, time.perf_counter() - start)
    torch.cuda.synchronize()
    return measure(run, ops, repeats), best * 1e6 / CPU_CALLS


def summary(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return {"median": round(median, 2), "q1": round(low, 2), "q3": round(high, 2)}


def main() -> None:
    global CPU, START
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--ops", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--only-ours", action="store_true", help="no peers: for tuning")
    parser.add_argument("--algos", nargs="*", default=["auto"], help="our algorithms to force, one group each")
    parser.add_argument("--bandwidth", type=float, default=400.0, help="GB/s a direction of the link, for `limit`")
    args = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    shared = size > torch.cuda.device_count()
    if shared:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    CPU = dist.new_group(backend="gloo")
    name = dist.group.WORLD.group_name
    most = max(args.sizes) // 2
    groups = {algo: Group(device="cuda", arena_bytes=512 << 20, algo=algo) for algo in args.algos}
    token = torch.zeros(1, device="cuda")
    first = next(iter(groups.values()))
    START = lambda: torch.ops.sglang_symm.barrier(token, first.unique_name)  # noqa: E731
    x = torch.ones(most, dtype=torch.bfloat16, device="cuda")
    inside = {
        algo: torch.ops.sglang_symm.empty([most], g.unique_name, dtype=x.dtype, device=g.device)
        for algo, g in groups.items()
    }
    for y in inside.values():
        y.fill_(1)
    buffer, window = None, None
    if not args.only_ours:
        if shared:
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        buffer = symm_mem.empty(most, dtype=x.dtype, device="cuda")
        symm_mem.rendezvous(buffer, name)
        buffer.fill_(0)
        if not shared:
            try:
                backend = dist.group.WORLD._get_backend(torch.device("cuda"))
                pool = torch.cuda.MemPool(backend.mem_allocator)
                with torch.cuda.use_mem_pool(pool):
                    window = torch.zeros(most, dtype=x.dtype, device="cuda")
                backend.register_mem_pool(pool, symm=True)
            except Exception as error:  # an NCCL without windows
                window = None
                if rank == 0:
                    print("NCCL window:", error, flush=True)
    results = []
    for bytes_ in args.sizes:
        n = bytes_ // 2
        functions: dict[str, Function] = {}
        for algo, group in groups.items():
            label = "ours" if algo == "auto" else algo
            for where, tensor in (("", inside[algo]), ("_outside", x)):
                functions[label + where] = lambda g=group.unique_name, v=tensor[:n]: torch.ops.sglang_symm.all_reduce(
                    v, g
                )
        if not args.only_ours:
            if not shared:
                functions["nccl"] = lambda v=x[:n]: dist.all_reduce(v)
                if window is not None:
                    functions["nccl_window"] = lambda v=window[:n]: dist.all_reduce(v)
            functions["torch_one_shot"] = lambda v=buffer[:n]: torch.ops.symm_mem.one_shot_all_reduce(v, "sum", name)
            functions["torch_two_shot"] = lambda v=buffer[:n]: torch.ops.symm_mem.two_shot_all_reduce_(v, "sum", name)
        row: dict[str, Any] = {
            "bytes": bytes_,
            "limit": round(max(0.6, bytes_ * 2 * (size - 1) / size / args.bandwidth / 1e3), 2),
        }
        for label, f in functions.items():
            row[label] = {"graph": summary(in_graph(f, args.ops, args.repeats))}
            times, cpu = eager(f, args.ops, max(5, args.repeats // 3))
            row[label]["eager"] = summary(times)
            row[label]["cpu"] = round(cpu, 2)
            x.fill_(1)
        results.append(row)
        if rank == 0:
            parts = [
                f"{k} {v['graph']['median']:.2f} ({v['eager']['median']:.1f}, cpu {v['cpu']:.1f})"
                for k, v in row.items()
                if isinstance(v, dict)
            ]
            print(f"{bytes_:>9} limit {row['limit']:>6}  " + "  ".join(parts), flush=True)
    for group in groups.values():
        group.check()
    if rank == 0 and args.json:
        commit = os.environ.get("SGLANG_SYMM_COMMIT")  # of a tree that is no repository
        if commit is None:
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        report = {
            "what": "all_reduce, bf16, microseconds a call",
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit,
            "device": torch.cuda.get_device_name(),
            "ranks": size,
            "gpus": torch.cuda.device_count(),
            "torch": torch.__version__,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "command": " ".join(sys.argv),
            "results": results,
        }
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)
    dist.barrier()
    for group in groups.values():
        group.destroy()
    dist.destroy_process_group()


CPU: Any = None
START: Function = lambda: None  # noqa: E731
if __name__ == "__main__":
    main()
