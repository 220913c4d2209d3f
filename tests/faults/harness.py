"""Random faults in random ranks at random moments, for as long as one likes.

    python tests/faults/harness.py --n N --seed S [--world 2..4] [--fault NAME] [--trial K] [--json FILE]

In each trial some ranks make a group and call random collectives of random sizes until one of them suffers a fault.
Asked of every trial: nobody waits past the deadline; every survivor raises, all of them the same sentence, which names
the right rank; a broken group says it again at once; the next group (of the survivors, or with a new process for the
dead one) works; nobody holds more afterwards than before, and nothing is left in /dev/shm.

Processes live on from trial to trial. A dead one is replaced by a fork of its director, which has imported torch and
has no threads. Several directors work at a time, because some trials wait for a deadline:

    harness  --fork-->  store
             --fork-->  director  --fork-->  ranks        (whoever loses its parent dies)
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: whoever is forked from must have no threads

import torch
import torch.distributed as dist
from trial_rank import rank_main
from trials import (
    CREATION,
    DIED,
    DISAGREE,
    FAULTS,
    HARMLESS,
    LEFT,
    MISSING,
    Trial,
    draw_trial,
)

ROOT = Path(__file__).resolve().parents[2]
SLACK = 4.0  # seconds beyond a deadline; far more than is needed, but the machine may be loaded
HANG = 40.0  # seconds in which a rank answers, whatever happens
FALLBACK = "death in a fallback"
CREATION_GRACE = 6.0  # seconds after first_timeout in which a creation still collects what failed
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def fork(parent: int) -> int:
    """A fork that dies with its parent."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    return pid


class Hangs(Exception):
    """A rank did not answer."""


@dataclass
class Member:
    """A rank's process, seen from its director. ``baseline``: what it held when it had left its first world."""

    pid: int
    pipe: Connection
    stream: list[Any] = field(default_factory=list)
    baseline: dict[str, int] | None = None


@dataclass
class Result:
    """Of one trial. ``seconds``: from the fault to each survivor's error."""

    number: int
    fault: str
    problems: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    trial: dict[str, Any] = field(default_factory=dict)
    sentence: str = ""


class Director:
    """Runs trials one after the other."""

    def __init__(self, port: int, name: str, outside: list[Connection]) -> None:
        self.port = port
        self.name = name
        self.outside = outside  # the harness's pipes, which no rank may hold
        self.ranks: list[Member] = []
        self.worlds = 0

    # Processes

    def start_rank(self) -> Member:
        ours, theirs = Pipe()
        pid = fork(os.getpid())
        if pid == 0:
            for pipe in [ours, *self.outside, *(rank.pipe for rank in self.ranks)]:
                pipe.close()
            rank_main(theirs, self.port)
            os._exit(70)
        theirs.close()
        return Member(pid, ours)

    def staff(self, world: int) -> None:
        while len(self.ranks) < world:
            self.ranks.append(self.start_rank())

    def end(self, rank: Member) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.pid, signal.SIGKILL)
        os.waitpid(rank.pid, 0)
        rank.pipe.close()

    def dismiss(self) -> list[str]:
        """End all ranks in good order; what was wrong with it."""
        problems = []
        for rank in self.ranks:
            rank.pipe.send(("quit",))
        for rank in self.ranks:
            code = os.waitstatus_to_exitcode(os.waitpid(rank.pid, 0)[1])
            if code != 0:
                problems.append(f"a rank ended with {code}")
            rank.pipe.close()
        self.ranks = []
        return problems

    def abandon(self) -> None:
        for rank in self.ranks:
            self.end(rank)
        self.ranks = []

    # Talking with ranks

    def hear(self, rank: Member, kind: str, seconds: float = HANG) -> Any:
        """The next message of this kind: "creating", "ready", "fault" or "answer"; later ones stay in the stream."""
        end = time.monotonic() + seconds
        while True:
            for at, (what, value) in enumerate(rank.stream):
                if what == kind:
                    del rank.stream[at]
                    return value
            if kind != "answer" and any(what == "answer" for what, _ in rank.stream):
                return None  # it ended without
            if not rank.pipe.poll(max(0.0, end - time.monotonic())):
                os.kill(rank.pid, signal.SIGUSR1)  # shows where it is
                time.sleep(0.3)
                raise Hangs(f"rank {self.ranks.index(rank)} (process {rank.pid}) did not answer within {seconds:.0f} s")
            try:
                message = rank.pipe.recv()
            except (EOFError, ConnectionResetError):
                if kind != "answer":
                    return None
                raise Hangs(f"rank {self.ranks.index(rank)} (process {rank.pid}) has gone") from None
            if isinstance(message, str):
                rank.stream.append((message, time.monotonic()))
            elif isinstance(message, tuple):
                rank.stream.append(message)
            else:
                rank.stream.append(("answer", message))

    def prefix(self) -> str:
        self.worlds += 1
        return f"{self.name}/world{self.worlds}"

    # Trials

    def run(self, trial: Trial) -> Result:
        result = Result(trial.number, FALLBACK if trial.fallback else trial.fault, trial=asdict(trial))
        try:
            self.staff(trial.world)
            self.run_trial(trial, result)
        except Hangs as error:
            result.problems.append(f"HANG: {error}")
            self.abandon()
        except (BrokenPipeError, ConnectionResetError, ProcessLookupError) as error:
            result.problems.append(f"a rank died that should not: {error}")
            self.abandon()
        return result

    def run_trial(self, trial: Trial, result: Result) -> None:
        ranks = self.ranks[: trial.world]
        for rank in ranks:
            rank.stream.clear()
        prefix = self.prefix()
        for number, rank in enumerate(ranks):
            rank.pipe.send(("trial", trial, number, prefix))
        members = [ranks[number] for number in trial.members]
        victim, survivors = members[trial.victim], [r for i, r in enumerate(members) if i != trial.victim]
        for rank in ranks:  # the death is to come in the creation of the group, not in that of the process group
            self.hear(rank, "creating")
        if trial.fault not in CREATION:
            for rank in ranks:
                self.hear(rank, "ready")

        fault_at, exit_code = self.inflict(trial, victim, survivors)
        told = {
            i: self.hear(rank, "answer") for i, rank in enumerate(members) if rank is not victim or exit_code is None
        }
        for number, rank in enumerate(ranks):
            if rank not in members:
                self.hear(rank, "answer")
                assert number not in trial.members
        self.judge(trial, told, fault_at, victim.pid, result)
        if exit_code is not None:
            expected = {"_exit(0)": 0, "_exit(1)": 1, "sys.exit": 5, "SIGSEGV": -signal.SIGSEGV}
            if exit_code != expected.get(trial.fault, -signal.SIGKILL):
                result.problems.append(f"the victim ended with {exit_code}")
        self.run_next(trial, [r for r in ranks if r is not victim or exit_code is None], victim, result)

    def inflict(self, trial: Trial, victim: Member, survivors: list[Member]) -> tuple[float | None, int | None]:
        """Let it happen. When the fault came, and the exit code of a victim that is dead."""

        def end_of_victim() -> int:
            end = time.monotonic() + HANG
            while time.monotonic() < end:
                pid, status = os.waitpid(victim.pid, os.WNOHANG)
                if pid:
                    victim.pipe.close()
                    self.ranks.remove(victim)
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.001)
            raise Hangs(f"the victim (process {victim.pid}) did not die")

        def signal_victim(number: int) -> float:
            now = time.monotonic()
            os.kill(victim.pid, number)
            return now

        def await_answers() -> None:
            for rank in survivors:
                rank.stream.append(("answer", self.hear(rank, "answer")))

        fault = trial.fault
        if fault in ("SIGKILL", "SIGSEGV", *CREATION):
            time.sleep(trial.delay)
            at = signal_victim(signal.SIGSEGV if fault == "SIGSEGV" else signal.SIGKILL)
            return at, end_of_victim()
        if fault.startswith("stopped"):
            time.sleep(trial.delay)
            at = signal_victim(signal.SIGSTOP)
            if fault == "stopped, killed early":
                time.sleep(5 * trial.delay)
                at = signal_victim(signal.SIGKILL)
                return at, end_of_victim()
            await_answers()
            if fault == "stopped, continued":
                signal_victim(signal.SIGCONT)
                return at, None
            signal_victim(signal.SIGKILL)
            return at, end_of_victim()
        if fault in ("_exit(0)", "_exit(1)", "sys.exit"):
            at = self.hear(victim, "fault")
            return at, end_of_victim()
        if fault in ("late", "full arena, left", "closed socket"):
            return self.hear(victim, "fault"), None
        return None, None

    def judge(self, trial: Trial, told: dict[int, Any], fault_at: float | None, pid: int, result: Result) -> None:
        """Did all say what they should, in time?"""
        problems, victim = result.problems, trial.victim
        for i, answer in told.items():
            problems += [f"rank {i}: {note}" for note in answer.get("notes", [])]
            if "crash" in answer:
                raise Hangs(answer["crash"])
        if trial.fault in HARMLESS:
            problems += [f"rank {i}: {a['error']}" for i, a in told.items() if "error" in a]
            return
        concerned = {i: a for i, a in told.items() if i != victim or trial.fault != "full arena, left"}
        silent = [i for i, answer in concerned.items() if "error" not in answer]
        if silent:
            problems.append(f"rank(s) {silent} raised nothing")
            return
        sentences = {i: answer["error"][1] for i, answer in concerned.items()}
        result.sentence = next(iter(sentences.values()))
        for i, answer in concerned.items():
            kind, sentence = answer["error"]
            again = answer.get("again")
            last = sentence if again is None else again["sentences"][-1]
            if kind != "DistBackendError":
                problems.append(f"rank {i}: {kind}: {sentence}")
            if trial.fallback and "through its process group" in sentence:
                # gloo may hear of it first; the group's own sentence follows.
                sentences[i] = last
            elif again is not None and set(again["sentences"]) != {sentence}:
                problems.append(f"rank {i} said {sentence} and then {again['sentences']}")
            if again is not None and (again["broken"] is None or again["seconds"] > SLACK):
                problems.append(f"rank {i}: broken group: {again}")
            if not names(trial, sentences[i], pid):
                problems.append(f"rank {i} does not name the right rank: {sentences[i]}")
        if len(set(sentences.values())) > 1 and "creation" not in str(sentences):
            problems.append(f"sentences differ: {sentences}")
        if trial.fault in DISAGREE:
            calls = {i: answer["call"] for i, answer in concerned.items()}
            if set(calls.values()) != {trial.at_call}:
                problems.append(f"the disagreement of call {trial.at_call} came to light in calls {calls}")
        if fault_at is None:
            return
        others = [answer["time"] - fault_at for i, answer in concerned.items() if i != victim]
        result.seconds = others
        limit = SLACK
        if trial.fault in MISSING:
            limit += trial.timeout
            if min(others) < 0.5 * trial.timeout:  # its wait may have begun a little before the fault
                problems.append(f"errors after {others} s, before the deadline of {trial.timeout} s")
        elif trial.fault in CREATION:
            limit += trial.first_timeout + CREATION_GRACE
        elif trial.fallback:
            limit += trial.process_group_timeout
        if max(others) > limit:
            problems.append(f"errors after {others} s, expected at most {limit} s")

    def run_next(self, trial: Trial, left: list[Member], victim: Member, result: Result) -> None:
        """The next group works, and nobody holds more than before."""
        alive = list(left)
        seed = f"{trial.seed}/{trial.number}/next"
        if victim not in left and trial.replaced:
            self.staff(trial.world)
            alive += [rank for rank in self.ranks if rank not in left][: trial.world - len(left)]
            numbers, prefix, world = list(range(len(alive))), self.prefix(), len(alive)
        else:
            gone = trial.members[trial.victim] if victim not in left else -1
            numbers, prefix, world = [n for n in range(trial.world) if n != gone], None, trial.world
        for number, rank in zip(numbers, alive, strict=True):
            rank.pipe.send(("next", numbers, prefix, number, world, seed))
        for number, rank in zip(numbers, alive, strict=True):
            answer = self.hear(rank, "answer")
            if answer.get("right") is not True:
                result.problems.append(f"the next group, rank {number}: {answer}")
        for rank in alive:
            rank.pipe.send(("leave",))
        for number, rank in zip(numbers, alive, strict=True):
            held = self.hear(rank, "answer")
            rank.baseline = rank.baseline or held
            if held != rank.baseline:
                result.problems.append(f"rank {number} holds {held}, after its first trial {rank.baseline}")


def names(trial: Trial, sentence: str, pid: int) -> bool:
    """Whether a sentence says what happened, and to whom."""
    v = trial.victim
    if trial.fault in DISAGREE:
        found = re.search(r"ranks disagree in call \d+: rank 0 called (.+), rank (\d+) called (.+)\. Every", sentence)
        # Rank 0 is the reference: when it is the one that differs, any other is named beside it.
        return found is not None and found[1] != found[3] and (v == 0 or int(found[2]) == v)
    if trial.fault in LEFT:
        return f"rank(s) {v} left" in sentence
    if trial.fault in MISSING:
        return f"rank(s) {v} did not arrive within {trial.timeout:g} s" in sentence
    if trial.fault in DIED:
        return f"rank {v} died (process {pid} ended" in sentence
    if trial.fault in CREATION:
        return re.search(rf"rank(\(s\))? {v}\b", sentence) is not None
    # A connection has two ends, and both see it close.
    return re.search(r"rank \d+ died", sentence) is not None


def direct(port: int, name: str, numbers: list[int], args: argparse.Namespace, to_harness: Connection) -> None:
    """The life of a director."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    director = Director(port, name, [to_harness])
    for number in numbers:
        to_harness.send(director.run(draw_trial(args.seed, number, args.world, args.faults)))
    to_harness.send(director.dismiss())


def serve_store(to_harness: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    to_harness.send(store.port)
    while True:
        signal.pause()


# Reporting


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def table(results: list[Result]) -> list[dict[str, Any]]:
    """Per fault: trials, failed, and milliseconds from the fault to a survivor's error."""
    by_fault: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_fault[result.fault].append(result)
    rows = []
    for fault in [f for f in (*FAULTS, FALLBACK) if f in by_fault]:
        chosen = by_fault[fault]
        seconds = [s for result in chosen for s in result.seconds]
        row: dict[str, Any] = {
            "fault": fault,
            "trials": len(chosen),
            "failed": sum(bool(result.problems) for result in chosen),
        }
        if seconds:
            row |= {f"p{int(100 * q)}_ms": round(1e3 * quantile(seconds, q), 1) for q in (0.5, 0.99)}
            row["max_ms"] = round(1e3 * max(seconds), 1)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    columns = ("trials", "failed", "p50_ms", "p99_ms", "max_ms")
    print(f"{'fault':24}" + "".join(f"{column:>10}" for column in columns))
    for row in rows:
        print(f"{row['fault']:24}" + "".join(f"{row.get(column, ''):>10}" for column in columns))


def deaths(results: list[Result]) -> dict[str, float]:
    """Milliseconds from a death to a survivor's error, over all trials in which a process ended."""
    seconds = [s for r in results if r.fault in (*DIED, "sys.exit") for s in r.seconds]
    return {f"p{int(100 * q)}_ms": round(1e3 * quantile(seconds, q), 1) for q in (0.5, 0.99)} if seconds else {}


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(x, 1) for x in os.getloadavg()],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    def worlds(text: str) -> tuple[int, int]:
        least, _, most = text.partition("..")
        return int(least), int(most or least)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200, help="trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=worlds, default=(2, 4), metavar="2..4", help="ranks")
    parser.add_argument(
        "--fault", dest="faults", action="append", metavar="NAME", help=f"only these: {', '.join(FAULTS)}"
    )
    parser.add_argument("--trial", type=int, help="this trial alone, with what it was told")
    parser.add_argument("--directors", type=int, default=3, help="trials at a time")
    parser.add_argument("--limit", type=float, default=None, help="seconds after which no more results are waited for")
    parser.add_argument("--json", type=Path, help="leave the results here")
    args = parser.parse_args(argv)
    chosen = [fault for fault in FAULTS for name in args.faults or [""] if fault.startswith(name)]
    if not chosen or not 2 <= args.world[0] <= args.world[1] or args.n < 1 or args.directors < 1:
        parser.error("expected a known fault, worlds of at least 2 ranks, and at least one trial and director")
    args.faults = tuple(chosen)
    return args


def collect(args: argparse.Namespace, pipes: dict[Connection, list[int]]) -> tuple[list[Result], list[str], bool]:
    """Results as they come, with a line of progress every few seconds."""
    results: list[Result] = []
    problems: list[str] = []
    total, begin, shown = sum(map(len, pipes.values())), time.monotonic(), time.monotonic()
    while pipes:
        for pipe in wait(list(pipes), 1.0):
            assert isinstance(pipe, Connection)
            try:
                message = pipe.recv()
            except EOFError:
                problems.append("a director ended early")
                message = []
            if isinstance(message, Result):
                results.append(message)
                for problem in message.problems:
                    print(f"trial {message.number} ({message.fault}): {problem}", flush=True)
            else:
                problems += message
                del pipes[pipe]
        now = time.monotonic()
        if now - shown > 5 or not pipes:
            shown = now
            failed = sum(bool(result.problems) for result in results)
            print(
                f"{len(results)}/{total} trials, {failed} failed, {len(results) / (now - begin):.1f} a second",
                flush=True,
            )
        if args.limit is not None and now - begin > args.limit:
            return results, problems, True
    return results, problems, False


def reap(pids: list[int]) -> None:
    """End all that this process started: directors and store die, and with them whatever they started."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.005)
    raise RuntimeError("a process is left")


def shared_objects() -> Counter[str]:
    return Counter(name for name in os.listdir("/dev/shm") if "symm" in name.lower())


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"forked from a process of {len(threads)} threads"
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    gc.collect()
    gc.freeze()  # what torch made stays shared with all forks, and their collections pass it by
    objects, revision, begin = shared_objects(), commit(), time.monotonic()
    numbers = [args.trial] if args.trial is not None else list(range(args.n))
    directors = min(args.directors, len(numbers))
    pids: list[int] = []
    pipes: dict[Connection, list[int]] = {}

    def start(life: Any, *arguments: Any) -> Connection:
        ours, theirs = Pipe()
        pid = fork(os.getpid())
        if pid == 0:
            for pipe in [ours, *pipes]:
                pipe.close()
            life(*arguments, theirs)
            os._exit(0)
        pids.append(pid)
        theirs.close()
        return ours

    interrupted = False
    results: list[Result] = []
    problems: list[str] = []
    try:
        port = start(serve_store).recv()
        for d in range(directors):
            mine = numbers[d::directors]
            pipes[start(direct, port, f"director{d}", mine, args)] = mine
        results, problems, late = collect(args, pipes)
        if late:
            print(f"stopped after {args.limit:.0f} s")
    except KeyboardInterrupt:
        interrupted = True
    finally:
        reap(pids)
    if interrupted:
        print("interrupted: all processes are ended")
        return 130
    if left := shared_objects() - objects:
        problems.append(f"left in /dev/shm: {list(left)}")
    wall = time.monotonic() - begin
    rows = table(results)
    show(rows)
    print("from a death to a survivor's error:", deaths(results))
    if args.trial is not None:
        print(json.dumps([asdict(result) for result in results], indent=1))
    failed = sum(bool(result.problems) for result in results)
    for problem in problems:
        print(problem)
    if args.json:
        report = {
            "command": " ".join(["python", *sys.argv]),
            "commit": revision,
            "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "machine": machine(),
            "wall_seconds": round(wall, 1),
            "trials": len(results),
            "failed": failed,
            "problems": problems,
            "death_to_error": deaths(results),
            "faults": rows,
            "failures": [asdict(result) for result in results if result.problems],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    failed += len(problems)
    print(f"{len(results)} trials in {wall:.0f} s, {len(results) / wall:.1f} a second, seed {args.seed}")
    print(f"{len(results) - sum(bool(r.problems) for r in results)} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
