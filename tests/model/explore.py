"""Runs a model (explore.h) and reads what it prints."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

LINE = re.compile(r"holds: .* ([\d]+) searches, fault \w+: (\d+) states, (\d+) steps, (\d+) ends, longest (\d+) steps")


def run(checker: Path, *args: str | int) -> tuple[int, str]:
    """Exit status and output: 0 and one line, or 1 and a counterexample."""
    done = subprocess.run([checker, *map(str, args)], capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout


def holds(checker: Path, counts: list[str], ranks: int, fault: str, *calls: str) -> None:
    status, output = run(checker, "--ranks", ranks, "--fault", fault, *calls)
    assert status == 0, "\n" + output
    match = LINE.match(output)
    assert match is not None, output
    searches, states, steps, ends, longest = map(int, match.groups())
    assert ends >= searches, "each search ends somewhere"
    what = f"{ranks} ranks, {fault:11} {searches:5} sequences of calls"
    counts.append(f"{what} {states:10,} states {steps:11,} steps, longest {longest}")


def caught(checker: Path, mutant: str, ranks: int, calls: str, fault: str, violated: str, *options: str) -> str:
    """Requires a counterexample whose last line matches `violated`, and prints it. Returns a line for `counts`."""
    given = ["--ranks", ranks, "--calls", calls, "--fault", fault, "--mutant", mutant, *options]
    status, output = run(checker, *given)
    print(output)
    assert status == 1, f"nothing is wrong with a protocol in which {mutant}"
    lines = output.splitlines()
    assert re.search(violated, lines[-1]), output
    steps = [int(line[:4]) for line in lines if re.match(r" *\d+  rank \d", line)]
    assert steps == list(range(1, len(steps) + 1)), "the trace names every step"
    states = int(re.findall(r"(\d+) states", lines[0])[0])
    return f"caught after {states:7,} states, trace of {len(steps):2} steps: {mutant}"


def mutants(checker: Path) -> set[str]:
    """What the model breaks; not its variants that hold."""
    _, names = run(checker, "--mutants")
    return {name for name in names.splitlines() if name != "none" and not name.startswith("(holds)")}
