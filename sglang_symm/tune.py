# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""`python -m sglang_symm tune`: times every algorithm at every size on this machine, and writes the tuning table that
groups of as many ranks choose by (see tuning.py)."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_symm import tuning
from sglang_symm.bench import (
    arena_bytes,
    check_gpus,
    check_output,
    commit,
    launched,
    machine,
    make_clocks,
    number_of_ranks,
)
from sglang_symm.bench.cases import DTYPES, Case, format_bytes, parse_bytes, sizes
from sglang_symm.bench.peers import Symm
from sglang_symm.bench.ranks import World, measure
from sglang_symm.distributed.group import Group
from sglang_symm.distributed.launch import run_ranks, under_launcher

_SUMS = ("one_shot", "two_shot", "two_shot_direct")
_COPIES = ("one_shot", "two_shot_direct")
# Device -> op -> algorithms that differ there.
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"all_reduce": _SUMS, "reduce_scatter": _COPIES, "all_gather": _COPIES, "broadcast": _COPIES},
    "cuda": {"all_reduce": _SUMS, "all_gather": _COPIES, "broadcast": _COPIES},
}
# Smallest and largest contribution of a rank, dtypes.
DEFAULTS = {"cpu": ("256", "8M", ["float32", "bfloat16"]), "cuda": ("1K", "64M", ["bfloat16"])}
PLACES = ("inside", "outside")
# Op -> how it is called: what is added to the place, and whether the result takes the place of x. An all_reduce into a
# new tensor writes to symmetric memory wherever x lies, so algorithms compare differently.
FORMS = {
    "all_reduce": (("", True), (", new result", False)),
    "reduce_scatter": (("", False),),
    "all_gather": (("", False),),
    "broadcast": (("", True),),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `tune`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument(
        "-n", "--nproc", type=int, help="ranks; started here unless torchrun did (default 2, or torchrun's)"
    )
    parser.add_argument("-b", "--begin", metavar="BYTES", help="smallest size (default 256 on cpu, 1K on cuda)")
    parser.add_argument("-e", "--end", metavar="BYTES", help="largest size (default 8M on cpu, 64M on cuda)")
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        action="append",
        help="again for more (default float32 and bfloat16; cuda: bfloat16)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds, in which the algorithms take turns (default 5)")
    parser.add_argument(
        "--sweeps",
        type=int,
        help="over all sizes, so that what disturbs a while disturbs not all of a size (default 3 on cpu, 1 on cuda)",
    )
    parser.add_argument("--seconds", type=float, default=0.001, help="of calls in a round, on cpu (default 0.001)")
    parser.add_argument("--calls", type=int, default=20, help="in a CUDA graph (default 20)")
    parser.add_argument(
        "--process-group",
        action="store_true",
        help="let the process group (Gloo, NCCL) be chosen where it wins; its sums may differ in their bits",
    )
    parser.add_argument(
        "-o", "--output", default="sglang_symm_tables", metavar="FOLDER", help="default sglang_symm_tables"
    )
    parser.add_argument("--json", action="store_true", help="print the table file instead of a summary")
    parser.add_argument("--raw", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    """Exit code 0; 1 if a result was wrong; 2 for wrong arguments; a failed rank's own code otherwise."""
    begin, end, dtypes = DEFAULTS[args.device]
    try:
        args.nproc = number_of_ranks(args.nproc)
        wanted = sizes(parse_bytes(args.begin or begin), parse_bytes(args.end or end), 2)
        args.sweeps = (3 if args.device == "cpu" else 1) if args.sweeps is None else args.sweeps
        if (
            args.rounds < 1
            or args.sweeps < 1
            or not 0 < args.seconds < 1e6
            or not 2 <= args.nproc <= 16
            or args.calls < 1
        ):
            raise ValueError(
                "expected --nproc 2 to 16, --rounds >= 1, --sweeps >= 1, --calls >= 1, --seconds > 0, "
                f"got {args.nproc}, {args.rounds}, {args.sweeps}, {args.calls}, {args.seconds}"
            )
        if wanted[0] < 64:
            raise ValueError(f"expected -b of at least 64 bytes, got {wanted[0]}")
        if args.device == "cuda":
            check_gpus(args.nproc)
        Path(args.output).mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
        check_output(str(Path(args.output) / ".writable"))
        (Path(args.output) / ".writable").unlink(missing_ok=True)
    except (ValueError, OSError) as error:
        print(f"sglang_symm tune: {error}", file=sys.stderr)
        return 2
    args.dtype = args.dtype or dtypes
    args.modes = ["graph"]  # as decode steps run; on the CPU there is one mode only
    if under_launcher():
        return _run_rank(args, wanted)
    # One thread a rank, as a rank of an engine has beside its compute threads.
    return run_ranks(
        args.nproc,
        [sys.executable, "-m", "sglang_symm", "tune", *args.words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _run_rank(args: argparse.Namespace, wanted: list[int]) -> int:
    # Bound, ranks meet on the same cores in every run; unbound, four ranks on two cores take 12 or 37 us, as it comes.
    world = World(args.device, bind=args.device == "cpu")
    choices = CHOICES[args.device]
    names = [*_SUMS, *(["process_group"] if args.process_group else [])]
    groups = {
        name: Group(name=f"tune-{name}", device=world.device, algo=name, arena_bytes=arena_bytes(world, wanted[-1]))
        for name in names
    }
    clocks = make_clocks(args, world, groups["one_shot"])
    # (op, place, dtype, algorithm, contribution) -> microseconds of all rounds of all sweeps.
    found: dict[tuple[str, str, str, str, int], list[float]] = {}
    wrong = 0
    cases = [
        (op, dtype, contribution)
        for op in choices
        for dtype in (args.dtype if op in ("all_reduce", "reduce_scatter") else args.dtype[:1])  # a copy is a copy
        for contribution in wanted
        if contribution * (world.size if op == "all_gather" else 1) <= wanted[-1]
    ]
    try:
        for number in range(args.sweeps * len(cases)):
            op, dtype, contribution = cases[number % len(cases)]
            if world.rank == 0:
                text = f"{number + 1}/{args.sweeps * len(cases)} {op} {dtype} {format_bytes(contribution)}"
                print(f"tune: {text}", file=sys.stderr, flush=True)
            lanes = [(name, place) for name in (*choices[op], *names[len(_SUMS) :]) for place in PLACES]
            runners = [Symm(groups[name], name, place == "inside") for name, place in lanes]
            case = Case(op, contribution * (world.size if op == "all_gather" else 1), DTYPES[dtype], world.size)
            for form, in_place in FORMS[op]:
                for (name, place), row in zip(lanes, measure(world, case, runners, [in_place], clocks, args.rounds)):
                    wrong += row.wrong
                    found.setdefault((op, place + form, dtype, name, contribution), []).extend(row.us)
        for group in groups.values():
            group.check()
    finally:
        for group in groups.values():
            group.destroy()
        world.close()
    if world.rank != 0:
        return 0
    document = make_document(args, world, collect(found))
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / tuning.file_name(document["device"], world.size)
    path.write_text(dump(document))
    print(dump(document) if args.json else summary(document), end="" if args.json else "\n")
    print(f"tune: wrote {path}. To use it: export SGLANG_SYMM_TABLES={folder.resolve()}", file=sys.stderr)
    if wrong:
        print(f"tune: {wrong} elements were wrong", file=sys.stderr)
    return int(wrong != 0)


def _lower_quartile(times: list[float]) -> float:
    """What the call takes when nothing else holds it up: other processes can only add to it."""
    return sorted(times)[(len(times) - 1) // 4]


def collect(found: Mapping[tuple[str, str, str, str, int], list[float]]) -> dict[str, Any]:
    """The ``times`` of a table."""
    times: dict[str, Any] = {}
    for (op, place, dtype, name, contribution), us in found.items():
        columns = times.setdefault(op, {}).setdefault(place, {}).setdefault(dtype, {"bytes": []})
        if contribution not in columns["bytes"]:
            columns["bytes"].append(contribution)
        columns.setdefault(name, []).append(round(_lower_quartile(us), 2))
    return times


def make_document(args: argparse.Namespace, world: World, times: dict[str, Any]) -> dict[str, Any]:
    """The table's JSON."""
    allowed = tuning.ALGORITHMS if args.process_group else _SUMS
    device = "cpu" if world.device.type == "cpu" else torch.cuda.get_device_name(world.device)
    noise = tuning.noise_of(device, shares_cores=world.size > world.cores)
    choice = tuning.derive_choice(times, noise, allowed)
    return {
        "format": tuning.FORMAT,
        "device": device,
        "world_size": world.size,
        "measured": {
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "machine": machine(world),
            "torch": torch.__version__,
            "what": "microseconds a call, lower quartile over rounds of the slowest rank; bytes: a rank's contribution",
            "command": launched("-m", "sglang_symm", "tune", *_without_output(args.words)),
        },
        "noise": noise,
        "choice": {op: [list(step) for step in ladder] for op, ladder in choice.items()},
        "times": times,
    }


def _without_output(words: Sequence[str]) -> list[str]:
    """The command line but for where the table went: it says nothing about the times."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and not word.startswith(("-o", "--output")):
            kept.append(word)
        skip = word in ("-o", "--output")
    return kept


def dump(value: Any, pad: str = "") -> str:
    """JSON with a line a list, so that a table is short and its changes are readable."""
    if not isinstance(value, dict):
        return json.dumps(value)
    inner = ",\n".join(f"{pad} {json.dumps(key)}: {dump(each, pad + ' ')}" for key, each in value.items())
    return "{\n" + inner + "\n" + pad + "}" + ("" if pad else "\n")


def summary(document: dict[str, Any]) -> str:
    """Times and choice as text."""
    lines = ["# " + "  ".join(f"{key} {value}" for key, value in document["measured"].items() if key != "what")]
    lines.append(f"# {document['measured']['what']}; * the choice")
    for op, places in document["times"].items():
        for place, dtypes in places.items():
            for dtype, columns in dtypes.items():
                names = [name for name in columns if name != "bytes"]
                where, *form = place.split(", ")
                lines.append("\n" + ", ".join([op, dtype, f"{where} symmetric memory", *form]))
                lines.append(f"{'bytes':>8}" + "".join(f"{name:>18}" for name in names))
                for i, n in enumerate(columns["bytes"]):
                    ladder = document["choice"][op]
                    chosen = next(name for end, name in ladder if end is None or n <= end)
                    cells = [f"{columns[name][i]:.2f}{'*' if name == chosen else ' '}" for name in names]
                    lines.append(f"{format_bytes(n):>8}" + "".join(f"{cell:>18}" for cell in cells))
    lines.append("")
    for op, ladder in document["choice"].items():
        steps = [name + (f" up to {format_bytes(end)}" if end is not None else "") for end, name in ladder]
        lines.append(f"{op}: {', then '.join(steps)}")
    return "\n".join(lines)
