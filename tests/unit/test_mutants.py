"""The lists of mutants fit the source (`make mutants` builds and runs those of the protocol)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import mutants_cuda  # noqa: E402
import mutants_python  # noqa: E402
from mutants import MUTANTS, Mutant  # noqa: E402


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_line_that_a_mutant_breaks_occurs_once(mutant: Mutant) -> None:
    assert (ROOT / "csrc" / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new


@pytest.mark.parametrize("mutant", [*mutants_cuda.CONTROLS, *mutants_cuda.MUTANTS], ids=lambda m: m.name)
def test_the_line_of_a_kernel_that_a_mutant_breaks_occurs_once(mutant: mutants_cuda.CudaMutant) -> None:
    assert (ROOT / "csrc" / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    assert mutant.units
    assert all((ROOT / "csrc" / unit).is_file() for unit in mutant.units)
    assert not mutant.slow or mutant.units[0] in mutants_cuda.SLOW


@pytest.mark.parametrize("mutant", mutants_python.MUTANTS, ids=lambda m: m.name)
def test_the_line_of_a_behaviour_occurs_once(mutant: mutants_python.Mutant) -> None:
    assert (ROOT / "sglang_symm" / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
