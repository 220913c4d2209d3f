"""benchmarks/many_gpus.sh, with a Python that only says how many GPUs there are and what it was to run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "many_gpus.sh"
PYTHON = """#!/bin/sh
case "$*" in
    *device_count*) echo {gpus} ;;
    *) echo "$@" >> "$(dirname "$0")/log" ;;
esac
"""


def run(folder: Path, python: str, **settings: str) -> subprocess.CompletedProcess[str]:
    program = folder / "python"
    program.write_text(python)
    program.chmod(0o755)
    env = {**os.environ, "PYTHON": str(program), "OUT": str(folder / "out"), "STEPS": "tests", **settings}
    return subprocess.run([SCRIPT], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("python", "error"),
    [
        ("#!/bin/sh\nexit 1\n", "python cannot import torch: expected one that can"),
        (PYTHON.format(gpus=1), "expected at least 2 GPUs, torch sees 1"),
    ],
)
def test_a_machine_that_cannot_run_it_is_told(python: str, error: str, tmp_path: Path) -> None:
    done = run(tmp_path, python)
    assert done.returncode == 2
    assert error in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("quick", "steps"), [("0", 3), ("1", 1)])
def test_each_step_of_the_tests_names_its_tests(quick: str, steps: int, tmp_path: Path) -> None:
    done = run(tmp_path, PYTHON.format(gpus=6), QUICK=quick)
    assert done.returncode == 0, done.stdout + done.stderr
    started = [line for line in (tmp_path / "log").read_text().splitlines() if "pytest" in line]
    assert len(started) == steps
    assert all("-m pytest -q tests/gpu" in line for line in started)
