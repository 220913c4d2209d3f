# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""`python -m sglang_symm bench`: collectives of this library beside its peers, in one run, with nccl-tests' habits."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from sglang_symm._version import __version__
from sglang_symm.bench import mpi, peers_cuda, report
from sglang_symm.bench.cases import DTYPES, LINK_GB_S, OPS, Case, format_bytes, parse_bytes, sizes
from sglang_symm.bench.clocks import Clock, EagerClock, GpuStart, GraphClock, HostClock
from sglang_symm.bench.peers import DeepSpeed, Empty, Gloo, Peer, Symm
from sglang_symm.bench.ranks import World, measure
from sglang_symm.bench.report import Row
from sglang_symm.distributed.group import ALGORITHMS, Group
from sglang_symm.distributed.launch import raise_on_sigterm, run_ranks, under_launcher

CPU_PEERS = ("gloo", "deepspeed", "openmpi", "mpich")
MODES = ("graph", "eager")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `bench`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("-b", "--begin", default="2K", metavar="BYTES", help="smallest size (default 2K)")
    parser.add_argument("-e", "--end", default="32M", metavar="BYTES", help="largest size (default 32M)")
    parser.add_argument("-f", "--factor", type=int, default=4, help="from one size to the next (default 4)")
    parser.add_argument(
        "-n", "--nproc", type=int, help="ranks; started here unless torchrun did (default 2, or torchrun's)"
    )
    parser.add_argument("--op", choices=OPS, action="append", help="again for more (default all_reduce)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--algo", choices=ALGORITHMS, action="append", help="again for more (default auto)")
    parser.add_argument(
        "--place", choices=("in", "out", "both"), default="both", help="in place, out of place (default both)"
    )
    parser.add_argument(
        "--peers",
        default="all",
        metavar="LIST",
        help=f"on cpu of {','.join(CPU_PEERS)}, on cuda of {','.join(peers_cuda.NAMES)}; 'all' that are installed "
        "(default), or 'none'",
    )
    parser.add_argument(
        "--bind",
        action="store_true",
        help="on cpu: rank r to the (r modulo cores)-th core, as mpirun binds its processes",
    )
    parser.add_argument("--rounds", type=int, default=11, help="rounds, in which the peers take turns (default 11)")
    parser.add_argument("--seconds", type=float, default=0.05, help="of calls in a round, on cpu (default 0.05)")
    parser.add_argument("--calls", type=int, default=20, help="in a graph, and in a round of eager code (default 20)")
    parser.add_argument(
        "--mode", default=",".join(MODES), metavar="LIST", help="on cuda: of graph,eager (default both)"
    )
    parser.add_argument(
        "--link-bandwidth",
        type=float,
        metavar="GB/s",
        help="a direction, for the physical limit (default: the vendor's figure for the GPU, 450 on Hopper; "
        "benchmarks/link.cu measured 361 of stores, 384 of the copy engine between two H200s)",
    )
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="as JSON, to FILE or instead of the table")
    parser.add_argument("--csv", metavar="FILE", help="as CSV too")
    parser.add_argument("--plot", metavar="FILE.png", help="as a plot too (needs matplotlib)")
    parser.add_argument("--raw", help=argparse.SUPPRESS)  # from the launching process: where rank 0 leaves its rows


def main(args: argparse.Namespace) -> int:
    """Exit code 0; 1 if a result was wrong; 2 for wrong arguments; a failed rank's own code otherwise."""
    try:
        args.nproc = number_of_ranks(args.nproc)
        wanted = sizes(parse_bytes(args.begin), parse_bytes(args.end), args.factor)
        if args.rounds < 1 or not 0 < args.seconds < 1e6 or not 2 <= args.nproc <= 16 or args.calls < 1:
            raise ValueError(
                "expected --nproc 2 to 16, --rounds >= 1, --calls >= 1, --seconds > 0, "
                f"got {args.nproc}, {args.rounds}, {args.calls}, {args.seconds}"
            )
        names = CPU_PEERS if args.device == "cpu" else peers_cuda.NAMES
        peers = set(names) if args.peers == "all" else _among("--peers", args.peers, names)
        modes = _among("--mode", args.mode, MODES)
        if args.device == "cuda":
            check_gpus(args.nproc)
        elif "nccl" in (args.algo or []):
            raise ValueError("--algo nccl needs --device cuda")
        if args.plot:
            report.check_plot(args.plot)
        for path in (args.json, args.csv, args.plot):  # now, not after minutes of measuring
            if path and path != "-":
                check_output(path)
    except (ValueError, OSError) as error:
        print(f"sglang_symm bench: {error}", file=sys.stderr)
        return 2
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.modes = [mode for mode in MODES if mode in modes] if args.device == "cuda" else ["eager"]
    if under_launcher():
        return _run_rank(args, wanted, peers)
    restore = raise_on_sigterm()
    try:
        return _launch(args, wanted, peers)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        restore()


def number_of_ranks(nproc: int | None) -> int:
    """--nproc, or the launcher's. Raises ValueError when both are told and differ."""
    if not under_launcher():
        return 2 if nproc is None else nproc
    launched = int(os.environ["WORLD_SIZE"])
    if nproc not in (None, launched):
        raise ValueError(f"expected --nproc {launched}, as many ranks as were started, or none, got {nproc}")
    return launched


def check_output(path: str) -> None:
    """Raise OSError where a file cannot be written."""
    with open(path, "a"):
        pass


def check_gpus(nproc: int) -> None:
    """Raise ValueError when there is no GPU, or ranks that are started here would not have one each."""
    gpus = torch.cuda.device_count()
    if gpus == 0:
        raise ValueError("--device cuda: expected a GPU, torch sees none (nvidia-smi tells why)")
    if not under_launcher() and gpus < nproc:
        raise ValueError(
            f"{nproc} ranks need {nproc} GPUs, torch sees {gpus}. Ranks that share one: "
            f"python tools/mps_rig.py --ranks {nproc} -- -m sglang_symm ..."
        )


def _among(option: str, text: str, known: tuple[str, ...]) -> set[str]:
    names = set() if text == "none" else set(text.split(","))
    if not names <= set(known):
        raise ValueError(f"{option} {text}: expected 'all', 'none' or names of {', '.join(known)}")
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
    found = {implementation.name for implementation in mpi.installed()}
    for name in sorted(peers & {"openmpi", "mpich"} - found) if args.peers != "all" else []:
        _say(f"{name} left out: its mpicc and mpirun were not found")
    for implementation in mpi.installed() if args.device == "cpu" else []:
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
    world = World(args.device, bind=args.bind)
    dtype = DTYPES[args.dtype]
    groups = {
        algo: Group(
            name=f"bench-{algo}",
            device=world.device,
            algo=algo,
            arena_bytes=arena_bytes(world, wanted[-1]),
            nccl="1" if algo == "nccl" else None,
        )
        for algo in args.algo or ["auto"]
    }
    runners: list[Peer] = [Symm(group, algo, inside) for inside in (True, False) for algo, group in groups.items()]
    if world.rank == 0 and not args.raw:
        for name in sorted(peers & {"openmpi", "mpich"}):
            _say(f"{name} left out: mpirun starts its ranks, which it does not do under a launcher")
    others = (_cpu_peers if args.device == "cpu" else _cuda_peers)(world, peers, wanted[-1])
    clocks = make_clocks(args, world, next(iter(groups.values())))
    places = {"in": [True], "out": [False], "both": [True, False]}[args.place]
    bandwidth = args.link_bandwidth or _link_bandwidth(world)
    rows: list[Row] = []
    try:
        steps = [(op, n) for op in args.op or ["all_reduce"] for n in wanted]
        for number, (op, n) in enumerate(steps, 1):
            if world.rank == 0:
                _say(f"{number}/{len(steps)} {op} {format_bytes(n)}")
            case = Case(op, n, dtype, world.size)
            measured = measure(world, case, [*runners, *others], places, clocks, args.rounds)
            for row in measured:
                row.limit_us = case.limit_us(bandwidth) if bandwidth else None
            rows += measured
        for group in groups.values():
            group.check()
    finally:
        for group in (*groups.values(), *(peer.group for peer in others if isinstance(peer, Empty))):
            group.destroy()
        world.close()
    if world.rank != 0:
        return 0
    environment = _environment(args, world)
    if args.raw:
        Path(args.raw).write_text(report.to_json(rows, environment))
        return 0
    return _output(args, rows, environment)


def arena_bytes(world: World, most: int) -> int:
    """Enough for the fixed part, and for input and results of a case in every mode and place, graphs' among them."""
    return max(64 << 20, 6 * most + (16 << 20)) if world.device.type == "cpu" else (256 << 20) + 16 * most


def make_clocks(args: argparse.Namespace, world: World, group: Group) -> list[Clock]:
    """Of the modes that are asked for; ``group`` brings the ranks together on GPUs."""
    if world.device.type == "cpu":
        return [HostClock(args.seconds)]
    start = GpuStart(group)
    kinds: dict[str, type[GraphClock] | type[EagerClock]] = {"graph": GraphClock, "eager": EagerClock}
    return [kinds[mode](start, args.calls) for mode in args.modes]


def _cpu_peers(world: World, names: set[str], most: int) -> list[Peer]:
    peers: list[Peer] = [Empty(world.rank)]
    if "gloo" in names:
        peers.append(Gloo())
    if "deepspeed" in names:
        try:
            peers.append(DeepSpeed(world.rank, world.size))
        except Exception as error:  # it compiles on first use: whatever goes wrong there is not ours to fail for
            _left_out(world, "deepspeed", error)
    return peers


def _cuda_peers(world: World, names: set[str], most: int) -> list[Peer]:
    peers: list[Peer] = []
    for name in (n for n in peers_cuda.NAMES if n in names):
        if world.shares_gpu and name.startswith("nccl"):
            _left_out(world, name, RuntimeError("it refuses ranks that share a GPU"))
            continue
        try:
            if name.startswith("nccl"):
                peers.append(peers_cuda.Nccl(world.device, most, window=name == "nccl_window"))
            else:
                peers.append(peers_cuda.TorchSymm(world.device, most, one_shot=name == "torch_one_shot"))
        except RuntimeError as error:  # an NCCL without windows, GPUs that torch's symmetric memory does not know
            _left_out(world, name, error)
    return peers


def _left_out(world: World, name: str, error: Exception) -> None:
    if world.rank == 0:
        _say(f"{name} left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _link_bandwidth(world: World) -> float | None:
    """GB/s; None for the CPU, for ranks that share a GPU, and for a GPU that nobody told us of."""
    if world.device.type == "cpu" or world.shares_gpu:
        return None
    name = torch.cuda.get_device_name(world.device)
    return next((gb_s for word, gb_s in LINK_GB_S.items() if word in name), None)


def commit() -> str:
    """SGLANG_SYMM_COMMIT, where this is a copy; else of the checkout that this is."""
    folder = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return os.environ.get("SGLANG_SYMM_COMMIT") or done.stdout.strip() or "not in a checkout"


def launched(*program: str) -> str:
    """The command line that repeats ranks of ``program``, as after `python`: with what has started them, and files
    without this machine's folders."""
    words = shlex.join(Path(word).name if word.startswith("/") else word for word in program)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "SGLANG_SYMM_SMS" in os.environ and ranks > torch.cuda.device_count():
        return f"python tools/mps_rig.py --ranks {ranks} -- {words}"
    return f"torchrun --nproc-per-node {ranks} {words}" if "TORCHELASTIC_RUN_ID" in os.environ else f"python {words}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _environment(args: argparse.Namespace, world: World) -> dict[str, Any]:
    words = [w for w in args.words if w not in ("--raw", args.raw)]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "version": __version__,
        "device": args.device,
        "machine": machine(world),
        "ranks": world.size,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rounds": args.rounds,
        **({} if world.device.type == "cpu" else _gpu_environment(args)),
        "command": launched("-m", "sglang_symm", "bench", *words),
    }


def _gpu_environment(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"calls": args.calls, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    if "NCCL_NVLS_ENABLE" in os.environ:
        found["NCCL_NVLS_ENABLE"] = os.environ["NCCL_NVLS_ENABLE"]
    return found


def machine(world: World) -> str:
    """Processor and cores, or the GPUs."""
    if world.device.type == "cpu":
        return f"{world.cores} cores of {_cpu_name()}"
    name = torch.cuda.get_device_name(world.device)
    return f"one {name}, shared" if world.shares_gpu else f"{world.size} {name}"


def _output(args: argparse.Namespace, rows: list[Row], environment: dict[str, Any]) -> int:
    order = {n: i for i, n in enumerate(dict.fromkeys((r.op, r.bytes, r.mode, r.in_place) for r in rows))}
    rows.sort(key=lambda r: order[r.op, r.bytes, r.mode, r.in_place])
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
