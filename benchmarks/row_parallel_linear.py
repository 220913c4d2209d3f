"""The row-parallel linear on GPUs, beside cuBLAS alone and cuBLAS followed by an all-reduce, in one run.

    torchrun --nproc-per-node 2 benchmarks/row_parallel_linear.py [--json FILE] [--plot FILE]
        [--shapes 8192x4096 8192x14336] [--tokens 1 16 64 256 2048]

Microseconds of one op y[M, N] = sum over ranks of x[M, K] @ w[N, K]^T, bf16, in a CUDA graph of `ops` ops whose weights
rotate over 4 copies, so that L2 flatters nobody: the median over repeats of the slowest rank, and the quartiles.

    gemm             torch.mm alone, nothing is reduced
    nccl             torch.mm, then NCCL's all-reduce
    torch_one_shot   torch.mm into torch's symmetric memory, then its one-shot all-reduce
    torch_two_shot   the same with its two-shot
    all_reduce_      torch.mm into symmetric memory, then this library's all-reduce in place
    fused            row_parallel_linear
    fused_plain      the same without programmatic launch: each kernel starts when the one before has ended
    fused_static     the same with static_weight: the weights are fetched while the op before ends
    limit            the longest of: bytes of w, x and y over --bandwidth (of a GPU's memory), multiplications over
                     --tflops, the bytes that a rank must send over --link; each as measured, or as the vendor says
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

from sglang_symm.bench import commit, launched
from sglang_symm.distributed.group import Group
from sglang_symm.distributed.launch import require_gpu_ranks

COPIES = 4
ARENA = 1 << 30  # graphs of several ways keep their results at the same time
# At which a GPU's memory is read, GB/s: benchmarks/memory.cu (H200), the slope of cuBLAS' time over the weight's bytes
# (H100).
BANDWIDTH = {"H100": 2930.0, "H200": 4570.0}
LINK_HELP = (
    "GB/s of a GPU's link in one direction, for `limit` (default 450: NVLink 4, as the vendor says; between two H200s "
    "benchmarks/link.cu measured 361 of stores, 384 of the copy engine)"
)
PEERS = ("nccl", "torch_one_shot", "torch_two_shot")
Op = Callable[[int], Any]


class Bench:
    """Times ops in CUDA graphs, the ranks starting together."""

    def __init__(self, group: Group, ops: int, repeats: int) -> None:
        self.group, self.ops, self.repeats = group, ops, repeats
        self.cpu_group = dist.new_group(backend="gloo")
        self.token = torch.zeros(1, device="cuda")
        # A rank of the rig stays in the stream of its green context.
        current = torch.cuda.current_stream()
        self.stream = torch.cuda.Stream() if current == torch.cuda.default_stream() else current

    def time(self, ops: dict[str, Op]) -> dict[str, list[float]]:
        """Microseconds of one op, the slowest rank's, for each label and repeat; op(i) uses the i-th copy. Labels take
        turns, in another order each time: who follows a long product finds the GPU slower."""
        graphs = {label: self.capture(op) for label, op in ops.items()}
        times: dict[str, list[float]] = {label: [] for label in ops}
        with torch.cuda.stream(self.stream):
            for repeat in range(self.repeats + 3):
                turns = list(graphs.items())
                random.Random(repeat).shuffle(turns)  # the same on all ranks
                for label, graph in turns:
                    us = self.replay(graph)
                    if repeat >= 3:
                        times[label].append(us)
        slowest = torch.tensor(list(times.values()))
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return dict(zip(ops, slowest.tolist(), strict=True))

    def capture(self, op: Op) -> torch.cuda.CUDAGraph:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for i in range(COPIES):
                op(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for i in range(self.ops):
                op(i % COPIES)
        return graph

    def replay(self, graph: torch.cuda.CUDAGraph) -> float:
        dist.barrier(group=self.cpu_group)
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000)  # the host gets ahead
        torch.ops.sglang_symm.barrier(self.token, self.group.unique_name)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1000 / self.ops


def summary(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return {"median": round(median, 2), "q1": round(low, 2), "q3": round(high, 2)}


def make_ops(m: int, n: int, k: int, group: Group, buffer: torch.Tensor | None, nccl: bool) -> dict[str, Op]:
    """Every way to do it, by label."""
    name, world = group.unique_name, dist.group.WORLD.group_name
    xs = [torch.randn(m, k, device="cuda").bfloat16() for _ in range(COPIES)]
    ws = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(COPIES)]
    y = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    inside = torch.ops.sglang_symm.empty([m, n], name, dtype=y.dtype, device=y.device)
    linear = torch.ops.sglang_symm.row_parallel_linear

    def gemm(i: int, out: torch.Tensor = y) -> None:
        torch.mm(xs[i], ws[i].t(), out=out)

    def then_nccl(i: int) -> None:
        gemm(i)
        dist.all_reduce(y)

    def then_ours(i: int) -> None:
        gemm(i, inside)
        torch.ops.sglang_symm.all_reduce_(inside, name)

    ops: dict[str, Op] = {"gemm": gemm, "all_reduce_": then_ours}
    if nccl:
        ops["nccl"] = then_nccl
    if buffer is not None:
        theirs = buffer[: m * n].view(m, n)

        def one_shot(i: int) -> None:
            gemm(i, theirs)
            torch.ops.symm_mem.one_shot_all_reduce_out(theirs, "sum", world, y)

        def two_shot(i: int) -> None:
            gemm(i, theirs)
            torch.ops.symm_mem.two_shot_all_reduce_(theirs, "sum", world)

        ops.update(torch_one_shot=one_shot, torch_two_shot=two_shot)

    def plain(i: int) -> None:
        os.environ["SGLANG_SYMM_PROGRAMMATIC_LAUNCH"] = "0"
        linear(xs[i], ws[i], None, name)
        del os.environ["SGLANG_SYMM_PROGRAMMATIC_LAUNCH"]

    ops["fused_plain"] = plain
    ops["fused"] = lambda i: linear(xs[i], ws[i], None, name)
    ops["fused_static"] = lambda i: linear(xs[i], ws[i], None, name, True, True)
    return ops


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """What the figures are judged by."""
    static, plain = row["fused_static"]["median"], row["fused"]["median"]
    found = {
        "static/gemm": static / row["gemm"]["median"],
        "fused/gemm": plain / row["gemm"]["median"],
        "plain/gemm": row["fused_plain"]["median"] / row["gemm"]["median"],
        "static/all_reduce_": static / row["all_reduce_"]["median"],
    }
    peers = [row[p]["median"] for p in PEERS if p in row]
    if peers:
        found["static/peers"] = static / min(peers)
    return {label: round(value, 3) for label, value in found.items()}


def limit(m: int, n: int, k: int, size: int, args: argparse.Namespace) -> float:
    """Microseconds that no implementation can beat on this hardware."""
    memory = 2 * (n * k + m * k + m * n) / args.bandwidth / 1e3
    products = 2 * m * n * k / args.tflops / 1e6
    link = 2 * m * n * 2 * (size - 1) / size / args.link / 1e3
    return round(max(memory, products, link), 2)


def plot(results: list[dict[str, Any]], path: str, title: str) -> None:
    """Each way's time over the GEMM's alone, by the number of tokens; a panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = sorted({(row["n"], row["k"]) for row in results})
    figure, panels = plt.subplots(1, len(shapes), figsize=(5.5 * len(shapes), 4.2), squeeze=False, layout="constrained")
    for panel, (n, k) in zip(panels[0], shapes, strict=True):
        rows = sorted((row for row in results if (row["n"], row["k"]) == (n, k)), key=lambda row: row["m"])
        for label in (
            "nccl",
            "torch_one_shot",
            "torch_two_shot",
            "all_reduce_",
            "fused_plain",
            "fused",
            "fused_static",
        ):
            some = [row for row in rows if label in row]
            if not some:
                continue
            ours = label.startswith("fused")
            panel.plot(
                [row["m"] for row in some],
                [row[label]["median"] / row["gemm"]["median"] for row in some],
                marker="o" if ours else "x",
                linewidth=2 if ours else 1,
                label=label,
            )
        panel.plot(
            [row["m"] for row in rows],
            [row["limit"] / row["gemm"]["median"] for row in rows],
            color="black",
            linestyle=":",
            label="limit",
        )
        panel.axhline(1, color="gray", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens")
        panel.set_title(f"N={n}, K={k} a rank")
    panels[0][0].set_ylabel("time / GEMM alone (torch.mm)")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def report(args: argparse.Namespace, size: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "what": "row_parallel_linear, bf16, microseconds an op in a CUDA graph",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": torch.cuda.get_device_name(),
        "ranks": size,
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "command": launched(*sys.argv),
        "ops": args.ops,
        "results": results,
    }


def matrix(text: str) -> tuple[int, int]:
    n, found, k = text.partition("x")
    if not (found and n.isdecimal() and k.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected NxK, as 8192x4096, got '{text}'")
    return int(n), int(k)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--ops", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--shapes",
        nargs="*",
        type=matrix,
        default=[(8192, 4096), (8192, 14336)],
        metavar="NxK",
        help="of a rank's weight (default 8192x4096 8192x14336)",
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 64, 256, 2048])
    parser.add_argument("--plot", help="PNG file")
    parser.add_argument("--bandwidth", type=float, help="GB/s of memory, for `limit`; default: by the GPU's name")
    parser.add_argument("--link", type=float, default=450.0, help=LINK_HELP)
    parser.add_argument("--tflops", type=float, default=989.0, help="dense bf16, for `limit`")
    args = parser.parse_args()
    require_gpu_ranks("row_parallel_linear")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if args.bandwidth is None:
        named = (speed for name, speed in BANDWIDTH.items() if name in torch.cuda.get_device_name())
        args.bandwidth = next(named, BANDWIDTH["H100"])
    shared = size > torch.cuda.device_count()
    if shared:
        dist.init_process_group("gloo")
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    else:
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    group = Group(device="cuda", arena_bytes=ARENA)
    bench = Bench(group, args.ops, args.repeats)
    buffer = symm_mem.empty(max(n for n, _ in args.shapes) * max(args.tokens), dtype=torch.bfloat16, device="cuda")
    symm_mem.rendezvous(buffer, dist.group.WORLD.group_name)
    results = []
    for n, k in args.shapes:
        for m in args.tokens:
            row: dict[str, Any] = {"m": m, "n": n, "k": k, "limit": limit(m, n, k, size, args)}
            fused_before = group.info()["fused_calls"]
            times = bench.time(make_ops(m, n, k, group, buffer, not shared))
            row.update({label: summary(found) for label, found in times.items()})
            row["is_fused"] = group.info()["fused_calls"] > fused_before
            row["ratios"] = ratios(row)
            results.append(row)
            if rank == 0:
                figures = "  ".join(
                    f"{k} {v['median']:.1f}" for k, v in row.items() if isinstance(v, dict) and "q1" in v
                )
                print(f"N {n:>5} K {k:>5} M {m:>4}  limit {row['limit']:.1f}  {figures}  {row['ratios']}", flush=True)
    group.check()
    if rank == 0 and args.json:
        with open(args.json, "w") as file:
            json.dump(report(args, size, results), file, indent=1)
    if rank == 0 and args.plot:
        plot(results, args.plot, f"{size} ranks, {torch.cuda.device_count()} x {torch.cuda.get_device_name()}, bf16")
    dist.barrier()
    group.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
