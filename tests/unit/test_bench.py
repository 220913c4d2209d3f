"""The bench command's arithmetic and output, without ranks."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from preloaded import Process

from sglang_symm import tuning
from sglang_symm.__main__ import main as command
from sglang_symm.bench import launched, report
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


GPU_ROWS = [
    Row("all_reduce", "bfloat16", 2048, "symm", False, 1.0, 0, [2.0], "graph", None, 0.61),
    Row("all_reduce", "bfloat16", 2048, "symm", False, 1.0, 0, [9.0], "eager", 4.5, 0.61),
    Row("all_reduce", "bfloat16", 2048, "nccl", True, 1.0, 0, [5.0], "graph", None, 0.61),
    Row("all_reduce", "bfloat16", 2048, "nccl", True, 1.0, 0, [10.0], "eager", 8.0, 0.61),
    Row("all_reduce", "bfloat16", 2048, "torch_one_shot", False, 1.0, 0, [8.0], "graph", None, 0.61),
]
GPU_ENVIRONMENT = {"machine": "2 GPUs", "device": "cuda", "ranks": 2}


def test_on_gpus_the_ratio_is_within_a_mode_to_the_best_peer_of_any_place() -> None:
    lines = report.table(GPU_ROWS, GPU_ENVIRONMENT).splitlines()
    graph, eager = (next(x for x in lines if " symm " in x and mode in x).split() for mode in ("graph", "eager"))
    assert graph[-1] == f"{2.0 / 5.0:.2f}"
    assert eager[-1] == f"{9.0 / 10.0:.2f}"


def test_on_gpus_the_limit_and_the_time_of_the_host_stand_beside_each_row() -> None:
    lines = report.table(GPU_ROWS, GPU_ENVIRONMENT).splitlines()
    assert "cpu us" in lines[1]
    assert "limit" in lines[1]
    assert next(x for x in lines if " nccl " in x and "eager" in x).split()[-2:] == ["8.00", "0.61"]
    assert next(x for x in lines if " nccl " in x and "graph" in x).split()[-2:] == ["-", "0.61"]
    assert all("limit" not in line for line in report.table(ROWS, ENVIRONMENT).splitlines())


def test_the_limit_is_what_the_link_carries_and_the_flight_of_a_flag() -> None:
    one, big = (Case("all_reduce", n, torch.bfloat16, 4).limit_us(450.0) for n in (2, 450 << 20))
    assert 0.6 < one < 0.601
    assert big == pytest.approx(0.6 + 1.5 * (450 << 20) / 450e3)


def test_rows_of_a_graph_come_back_with_their_mode(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(report.to_json(GPU_ROWS, GPU_ENVIRONMENT))
    assert report.load(str(path)) == GPU_ROWS
    content = json.loads(path.read_text())
    for row in content["rows"]:  # a file from before there were modes
        del row["mode"], row["cpu_us"], row["limit_us"]
    path.write_text(json.dumps(content))
    assert {(row.mode, row.limit_us) for row in report.load(str(path))} == {("eager", None)}


def test_csv_names_as_many_columns_as_it_has(tmp_path: Path) -> None:
    report.write_csv(GPU_ROWS, str(tmp_path / "rows.csv"))
    lines = [line.split(",") for line in (tmp_path / "rows.csv").read_text().splitlines()]
    assert {len(line) for line in lines} == {14}
    assert lines[2][-3:] == ["eager", "4.500", "0.610"]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["-n", "1"], "--nproc 2 to 16"),
        (["--calls", "0"], "--calls >= 1"),
        (["--device", "cuda", "--peers", "gloo"], "nccl, nccl_window, torch_one_shot, torch_two_shot"),
        (["--peers", "nccl"], "gloo, deepspeed"),
        (["--device", "cuda", "--mode", "graphs"], "graph, eager"),
        (["-b", "4K", "-e", "2K"], "-b"),
        (["--seconds", "inf"], "--seconds > 0"),
        (["--algo", "nccl"], "needs --device cuda"),
        (["--csv", "/proc/nowhere/rows.csv"], "/proc/nowhere/rows.csv"),
        (["--plot", "rows.xyz"], "png"),
    ],
)
def test_wrong_arguments_end_with_2_and_a_sentence(
    words: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["bench", *words]) == 2
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize(("gpus", "shown"), [(0, "torch sees none"), (1, "mps_rig")])
@pytest.mark.parametrize("program", ["bench", "tune"])
def test_fewer_gpus_than_ranks_end_with_2_and_a_sentence(
    program: str, gpus: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert command([program, "--device", "cuda", "-n", "2"]) == 2
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize("program", ["bench", "tune"])
def test_a_number_of_ranks_that_the_launcher_did_not_start_is_refused(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert command([program, "-n", "3"]) == 2
    assert "expected --nproc 4, as many ranks as were started, or none, got 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, "python"),
        ({"LOCAL_WORLD_SIZE": "4"}, "python"),  # the ranks that bench starts itself
        ({"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}, "torchrun --nproc-per-node 4"),
        ({"LOCAL_WORLD_SIZE": "4", "SGLANG_SYMM_SMS": "32"}, "python tools/mps_rig.py --ranks 4 --"),
    ],
)
def test_the_command_that_is_written_down_names_its_launcher(
    environment: dict[str, str], launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SGLANG_SYMM_SMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert launched("-m", "sglang_symm", "tune", "-n", "4") == f"{launcher} -m sglang_symm tune -n 4"
    assert launched("benchmarks/a.py", "--json", "/a/folder/a.json") == f"{launcher} benchmarks/a.py --json a.json"


def test_a_plot_without_matplotlib_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command(["bench", "--plot", "rows.png"]) == 2
    assert "pip install 'sglang_symm[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["-n", "17"], ["-b", "32"], ["-e", "1T"], ["--device", "cuda", "-n", "16", "-b", "8K"]]
)
def test_wrong_arguments_of_tune_end_with_2_and_a_sentence(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["tune", *words]) == 2
    assert "sglang_symm tune: " in capsys.readouterr().err


@pytest.mark.slow
def test_tune_writes_a_table_that_a_group_reads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["tune", "-n", "2", "-b", "1K", "-e", "4K", "--rounds", "1", "--dtype", "float32", "--json"]
    assert command([*words, "--process-group", "-o", str(tmp_path)]) == 0
    printed = json.loads(capfd.readouterr().out)
    path = tmp_path / tuning.file_name("cpu", 2)
    assert json.loads(path.read_text()) == printed
    assert tuning.find("cpu", 2, str(tmp_path)).source == path.name
    assert str(tmp_path) not in printed["measured"]["command"]
    assert printed["measured"]["command"].endswith("--process-group")
    assert set(printed["times"]["all_reduce"]) == {"inside", "outside", "inside, new result", "outside, new result"}
    for where in printed["times"]["all_reduce"].values():
        assert where["float32"]["bytes"] == [1024, 2048, 4096]
        assert all(len(where["float32"][name]) == 3 for name in tuning.ALGORITHMS)
    assert printed["times"]["all_gather"]["inside"]["float32"]["bytes"] == [1024, 2048]


def test_json_comes_back_as_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(report.to_json(ROWS, ENVIRONMENT))
    assert report.load(str(path)) == ROWS
    assert json.loads(path.read_text())["rows"][0]["median_us"] == 2.0


def test_csv_has_a_line_a_row(tmp_path: Path) -> None:
    report.write_csv(ROWS, str(tmp_path / "rows.csv"))
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + len(ROWS)


@pytest.mark.parametrize(("rows", "environment"), [(ROWS, ENVIRONMENT), (GPU_ROWS, GPU_ENVIRONMENT)])
def test_a_plot_is_written(tmp_path: Path, rows: list[Row], environment: dict[str, Any]) -> None:
    report.plot(rows, str(tmp_path / "plot.png"), environment)
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_end_while_mpi_runs_ends_mpi_too(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """mpicc and mpirun are scripts here: the launcher has a child that would run for minutes."""
    child = tmp_path / "child"
    scripts = {
        "mpicc.openmpi": "exit 0",
        "mpirun.openmpi": f"sleep 300 & echo $! > {child}.part; mv {child}.part {child}; wait",
    }
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    words = ["-b", "2K", "-e", "2K", "--peers", "openmpi"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    bench = Process(command, ["bench", *words], env=environment)
    deadline = time.monotonic() + 120
    while not child.exists():
        assert bench.poll() is None, bench.communicate(timeout=1)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    bench.send_signal(number)
    _, err = bench.communicate(timeout=60)
    assert bench.returncode == code, err
    pid = int(child.read_text())
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not list(tmp_path.glob("sglang_symm-*"))
