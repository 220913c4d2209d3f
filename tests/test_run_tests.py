"""The verdict of `make test`: a failure on any rank counts, a rank that dies counts, nothing counts twice."""

from __future__ import annotations

import importlib.util
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
    part.run()
    assert counts(part) == (1, 2, 1)


def test_a_file_that_cannot_be_imported_is_a_failure(runner: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tests" / "test_some.py").write_text("import no_such_module\n")
    part = runner.pytest_part("single", "tests")
    part.run()
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
    part.run()
    assert counts(part) == (0, 1, 0)
    assert "did not end within" in part.note
    assert part.seconds < 50


def test_the_last_line_is_the_sum_and_a_missing_gtest_is_told_before_it(runner: ModuleType) -> None:
    parts = [runner.Part("single", [], passed=2, skipped=1), runner.Part("ranks2", [], passed=3, failed=1)]
    lines = runner.summary(parts, gtest_missing=True).splitlines()
    assert lines[-1] == "5 passed, 1 failed, 1 skipped"
    assert "apt-get install -y libgtest-dev" in lines[-2]


def test_ranks_above_zero_are_quiet_until_they_fail(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    test = tmp_path / "tests" / "test_some.py"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    test.write_text("def test_fine(): pass\n")
    runner.pytest_part("ranks2", "tests").run()
    assert "passed" not in capfd.readouterr().out
    test.write_text("def test_wrong(): assert 0\n")
    runner.pytest_part("ranks2", "tests").run()
    assert "[rank 1] FAILED tests/test_some.py::test_wrong" in capfd.readouterr().err
