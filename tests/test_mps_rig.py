"""tools/mps_rig.py leaves neither ranks nor MPS behind. MPS is a shell script here, and ranks have no GPU."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import mps_rig  # noqa: E402

RIG = f"""
import sys
sys.path.insert(0, {str(TOOLS)!r})
import mps_rig
mps_rig.RANK, mps_rig.PATIENCE, mps_rig.GRACE = [sys.executable, "-c"], 0.5, 0.5
sys.exit(mps_rig.main())
"""
MPS = """#!/bin/sh
cd "$(dirname "$0")"
if [ "$1" = -d ]; then
    echo "started $CUDA_MPS_PIPE_DIRECTORY" >> log
    : > "$CUDA_MPS_PIPE_DIRECTORY/control"
else
    read line && echo "$line" >> log
fi
"""
# A rank that says its process id, and for which SIGTERM is not enough.
ENDLESS = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open("rank" + os.environ["RANK"], "w").write(str(os.getpid()))
time.sleep(100)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts the rig in a folder of its own, whose fake MPS keeps a log."""
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text(MPS)
    program.chmod(0o755)

    def run(*words: str, **more: str) -> subprocess.Popen[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_MPS_")}
        env |= {"PATH": f"{tmp_path}:{env['PATH']}", "TMPDIR": str(tmp_path), **more}
        command = [sys.executable, "-c", RIG, *words]
        return subprocess.Popen(
            command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    return run


def nothing_is_left(folder: Path) -> bool:
    """MPS was started once and told to quit once, and its folder is gone."""
    started, quit_ = (folder / "log").read_text().splitlines()
    return started.startswith("started ") and quit_ == "quit" and not Path(started.split()[1]).exists()


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def ids_of(ranks: int, folder: Path) -> list[int]:
    """Of ENDLESS ranks, once all have said theirs."""
    files = [folder / f"rank{rank}" for rank in range(ranks)]
    end = time.monotonic() + 60
    while not all(file.is_file() and file.read_text() for file in files):
        assert time.monotonic() < end
        time.sleep(0.05)
    return [int(file.read_text()) for file in files]


def test_mps_lasts_as_long_as_the_ranks(start: Start, tmp_path: Path) -> None:
    write = 'import os; open("rank" + os.environ["RANK"], "w").write(os.environ["WORLD_SIZE"])'
    assert start("--ranks", "3", "--", write).wait(60) == 0
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(3)] == ["3"] * 3
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize("to_all", [False, True], ids=["to the rig", "to all of its processes, twice"])
def test_a_sigterm_ends_the_ranks_and_mps(start: Start, tmp_path: Path, to_all: bool) -> None:
    rig = start("--ranks", "2", "--", ENDLESS)
    ranks = ids_of(2, tmp_path)
    if to_all:
        os.killpg(rig.pid, signal.SIGTERM)
        time.sleep(0.1)
        os.killpg(rig.pid, signal.SIGTERM)
    else:
        rig.terminate()
    assert rig.wait(60) == 128 + signal.SIGTERM
    assert all(is_gone(pid) for pid in ranks)
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("fails", "status"), [("raise SystemExit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL)]
)
def test_a_rank_that_fails_ends_the_others(start: Start, tmp_path: Path, fails: str, status: int) -> None:
    last = f"import os, signal, time\nif os.environ['RANK'] == '1':\n    time.sleep(0.5)\n    {fails}\n"
    assert start("--ranks", "2", "--", last + ENDLESS).wait(60) == status
    assert all(is_gone(int(file.read_text())) for file in tmp_path.glob("rank*"))
    assert nothing_is_left(tmp_path)


def test_the_last_rank_to_end_counts_though_a_signal_ended_it(start: Start) -> None:
    last = "import os, signal, time\nif os.environ['RANK'] == '1':\n    time.sleep(0.5)\n    os.kill(os.getpid(), 9)\n"
    assert start("--ranks", "2", "--", last).wait(60) == 128 + signal.SIGKILL


def test_an_mps_that_runs_already_is_left_alone(start: Start, tmp_path: Path) -> None:
    (tmp_path / "control").touch()
    assert start("--ranks", "2", "--", "pass", CUDA_MPS_PIPE_DIRECTORY=str(tmp_path)).wait(60) == 0
    assert not (tmp_path / "log").exists()
    assert (tmp_path / "control").exists()


@pytest.mark.parametrize("ranks", ["0", "-1", "17", "two"])
def test_a_number_of_ranks_that_cannot_be_is_refused(start: Start, tmp_path: Path, ranks: str) -> None:
    rig = start("--ranks", ranks, "--", "pass")
    assert f"expected 1 to 16, got {ranks}" in rig.communicate(timeout=60)[1]
    assert rig.returncode == 2
    assert not (tmp_path / "log").exists()


def test_a_rank_has_its_part_of_this_gpus_sms_in_eights() -> None:
    assert [mps_rig.sms_of_a_rank(132, ranks) for ranks in (1, 2, 3, 4, 8, 16)] == [128, 64, 40, 32, 16, 8]
    assert mps_rig.sms_of_a_rank(148, 4) == 32
    with pytest.raises(SystemExit, match="at least 8 SMs for each of 16 ranks, the GPU has 114: at most --ranks 14"):
        mps_rig.sms_of_a_rank(114, 16)


class FakeDriver(SimpleNamespace):
    """A driver of CUDA 12.5 on a GPU that splits into `parts` and `rest` SMs; `code`: what the split returns."""

    def __init__(self, parts: int, rest: int = 0, code: int = 0) -> None:
        def split(result: Any, count: Any, whole: Any, left: Any, flags: int, sms: int) -> int:
            count._obj.value = parts
            left._obj.sms = rest
            return code

        def why(code: int, text: Any) -> int:
            text._obj.value = b"invalid argument"
            return 0

        def fine(*arguments: Any) -> int:
            return 0

        calls = ("cuDeviceGetDevResource", "cuDevResourceGenerateDesc", "cuGreenCtxCreate", "cuGreenCtxStreamCreate")
        super().__init__(cuDevSmResourceSplitByCount=split, cuGetErrorString=why, **dict.fromkeys(calls, fine))


@pytest.mark.parametrize(
    ("driver", "error"),
    [
        (FakeDriver(3, rest=24), "expected 4 parts of 32 SMs, the GPU splits into 3: fewer --ranks"),
        (FakeDriver(4, code=1), "SplitByCount into 4 parts of 32 SMs: CUDA error 1, invalid argument"),
        (SimpleNamespace(), "this driver has no green contexts: expected one of CUDA 12.5"),
    ],
)
def test_an_error_of_green_contexts_says_what_did_not_fit(
    driver: Any, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    with pytest.raises(RuntimeError, match=error):
        mps_rig.GreenContext(0, 4, 32)


@pytest.mark.parametrize("driver", [FakeDriver(4), FakeDriver(3, rest=32)], ids=["parts", "what is left"])
def test_a_split_that_fits_gives_each_rank_its_part(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    for part in range(4):
        mps_rig.GreenContext(part, 4, 32)
