"""Where the time of the prefill kernel goes: when its CTAs were where, in each visit of a tile.

    SGLANG_SYMM_TRACE=1 SGLANG_SYMM_CUDA=1 python setup.py build_ext --inplace
    torchrun --nproc-per-node 2 benchmarks/prefill_trace.py [--shape 8192x4096] [--tokens 2048] [--static] [--json FILE]

Needs a library built with SGLANG_SYMM_TRACE=1, whose kernel is slower by its stamps (csrc/fused/prefill_trace_sm90.cuh
says what each of them means). Replays a CUDA graph of `ops` calls, whose weights rotate over 4 copies, and takes the
stamps of the last one, `repeats` times.

Prints for each stamp of each visit how many CTAs have it and when, microseconds after the first stamp of the kernel on
that rank: the mean over CTAs and repeats, the first and the last CTA (medians over repeats). Then the same of the time
between two stamps, which says where CTAs wait. CTAs with another rank's tile, an own one, or one that all ranks sum are
told apart; each half of the latter counts as a visit more, behind the steps of all columns. Clocks of GPUs differ, so
each rank is by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from row_parallel_linear import COPIES, matrix

from sglang_symm.bench import commit, launched
from sglang_symm.distributed.group import Group
from sglang_symm.distributed.launch import require_gpu_ranks

OF_THE_CALL = ("previous_ended", "close_begins", "close_ends", "end")
# What a warp does between two of its stamps.
SPANS = {
    "waits for its first stage": ("begins", "filled"),
    "multiplies": ("filled", "multiplied"),
    "waits for staging or a partial": ("multiplied", "may_store"),
    "sums, stores": ("may_store", "stored"),
    "waits for the other's part, sums": ("stored", "summed"),
    "mover: waits for partials": ("partial_awaited", "partial_came"),
    "mover: sends": ("taken", "sent"),
    "mover: has copies read": ("sent", "freed"),
    "mover: has copies arrive": ("sent", "arrived"),
    "mover: closing barrier": ("close_begins", "close_ends"),
}


def of_ctas(us: torch.Tensor) -> dict[str, float] | None:
    """What is known of us [repeat, CTA], where NaN is a CTA that has not been there; None when none has."""
    there = ~us.isnan()
    if not there.any(dim=1).all():
        return None
    least = us.nan_to_num(math.inf).amin(dim=1).median()
    most = us.nan_to_num(-math.inf).amax(dim=1).median()
    found = {"mean": us.nanmean(), "min": least, "max": most}
    return {"ctas": int(there.sum(dim=1).max()), **{name: round(value.item(), 2) for name, value in found.items()}}


def rows(times: torch.Tensor, stamps: list[str]) -> list[dict[str, Any]]:
    """Of times [repeat, CTA, visit, stamp] in ns, 0 where there is none: a row for each stamp and span of a visit."""
    first = torch.where(times == 0, torch.iinfo(times.dtype).max, times).amin(dim=(1, 2, 3), keepdim=True)
    us = torch.where(times == 0, math.nan, (times - first).double() / 1000)
    found = []

    def add(visit: int | None, tiles: str, which: torch.Tensor, names: list[str]) -> None:
        at = {stamp: us[:, :, visit or 0, stamps.index(stamp)].where(which, math.nan) for stamp in names}
        spans = {span: at[end] - at[begin] for span, (begin, end) in SPANS.items() if begin in at}
        for kind, each in (("at", at), ("for", spans)):
            for what, values in each.items():
                summary = of_ctas(values)
                if summary is not None:
                    found.append({"visit": visit, "tiles": tiles, "kind": kind, "what": what, **summary})

    of_visits = [stamp for stamp in stamps if stamp not in OF_THE_CALL]
    for visit in range(times.shape[2]):
        own = ~us[:, :, visit, stamps.index("partial_awaited")].isnan()
        summed = ~us[:, :, visit : visit + 2, stamps.index("summed")].isnan()
        everybodys = summed.any(dim=2) & ~own  # or the visit before one's first half
        for tiles, which in {"others'": ~(own | everybodys), "own": own, "all ranks'": everybodys}.items():
            add(visit, tiles, which, of_visits)
    add(None, "", torch.ones_like(own), list(OF_THE_CALL))
    return found


def resolution(times: torch.Tensor) -> int:
    """ns: what all differences between stamps are multiples of."""
    some = times[times != 0]
    return math.gcd(*(some - some.min()).unique().tolist())


def gemm_kernels(x: torch.Tensor, w: torch.Tensor) -> list[str]:
    """What torch.mm runs: tile, stages and cluster are in the name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.mm(x, w.t())
        torch.cuda.synchronize()
    return sorted({event.key for event in profile.key_averages() if not event.key.startswith("cuda")})


def trace(group: Group, m: int, n: int, k: int, static: bool, ops: int, repeats: int) -> tuple[torch.Tensor, list[str]]:
    """Times [repeat, CTA, visit, stamp] of the last of `ops` calls, and the stamps' names."""
    xs = [torch.randn(m, k, device="cuda").bfloat16() for _ in range(COPIES)]
    ws = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(COPIES)]
    linear, taken = torch.ops.sglang_symm.row_parallel_linear, torch.ops.sglang_symm._prefill_trace
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        linear(xs[0], ws[0], None, group.unique_name)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(ops):
            linear(xs[i % COPIES], ws[i % COPIES], None, group.unique_name, True, static)
    times = []
    for repeat in range(repeats + 3):
        dist.barrier()
        with torch.cuda.stream(stream):
            graph.replay()
        torch.cuda.synchronize()
        each, stamps = taken()
        if repeat >= 3:
            times.append(each)
    return torch.stack(times), stamps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=matrix, default="8192x4096", metavar="NxK", help="of a rank's weight")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--static", action="store_true", help="with static_weight")
    parser.add_argument("--ops", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", help="file for what is printed, of all ranks")
    args = parser.parse_args()
    require_gpu_ranks("prefill_trace")
    if not hasattr(torch.ops.sglang_symm, "_prefill_trace"):
        raise SystemExit("prefill_trace: this library writes no stamps. Build it with SGLANG_SYMM_TRACE=1")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    group = Group(device="cuda", arena_bytes=512 << 20)
    n, k = args.shape
    times, stamps = trace(group, args.tokens, n, k, args.static, args.ops, args.repeats)
    group.check()
    if not times.any():
        raise SystemExit(f"prefill_trace: no prefill kernel for {args.tokens} tokens of {n}x{k}")
    x, w = (torch.randn(rows, k, device="cuda").bfloat16() for rows in (args.tokens, n))
    mine = {
        "rank": rank,
        "resolution_ns": resolution(times),
        "gemm": gemm_kernels(x, w),
        "settings": group.info()["settings"]["agreed"],
        "rows": rows(times, stamps),
    }
    ranks: list[Any] = [None] * size
    dist.all_gather_object(ranks, mine)
    if rank == 0:
        for each in ranks:
            print(f"rank {each['rank']}, clock in steps of {each['resolution_ns']} ns; {each['settings']}")
            print(f"torch.mm here: {', '.join(each['gemm'])}")
            print(f"{'visit':>5} {'tiles':10}     {'':32} {'CTAs':>4} {'mean':>8} {'min':>8} {'max':>8}")
            for row in each["rows"]:
                visit = "" if row["visit"] is None else row["visit"]
                figures = " ".join(f"{row[name]:>8.2f}" for name in ("mean", "min", "max"))
                what = f"{row['kind']:>3} {row['what']:32}"
                print(f"{visit:>5} {row['tiles']:10} {what} {row['ctas']:>4} {figures}")
        if args.json:
            head = {
                "date": time.strftime("%Y-%m-%d"),
                "commit": commit(),
                "device": torch.cuda.get_device_name(),
                "command": launched(*sys.argv),
            }
            with open(args.json, "w") as file:
                json.dump({**head, **vars(args), "ranks": ranks}, file, indent=1)
    dist.barrier()
    group.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
