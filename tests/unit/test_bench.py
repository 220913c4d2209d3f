"""The bench command's arithmetic and output, without ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sglang_symm.bench import report
from sglang_symm.bench.cases import Case, format_bytes, parse_bytes, sizes
from sglang_symm.bench.report import Row


def test_sizes_are_read_and_written_as_nccl_tests_does() -> None:
    assert [parse_bytes(t) for t in ("512", "2K", "2k", "8MiB", "1G")] == [512, 2048, 2048, 8 << 20, 1 << 30]
    assert [format_bytes(n) for n in (512, 2048, 3 << 20, 1500)] == ["512", "2K", "3M", "1500"]
    assert sizes(2048, 32768, 4) == [2048, 8192, 32768]


@pytest.mark.parametrize("text", ["", "K", "-2K", "2.5K", "2T"])
def test_a_wrong_size_is_an_error_that_shows_it(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_bytes(text)


def test_bus_bandwidth_follows_the_algorithms_traffic() -> None:
    factors = [Case(op, 1024, torch.float32, 4).bus_factor for op in ("all_reduce", "all_gather", "broadcast")]
    assert factors == [1.5, 0.75, 1.0]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("op", ["all_reduce", "reduce_scatter", "all_gather", "broadcast"])
def test_the_expected_result_is_the_definition_of_the_op(op: str, world_size: int) -> None:
    case = Case(op, 400, torch.bfloat16, world_size)
    inputs = [case.value(r).double() for r in range(world_size)]
    for rank in range(world_size):
        got = case.expected(rank).double()
        if op == "all_reduce":
            want = sum(inputs)
        elif op == "reduce_scatter":
            want = sum(inputs).chunk(world_size)[rank]
        elif op == "all_gather":
            want = torch.cat(inputs)
        else:
            want = inputs[0]
        assert torch.equal(got, want)


ROWS = [
    Row("all_reduce", "float32", 2048, "symm", True, 1.0, 0, [2.0, 1.0, 3.0]),
    Row("all_reduce", "float32", 2048, "gloo", True, 1.0, 0, [400.0, 410.0, 420.0]),
    Row("all_reduce", "float32", 2048, "broken", True, 1.0, 7, [1.0, 1.0, 1.0]),
    Row("all_reduce", "float32", 2048, "empty op", True, 1.0, 0, [1.5, 1.5, 1.5]),
]
ENVIRONMENT = {"machine": "2 cores", "ranks": 2}


def test_the_ratio_is_to_the_best_peer_that_was_right() -> None:
    line = next(x for x in report.table(ROWS, ENVIRONMENT).splitlines() if " symm " in x)
    assert line.split()[-2] == f"{2.0 / 410.0:.2f}"


def test_a_peer_called_from_c_is_given_the_time_of_an_empty_op() -> None:
    rows = [*ROWS, Row("all_reduce", "float32", 2048, "openmpi", True, 1.0, 0, [0.5, 0.5, 0.5])]
    line = next(x for x in report.table(rows, ENVIRONMENT).splitlines() if " symm " in x)
    assert line.split()[-2:] == [f"{2.0 / 0.5:.2f}", f"{2.0 / (0.5 + 1.5):.2f}"]


def test_json_comes_back_as_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(report.to_json(ROWS, ENVIRONMENT))
    assert report.load(str(path)) == ROWS
    assert json.loads(path.read_text())["rows"][0]["median_us"] == 2.0


def test_csv_has_a_line_a_row(tmp_path: Path) -> None:
    report.write_csv(ROWS, str(tmp_path / "rows.csv"))
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + len(ROWS)


def test_a_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is an extra: pip install sglang_symm[bench]")
    report.plot(ROWS, str(tmp_path / "plot.png"), ENVIRONMENT)
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
