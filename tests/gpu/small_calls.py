"""Every kernel of the library at small shapes, over two GPUs or on one: what compute-sanitizer watches.

    python tests/gpu/small_calls.py --sanitizer memcheck --reports FOLDER [--only collectives|norm|fused|prefill]

On one GPU the ranks take turns, a slice of time each, as without MPS: it is slow, and nothing waits in vain.

Starts two ranks, each under `compute-sanitizer --tool ...` (or plainly), which leaves FOLDER/TOOL.RANK.txt.
Results are compared bit by bit too. Only the library's kernels are watched.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
COUNTS = (0, 1, 1000, 5003)


def collectives(rank: int, size: int) -> Iterator[tuple[str, bool]]:
    """(what, whether its bits are right)"""
    import torch

    from sglang_symm.distributed.group import Group
    from tests.distributed_cases import inputs, ordered_sum, same_bits

    for algo in ("one_shot", "two_shot", "two_shot_direct"):
        group = Group(device="cuda", timeout=120.0, arena_bytes=16 << 20, algo=algo)
        for dtype in (torch.float32, torch.bfloat16):
            for count in COUNTS:
                xs = inputs(size, [count], dtype, seed=count)
                x = xs[rank].cuda()
                for parity in range(2):
                    y = group.all_reduce(x).cpu()
                    yield f"all_reduce {algo} {dtype} {count} parity {parity}", same_bits(y, ordered_sum(xs))
        xs = inputs(size, [300_001], torch.bfloat16)
        yield f"all_reduce {algo} of 300001", same_bits(group.all_reduce(xs[rank].cuda()).cpu(), ordered_sum(xs))
        x = xs[rank].cuda()[1:5001]  # not aligned
        y = group.all_reduce(x).cpu()
        yield f"all_reduce {algo}, unaligned", same_bits(y, ordered_sum([t[1:5001] for t in xs]))
        for rows in (1, 9, 30_000):
            xs = inputs(size, [rows * size, 3], torch.bfloat16, seed=rows)
            x = xs[rank].cuda()
            part = ordered_sum(xs)[rank * rows : (rank + 1) * rows]
            yield f"reduce_scatter {algo} {rows}", same_bits(group.reduce_scatter(x).cpu(), part)
            yield f"all_gather {algo} {rows}", same_bits(group.all_gather(x).cpu(), torch.cat(xs))
            group.broadcast(x, size - 1)
            yield f"broadcast {algo} {rows}", same_bits(x.cpu(), xs[size - 1])
        group.barrier()
        group.check()
        group.destroy()


def fused(rank: int, size: int) -> Iterator[tuple[str, bool]]:
    import torch

    from sglang_symm.distributed.group import Group
    from tests.gpu.test_fused import Case, fused_calls, same

    group = Group(device="cuda", timeout=120.0, arena_bytes=64 << 20)
    for dtype in (torch.bfloat16, torch.float16):
        for m, n, k in (
            (1, 72, 72),
            (5, 584, 264),
            (16, 1288, 72),
            (17, 2120, 72),
            (33, 2184, 264),
            (64, 2184, 72),
            (3, 584, 2056),
            (17, 584, 2056),
            (64, 1288, 2056),
            (3, 4296, 4104),  # more tiles than pairs of CTAs
        ):
            case = Case(size, m, n, k, dtype, seed=m, bias=m % 2 == 1)
            before = fused_calls(group)
            for static in (False, True, False):
                y = case.call(group, rank, static_weight=static)
                yield f"fused {dtype} {m} x {n} x {k}, static {static}", same(y, case.expected())
            assert fused_calls(group) == before + 3
    group.check()
    group.destroy()


def prefill(rank: int, size: int) -> Iterator[tuple[str, bool]]:
    """Every form of the kernel for many tokens: one to three visits, wide and narrow tiles, some not full."""
    import torch

    from sglang_symm.distributed.group import Group
    from tests.gpu.test_fused import Case, fused_calls, same

    group = Group(device="cuda", timeout=120.0, arena_bytes=512 << 20)
    for dtype in (torch.bfloat16, torch.float16):
        for m, n, k in ((500, 8192, 136), (750, 8192, 72), (1000, 8000, 72), (1500, 8000, 72)):
            case = Case(size, m, n, k, dtype, seed=m, bias=m == 500)
            before = fused_calls(group)
            for static in (False, True):
                y = case.call(group, rank, static_weight=static)
                yield f"fused {dtype} {m} x {n} x {k}, static {static}", same(y, case.expected())
            assert fused_calls(group) == before + 2
    group.check()
    group.destroy()


def norm(rank: int, size: int) -> Iterator[tuple[str, bool]]:
    import torch

    from sglang_symm.distributed.group import Group
    from tests.gpu.test_norm import Case, problem

    group = Group(device="cuda", timeout=120.0, arena_bytes=64 << 20)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((1, 50), (3, 576), (64, 4096), (5, 8195)):
            case = Case(size, shape, dtype, seed=shape[0])
            for parity in range(2):
                wrong = problem(case.call(group, rank), case.hidden(), case.weight)
                yield f"all_reduce_add_rms_norm {dtype} {shape} parity {parity} {wrong}", wrong == ""
    group.check()
    group.destroy()


def sanitizer(tool: str, report: Path) -> list[str]:
    """The command before a rank's own; its option for names of kernels has had several names."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [program, "--tool", tool, "--log-file", str(report), "--error-exitcode", "9"]
    for option in ("--kernel-name", "--kernel-regex"):
        told = subprocess.run([program, option, "kns=sglang_symm", "true"], capture_output=True, text=True)
        if not re.search(r"unrecogni|unknown|invalid|usage", told.stdout + told.stderr, re.I):
            return [*command, option, "kns=sglang_symm"]
    return command


PARTS = {"collectives": collectives, "norm": norm, "fused": fused, "prefill": prefill}


def run_rank(rank: int, store: str, only: str | None) -> None:
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    wrong, calls = [], 0
    for name, part in PARTS.items():
        if only in (None, name):
            for what, right in part(rank, 2):
                calls += 1
                wrong += [] if right else [what]
    print(f"rank {rank}: {calls} calls, {len(wrong)} wrong {wrong[:5]}", flush=True)
    sys.stdout.flush()
    os._exit(1 if wrong else 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitizer", choices=["memcheck", "racecheck", "synccheck", "initcheck"])
    parser.add_argument("--reports", default=".", metavar="FOLDER")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--rank", nargs=2, metavar=("RANK", "STORE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        run_rank(int(args.rank[0]), args.rank[1], args.only)
    import torch

    if torch.cuda.device_count() == 0:
        raise SystemExit("small_calls: expected one GPU or two, torch sees none (nvidia-smi tells why)")
    reports = [Path(args.reports, f"{args.sanitizer}.{rank}.txt") for rank in (0, 1)]
    if args.sanitizer:
        Path(args.reports).mkdir(parents=True, exist_ok=True)  # else it writes none, and says nothing
        for report in reports:
            report.unlink(missing_ok=True)
    env: dict[str, Any] = {**os.environ, "CUDA_MODULE_LOADING": "LAZY"}
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank, report in enumerate(reports):
            command = [sys.executable, __file__, "--rank", str(rank), f"{folder}/store"]
            command += ["--only", args.only] if args.only else []
            if args.sanitizer:
                command = [*sanitizer(args.sanitizer, report), *command]
            ranks.append(subprocess.Popen(command, env=env))
        status = max(rank.wait() for rank in ranks)
    if args.sanitizer:
        from sglang_symm.bench import commit, launched

        where = f"{torch.cuda.get_device_name()}, {torch.cuda.device_count()} of them"
        told = launched("tests/gpu/small_calls.py", *sys.argv[1:])
        for report in filter(Path.exists, reports):
            report.write_text(f"{told}; {date.today()}, {commit()}, {where}\n{report.read_text()}")
    return status


if __name__ == "__main__":
    sys.exit(main())
