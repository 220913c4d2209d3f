"""Break the protocol on purpose, one line at a time, and require that the C++ unit tests notice.

A mutant is a small edit of a copy of csrc/: a signal that is dropped, a wait that is skipped, a parity that is not
used. Each is built with the unit tests of tests/cpp and must make them fail (an assertion, an error or the time limit).
A mutant that survives means that a line of the protocol is proven by nothing.

    python tools/mutants.py [--list] [--only NAME] [--limit SECONDS]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
TRIES = 3  # a mistake that needs two ranks to meet may pass once on a machine of two cores


@dataclass(frozen=True)
class Mutant:
    """One edit: `old` occurs once in `file` and becomes `new`; `tests` is a GoogleTest filter that must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str = "Group.*"


AnyMutant = TypeVar("AnyMutant", bound=Mutant)

MUTANTS = [
    Mutant(
        "no wait for the peers' headers",
        "signal/signal_cpu.cpp",
        "header(call, peer).epoch.load(std::memory_order_acquire) == call.epoch",
        "header(call, peer).epoch.load(std::memory_order_acquire) <= call.epoch",
    ),
    Mutant(
        "one parity for all calls",
        "signal/signal_cpu.h",
        "int next_parity() const { return static_cast<int>((epoch_ + 1) & 1); }",
        "int next_parity() const { return 0; }",
    ),
    Mutant(
        "one header for both parities",
        "signal/signal_cpu.h",
        "int parity() const { return static_cast<int>(epoch & 1); }",
        "int parity() const { return 0; }",
    ),
    Mutant(
        "no done flag is awaited",
        "signal/signal_cpu.cpp",
        "pad(rank_)->from[peer].done.load(std::memory_order_acquire) >= call.epoch",
        "pad(rank_)->from[peer].done.load(std::memory_order_acquire) <= call.epoch",
    ),
    Mutant(
        "a call that others gave up ends well",
        "signal/signal_cpu.cpp",
        "It wrote the abort record before it raised.\n  require_healthy();",
        "It wrote the abort record before it raised.\n",
        "Signal.*",
    ),
    Mutant(
        "a broken group hands out memory",
        "group/group.cpp",
        "void* block = arena_ && !broken ?",
        "void* block = arena_ ?",
    ),
    Mutant(
        "another user's process is a member",
        "rendezvous/peers.cpp",
        "peer_credentials(socket).uid == geteuid()",
        "peer_credentials(socket).uid != 4711",
        "Rendezvous.*",
    ),
    Mutant(
        "the header goes before its fields",
        "signal/signal_cpu.cpp",
        "header.offset_in = offset_in;",
        "header.epoch.store(call.epoch, std::memory_order_release); usleep(1000); header.offset_in = offset_in;",
    ),
    Mutant(
        "descriptors are not compared",
        "signal/signal_cpu.cpp",
        "if (descriptor_of(r) == reference) continue;",
        "if (descriptor_of(r) == reference || r > 0) continue;",
    ),
    Mutant(
        "a rank that left is not noticed",
        "signal/signal_cpu.cpp",
        "own_pad()->left.fetch_or(1u << peer, std::memory_order_release);",
        "(void)peer;",
    ),
    Mutant(
        "the first report does not win",
        "signal/signal_cpu.cpp",
        "std::memory_order_acq_rel)) return;",
        "std::memory_order_acq_rel)) what.kind == AbortKind::none ? void() : void();",
    ),
    Mutant(
        "the deadline is never looked at",
        "signal/signal_cpu.cpp",
        "return stop || now >= end_ns_;",
        "return stop;",
    ),
    Mutant(
        "offsets from peers are believed",
        "collective/collectives_cpu.cpp",
        "if (offset > arena_.bytes() || bytes > arena_.bytes() - offset) signal_.damaged(call, peer);",
        "if (offset > arena_.bytes() && bytes == 0) signal_.damaged(call, peer);",
    ),
    Mutant(
        "the result is written to this rank alone",
        "collective/collectives_cpu.cpp",
        "{sources.data(), world_size_, outputs.data(), world_size_, hi - lo,",
        "{sources.data(), world_size_, outputs.data() + rank_, 1, hi - lo,",
    ),
    Mutant(
        "a tensor in the arena is staged, its offset sent all the same",
        "collective/collectives_cpu.cpp",
        "if (!out_inside) copy_bytes(round.out, staging, bytes);",
        "if (out_inside) copy_bytes(round.out, staging, bytes);",
    ),
    Mutant(
        "rank order is lost",
        "collective/sum.cpp",
        "for (int r = 2; r < task.world_size; r++) {",
        "for (int r = task.world_size - 1; r > 2; r--) {",
        "Sum.*:Group.*",
    ),
    Mutant(
        "round half up instead of to even",
        "collective/sum.cpp",
        "0xFFFu + (m >> 13 & 1u)",
        "0x1000u",
        "Sum.*",
    ),
    Mutant(
        "neighbours are not merged",
        "memory/heap.cpp",
        "if (previous->first + previous->second == begin) {",
        "if (previous->first + previous->second == begin && bytes == 0) {",
        "Heap.*",
    ),
    Mutant(
        "a retired arena is unmapped under a live tensor",
        "memory/arena.cpp",
        "return retired_ && heap_.live_blocks() == 0;",
        "return retired_;",
        "ArenaRegistry.*",
    ),
    Mutant(
        "any stranger is a member",
        "rendezvous/peers.cpp",
        "if (result != Received::whole || !is_from_member(hello, token_, socket.get())) return false;",
        "if (result != Received::whole || (is_from_member(hello, token_, socket.get()), false)) return false;",
        "Rendezvous.*",
    ),
    # The protocol's model (tests/model) has the same mutants, and those that no test of the real thing can catch.
    Mutant(
        "the last peer's header is not awaited",
        "signal/signal_cpu.cpp",
        "step < world_size_; step++) {\n    const int peer",
        "step < world_size_ - 1; step++) {\n    const int peer",
        "Signal.*",
    ),
    Mutant(
        "the root of a broadcast awaits nobody",
        "signal/signal_cpu.cpp",
        "{ return header(call, peer).epoch",
        "{ return (call.descriptor.op == OpCode::broadcast && int(call.descriptor.aux) == rank_) || "
        "header(call, peer).epoch",
        "Signal.*",
    ),
    Mutant(
        "a reader of a broadcast awaits the root alone",
        "signal/signal_cpu.cpp",
        "{ return header(call, peer).epoch",
        "{ return (call.descriptor.op == OpCode::broadcast && int(call.descriptor.aux) != peer) || "
        "header(call, peer).epoch",
        "Signal.*",
    ),
    Mutant(
        "only the root of a broadcast sends a header",
        "signal/signal_cpu.cpp",
        "step < world_size_; step++) {  // the next rank first",
        "step < world_size_ && (descriptor.op != OpCode::broadcast || int(descriptor.aux) == rank_); step++) {  //",
        "Signal.*",
    ),
    Mutant(
        "a call of 0 elements sends no header",
        "signal/signal_cpu.cpp",
        "step < world_size_; step++) {  // the next rank first",
        "step < world_size_ && descriptor.count != 0; step++) {  //",
        "Signal.*",
    ),
    Mutant(
        "the slot is filled after the header is sent",
        "collective/collectives_cpu.cpp",
        "const uint64_t offset = stage(round.in, bytes, false);\n"
        "  const Call call = signal_.start(descriptor, offset, kNoOffset);\n",
        "std::byte* late = slot();\n"
        "  const Call call = signal_.start(descriptor, static_cast<uint64_t>(late - arena_.base()), kNoOffset);\n"
        "  usleep(1000);\n  copy_bytes(late, round.in, bytes);\n",
    ),
    Mutant(
        "the slot is filled before the abort record is looked at",
        "collective/collectives_cpu.cpp",
        "  signal_.require_healthy();\n  return arena_.base()",
        "  return arena_.base()",
    ),
    Mutant(
        "done is sent before the share is written",
        "collective/collectives_cpu.cpp",
        "  sum_in_rank_order({sources.data(), world_size_, outputs.data(),",
        "  signal_.finish(call);\n  usleep(1000);\n  sum_in_rank_order({sources.data(), world_size_, outputs.data(),",
    ),
    Mutant(
        "the abort record is complete before its fields",
        "signal/signal_cpu.cpp",
        "  target.kind = what.kind;\n",
        "  target.state.store(AbortRecord::kComplete);\n  usleep(1000);\n  target.kind = what.kind;\n",
        "Signal.*",
    ),
    Mutant(
        "an incomplete abort record is read",
        "signal/signal_cpu.cpp",
        "while (found.state.load(std::memory_order_acquire) == AbortRecord::kBeingWritten) {",
        "while (found.state.load(std::memory_order_acquire) == AbortRecord::kEmpty) {",
        "Signal.*",
    ),
    Mutant(
        "a reader without patience reads an incomplete record",
        "signal/signal_cpu.cpp",
        "if (patience.passed()) record().state.compare_exchange_strong(state, AbortRecord::kAbandoned);",
        "if (patience.passed() && state == AbortRecord::kBeingWritten) return describe(found);",
        "Signal.*",
    ),
    Mutant(
        "a rank raises its own sentence, not the record's",
        "signal/signal_cpu.cpp",
        "    report(what, rank_);\n    check();\n  }\n}\n\nvoid SignalCpu::arrive",
        "    report(what, rank_);\n    throw Error(ErrorKind::communication, describe(what));\n  }\n}\n\n"
        "void SignalCpu::arrive",
        "Signal.*",
    ),
    Mutant(
        "the abort record and bye are looked at before the data",
        "signal/signal_cpu.cpp",
        "[&] { return present(peer); }, give_up",
        "[&] { return !broken() && (left() >> peer & 1) == 0 && present(peer); }, give_up",
        "Signal.*",
    ),
    Mutant(
        "a late rank ignores the abort record",
        "signal/signal_cpu.cpp",
        "  require_healthy();\n  const Call call{++epoch_",
        "  const Call call{++epoch_",
        "Signal.*",
    ),
    Mutant(
        "a waiting rank ignores the abort record",
        "signal/signal_cpu.cpp",
        "if (broken() || (left() >> peer & 1) != 0 || closing_",
        "if ((left() >> peer & 1) != 0 || closing_",
        "Signal.*",
    ),
    Mutant(
        "a death is not noticed",
        "signal/signal_cpu.cpp",
        "  what.pid = static_cast<uint64_t>(pid);\n  report(what, rank_);\n",
        "  what.pid = static_cast<uint64_t>(pid);\n  (void)what;\n",
        "Signal.*",
    ),
    Mutant(
        "pinned mode takes the process group",
        "collective/choose.cpp",
        "    if (!allowed(step.algorithm)) continue;\n",
        "",
        "Choose.*",
    ),
    Mutant(
        "ranks with other tuning tables agree",
        "collective/choose.cpp",
        "for (const char c : to_string(agreed.tuning))",
        "for (const char c : std::string())",
        "Tuning.*",
    ),
]


def mutate(csrc: Path, mutant: Mutant) -> Path:
    path = csrc / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(
            f"mutant '{mutant.name}': its line occurs {text.count(mutant.old)} times in csrc/{mutant.file}, expected 1"
        )
    path.write_text(text.replace(mutant.old, mutant.new))
    return path


def build_program(work: Path, mutant: Mutant, *arguments: str) -> None:
    """make in the copy's tests/cpp."""
    build = subprocess.run(["make", "-s", "-C", str(work / "tests/cpp"), *arguments], capture_output=True, text=True)
    if build.returncode != 0:
        raise SystemExit(f"mutant '{mutant.name}' does not compile:\n{build.stdout}{build.stderr}")


def run_tests(program: Path, tests: str, limit: float, seeds: int | None = None) -> tuple[bool, str]:
    """True when a test failed, and which. `seeds`: how many a randomised test takes, if not as many as usual."""
    try:
        run = subprocess.run(
            [str(program), "--gtest_brief=1", "--gtest_fail_fast", f"--gtest_filter={tests}"],
            capture_output=True,
            text=True,
            timeout=limit,
            env=os.environ | ({"SGLANG_SYMM_TEST_N": str(seeds)} if seeds else {}),
        )
    except subprocess.TimeoutExpired:
        return True, f"still waiting after {limit:.0f} s"
    if run.returncode == 0:
        return False, "all tests passed"
    failed = [line.split("]")[1].strip() for line in run.stdout.splitlines() if line.startswith("[  FAILED  ]")]
    return True, failed[0] if failed else f"the tests crashed (exit code {run.returncode})"


def try_mutant(work: Path, mutant: Mutant, limit: float) -> tuple[bool, str]:
    """Build and run. True when the tests noticed, and how."""
    source = ROOT / "csrc" / mutant.file
    target = mutate(work / "csrc", mutant)
    try:
        build_program(work, mutant, "program")
        for _ in range(TRIES):
            caught, how = run_tests(work / "build/cpp/plain/unit_tests", mutant.tests, limit)
            if caught:
                break
        return caught, how
    finally:
        shutil.copyfile(source, target)  # a new time stamp: make builds the original again


def copy_tree(work: Path) -> None:
    """csrc/ and tests/cpp with the objects of the original, so that a mutant builds only what it touches."""
    for part in ("csrc", "tests/cpp"):
        shutil.copytree(ROOT / part, work / part)
    if (ROOT / "build/cpp/plain").is_dir():
        shutil.copytree(ROOT / "build/cpp/plain", work / "build/cpp/plain", copy_function=shutil.copy2)


def report(number: int, count: int, mutant: Mutant, result: tuple[bool, str], seconds: float) -> None:
    caught, how = result
    mark = "caught  " if caught else "SURVIVED"
    print(f"{number:2}/{count} {mark} {mutant.name}: {how} ({seconds:.0f} s)", flush=True)


def command_line(description: str | None, limit: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    parser.add_argument("--only", metavar="NAME", help="those whose name contains NAME")
    parser.add_argument(
        "--limit",
        type=float,
        default=limit,
        help=f"seconds after which waiting tests count as failed (default {limit:.0f})",
    )
    return parser


def with_name(mutants: list[AnyMutant], part: str | None, listed_by: str = "--list") -> list[AnyMutant]:
    chosen = [mutant for mutant in mutants if part is None or part in mutant.name]
    if not chosen:
        raise SystemExit(f"no mutant's name contains '{part}': {listed_by} names them")
    return chosen


def main() -> int:
    args = command_line(__doc__, limit=30.0).parse_args()
    chosen = with_name(MUTANTS, args.only)
    if args.list:
        for mutant in chosen:
            print(f"{mutant.name}  (csrc/{mutant.file})")
        return 0
    survivors = []
    with tempfile.TemporaryDirectory(prefix="sglang_symm-mutants-") as folder:
        work = Path(folder)
        copy_tree(work)
        os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
        for number, mutant in enumerate(chosen, 1):
            start = time.monotonic()
            result = try_mutant(work, mutant, args.limit)
            report(number, len(chosen), mutant, result, time.monotonic() - start)
            if not result[0]:
                survivors.append(mutant.name)
    print(f"{len(chosen) - len(survivors)} passed, {len(survivors)} failed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
