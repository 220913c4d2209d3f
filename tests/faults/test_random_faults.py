"""The harness of random faults: a short run of it, and what it must notice (`make faults N=2000` for a long one)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import pytest
from trials import DISAGREE, FAULTS, Trial, draw_disagreement, draw_trial

HARNESS = Path(__file__).parent / "harness.py"


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HARNESS), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    process = start(*arguments, "--limit", "240", "--json", str(folder / "report.json"))
    try:
        output, _ = process.communicate(timeout=280)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 0, output
    assert re.search(r"\d+ passed, 0 failed\n$", output), output
    return json.loads((folder / "report.json").read_text())


@pytest.mark.slow
def test_two_hundred_random_faults_are_named_by_every_survivor_in_time_and_the_next_group_works(tmp_path):
    report = run(tmp_path, "--n", "200", "--seed", "1")
    assert report["trials"] == 200
    assert report["failed"] == 0
    assert report["death_to_error"]["p99_ms"] < 1000 * harness.SLACK


@pytest.mark.slow
def test_two_hundred_disagreeing_calls_between_processes_raise_one_sentence_on_all_ranks(tmp_path):
    report = run(tmp_path, "--n", "200", "--seed", "2", "--fault", "disagree")
    assert report["trials"] == 200
    assert {row["fault"] for row in report["faults"]} == set(DISAGREE)


def test_an_interrupt_leaves_no_process_stopped_ones_included():
    process = start("--n", "100000", "--fault", "stopped", "--fault", "SIGKILL")
    try:
        time.sleep(8)
        assert process.poll() is None
        assert len(processes_of(process.pid)) > 4
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 130, output
        assert processes_of(process.pid) == []
    finally:
        if process.poll() is None:
            process.kill()


def processes_of(session: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


# The harness itself: what it must not let pass.

DEATH = Trial(1, 7, 3, (0, 1, 2), 1, "SIGKILL", 5, 0.01, False, 8.0, 15.0, False, True)
SENTENCE = "group 'trial#1' (3 ranks) is broken: rank 1 died (process 77 ended without destroying the group)"


def answer(sentence: str = SENTENCE, seconds: float = 0.1, **values: Any) -> dict[str, Any]:
    again = {"sentences": [sentence] * 3, "broken": sentence, "seconds": 0.01}
    return {"error": ("DistBackendError", sentence), "time": 100 + seconds, "again": again, "notes": []} | values


def problems(told: dict[int, Any]) -> str:
    result = harness.Result(7, "SIGKILL")
    harness.Director(0, "judge", []).judge(DEATH, told, 100.0, 77, result)
    return "; ".join(result.problems)


def test_the_harness_is_content_with_survivors_that_say_who_died():
    assert problems({0: answer(), 2: answer()}) == ""


WRONG = {
    "raised nothing": {0: answer(), 2: {"notes": []}},
    "does not name the right rank": {0: answer(), 2: answer(SENTENCE.replace("rank 1", "rank 0"))},
    "sentences differ": {0: answer(), 2: answer(SENTENCE.replace("(3 ranks)", "(4 ranks)"))},
    "and then": {0: answer(), 2: answer(again={"sentences": ["no error"] * 3, "broken": None, "seconds": 0.0})},
    "broken group": {0: answer(), 2: answer(again={"sentences": [SENTENCE], "broken": None, "seconds": 0.0})},
    "expected at most": {0: answer(), 2: answer(seconds=9)},
    "RuntimeError": {0: answer(), 2: answer(error=("RuntimeError", SENTENCE))},
    "wrong result": {0: answer(), 2: answer(notes=["wrong result of call 3"])},
}


@pytest.mark.parametrize("problem", WRONG)
def test_the_harness_notices(problem):
    assert problem in problems(WRONG[problem])


def test_trials_are_drawn_by_seed_and_number_alone_and_every_fault_comes():
    drawn = [draw_trial(1, number, (2, 4), FAULTS) for number in range(400)]
    assert drawn == [draw_trial(1, number, (2, 4), FAULTS) for number in range(400)]
    assert {trial.fault for trial in drawn} == set(FAULTS)
    assert {len(trial.members) for trial in drawn} == {2, 3, 4}
    assert all(trial.victim < len(trial.members) <= trial.world for trial in drawn)


@pytest.mark.parametrize("fault", DISAGREE)
def test_a_disagreement_differs(fault):
    what = fault.removeprefix("disagree: ")
    for number in range(50):
        chosen = draw_trial(3, number, (2, 4), (fault,)).random("calls")
        honest, deviant = draw_disagreement(chosen, 3, what)
        assert honest != deviant
