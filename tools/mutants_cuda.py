"""Break the GPUs' protocol on purpose, one line at a time, and require that the tests of tests/gpu notice.

    python tools/mutants_cuda.py list
    python tools/mutants_cuda.py build --out FOLDER [--only NAME]      where nvcc is: a library a mutant; no GPU needed
    python tools/mutants_cuda.py run FOLDER [--jobs 4] [--limit 45]    where two GPUs are, or one that ranks share

Needs a CUDA build in place (SGLANG_SYMM_CUDA=1 python setup.py build_ext --inplace). Only the sources that a mutant
touches are compiled again, and for two ranks alone where its tests have two. Some mistakes show only when a rank is
slow between two steps; such a mutant makes rank 1 sleep there, and a control of the same sleep without the mistake must
pass, as must the library as it is. A mutant whose tests are ended at the limit is caught too, as ranks may wait for
ever; that is told, and with such a sleep it counts only when the control has passed. On one GPU all ranks of a test
share it (tools/mps_rig.py).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutants import Mutant, with_name  # noqa: E402

ONE_SHOT, TWO_SHOT = "collective/one_shot_cuda.cu", "collective/two_shot_cuda.cu"
NORM = "collective/norm_cuda.cu"
DIRECT, SMALL = "collective/direct_cuda.cu", "collective/small_cuda.cu"
FUSED = "fused/decode_sm90.cu"
PAD, LAUNCH = "signal/pad_cuda.cuh", "collective/launch_cuda.cuh"

COLLECTIVES = "tests/gpu/test_collectives.py -k "
SUMS = COLLECTIVES + "'all_reduce_gives and bfloat16 and {}'"
IN_A_ROW = COLLECTIVES + "'calls_in_a_row and {}'"
FAILURES = "tests/gpu/test_failures.py -k "
FUSED_TEST = "tests/gpu/test_fused.py -k "
NORM_TEST = "tests/gpu/test_norm.py -k 'composition and bfloat16 and 576'"
PREFILL = "fused/prefill_sm90.cu"
PREFILL_TEST = "tests/gpu/test_fused_prefill.py -k "
MANY_TOKENS = PREFILL_TEST + "'every_number and bfloat16'"
TOKENS = FUSED_TEST + "'every_number and bfloat16 and 2120'"
FUSED_IN_A_ROW = FUSED_TEST + "'random_calls'"

# Where rank 1 is slow, in every fourth call, so that others run ahead of what it has still to read or to write.
SLEEP = "if (s.call.rank == 1 && (s.epoch & 3) == {}) __nanosleep(100000);"
SLOW = {
    ONE_SHOT: [(ONE_SHOT, "const bool came = s.alive &&", SLEEP.format(2) + " const bool came = s.alive &&")],
    # The results are out, so the other rank may end the call and begin the next.
    TWO_SHOT: [(TWO_SHOT, "re_arm<Max>(s, partials, i);", SLEEP.format(2) + " re_arm<Max>(s, partials, i);")],
    # Before the contributions, but for those of CTA 0, which sends the header; before the sums, but for those of the
    # warp that sends the flags.
    DIRECT: [
        (
            DIRECT,
            "if (works && pushes && s.alive) {",
            f"if (blockIdx.x != 0) {{ {SLEEP.format(0)} }} if (works && pushes && s.alive) {{",
        ),
        (
            DIRECT,
            "const uint4 sum = sum_in",
            f"if (threadIdx.x >= kWarp) {{ {SLEEP.format(0)} }} const uint4 sum = sum_in",
        ),
    ],
    FUSED: [
        (
            "fused/decode_sm90.cuh",
            "reducers.reduce(work.tile_of(i));",
            SLEEP.format(2).replace("s.call", "a.call") + " reducers.reduce(work.tile_of(i));",
        )
    ],
}


@dataclass(frozen=True)
class CudaMutant(Mutant):
    """`file`, `old`, `new` as in tools/mutants.py; `tests`: arguments of pytest, one of which must fail."""

    units: tuple[str, ...] = ()  # sources of csrc/ that are compiled again
    slow: bool = False  # rank 1 is slow there
    ranks: int = 2  # on GPUs of their own as far as there are two; 4: on one, by tools/mps_rig.py
    control: bool = False  # its tests must pass


MUTANTS = [
    CudaMutant(
        "one_shot: slots are not re-armed",
        ONE_SHOT,
        "re_arm<Max>(s, from, a.part);",
        "(void)0;",
        SUMS.format("one_shot"),
        (ONE_SHOT,),
    ),
    CudaMutant(
        "one_shot: one parity for all slots",
        ONE_SHOT,
        "s.parity() * a.slot_bytes",
        "0 * a.slot_bytes",
        IN_A_ROW.format("one_shot"),
        (ONE_SHOT,),
        slow=True,
    ),
    CudaMutant(
        "one_shot: a slot is used again one call early",
        ONE_SHOT,
        "s.parity() * a.slot_bytes",
        "(s.epoch >> 1 & 1) * a.slot_bytes",
        IN_A_ROW.format("one_shot"),
        (ONE_SHOT,),
        slow=True,
    ),
    CudaMutant(
        "one_shot: no header is sent",
        LAUNCH,
        "if (speaks) send_headers(s);",
        "",
        SUMS.format("one_shot"),
        (ONE_SHOT,),
    ),
    CudaMutant(
        "norm: slots are not re-armed",
        NORM,
        "re_arm<Max>(s, slots, slot + chunk);",
        "(void)0;",
        NORM_TEST,
        (NORM,),
    ),
    CudaMutant(
        "norm: the mean is of one warp's squares",
        NORM,
        "warp < workers / kWarp; warp++",
        "warp < 1; warp++",
        NORM_TEST,
        (NORM,),
    ),
    CudaMutant(
        "one_shot: descriptors are not compared",
        PAD,
        "same &= got.x == descriptor_word",
        "same |= got.x == descriptor_word",
        FAILURES + "different_ops",
        (ONE_SHOT, SMALL),
    ),
    CudaMutant(
        "one_shot: a kernel that gives up writes no status",
        PAD,
        "if (atomicCAS(&pad->claimed, 0u, 1u) == 0) {",
        "if (atomicCAS(&pad->claimed, 0u, 1u) > 1u) {",
        FAILURES + "'missing_rank_is_named and one_shot-64'",
        (ONE_SHOT,),
    ),
    CudaMutant(
        "one_shot: what did not come is left as it was",
        ONE_SHOT,
        "store_chunk<Type, Plain>(a.out, chunk, a.count, is_aligned(a.out), all_bits_set());",
        "(void)0;",
        FAILURES + "'missing_rank_is_named and one_shot-64'",
        (ONE_SHOT,),
    ),
    CudaMutant(
        "one_shot: a broken group goes on",
        PAD,
        "return {call, last + 1, broken == 0};",
        "return {call, last + 1, broken < 2};",
        FAILURES + "replay_after_destroy",
        (ONE_SHOT,),
    ),
    CudaMutant(
        "two_shot: slots of partials are not re-armed",
        TWO_SHOT,
        "re_arm<Max>(s, partials, i);",
        "(void)0;",
        SUMS.format("two_shot and not direct"),
        (TWO_SHOT,),
    ),
    CudaMutant(
        "two_shot: slots of results are not re-armed",
        TWO_SHOT,
        "store_sys(slot, all_bits_set());",
        "(void)0;",
        SUMS.format("two_shot and not direct"),
        (TWO_SHOT,),
    ),
    CudaMutant(
        "two_shot: one parity for all slots",
        TWO_SHOT,
        "const size_t begin = a.slots + s.parity() * a.slot_bytes;",
        "const size_t begin = a.slots;",
        IN_A_ROW.format("two_shot and not direct"),
        (TWO_SHOT,),
        slow=True,
    ),
    CudaMutant(
        "reduce_scatter: slots are not re-armed",
        TWO_SHOT,
        "re_arm<Max>(s, slots, i);",
        "(void)0;",
        COLLECTIVES + "'reduce_scatter and bfloat16'",
        (TWO_SHOT,),
    ),
    CudaMutant(
        "direct: contributions are summed before they have come",
        DIRECT,
        "await_flag(s, lane, &PadCuda::arrived)",
        "true",
        IN_A_ROW.format("direct"),  # the last call's contributions are others
        (DIRECT,),
        slow=True,
    ),
    CudaMutant(
        "direct: no done flag is awaited",
        DIRECT,
        "if (fine) fine = finish(s);\n  const std::byte* result",
        "const std::byte* result",
        SUMS.format("direct"),
        (DIRECT,),
    ),
    CudaMutant(
        "direct: done flags are sent before the share is written",
        PAD,
        "__syncthreads();  // the release below covers what the whole CTA wrote and read before this\n",
        "",
        SUMS.format("direct"),  # each is looked at before the next; every fourth, the slow one, is in place
        (DIRECT,),
        slow=True,
    ),
    CudaMutant(
        "small copies: an older copy counts",
        SMALL,
        "return got.y == s.epoch && got.w == s.epoch;",
        "return got.y != 0 && got.w != 0;",
        COLLECTIVES + "'all_gather_and and bfloat16'",
        (SMALL,),
    ),
    CudaMutant(
        "fused: slots are not re-armed",
        "fused/reducer_sm90.cuh",
        "store_slot(slot(tile, r, c, place), all_bits_set());",
        "(void)place;",
        TOKENS,
        (FUSED,),
    ),
    CudaMutant(
        "fused: the last tile is not re-armed",
        "fused/reducer_sm90.cuh",
        "store_slot(slot(tile, r, c, place), all_bits_set());",
        "if (tile != a.tiles - 1) store_slot(slot(tile, r, c, place), all_bits_set());",
        TOKENS,
        (FUSED,),
    ),
    CudaMutant(
        "fused: one parity for all slots",
        "fused/tile_sm90.cuh",
        "s.parity() * a.slot_bytes",
        "0 * a.slot_bytes",
        FUSED_IN_A_ROW,
        (FUSED,),
        slow=True,
    ),
    CudaMutant(
        "fused: headers are not awaited",
        "fused/decode_sm90.cuh",
        "if (signals) await_headers(s);",
        "(void)signals;",
        FUSED_TEST + "'disagree and bias'",
        (FUSED,),
    ),
    CudaMutant(
        "fused: every weight is static",
        FUSED,
        "args.parts = config.k_parts;",
        "args.parts = config.k_parts;\n  args.static_weight = args.partial == nullptr;",
        FUSED_TEST + "'written_by_the_kernel and all_reduce_'",
        (FUSED,),
    ),
    CudaMutant(
        "fused, pairs of CTAs: the other half of k is added before it has come",
        "fused/decode_sm90.cuh",
        "barrier_wait_cluster(came, (i >> 1) & 1);",
        "",
        FUSED_TEST + "'pairs_of_ctas and bfloat16 and 2048'",
        (FUSED,),
    ),
    CudaMutant(
        "fused, two-shot: slots of results are not re-armed",
        "fused/reducer_sm90.cuh",
        "store_slot(result(tile, c), all_bits_set());",
        "(void)0;",
        TOKENS,
        (FUSED,),
        ranks=4,
    ),
    CudaMutant(
        "fused, two-shot: results of the last tile are not collected",
        "fused/decode_sm90.cuh",
        "if (reducers.two_shot() && before >= 0) reducers.collect(before);\n  }\n",
        "}\n",
        TOKENS,
        (FUSED,),
        ranks=4,
    ),
    CudaMutant(
        "prefill, more ranks: flags of partials are not re-armed",
        "fused/prefill_owners_sm90.cuh",
        "if (waits) store_sys(flag, kSentinel);",
        "(void)0;",
        MANY_TOKENS,
        (PREFILL,),
        ranks=4,
    ),
    CudaMutant(
        "prefill: every weight is static",
        PREFILL,
        "args.share = config.share;",
        "args.share = config.share;\n  args.static_weight = args.partial == nullptr;",
        PREFILL_TEST + "'written_by_the_kernel and all_reduce_'",
        (PREFILL,),
    ),
    CudaMutant(
        "prefill, two ranks: slots are not re-armed",
        "fused/prefill_exchange_sm90.cuh",
        "store_slot(from + end.within(c), all_bits_set());",
        "(void)0;",
        MANY_TOKENS,
        (PREFILL,),
    ),
    CudaMutant(
        "prefill, last tile: the halves' stages are filled while a whole tile's are read",
        "fused/prefill_tile_sm90.cuh",
        "        barrier_wait(&ring.empty[before.stage], before.parity);\n        before.next(ring.stages);\n",
        "",
        MANY_TOKENS,
        (PREFILL,),
    ),
    CudaMutant(
        "prefill, last tile: a half is sent before it is in staging",
        "fused/prefill_exchange_sm90.cuh",
        "      await_math<T>(h, lane, last + 1 + half);\n",
        "",
        MANY_TOKENS,
        (PREFILL,),
    ),
]
# What must pass: the library as it is, and a slow rank 1.
CONTROLS = [
    CudaMutant("(control) a slow rank: " + Path(unit).stem, unit, "", "", tests, (unit,), slow=True, control=True)
    for unit, tests in (
        (ONE_SHOT, IN_A_ROW.format("one_shot")),
        (TWO_SHOT, IN_A_ROW.format("two_shot and not direct")),
        (DIRECT, COLLECTIVES + "'(calls_in_a_row or (all_reduce_gives and bfloat16)) and direct'"),
        (FUSED, FUSED_IN_A_ROW),
    )
]
# Instances for more than two ranks, which a mutant of two ranks does not need; it is compiled in half the time.
NARROW = (LAUNCH, "return f(Constant<{}>{{}});")


def chosen_by(only: str | None) -> list[CudaMutant]:
    """Those whose name contains `only`, behind the controls of their sleeps."""
    found = with_name([*CONTROLS, *MUTANTS], only, "list")
    slow = {m.units[0] for m in found if m.slow}
    return [c for c in CONTROLS if c in found or c.units[0] in slow] + [m for m in found if not m.control]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


# --- build ----------------------------------------------------------------------------------------------------------


def edit(csrc: Path, mutant: Mutant, file: str, old: str, new: str) -> None:
    path = csrc / file
    text = path.read_text()
    if text.count(old) != 1:
        raise SystemExit(f"mutant '{mutant.name}': its line occurs {text.count(old)} times in csrc/{file}, expected 1")
    path.write_text(text.replace(old, new))


def build_folder() -> Path:
    found = sorted((ROOT / "build").glob("torch-*-cuda*/build.ninja"))
    if not found:
        raise SystemExit("mutants_cuda: no CUDA build here: SGLANG_SYMM_CUDA=1 python setup.py build_ext --inplace")
    return found[-1].parent


def commands(folder: Path) -> dict[str, str]:
    """Source in csrc/ -> the command that compiles it."""
    ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
    text = subprocess.run([ninja, "-C", folder, "-t", "commands"], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in text.splitlines():
        match = re.search(r"-c (\S*?/csrc/(\S+)) -o ", line)
        if match:
            found[match.group(2)] = line
    return found


def build(mutant: CudaMutant, folder: Path, compile_with: dict[str, str], out: Path) -> None:
    import torch

    with tempfile.TemporaryDirectory(prefix="mutant-") as temporary:
        work = Path(temporary)
        shutil.copytree(ROOT / "csrc", work / "csrc")
        if not mutant.control:
            edit(work / "csrc", mutant, mutant.file, mutant.old, mutant.new)
        if mutant.slow:
            for slow in SLOW[mutant.units[0]]:
                edit(work / "csrc", mutant, *slow)
        if mutant.ranks == 2:
            path = work / "csrc" / NARROW[0]
            text = path.read_text()
            for more in (4, 8, 16):
                text = text.replace(NARROW[1].format(more), NARROW[1].format(2))
            path.write_text(text)
        objects = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.o"))}
        for unit in mutant.units:
            target = work / Path(unit).with_suffix(".o").name
            name = str(Path("csrc", unit).with_suffix(".o"))
            command = compile_with[unit].replace(str(folder / name), str(target)).replace("--Werror=all-warnings", "")
            command = command.replace(str(ROOT / "csrc"), str(work / "csrc"))
            subprocess.run(command, shell=True, check=True, cwd=work)
            objects[name] = target
        libraries = Path(torch.__file__).parent / "lib"
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        link = ["g++", "-shared", *map(str, objects.values()), f"-L{libraries}", f"-L{home}/lib64"]
        link += ["-lc10", "-ltorch", "-ltorch_cpu", "-lcudart", "-lc10_cuda", "-ltorch_cuda"]
        library = out / f"{slug(mutant.name)}.so"
        subprocess.run([*link, "-Wl,--as-needed", "-Wl,-s", "-o", str(library)], check=True)


# --- run ------------------------------------------------------------------------------------------------------------


def tree(library: Path, target: Path) -> None:
    """What the tests need, with this library."""
    for part in ("sglang_symm", "tests", "tools"):
        shutil.copytree(ROOT / part, target / part, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    shutil.copyfile(ROOT / "pyproject.toml", target / "pyproject.toml")
    shutil.copyfile(library, target / "sglang_symm" / "_C.abi3.so")


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them: two at most. Raises SystemExit when there is none."""
    import torch

    count = min(torch.cuda.device_count(), 2)
    if count == 0:
        raise SystemExit("mutants_cuda: run needs a GPU, and torch sees none here (nvidia-smi tells why)")
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:count]


def start(mutant: CudaMutant, target: Path, log: Path, gpu: str | None) -> list[subprocess.Popen[bytes]]:
    """Ranks on GPUs of their own, or, with `gpu`, all on that one."""
    tests = re.findall(r"'([^']*)'|(\S+)", mutant.tests)
    pytest = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(a or b for a, b in tests)]
    env = {
        **os.environ,
        "PYTHONPATH": str(target),
        "SGLANG_SYMM_TEST_TIMEOUT": "4",
        "SGLANG_SYMM_FIRST_TIMEOUT": "10",
        "OMP_NUM_THREADS": "1",
    }
    with open(log, "wb") as output:
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = gpu
            command = [sys.executable, "tools/mps_rig.py", "--ranks", str(mutant.ranks), "--", *pytest]
            return [subprocess.Popen(command, cwd=target, env=env, stdout=output, stderr=output)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            subprocess.Popen(
                [sys.executable, *pytest],
                cwd=target,
                env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=output,
            )
            for rank in (0, 1)
        ]


class Outcome(NamedTuple):
    noticed: bool  # the tests failed
    how: str
    at_limit: bool = False  # they had to be ended


def try_mutant(mutant: CudaMutant, library: Path, limit: float, gpu: str | None) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        target, log = Path(folder), Path(folder, "log")
        tree(library, target)
        begin = time.monotonic()
        ranks = start(mutant, target, log, gpu)
        while any(rank.poll() is None for rank in ranks) and time.monotonic() - begin < limit:
            if any(rank.returncode for rank in ranks) and time.monotonic() - begin > 10:
                limit = min(limit, time.monotonic() - begin + 5)  # its peer waits in vain
            time.sleep(0.1)
        late = [rank for rank in ranks if rank.poll() is None]
        crashed = any(rank.returncode for rank in ranks)
        for rank in late:
            rank.send_signal(signal.SIGKILL if gpu is None else signal.SIGTERM)  # the rig ends its ranks
        for rank in ranks:
            rank.wait()
        text = log.read_text(errors="replace")
        failed = re.findall(r"^(?:\[rank \d+\] )?(?:FAILED|ERROR) (\S+)", text, re.M)
        passed = re.findall(r"(\d+) passed", text)
        if failed:
            return Outcome(True, failed[0])
        if crashed:
            return Outcome(True, f"no test failed, exit status {[rank.returncode for rank in ranks]}: {text[-300:]}")
        if late:
            return Outcome(True, f"still waiting after {limit:.0f} s", at_limit=True)
        return Outcome(False, f"{passed[0] if passed else 'no'} passed")


def all_of(selections: list[str]) -> str:
    """One selection of all tests of several."""
    split = [selection.split(" -k ") for selection in selections]
    files = sorted({file for file, _ in split})
    names = sorted({names.strip("'") for _, names in split})
    return " ".join(files) + " -k '" + " or ".join(f"({name})" for name in names) + "'"


def run(folder: Path, jobs: int, limit: float, only: str | None) -> int:
    wanted = chosen_by(only)
    chosen = [m for m in wanted if (folder / f"{slug(m.name)}.so").is_file()]
    if not chosen:
        raise SystemExit(
            f"mutants_cuda: expected a library of a mutant in {folder}, as {slug(wanted[-1].name)}.so, found none: "
            f"python tools/mutants_cuda.py build --out {folder}, where nvcc is"
        )
    plain = []
    for ranks in sorted({m.ranks for m in chosen}):
        name = f"(control) the library as it is, {ranks} ranks"
        tests = all_of([m.tests for m in chosen if m.ranks == ranks])
        plain.append(CudaMutant(name, "", "", "", tests, ranks=ranks, control=True))
    original = ROOT / "sglang_symm" / "_C.abi3.so"
    gpus = visible_gpus()
    if len(gpus) == 1 and "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        jobs = 1  # an MPS that all would use: ranks of two mutants would be given the same part of the GPU
    begin = time.monotonic()

    def shared(mutant: CudaMutant) -> bool:
        return mutant.ranks > len(gpus)

    def attempt(numbered: tuple[int, CudaMutant]) -> Outcome:
        number, mutant = numbered
        start = time.monotonic()
        library = original if mutant in plain else folder / f"{slug(mutant.name)}.so"
        gpu = gpus[number % len(gpus)] if shared(mutant) else None
        found = try_mutant(mutant, library, 4 * limit if mutant.control else limit, gpu)
        mark = ("CAUGHT" if found.noticed else "passes") if mutant.control else "SURVIVED"
        if found.noticed and not mutant.control:
            mark = "caught (ended at the limit)" if found.at_limit else "caught"
        print(f"{mark:8} {mutant.name}: {found.how} ({time.monotonic() - start:.0f} s)", flush=True)
        return found

    def several(those: list[CudaMutant], at_once: int) -> dict[CudaMutant, Outcome]:
        with ThreadPoolExecutor(at_once) as pool:
            return dict(zip(those, pool.map(attempt, enumerate(those))))

    everything = [*plain, *chosen]
    with ThreadPoolExecutor(2) as pool:  # those of the rig beside the others
        rig = pool.submit(several, [m for m in everything if shared(m)], max(1, jobs // 4) if len(gpus) > 1 else jobs)
        found = several([m for m in everything if not shared(m)], jobs) | rig.result()
    passing = {m.units[0] for m in CONTROLS if m in found and not found[m].noticed}
    right = {m: outcome.noticed != m.control for m, outcome in found.items()}
    ended = [m for m, outcome in found.items() if outcome.at_limit and not m.control]
    for mutant in ended:
        if mutant.slow and mutant.units[0] not in passing:
            right[mutant] = False
            print(f"UNCLEAR  {mutant.name}: ended at the limit, and no control of the same sleep has passed")
    yes, limited = sum(right.values()), f", {len(ended)} ended at the limit" if ended else ""
    print(f"{yes} as expected, {len(right) - yes} not{limited}, {time.monotonic() - begin:.0f} s")
    return 0 if all(right.values()) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["list", "build", "run"])
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="of the libraries, for run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the libraries, for build")
    parser.add_argument("--only", metavar="NAME", help="those whose name contains NAME")
    parser.add_argument("--jobs", type=int, default=4, help="mutants at a time (default 4)")
    parser.add_argument("--limit", type=float, default=45.0, help="seconds after which waiting tests count as failed")
    args = parser.parse_args()
    if args.do == "run":
        if args.folder is None or args.jobs < 1:
            parser.error("expected run FOLDER, where build --out FOLDER has left the libraries, and --jobs >= 1")
        return run(args.folder, args.jobs, args.limit, args.only)
    if args.do == "build" and args.out is None:
        parser.error("expected build --out FOLDER, where the libraries go")
    chosen = chosen_by(args.only)
    if args.do == "list":
        for mutant in chosen:
            print(f"{mutant.name}  (csrc/{mutant.file}; {mutant.tests})")
        return 0
    folder = build_folder()
    compile_with = commands(folder)
    args.out.mkdir(parents=True, exist_ok=True)
    for number, mutant in enumerate(chosen, 1):
        begin = time.monotonic()
        build(mutant, folder, compile_with, args.out)
        print(f"{number:2}/{len(chosen)} {mutant.name} ({time.monotonic() - begin:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
