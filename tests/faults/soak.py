"""Small collectives for hours if one likes: every bit is checked, and memory stays flat.

    python tests/faults/soak.py [--calls N] [--tensors N] [--limit SECONDS] [--seed S] [--json FILE]

Two ranks. First `calls` all-reduces of random sizes and dtypes, by both algorithms, inside and outside of symmetric
memory, in place and not, each compared bit by bit with a sum known beforehand. Then `tensors` creations of tensors in
symmetric memory, of sizes and lifetimes that differ by rank, so that no two arenas look alike, with sums of them in
between. Whatever there is time for is done: the figures say how much it was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[2]
KNOWN = 4096  # inputs with known sums
MAX_COUNT = 8192  # enough for the second algorithm
SAMPLES = 50
BATCH = 1000  # calls between two looks at the clock


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Soak:
    """One rank."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        import torch.distributed as dist

        from sglang_symm.distributed import Group

        self.args, self.torch = args, torch
        dist.init_process_group("gloo")
        self.rank = dist.get_rank()
        self.group = Group(name="soak", arena_bytes=8 << 20, timeout=60, first_timeout=60)
        self.begin = time.monotonic()
        self.said = self.begin
        self.samples: list[int] = []
        self.wrong = 0

    def say(self, text: str, now: bool = True) -> None:
        """Rank 0 tells how far it is; every few seconds unless ``now``."""
        if self.rank == 0 and (now or time.monotonic() - self.said > 3):
            self.said = time.monotonic()
            print(f"{time.monotonic() - self.begin:6.0f} s  {text}", flush=True)

    def out_of_time(self, limit: float) -> bool:
        """Whether rank 0's time is up: the same answer on both."""
        clock = self.torch.tensor([float(self.rank == 0 and time.monotonic() - self.begin > limit)])
        return bool(self.group.all_reduce(clock).item())

    def known_sums(self) -> list[tuple[Any, Any, Any]]:
        """(input of this rank, the sum's bits, their dtype)."""
        torch, chosen = self.torch, random.Random(self.args.seed)
        made = []
        for number in range(KNOWN):
            dtype, bits = chosen.choice(
                [(torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)]
            )
            count = int(2 ** chosen.uniform(0, 13))
            generator = torch.Generator().manual_seed(self.args.seed * KNOWN + number)
            x = (torch.randn(2, count, generator=generator) * 10 ** chosen.uniform(-3, 3)).to(dtype)
            total = (x[0].float() + x[1].float()).to(dtype)
            made.append((x[self.rank].clone(), total.view(bits), bits))
        return made

    def calls(self) -> int:
        """All-reduces, each checked. Returns how many."""
        torch, args = self.torch, self.args
        from sglang_symm import memory

        known = self.known_sums()
        # A block of symmetric memory for inputs, at a place of its own on each rank.
        memory_of_rank = [memory.empty(100 + 64 * self.rank, group=self.group)]
        inside = {
            dtype: memory.empty(MAX_COUNT, group=self.group, dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        }
        all_reduce, all_reduce_, name = (
            torch.ops.sglang_symm.all_reduce.default,
            torch.ops.sglang_symm.all_reduce_.default,
            self.group.unique_name,
        )
        order, places = random.Random(args.seed + 1), random.Random(args.seed + 2 + self.rank)
        done, equal = 0, torch.equal
        every = max(BATCH, args.calls // SAMPLES // BATCH * BATCH)
        while done < args.calls:
            for entry in order.choices(known, k=min(BATCH, args.calls - done)):
                x, expected, bits = entry
                where = places.random()
                if where < 0.25:
                    y = inside[x.dtype][: x.numel()].copy_(x)
                    all_reduce_(y, name)
                else:
                    y = all_reduce(x, name)
                if not equal(y.view(bits), expected):
                    self.wrong += 1
            done += min(BATCH, args.calls - done)
            if done % every == 0:
                self.samples.append(resident_bytes())
                rate = done / (time.monotonic() - self.begin)
                self.say(
                    f"{done:,} of {args.calls:,} calls, {rate:,.0f} a second, {self.wrong} wrong, "
                    f"{self.samples[-1] / 2**20:.1f} MiB resident",
                    now=False,
                )
            if self.out_of_time(args.limit * args.calls_share):
                break
        del memory_of_rank, inside
        return done

    def tensors(self) -> dict[str, Any]:
        """Tensors of sizes and lifetimes that differ by rank; every 50 creations a sum of one of them."""
        torch, args = self.torch, self.args
        from sglang_symm import memory

        mine, alike = random.Random(args.seed + 10 + self.rank), random.Random(args.seed + 20)
        alive: list[Any] = []
        made = sums = full = different = 0
        while made < args.tensors:
            for _ in range(50):
                try:
                    alive.append(memory.empty(int(2 ** mine.uniform(0, 14)), group=self.group))
                except torch.OutOfMemoryError:
                    full += 1
                    alive = alive[::2]
                if len(alive) > mine.randint(1, 400):
                    del alive[mine.randrange(len(alive))]
                made += 1
            count, value = alike.randint(1, 3000), float(alike.randint(-1000, 1000))
            x = memory.empty(count, group=self.group).fill_(value + self.rank)
            handle = self.group.rendezvous(x)
            different += handle.offsets[0] != handle.offsets[1]
            y = self.group.all_reduce(x)
            self.wrong += not torch.equal(y, torch.full((count,), 2 * value + 1))
            sums += 1
            del handle
            alive.append(y)
            if sums % 20 == 0:
                self.say(
                    f"{made:,} of {args.tensors:,} tensors, {len(alive)} alive, {sums} sums, {self.wrong} wrong",
                    now=False,
                )
            if self.out_of_time(args.limit):
                break
        del x, y
        alive.clear()
        return {"tensors": made, "sums": sums, "offsets_differed": different, "times_full": full}

    def run(self) -> None:
        calls = self.calls()
        call_seconds = time.monotonic() - self.begin
        self.say(f"{calls:,} calls in {call_seconds:.0f} s, {self.wrong} wrong")
        stats = self.tensors()
        self.say(f"{stats}, {self.wrong} wrong")
        left = self.group.memory_stats()
        info = self.group.info()
        settled = self.samples[len(self.samples) // 5 :] or [resident_bytes()]
        report = {
            "calls": calls,
            "calls_asked": self.args.calls,
            "call_seconds": round(call_seconds, 1),
            "wrong": self.wrong,
            **stats,
            "calls_by_algorithm": info["calls_by_algorithm"],
            "resident_mib": [round(sample / 2**20, 2) for sample in self.samples],
            "growth_kib": (max(settled) - settled[0]) // 1024,
            "live_blocks": left["live_blocks"],
            "allocated_bytes": left["allocated_bytes"],
            "unbroken_heap": left["largest_free_bytes"] == left["heap_bytes"],
        }
        Path(self.args.folder, f"rank{self.rank}.json").write_text(json.dumps(report))
        self.group.destroy()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000_000)
    parser.add_argument("--tensors", type=int, default=100_000)
    parser.add_argument("--limit", type=float, default=86400.0, help="seconds for all of it")
    parser.add_argument("--calls-share", type=float, default=0.85, help="of these, the part for the calls at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth-kib", type=int, default=4096, help="resident memory may grow by so much")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # a rank: where it leaves its report
    return parser.parse_args(argv)


def main() -> int:
    args = parse(None)
    if args.folder:
        Soak(args).run()
        return 0
    sys.path.insert(0, str(ROOT))
    from harness import commit, machine

    from sglang_symm.distributed.launch import run_ranks

    revision, begin = commit(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder]
        code = run_ranks(2, command, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=args.limit + 120)
        if code:
            return code
        ranks = [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(2)]
    failures = [
        f"rank {rank}: {what}"
        for rank, report in enumerate(ranks)
        for what, bad in {
            f"{report['wrong']} wrong results": report["wrong"],
            f"resident memory grew by {report['growth_kib']} KiB": report["growth_kib"] > args.growth_kib,
            f"{report['live_blocks']} blocks are still allocated": report["live_blocks"] or report["allocated_bytes"],
            "the heap is in pieces": not report["unbroken_heap"],
            "the histories of the ranks did not diverge": report["offsets_differed"] < report["sums"] // 2,
        }.items()
        if bad
    ]
    if args.json:
        report = {
            "command": " ".join(["python", *sys.argv]),
            "commit": revision,
            "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "machine": machine(),
            "wall_seconds": round(time.monotonic() - begin, 1),
            "failures": failures,
            "ranks": ranks,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    first = ranks[0]
    print(
        f"{first['calls']:,} calls in {first['call_seconds']:.0f} s, {first['tensors']:,} tensors, "
        f"{first['offsets_differed']} of {first['sums']} sums at different offsets, wrong: "
        f"{sum(report['wrong'] for report in ranks)}, growth: {max(report['growth_kib'] for report in ranks)} KiB"
    )
    for failure in failures:
        print(failure)
    print(f"{int(not failures)} passed, {int(bool(failures))} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
