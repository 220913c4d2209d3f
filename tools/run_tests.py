"""Runs the tests: C++ unit tests, tests of one process, tests over several ranks, fault tests.

    python tools/run_tests.py [part ...]                  parts: cpp single ranks1 ... ranks8 faults (default: all)
    python tools/run_tests.py --device cuda [part ...]    parts: gpus2 over2 rig3 rig4 rig6; with one GPU: rig2 ...

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
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
NO_GTEST = """\
The C++ unit tests were left out: GoogleTest was not found.
To run them: apt-get install -y libgtest-dev (Debian, Ubuntu), then make test again."""


@dataclass
class Part:
    """One program that runs tests, and what came of it."""

    name: str
    command: list[str]
    limit: float = 900.0  # seconds
    env: dict[str, str] = field(default_factory=dict)
    ranks: int = 1
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""

    @property
    def folder(self) -> Path:
        return OUT / self.name

    def run(self) -> None:
        print(f"\n=== {self.name}: {' '.join(self.command)}", flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        env = {**os.environ, **self.env, "SGLANG_SYMM_TEST_RESULTS": str(self.folder)}
        start = time.monotonic()
        # A session of its own: what it started ends with it.
        process = subprocess.Popen(self.command, cwd=ROOT, env=env, start_new_session=True)
        try:
            status = process.wait(self.limit)
        except subprocess.TimeoutExpired:
            status, self.note = stop(process), f"did not end within {self.limit:.0f} s"
        except BaseException:  # Ctrl-C, or a signal to end
            stop(process)
            raise
        self.seconds = time.monotonic() - start
        self.count()
        if status != 0 and self.failed == 0:
            self.failed = 1
            self.note = self.note or f"ended with status {status}"

    def count(self) -> None:
        if self.name == "cpp":
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
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.wait(60)  # torchrun itself gives its ranks 30 s
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def has_gtest() -> bool:
    check = ["make", "--no-print-directory", "-s", "-C", "tests/cpp", "check"]
    return subprocess.run(check, cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 0


def cpp_part() -> Part:
    flags = f"GTEST_FLAGS=--gtest_output=json:{OUT / 'cpp' / 'gtest.json'}"
    return Part("cpp", ["make", "--no-print-directory", "-C", "tests/cpp", "run", flags])


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
    part.ranks = gpus
    return part


def on_the_rig(ranks: int, *tests: str) -> Part:
    part = pytest_part(f"rig{ranks}", *tests)
    part.command = [sys.executable, "tools/mps_rig.py", "--ranks", str(ranks), "--", *part.command[1:]]
    part.ranks = ranks
    return part


def gpu_parts() -> list[Part]:
    """Ranks on the GPUs of this machine, and what needs more ranks on the first of them (tools/mps_rig.py): SmolLM2's
    heads divide by 3, and attention-TP is neither 1 nor all of TP at 2x2 and 2x3 alone."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus == 0:
        raise SystemExit("run_tests: --device cuda, but torch sees no GPU here (nvidia-smi tells why)")
    if gpus > 1:
        print(f"ranks on {gpus} GPUs; more ranks share the first through MPS (tools/mps_rig.py)", flush=True)
        distributed = over_gpus(f"over{gpus}", gpus, "tests/distributed")
        distributed.env = {"SGLANG_SYMM_TEST_DEVICE": "cuda"}
        parts = [over_gpus(f"gpus{gpus}", gpus, "tests/gpu"), distributed]
    else:
        print(
            "one GPU: ranks share it through MPS (tools/mps_rig.py). Left out: tests/distributed, whose process group "
            "is NCCL's, and kill tests, which need a GPU a rank",
            flush=True,
        )
        parts = [on_the_rig(2, "tests/gpu")]
    models = ("tests/gpu/test_collectives.py", "tests/gpu/test_llama.py")
    parts += [on_the_rig(3, *models), on_the_rig(4, "tests/gpu"), on_the_rig(6, "tests/gpu/test_llama.py")]
    return [part for part in parts if part.ranks > gpus or not part.name.startswith("rig")]


def all_parts(device: str) -> list[Part]:
    if device == "cuda":
        return gpu_parts()
    single = ["tests", "--ignore=tests/distributed", "--ignore=tests/faults", "--ignore=tests/gpu"]
    parts = [cpp_part(), pytest_part("single", *single)]
    if (ROOT / "tests" / "distributed").is_dir():
        parts += [ranks_part(ranks) for ranks in (*RANKS, *MARKED_RANKS)]
    if (ROOT / "tests" / "faults").is_dir():
        parts.append(pytest_part("faults", "tests/faults"))
    return parts


def summary(parts: list[Part], gtest_missing: bool) -> str:
    rows = [f"{'part':10}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    for part in parts:
        row = f"{part.name:10}{part.passed:8}{part.failed:8}{part.skipped:9}{part.seconds:9.0f}"
        rows.append(f"{row}  {part.note}".rstrip())
    rows.append(f"total time: {sum(part.seconds for part in parts):.0f} s")
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
    args = parser.parse_args()
    parts = all_parts(args.device)
    unknown = set(args.parts) - {part.name for part in parts}
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}: expected {', '.join(part.name for part in parts)}")
    parts = [part for part in parts if not args.parts or part.name in args.parts]
    gtest_missing = any(part.name == "cpp" for part in parts) and not has_gtest()
    if gtest_missing:
        if os.environ.get("CI") == "true":
            print(NO_GTEST, file=sys.stderr)
            return 1
        parts = [part for part in parts if part.name != "cpp"]
    for part in parts:
        part.run()
    print("\n" + summary(parts, gtest_missing), flush=True)
    return 1 if any(part.failed for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
