"""Builds the model checkers, and prints at the end how many states each test visited."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COUNTS = pytest.StashKey[list[str]]()


def built(name: str) -> Path:
    """The program of that name, built anew when its source or explore.h is newer."""
    source = Path(__file__).with_name(f"{name}.cpp")
    changed = max(file.stat().st_mtime for file in (source, source.with_name("explore.h")))
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler})")
    program = ROOT / "build" / "model" / name
    if not program.exists() or program.stat().st_mtime < changed:
        program.parent.mkdir(parents=True, exist_ok=True)
        fresh = program.with_suffix(f".{os.getpid()}")  # moved into place: several test runs may build at a time
        subprocess.run([compiler, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", source, "-o", fresh], check=True)
        fresh.replace(program)
    return program


@pytest.fixture(scope="session")
def checker() -> Path:
    """The model of docs/protocol.md, on CPUs."""
    return built("protocol_model")


@pytest.fixture(scope="session")
def gpu_checker() -> Path:
    """The model of the same between GPUs."""
    return built("gpu_model")


@pytest.fixture
def counts(request: pytest.FixtureRequest) -> list[str]:
    """What is printed at the end of the run, one line an entry."""
    lines: list[str] = request.config.stash.setdefault(COUNTS, [])
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(COUNTS, [])
    if lines:
        terminalreporter.section("states of the protocol models")
        for line in lines:
            terminalreporter.write_line(line)
