# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""`python -m sglang_symm bench`: collectives of this library beside its peers, in one run, with nccl-tests' habits."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sglang_symm._version import __version__
from sglang_symm.bench import mpi, report
from sglang_symm.bench.cases import DTYPES, OPS, Case, format_bytes, parse_bytes, sizes
from sglang_symm.bench.peers import DeepSpeed, Empty, Gloo, Peer, Prepared, Symm
from sglang_symm.bench.report import Row
from sglang_symm.distributed.group import ALGORITHMS, Group
from sglang_symm.distributed.launch import run_ranks, under_launcher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `bench`."""
    parser.add_argument("-b", "--begin", default="2K", metavar="BYTES", help="smallest size (default 2K)")
    parser.add_argument("-e", "--end", default="32M", metavar="BYTES", help="largest size (default 32M)")
    parser.add_argument("-f", "--factor", type=int, default=4, help="from one size to the next (default 4)")
    parser.add_argument(
        "-n", "--nproc", type=int, default=2, help="ranks; started here unless torchrun did (default 2)"
    )
    parser.add_argument("--op", choices=OPS, action="append", help="again for more (default all_reduce)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--algo", choices=ALGORITHMS, action="append", help="again for more (default auto)")
    parser.add_argument(
        "--place", choices=("in", "out", "both"), default="both", help="in place, out of place (default both)"
    )
    parser.add_argument(
        "--peers",
        default="all",
        metavar="LIST",
        help="of gloo,deepspeed,openmpi,mpich; 'all' that are installed (default), or 'none'",
    )
    parser.add_argument(
        "--bind", action="store_true", help="rank r to the (r modulo cores)-th core, as mpirun binds its processes"
    )
    parser.add_argument("--rounds", type=int, default=11, help="rounds, in which the peers take turns (default 11)")
    parser.add_argument("--seconds", type=float, default=0.05, help="of calls in a round (default 0.05)")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="as JSON, to FILE or instead of the table")
    parser.add_argument("--csv", metavar="FILE", help="as CSV too")
    parser.add_argument("--plot", metavar="FILE.png", help="as a plot too (needs matplotlib)")
    parser.add_argument("--raw", help=argparse.SUPPRESS)  # from the launching process: where rank 0 leaves its rows


def main(args: argparse.Namespace) -> int:
    """Exit code 0; 1 if a result was wrong; 2 for wrong arguments; a failed rank's own code otherwise."""
    try:
        wanted = sizes(parse_bytes(args.begin), parse_bytes(args.end), args.factor)
        if args.rounds < 1 or not args.seconds > 0 or args.nproc < 2:
            raise ValueError(
                f"expected --nproc >= 2, --rounds >= 1, --seconds > 0, got {args.nproc}, {args.rounds}, {args.seconds}"
            )
        peers = _peer_names(args.peers)
    except ValueError as error:
        print(f"sglang_symm bench: {error}", file=sys.stderr)
        return 2
    if under_launcher():
        return _run_rank(args, wanted, peers)
    return _launch(args, wanted, peers)


def _peer_names(text: str) -> set[str]:
    known = {"gloo", "deepspeed", "openmpi", "mpich"}
    names = known if text == "all" else set() if text == "none" else set(text.split(","))
    if not names <= known:
        raise ValueError(f"--peers {text}: expected 'all', 'none' or names of {', '.join(sorted(known))}")
    return names


def _launch(args: argparse.Namespace, wanted: list[int], peers: set[str]) -> int:
    """MPI before and after, our ranks in between: so all share the machine's mood."""
    with tempfile.TemporaryDirectory(prefix="sglang_symm-bench-") as folder:
        raw = str(Path(folder) / "rows.json")
        rows = _mpi_rows(args, wanted, peers)
        command = [sys.executable, "-m", "sglang_symm", "bench", *args.words, "--raw", raw]
        # One thread a rank, as a rank of an engine has beside its compute threads.
        status = run_ranks(args.nproc, command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if status not in (0, 1) or not Path(raw).exists():
            return status
        environment = json.loads(Path(raw).read_text())["environment"]
        again = {(r.op, r.bytes, r.peer): r for r in _mpi_rows(args, wanted, peers)} if rows else {}
        for row in rows:
            if (row.op, row.bytes, row.peer) in again:
                row.us += again[row.op, row.bytes, row.peer].us
        rows = report.load(raw) + rows
    return _output(args, rows, environment)


def _mpi_rows(args: argparse.Namespace, wanted: list[int], peers: set[str]) -> list[Row]:
    rows: list[Row] = []
    for implementation in mpi.installed():
        if implementation.name not in peers:
            continue
        for op in args.op or ["all_reduce"]:
            cases = [Case(op, n, DTYPES[args.dtype], args.nproc) for n in wanted]
            if not mpi.supports(cases[0]):
                _say(f"{implementation.name} has no {args.dtype}: left out")
                break
            _say(f"{implementation.name}: {op}")
            try:
                results = implementation.run(op, args.nproc, wanted, max(1, args.rounds // 2), args.seconds)
            except RuntimeError as error:
                _say(f"left out: {error}")
                break
            for case in cases:
                us, wrong = results[case.bytes]
                in_place = op in ("all_reduce", "broadcast")
                rows.append(Row(op, args.dtype, case.bytes, implementation.name, in_place, case.bus_factor, wrong, us))
    return rows


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _run_rank(args: argparse.Namespace, wanted: list[int], peers: set[str]) -> int:
    cores = sorted(os.sched_getaffinity(0))
    if args.bind:  # before any thread is made: they inherit it
        os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ops, dtype = args.op or ["all_reduce"], DTYPES[args.dtype]
    arena = max(64 << 20, 6 * wanted[-1] + (16 << 20))
    groups = {algo: Group(name=f"bench-{algo}", algo=algo, arena_bytes=arena) for algo in args.algo or ["auto"]}
    runners: list[Peer] = [Symm(group, algo, True) for algo, group in groups.items()]
    runners += [Symm(group, algo, False) for algo, group in groups.items()]
    empty = Empty(rank)
    runners.append(empty)
    if "gloo" in peers:
        runners.append(Gloo())
    if "deepspeed" in peers:
        try:
            runners.append(DeepSpeed(rank, world_size))
        except Exception as error:  # it compiles on first use: whatever goes wrong there is not ours to fail for
            if rank == 0:
                _say(f"deepspeed left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    places = {"in": [True], "out": [False], "both": [True, False]}[args.place]
    rows: list[Row] = []
    try:
        steps = [(op, n) for op in ops for n in wanted]
        for number, (op, n) in enumerate(steps, 1):
            if rank == 0:
                _say(f"{number}/{len(steps)} {op} {format_bytes(n)}")
            rows += _measure(args, Case(op, n, dtype, world_size), runners, places, rank)
    finally:
        for group in (*groups.values(), empty.group):
            group.destroy()
        dist.destroy_process_group()
    if rank != 0:
        return 0
    environment = _environment(args, world_size, len(cores))
    if args.raw:
        Path(args.raw).write_text(report.to_json(rows, environment))
        return 0
    return _output(args, rows, environment)


def _measure(args: argparse.Namespace, case: Case, runners: list[Peer], places: list[bool], rank: int) -> list[Row]:
    """All implementations of one case: first right, then timed in turns."""
    lanes: list[tuple[Row, Prepared]] = []
    for in_place in places:
        for peer in runners:
            prepared = peer.prepare(case, rank, in_place)
            if prepared is None:
                continue
            prepared.reset()
            prepared.call()
            wrong = torch.tensor([int((prepared.result() != case.expected(rank)).sum())])
            dist.all_reduce(wrong)
            dtype = str(case.dtype).removeprefix("torch.")
            row = Row(case.op, dtype, case.bytes, peer.name, in_place, case.bus_factor, int(wrong), [])
            # From here on zeros: sums in place neither grow to infinity nor fall into denormals.
            prepared.value.zero_()
            prepared.reset()
            lanes.append((row, prepared))
    calls = [_calls_a_round(args, prepared) for _, prepared in lanes]
    times = torch.zeros(args.rounds, len(lanes), dtype=torch.float64)
    for r in range(args.rounds):
        for lane in [(i + r) % len(lanes) for i in range(len(lanes))]:  # each begins a round in its turn
            call = lanes[lane][1].call
            dist.barrier()
            start = time.perf_counter()
            for _ in range(calls[lane]):
                call()
            times[r, lane] = (time.perf_counter() - start) / calls[lane] * 1e6
    dist.all_reduce(times, dist.ReduceOp.MAX)
    for lane, (row, _) in enumerate(lanes):
        row.us = times[:, lane].tolist()
    return [row for row, _ in lanes]


def _calls_a_round(args: argparse.Namespace, prepared: Prepared) -> int:
    for _ in range(3):
        prepared.call()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(3):
        prepared.call()
    one = torch.tensor([(time.perf_counter() - start) / 3], dtype=torch.float64)
    dist.all_reduce(one, dist.ReduceOp.MAX)
    return max(1, min(20_000, int(args.seconds / float(one))))


def _commit() -> str:
    folder = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "not in a checkout"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _environment(args: argparse.Namespace, world_size: int, cores: int) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "version": __version__,
        "machine": f"{cores} cores of {_cpu_name()}",
        "ranks": world_size,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rounds": args.rounds,
        "command": "python -m sglang_symm bench " + " ".join(w for w in args.words if w != "--raw" and w != args.raw),
    }


def _output(args: argparse.Namespace, rows: list[Row], environment: dict[str, Any]) -> int:
    order = {n: i for i, n in enumerate(dict.fromkeys((r.op, r.bytes, r.in_place) for r in rows))}
    rows.sort(key=lambda r: order[r.op, r.bytes, r.in_place])
    if args.json == "-":
        print(report.to_json(rows, environment))
    else:
        print(report.table(rows, environment))
        if args.json:
            Path(args.json).write_text(report.to_json(rows, environment) + "\n")
    if args.csv:
        report.write_csv(rows, args.csv)
    if args.plot:
        try:
            report.plot(rows, args.plot, environment)
        except ImportError:
            _say("--plot needs matplotlib: pip install 'sglang_symm[bench]'")
            return 2
    return int(any(r.wrong and r.peer.startswith("symm") for r in rows))
