"""The verdict of `make test`: a failure on any rank counts, a rank that dies counts, nothing counts twice."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """tools/run_tests.py, working in a folder of its own that has this repository's conftest."""
    spec = importlib.util.spec_from_file_location("run_tests", ROOT / "tools" / "run_tests.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run_tests", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "OUT", tmp_path / "out")
    for name in ("RANK", "WORLD_SIZE", "SGLANG_SYMM_TEST_RESULTS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return module


def counts(part: object) -> tuple[int, int, int]:
    return part.passed, part.failed, part.skipped  # type: ignore[attr-defined]


def test_a_part_counts_passed_failed_and_skipped(runner: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tests" / "test_some.py").write_text(
        "import pytest\n"
        "def test_fine(): pass\n"
        "def test_wrong(): assert 0\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError\n"
        "def test_error_in_setup(broken): pass\n"
        "@pytest.mark.skip(reason='-')\n"
        "def test_skipped(): pass\n"
        "@pytest.mark.world_size(2)\n"
        "def test_for_two_ranks(): assert 0\n"
    )
    part = runner.pytest_part("single", "tests")
    runner.run_in_turn([part])
    assert counts(part) == (1, 2, 1)


def test_a_file_that_cannot_be_imported_is_a_failure(runner: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tests" / "test_some.py").write_text("import no_such_module\n")
    part = runner.pytest_part("single", "tests")
    runner.run_in_turn([part])
    assert counts(part) == (0, 1, 0)


def test_a_failure_on_any_rank_counts_once(runner: ModuleType) -> None:
    part = runner.ranks_part(3)
    part.folder.mkdir(parents=True)
    for rank, outcome in enumerate(["passed", "failed", "failed"]):
        outcomes = {"test_a": outcome, "test_b": "passed", "test_c": "skipped"}
        (part.folder / f"rank{rank}.json").write_text(json.dumps(outcomes))
    part.count()
    assert counts(part) == (1, 1, 1)


def test_a_rank_that_leaves_no_result_is_a_failure(runner: ModuleType) -> None:
    part = runner.ranks_part(2)
    part.folder.mkdir(parents=True)
    (part.folder / "rank0.json").write_text(json.dumps({"test_a": "passed"}))
    part.count()
    assert counts(part) == (1, 1, 0)
    assert part.note == "1 of 2 ranks left no result"


def test_a_part_that_hangs_is_ended_and_is_a_failure(runner: ModuleType) -> None:
    part = runner.Part("single", [sys.executable, "-c", "import time; time.sleep(100)"], limit=0.5)
    runner.run_in_turn([part])
    assert counts(part) == (0, 1, 0)
    assert "did not end within" in part.note
    assert part.seconds < 50


@pytest.mark.parametrize(("status", "expected"), [(0, (1, 0, 0)), (3, (0, 1, 0))])
def test_the_status_of_a_program_counts_as_one_test(
    runner: ModuleType, status: int, expected: tuple[int, int, int]
) -> None:
    part = runner.Part("memcheck2", [sys.executable, "-c", f"raise SystemExit({status})"], program=True)
    runner.run_in_turn([part])
    assert counts(part) == expected


def test_what_was_told_before_a_part_was_ended_counts(runner: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tests" / "test_some.py").write_text(
        "import time\ndef test_slow(): time.sleep(1.1)\ndef test_fine(): pass\ndef test_endless(): time.sleep(100)\n"
    )
    part = runner.pytest_part("single", "tests")
    part.limit = 8
    runner.run_in_turn([part])
    assert counts(part) == (1, 1, 0)
    assert part.note == "did not end within 8 s"


SHOW_DEVICES = """
import os, sys, time
line = f"{os.environ['CUDA_VISIBLE_DEVICES']} {time.monotonic()} "
time.sleep(0.5)
open(sys.argv[1], "a").write(line + f"{time.monotonic()}\\n")
print("said by a part")
"""


def test_parts_side_by_side_never_share_a_gpu(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,5")
    times = tmp_path / "times"
    command = [sys.executable, "-c", SHOW_DEVICES, str(times)]
    parts = [runner.Part(f"part{i}", command, gpus=gpus) for i, gpus in enumerate([3, 2, 2, 1, 1])]
    runner.run_side_by_side(parts)
    assert not any(part.failed for part in parts)
    assert capfd.readouterr().out.count(":\nsaid by a part\n") == 5
    runs = [line.split() for line in times.read_text().splitlines()]
    assert sorted(len(devices.split(",")) for devices, _, _ in runs) == [1, 1, 2, 2, 3]
    for device in ("0", "3", "5"):
        mine = sorted((float(begin), float(end)) for devices, begin, end in runs if device in devices.split(","))
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(mine))


WAIT_FOR = """
import pathlib, sys, time
print("said by a part", flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.05)
"""


def test_on_the_cpu_a_part_beside_the_next_is_not_waited_for_and_shows_its_output_when_it_has_ended(
    runner: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "done"
    waits = runner.Part("kernels", [sys.executable, "-c", WAIT_FOR, str(done)], limit=60, program=True, beside=True)
    next_one = runner.Part(
        "single", [sys.executable, "-c", f"open({str(done)!r}, 'w'); print('the next')"], program=True
    )
    runner.run_in_turn([waits, next_one])
    assert counts(waits) == counts(next_one) == (1, 0, 0)
    output = capfd.readouterr().out
    assert output.index("the next") < output.index("kernels:\nsaid by a part\n")


def test_a_part_that_runs_beside_others_is_not_held_when_it_is_the_last(
    runner: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    runner.run_in_turn([runner.Part("kernels", [sys.executable, "-c", "print('at once')"], program=True, beside=True)])
    output = capfd.readouterr().out
    assert "at once" in output
    assert "beside the next" not in output


def test_what_cannot_be_counted_ends_the_parts_that_still_run(runner: ModuleType, tmp_path: Path) -> None:
    waits = runner.Part("kernels", [sys.executable, "-c", WAIT_FOR, str(tmp_path / "never")], beside=True)
    broken = "import os; open(os.environ['SGLANG_SYMM_TEST_RESULTS'] + '/rank0.json', 'w').write('{')"
    with pytest.raises(json.JSONDecodeError):
        runner.run_in_turn([waits, runner.Part("single", [sys.executable, "-c", broken])])
    assert waits.process.wait(10) != 0


def test_a_part_beside_others_that_hangs_is_ended(runner: ModuleType, tmp_path: Path) -> None:
    hangs = runner.Part("kernels", [sys.executable, "-c", WAIT_FOR, str(tmp_path / "never")], limit=0.5, beside=True)
    runner.run_in_turn([hangs, runner.Part("single", [sys.executable, "-c", ""], program=True)])
    assert counts(hangs) == (0, 1, 0)
    assert "did not end within" in hangs.note


KILLS = ("kill2", "killnccl2")


@pytest.mark.parametrize(
    ("gpus", "names"),
    [
        (1, {"rig2", "rig3", "rig4", "rig6", "rig8"}),
        (2, {"gpus2", "over2", "rig3", "rig4", "rig6", "rig8", *KILLS}),
        (4, {"gpus4", "over4", "gpus3", "gpus2", "over2", "rig6", "rig8", *KILLS}),
        (8, {"gpus8", "over8", "gpus6", "gpus4", "gpus3", "gpus2", "over2", *KILLS}),
    ],
)
def test_the_parts_of_a_machine_with_gpus(
    runner: ModuleType, gpus: int, names: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    parts = runner.gpu_parts()
    unasked = [part for part in parts if part.unasked]
    assert {part.name for part in unasked} == names
    assert all(part.gpus == (1 if part.name.startswith("rig") else part.ranks) for part in unasked)
    assert all(part.gpus <= gpus for part in parts)
    assert {"rig5", "rig7", "long2", "memcheck2"} <= {part.name for part in parts if not part.unasked}


def test_the_last_line_is_the_sum_and_a_missing_gtest_is_told_before_it(runner: ModuleType) -> None:
    parts = [runner.Part("single", [], passed=2, skipped=1), runner.Part("ranks2", [], passed=3, failed=1)]
    lines = runner.summary(parts, 60.0, gtest_missing=True).splitlines()
    assert lines[-1] == "5 passed, 1 failed, 1 skipped"
    assert "apt-get install -y libgtest-dev" in lines[-2]


def test_ranks_above_zero_are_quiet_until_they_fail(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    test = tmp_path / "tests" / "test_some.py"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    test.write_text("def test_fine(): pass\n")
    runner.run_in_turn([runner.pytest_part("ranks2", "tests")])
    assert "passed" not in capfd.readouterr().out
    test.write_text("def test_wrong(): assert 0\n")
    runner.run_in_turn([runner.pytest_part("ranks2", "tests")])
    assert "[rank 1] FAILED tests/test_some.py::test_wrong" in capfd.readouterr().err
