"""Runs the tests: C++ unit tests, CUDA kernels on a CPU, tests of one process and over several ranks, fault tests.

    python tools/run_tests.py [part ...]                  parts: cpp kernels single ranks1 ... ranks8 faults
    python tools/run_tests.py --device cuda [part ...]    parts: gpus2 over2 rig3 rig4 ...; --list names this machine's,
                                                          and those that run only when they are named

On GPUs parts run side by side, each on GPUs of its own; what a part printed is shown when it has ended. On the CPU they
run in turn, but for the kernels, which take one core once they are compiled: beside what follows. A part that takes
longer than --limit seconds is ended; what its ranks had told until then counts, and it is a failure.

The last line is the sum over all parts: `N passed, N failed, N skipped`. A test over ranks counts once in each run, as
failed when it failed on any rank. With CI=true a missing GoogleTest is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "tests"
# Every test over ranks runs with these; those marked world_size(1), (6) or (8) with these too.
RANKS, MARKED_RANKS = (2, 3, 4), (1, 6, 8)
# Programs of GoogleTest, and what builds and runs each in tests/cpp/Makefile.
GTESTS = {"cpp": "run", "kernels": "run-kernels"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
NO_GTEST = """\
The C++ unit tests were left out: GoogleTest was not found.
To run them: apt-get install -y libgtest-dev (Debian, Ubuntu), then make test again."""


@dataclass(eq=False)
class Part:
    """One program that runs tests, and what came of it."""

    name: str
    command: list[str]
    limit: float = 900.0  # seconds
    env: dict[str, str] = field(default_factory=dict)
    ranks: int = 1
    gpus: int = 0
    unasked: bool = True  # runs when no part is named
    program: bool = False  # no tests of its own: its status counts as one
    beside: bool = False  # on the CPU: the parts behind it do not wait for it
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""
    begin: float = 0.0
    held: bool = False  # its output is in a file
    process: subprocess.Popen[bytes] = field(init=False, repr=False)

    @property
    def folder(self) -> Path:
        return OUT / self.name

    def start(self, devices: list[str] | None = None, held: bool = False) -> None:
        """On GPUs, as CUDA_VISIBLE_DEVICES names them; `held`: its output goes to a file, for show()."""
        self.held = held
        where = f" (GPU {', '.join(devices)})" if devices else " (beside the next)" if held else ""
        print(f"\n=== {self.name}{where}: {' '.join(self.command)}", flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        env = {**os.environ, **self.env, "SGLANG_SYMM_TEST_RESULTS": str(self.folder)}
        out = None
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        if held:
            out = (self.folder / "output").open("wb")
        self.begin = time.monotonic()
        # A session of its own: what it started ends with it.
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env=env, stdout=out, stderr=out and subprocess.STDOUT, start_new_session=True
        )
        if out is not None:
            out.close()

    def has_ended(self) -> bool:
        """Whether it has; it is ended when its time is over, and counted when it has ended."""
        status = self.process.poll()
        late = status is None
        if late:
            if time.monotonic() - self.begin < self.limit:
                return False
            stop(self.process)
        self.seconds = time.monotonic() - self.begin
        self.count()
        if late:
            self.failed += 1
            self.note = f"did not end within {self.limit:.0f} s"
        elif status == 0 and self.program:
            self.passed = 1
        elif status != 0 and self.failed == 0:
            self.failed = 1
            self.note = self.note or f"ended with status {status}"
        return True

    def show(self) -> None:
        print(f"\n--- {self.name}:\n{(self.folder / 'output').read_text(errors='replace')}", flush=True)

    def count(self) -> None:
        if self.name in GTESTS:
            self.count_gtest()
            return
        reports = [json.loads(path.read_text()) for path in sorted(self.folder.glob("rank*.json"))]
        if not reports:
            return
        failed = {test for report in reports for test, outcome in report.items() if outcome == "failed"}
        fine = {test: outcome for test, outcome in reports[0].items() if test not in failed}
        self.failed = len(failed)
        self.skipped = sum(outcome == "skipped" for outcome in fine.values())
        self.passed = len(fine) - self.skipped
        if len(reports) < self.ranks and not failed:
            self.failed, self.note = 1, f"{self.ranks - len(reports)} of {self.ranks} ranks left no result"

    def count_gtest(self) -> None:
        path = self.folder / "gtest.json"
        if not path.is_file():
            return
        report = json.loads(path.read_text())
        tests = [test for suite in report["testsuites"] for test in suite["testsuite"]]
        self.failed = sum("failures" in test for test in tests)
        self.skipped = sum(test["result"] == "SKIPPED" or test["status"] == "NOTRUN" for test in tests)
        self.passed = len(tests) - self.failed - self.skipped


def stop(process: subprocess.Popen[bytes]) -> int:
    """End a part. torchrun's ranks lie in sessions of their own and only it knows them, so it is asked first."""
    if process.poll() is not None:
        return process.returncode
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.wait(60)  # torchrun itself gives its ranks 30 s
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def has_gtest() -> bool:
    check = ["make", "--no-print-directory", "-s", "-C", "tests/cpp", "check"]
    return subprocess.run(check, cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 0


def gtest_part(name: str) -> Part:
    flags = f"GTEST_FLAGS=--gtest_output=json:{OUT / name / 'gtest.json'}"
    command = ["make", "--no-print-directory", "-C", "tests/cpp", GTESTS[name], flags]
    return Part(name, command, beside=name == "kernels")


def pytest_part(name: str, *args: str) -> Part:
    return Part(name, [sys.executable, "-m", "pytest", "-q", *args])


def ranks_part(ranks: int) -> Part:
    chosen = ["-m", "world_size"] if ranks in MARKED_RANKS else []
    part = pytest_part(f"ranks{ranks}", "tests/distributed", *chosen)
    part.command = [*TORCHRUN, f"--nproc-per-node={ranks}", *part.command[1:]]
    part.ranks = ranks
    part.env = {"OMP_NUM_THREADS": "1"}  # ranks share the cores
    return part


def over_gpus(name: str, gpus: int, *tests: str) -> Part:
    part = pytest_part(name, *tests)
    part.command = [*TORCHRUN, f"--nproc-per-node={gpus}", *part.command[1:]]
    part.ranks = part.gpus = gpus
    return part


def on_the_rig(ranks: int, *tests: str) -> Part:
    part = pytest_part(f"rig{ranks}", *tests)
    part.command = [sys.executable, "tools/mps_rig.py", "--ranks", str(ranks), "--", *part.command[1:]]
    part.ranks, part.gpus = ranks, 1
    return part


def gpu_parts() -> list[Part]:
    """Ranks on GPUs of their own as far as there are; more share one (tools/mps_rig.py): SmolLM2's heads divide by 3,
    attention-TP is neither 1 nor all of TP at 2x2 and 2x3 alone, and the fused kernels serve 2, 4 and 8 ranks."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus == 0:
        raise SystemExit("run_tests: --device cuda, but torch sees no GPU here (nvidia-smi tells why)")
    if gpus > 1:
        print(f"up to {gpus} ranks have a GPU each; more share one through MPS (tools/mps_rig.py)", flush=True)
    else:
        print(
            "one GPU: ranks share it through MPS (tools/mps_rig.py). Left out, as they need a GPU a rank: "
            "tests/distributed over NCCL's process group, and kill tests",
            flush=True,
        )
    llama, collectives = "tests/gpu/test_llama.py", "tests/gpu/test_collectives.py"
    models = [llama, "tests/gpu/test_smollm2.py"]
    wanted = {2: ["tests/gpu"], 4: ["tests/gpu"], 3: [collectives, *models], 6: models}
    wanted[8] = [f"tests/gpu/test_{name}.py" for name in ("collectives", "failures", "fused", "fused_proof", "norm")]
    wanted.setdefault(gpus, ["tests/gpu"])
    parts = []
    for ranks, tests in wanted.items():
        if ranks > gpus:
            parts.append(on_the_rig(ranks, *tests))
        elif ranks > 1:
            parts.append(over_gpus(f"gpus{ranks}", ranks, *tests))
            if ranks in (2, gpus):
                parts.append(over_gpus(f"over{ranks}", ranks, "tests/distributed"))
                parts[-1].env = {"SGLANG_SYMM_TEST_DEVICE": "cuda"}
    if gpus > 1:
        for name, file in {"kill2": "kill_a_peer.py", "killnccl2": "kill_a_peer_nccl.py"}.items():
            parts.append(Part(name, [sys.executable, f"tests/gpu/{file}"], ranks=2, gpus=2, program=True))
    # The largest first: the small ones fill what is left.
    return sorted(parts, key=lambda part: -part.gpus) + long_parts(gpus)


def long_parts(gpus: int) -> list[Part]:
    """Proofs between two ranks that take minutes, and what runs only when it is named."""
    proof = "tests/gpu/test_fused_proof.py"
    calls = over_gpus("long2", 2, proof, "-s") if gpus > 1 else on_the_rig(2, proof, "-s")
    calls.name = "long2"
    calls.env = {"SGLANG_SYMM_TEST_FUSED_CALLS": "1000000", "SGLANG_SYMM_TEST_FUSED_SECONDS": "240"}
    reports = ["--reports", str(OUT / "memcheck2")]
    memcheck = [sys.executable, "tests/gpu/small_calls.py", "--sanitizer", "memcheck", *reports]
    mutants = [sys.executable, "tools/mutants_cuda.py", "run", "build/mutants_cuda"]
    programs = {"memcheck2": memcheck, "mutants2": mutants}
    parts = [calls, *(Part(name, run, gpus=min(gpus, 2), program=True) for name, run in programs.items())]
    # Numbers that neither two nor three divides: shares are uneven, and registers are for more sources than there are.
    # 16 are the most.
    parts += [on_the_rig(ranks, "tests/gpu/test_collectives.py") for ranks in (5, 7, 16)]
    for part in parts:
        part.unasked = False
    return parts


def run_side_by_side(parts: list[Part]) -> None:
    """Each part on GPUs of its own, as soon as there are enough of them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    free = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    waiting, running = list(parts), list[tuple[Part, list[str]]]()
    try:
        while waiting or running:
            for part in list(waiting):
                if part.gpus <= len(free):
                    waiting.remove(part)
                    devices = [free.pop(0) for _ in range(part.gpus)]
                    part.start(devices, held=True)
                    running.append((part, devices))
            for part, devices in list(running):
                if part.has_ended():
                    running.remove((part, devices))
                    free += devices
                    part.show()
            time.sleep(0.05)
    except BaseException:  # Ctrl-C, or a signal to end
        for part, _ in running:
            stop(part.process)
        raise


def run_in_turn(parts: list[Part]) -> None:
    """One after the other, but for those that run beside what follows them."""
    running = list[Part]()

    def wait_for(part: Part) -> None:
        while part in running:
            for other in list(running):
                if other.has_ended():
                    running.remove(other)
                    if other.held:
                        other.show()
            time.sleep(0.05)

    try:
        for part in parts:
            part.start(held=part.beside and part is not parts[-1])
            running.append(part)
            if not part.held:
                wait_for(part)
        for part in parts:
            wait_for(part)
    except BaseException:  # Ctrl-C, or a signal to end
        for part in running:
            stop(part.process)
        raise


def all_parts(device: str) -> list[Part]:
    if device == "cuda":
        return gpu_parts()
    single = ["tests", "--ignore=tests/distributed", "--ignore=tests/faults", "--ignore=tests/gpu"]
    parts = [*(gtest_part(name) for name in GTESTS), pytest_part("single", *single)]
    if (ROOT / "tests" / "distributed").is_dir():
        parts += [ranks_part(ranks) for ranks in (*RANKS, *MARKED_RANKS)]
    if (ROOT / "tests" / "faults").is_dir():
        parts.append(pytest_part("faults", "tests/faults"))
    return parts


def summary(parts: list[Part], seconds: float, gtest_missing: bool) -> str:
    rows = [f"{'part':10}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    for part in parts:
        row = f"{part.name:10}{part.passed:8}{part.failed:8}{part.skipped:9}{part.seconds:9.0f}"
        rows.append(f"{row}  {part.note}".rstrip())
    rows.append(f"total time: {seconds:.0f} s")
    if gtest_missing:
        rows.append(NO_GTEST)
    totals = [sum(getattr(part, name) for part in parts) for name in ("passed", "failed", "skipped")]
    rows.append("{} passed, {} failed, {} skipped".format(*totals))
    return "\n".join(rows)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--limit", type=float, metavar="S", help="end a part after S seconds (default: 900)")
    parser.add_argument("--list", action="store_true", help="name the parts and what they run")
    args = parser.parse_args()
    parts = all_parts(args.device)
    unknown = set(args.parts) - {part.name for part in parts}
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}: expected {', '.join(part.name for part in parts)}")
    parts = [part for part in parts if (part.name in args.parts if args.parts else part.unasked)]
    if args.list:
        for part in parts:
            print(f"{part.name:10}{'' if part.unasked else '(when named) '}{' '.join(part.command)}")
        return 0
    for part in parts:
        part.limit = args.limit or part.limit
    gtest_missing = any(part.name in GTESTS for part in parts) and not has_gtest()
    if gtest_missing:
        if os.environ.get("CI") == "true":
            print(NO_GTEST, file=sys.stderr)
            return 1
        parts = [part for part in parts if part.name not in GTESTS]
    begin = time.monotonic()
    (run_side_by_side if args.device == "cuda" else run_in_turn)(parts)
    print("\n" + summary(parts, time.monotonic() - begin, gtest_missing), flush=True)
    return 1 if any(part.failed for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
