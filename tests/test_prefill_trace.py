"""What benchmarks/prefill_trace.py makes of stamps."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def module() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("prefill_trace")


def test_a_row_says_how_many_ctas_have_a_stamp_and_when_after_the_kernels_first(module: ModuleType) -> None:
    stamps = sorted({stamp for span in module.SPANS.values() for stamp in span} | set(module.OF_THE_CALL))
    times = torch.zeros(2, 3, 2, len(stamps), dtype=torch.int64)

    def put(repeat: int, cta: int, visit: int, **after: int) -> None:
        for stamp, ns in after.items():
            times[repeat, cta, visit, stamps.index(stamp)] = (5_000_000, 9_000_000)[repeat] + ns

    for repeat in range(2):  # of the third CTA there is nothing
        put(repeat, 0, 0, previous_ended=0, filled=10_000, multiplied=40_000, end=90_000)
        put(repeat, 1, 0, previous_ended=64, filled=12_000, multiplied=40_000, end=90_000)
        put(repeat, 0, 1, filled=50_000, multiplied=80_000)
        put(repeat, 1, 1, filled=50_000, multiplied=80_000, partial_awaited=45_000)
    rows = module.rows(times, stamps)
    found = {(row["visit"], row["kind"], row["what"]): row for row in rows if row["tiles"] != "own"}
    named = {"visit": 0, "tiles": "others'", "kind": "at", "what": "filled"}
    assert found[0, "at", "filled"] == {**named, "ctas": 2, "mean": 11.0, "min": 10.0, "max": 12.0}
    assert found[0, "for", "multiplies"]["min"] == 28.0
    assert found[0, "for", "multiplies"]["max"] == 30.0
    assert found[1, "for", "multiplies"]["ctas"] == 1
    assert [row["what"] for row in rows if row["tiles"] == "own" and row["kind"] == "for"] == ["multiplies"]
    assert found[None, "at", "previous_ended"]["min"] == 0.0
    assert found[None, "at", "end"]["mean"] == 90.0
    assert (1, "at", "previous_ended") not in found
    assert module.resolution(times) == 8  # of 64 ns, 45 us and 4 ms


def test_steps_of_all_columns_and_both_halves_are_of_a_tile_that_all_ranks_sum(module: ModuleType) -> None:
    stamps = sorted({stamp for span in module.SPANS.values() for stamp in span} | set(module.OF_THE_CALL))
    times = torch.zeros(1, 1, 4, len(stamps), dtype=torch.int64)
    for visit, names in enumerate((["partial_awaited", "stored"], ["filled"], ["stored", "summed"], ["summed"])):
        for name in names:
            times[0, 0, visit, stamps.index(name)] = 1000 * (visit + 1)
    rows = module.rows(times, stamps)
    tiles = {row["visit"]: row["tiles"] for row in rows if row["visit"] is not None}
    assert tiles == {0: "own", 1: "all ranks'", 2: "all ranks'", 3: "all ranks'"}


def test_every_span_lies_between_stamps_of_the_kernel(module: ModuleType) -> None:
    stamps = (ROOT / "csrc/fused/prefill_trace_sm90.cuh").read_text()
    names = {name for span in module.SPANS.values() for name in span} | set(module.OF_THE_CALL)
    assert [name for name in sorted(names) if f'"{name}"' not in stamps] == []
