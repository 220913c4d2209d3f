"""Groups and their tuning tables: what is chosen, and that all members choose by the same table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_cases import DEVICE, gather_objects, inputs, ordered_sum, raised, same_bits

from sglang_symm import tuning
from sglang_symm.distributed import Group

SEVERAL = pytest.mark.world_size(2, 3, 4)


def device_name() -> str:
    return "cpu" if DEVICE == "cpu" else torch.cuda.get_device_name()


def table(path: Path, size: int, end: int) -> Path:
    """One-shot up to ``end`` bytes, then two_shot, for every op of a group."""
    choice = {op: [[end, "one_shot"], [None, "two_shot"]] for op in tuning.OPS}
    path.write_text(json.dumps({"format": 1, "device": device_name(), "world_size": size, "choice": choice}))
    return path


def same_path(tmp_path: Path) -> Path:
    """A folder that all ranks know."""
    return Path(gather_objects(str(tmp_path))[0])


@SEVERAL
def test_a_group_chooses_by_its_table(make: Callable[..., Group], tmp_path: Path, rank: int, size: int) -> None:
    path = same_path(tmp_path) / "mine.json"
    if rank == 0:
        table(path, size, 400)
    gather_objects(None)
    group = make(tables=str(path))
    assert group.tuning.source == "mine.json"
    assert group.info()["settings"]["tuning"] == group.tuning.text
    assert tuning.digest(group.tuning.text) in group.info()["settings"]["agreed"]
    xs = inputs(size, [101])
    for n, algorithm in ((100, "one_shot"), (101, "two_shot")):
        before = group.info()["calls_by_algorithm"][algorithm]
        assert same_bits(group.all_reduce(xs[rank][:n]), ordered_sum([x[:n] for x in xs]))
        assert group.info()["calls_by_algorithm"][algorithm] == before + 1


@SEVERAL
def test_the_variable_names_a_table_and_an_argument_goes_before_it(
    make: Callable[..., Group], tmp_path: Path, rank: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = same_path(tmp_path) / tuning.file_name(device_name(), size)
    if rank == 0:
        table(path, size, 400)
    gather_objects(None)
    monkeypatch.setenv("SGLANG_SYMM_TABLES", str(path.parent))
    assert make().tuning.source == path.name
    built_in = make(tables="built-in")
    assert built_in.tuning == tuning.BUILT_IN
    assert tuning.digest(built_in.info()["settings"]["tuning"]) in built_in.info()["settings"]["agreed"]


@SEVERAL
def test_a_table_that_differs_on_one_rank_is_refused_by_name_on_all(
    make: Callable[..., Group], tmp_path: Path, rank: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal paths, other contents: as on ranks that see different files there."""
    monkeypatch.chdir(tmp_path)
    table(Path("table.json"), size, 400 if rank < size - 1 else 800)
    error = raised(make, tables="table.json")
    assert isinstance(error, ValueError)
    sentence = str(error)
    assert "disagree about tuning: rank 0 has tuning='table.json " in sentence
    assert f"rank {size - 1} has tuning='table.json " in sentence
    assert len(set(gather_objects(sentence))) == 1
    assert same_bits(make().all_reduce(torch.ones(8)), torch.full((8,), float(size)))


@SEVERAL
@pytest.mark.parametrize("content", ["", "{}", None])
def test_a_table_that_one_rank_cannot_read_is_told_to_all(
    make: Callable[..., Group],
    tmp_path: Path,
    rank: int,
    size: int,
    content: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    table(Path("table.json"), size, 400)
    if rank == size - 1:
        Path("table.json").unlink() if content is None else Path("table.json").write_text(content)
    error = raised(make, tables="table.json")
    assert isinstance(error, ValueError)
    assert "table.json" in str(error)
    assert f"on rank {size - 1} of the group" in str(error)
    assert len(set(gather_objects(str(error)))) == 1


@SEVERAL
def test_the_native_library_compares_the_tuning_too(
    make: Callable[..., Group], rank: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the labels equal by accident, the ladders are not."""
    ladders = [";".join(f"{op}:one_shot<={n},two_shot" for op in tuning.OPS) for n in (400, 800)]

    class Disguised(tuning.Tuning):
        @property
        def label(self) -> str:
            return "the same"

    text = ladders[0] if rank < size - 1 else ladders[1]
    monkeypatch.setattr(tuning, "find", lambda *_: Disguised("mine", text))
    error: Any = raised(make, first_timeout=5.0)
    assert error is not None
    assert "tuning=" in str(error)
