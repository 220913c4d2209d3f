"""The list of protocol mutants fits the source (`make mutants` builds and runs them)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from mutants import MUTANTS, Mutant  # noqa: E402


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_line_that_a_mutant_breaks_occurs_once(mutant: Mutant) -> None:
    assert (ROOT / "csrc" / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
