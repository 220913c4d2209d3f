"""The lists of mutants fit the source (`make mutants` builds and runs those of the protocol)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import mutants_cuda  # noqa: E402
import mutants_kernels  # noqa: E402
import mutants_python  # noqa: E402
from mutants import MUTANTS, Mutant  # noqa: E402
from mutants_cuda import Outcome, chosen_by, slug  # noqa: E402


@pytest.mark.parametrize("mutant", [*MUTANTS, *mutants_kernels.MUTANTS], ids=lambda m: m.name)
def test_the_line_that_a_mutant_breaks_occurs_once(mutant: Mutant) -> None:
    assert (ROOT / "csrc" / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new


@pytest.mark.parametrize("mutant", [*mutants_cuda.CONTROLS, *mutants_cuda.MUTANTS], ids=lambda m: m.name)
def test_the_lines_of_a_kernel_that_a_mutant_changes_occur_once(mutant: mutants_cuda.CudaMutant) -> None:
    edits = [] if mutant.control else [(mutant.file, mutant.old, mutant.new)]
    edits += mutants_cuda.SLOW[mutant.units[0]] if mutant.slow else []
    assert edits
    for file, old, new in edits:
        assert (ROOT / "csrc" / file).read_text().count(old) == 1
        assert old != new
    assert all((ROOT / "csrc" / unit).is_file() for unit in mutant.units)


@pytest.mark.parametrize("mutant", mutants_python.MUTANTS, ids=lambda m: m.name)
def test_the_line_of_a_behaviour_occurs_once(mutant: mutants_python.Mutant) -> None:
    assert (ROOT / "sglang_symm" / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new


@pytest.mark.parametrize(
    ("words", "status", "shown"),
    [
        (["run"], 2, "expected run FOLDER"),
        (["run", "."], 1, "expected a library of a mutant in ., as"),
        (["run", "nowhere"], 1, "found none: python tools/mutants_cuda.py build --out nowhere"),
        (["build"], 2, "expected build --out FOLDER"),
        (["run", ".", "--only", "nosuch"], 1, "no mutant's name contains 'nosuch': list names them"),
        (["list", "--only", "nosuch"], 1, "no mutant's name contains 'nosuch'"),
    ],
)
def test_a_run_of_no_mutant_is_an_error(words: list[str], status: int, shown: str, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tools" / "mutants_cuda.py", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "")
    assert shown in done.stderr


SLOW = "one_shot: one parity for all slots"
LATE, PASSES = Outcome(True, "still waiting after 45 s", at_limit=True), Outcome(False, "9 passed")


@pytest.mark.parametrize(
    ("control", "status", "shown"),
    [(PASSES, 0, "3 as expected, 0 not"), (LATE, 1, f"UNCLEAR  {SLOW}: ended at the limit")],
)
def test_what_ended_at_the_limit_is_caught_where_the_same_sleep_alone_passes(
    control: Outcome,
    status: int,
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = chosen_by(SLOW)
    assert [m.name for m in chosen] == ["(control) a slow rank: one_shot_cuda", SLOW]
    for mutant in chosen:
        (tmp_path / f"{slug(mutant.name)}.so").touch()

    def found(mutant: mutants_cuda.CudaMutant, *rest: object) -> Outcome:
        return LATE if mutant.name == SLOW else control if mutant is chosen[0] else PASSES

    monkeypatch.setattr(mutants_cuda, "try_mutant", found)
    monkeypatch.setattr(mutants_cuda, "visible_gpus", lambda: ["0", "1"])
    assert mutants_cuda.run(tmp_path, 2, 45.0, SLOW) == status
    output = capsys.readouterr().out
    assert shown in output
    assert f"caught (ended at the limit) {SLOW}: still waiting" in output
