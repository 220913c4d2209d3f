"""Tuning tables: what is read, what is refused, and how times become a choice."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_symm import tuning
from sglang_symm.tuning import derive_choice, derive_ladder, digest, file_name, find, load

LADDER = [[1024, "one_shot"], [None, "two_shot_direct"]]


def document(**changes: Any) -> dict[str, Any]:
    """A table of three CPU ranks; every op has a ladder of its own."""
    choice = {op: [[1024 << i, "one_shot"], [None, "two_shot_direct"]] for i, op in enumerate(tuning.OPS)}
    return {"format": 1, "device": "cpu", "world_size": 3, "choice": choice} | changes


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_table_becomes_the_text_that_the_native_library_reads(tmp_path: Path) -> None:
    found = find("cpu", 3, str(write(tmp_path / "mine.json", document())))
    assert found.source == "mine.json"
    assert found.text == (
        "all_reduce:one_shot<=1024,two_shot_direct;row_parallel_linear:one_shot<=2048,two_shot_direct;"
        "reduce_scatter:one_shot<=4096,two_shot_direct;all_gather:one_shot<=8192,two_shot_direct;"
        "broadcast:one_shot<=16384,two_shot_direct"
    )
    assert found.native() == ["tuning=" + found.text]
    assert found.label == f"mine.json {digest(found.text)}"


def test_the_built_in_tuning_is_the_native_librarys_own(tmp_path: Path) -> None:
    for built_in in (find("cpu", 3, "built-in"), find("a device that nobody measured", 2)):
        assert (built_in.source, built_in.native(), built_in.label) == ("built-in", [], "built-in")


def test_a_folder_is_searched_by_device_and_world_size(tmp_path: Path) -> None:
    assert file_name("NVIDIA H100 80GB HBM3", 8) == "NVIDIA_H100_80GB_HBM3_p8.json"
    write(tmp_path / file_name("A GPU", 3), document(device="A GPU"))
    assert find("A GPU", 3, str(tmp_path)).source == "A_GPU_p3.json"
    assert find("A GPU", 4, str(tmp_path)) == tuning.BUILT_IN


def test_a_file_of_another_device_or_world_size_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "table.json", document())
    assert find("cpu", 3, str(path)).source == "table.json"
    with pytest.warns(UserWarning, match=r"table\.json is of 3 ranks of cpu, so a group of 3 ranks of another"):
        assert find("another", 3, str(path)) == tuning.BUILT_IN
    with pytest.warns(UserWarning, match="so a group of 13 ranks of cpu does not use it"):
        assert find("cpu", 13, str(path)) == tuning.BUILT_IN


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "table.json", document())
    before = find("cpu", 3, str(path))
    write(path, document(choice={op: [[None, "two_shot"]] for op in tuning.OPS}))
    assert find("cpu", 3, str(path)).label != before.label


def test_a_path_that_is_none_is_an_error_that_names_the_variable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.*got nothing there.*SGLANG_SYMM_TABLES"):
        find("cpu", 2, str(tmp_path / "nowhere"))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match=r"fifo.*got what is neither"):
        find("cpu", 2, str(tmp_path / "fifo"))


def choice_with(ladder: Any) -> dict[str, Any]:
    return document()["choice"] | {"broadcast": ladder}


WRONG = {
    "not JSON": (b"{", "expected JSON"),
    "not text": (b"\xff\xfe\x00", "cannot be read"),
    "deeply nested": (b"[" * 100_000, "expected"),
    "a list": ([], "expected an object, got []"),
    "another format": (document(format=2), "expected format 1, got 2"),
    "no device": (document(device=""), "device: a name, got ''"),
    "a device that is a number": (document(device=3), "device: a name, got 3"),
    "no ranks": (document(world_size=0), "world_size: 1 to 16, got 0"),
    "ranks that are true": (document(world_size=True), "world_size: 1 to 16, got True"),
    "too many ranks": (document(world_size=17), "world_size: 1 to 16, got 17"),
    "no choice": (document(choice=None), "choice: an object, got None"),
    "an op is missing": (document(choice={"all_reduce": LADDER}), "got ['all_reduce']"),
    "an op too many": (document(choice=document()["choice"] | {"barrier": LADDER}), "barrier"),
    "no steps": (document(choice=choice_with([])), "choice of broadcast: a list"),
    "a step that is none": (document(choice=choice_with([["one_shot"]])), "got ['one_shot']"),
    "an unknown algorithm": (document(choice=choice_with([[None, "fastest"]])), "got 'fastest'"),
    "an algorithm that is a list": (document(choice=choice_with([[None, []]])), "got []"),
    "no end": (document(choice=choice_with([[8, "one_shot"]])), "the last null, got [8, 'one_shot']"),
    "an end in the middle": (document(choice=choice_with([[None, "one_shot"], [None, "two_shot"]])), "ascending"),
    "sizes that fall": (document(choice=choice_with([[8, "one_shot"], [8, "two_shot"], [None, "one_shot"]])), "got [8"),
    "half a byte": (document(choice=choice_with([[0.5, "one_shot"], [None, "two_shot"]])), "got [0.5"),
    "a size of 10^18": (document(choice=choice_with([[10**18, "one_shot"], [None, "two_shot"]])), "got [1000"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_malformed_table_is_an_error_that_names_the_file_and_what_is_wrong(name: str, tmp_path: Path) -> None:
    content, shown = WRONG[name]
    path = tmp_path / "broken.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=r"^sglang_symm: tuning table .*broken\.json: ") as raised:
        find("cpu", 3, str(path))
    assert shown in str(raised.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(key=st.sampled_from(["format", "device", "world_size", "choice"]), value=JSON)
def test_no_table_makes_anything_but_a_value_error(key: str, value: Any) -> None:
    with contextlib.suppress(ValueError):
        tuning.parse(document(**{key: value}))


# --- from times to a choice


NOISE = 0.03


def columns(**times: list[float]) -> dict[str, list[float]]:
    return {"bytes": [1024 << i for i in range(len(next(iter(times.values()))))], **times}


def test_the_ladder_changes_half_way_between_two_sizes() -> None:
    times = columns(one_shot=[1, 2, 4, 8], two_shot=[2, 2.5, 3, 4])
    assert derive_ladder([times], NOISE) == ((3072, "one_shot"), (None, "two_shot"))


def test_a_gain_that_is_noise_changes_nothing() -> None:
    times = columns(one_shot=[1.0, 1.0, 1.02, 1.0, 1.0], two_shot=[1.5, 1.5, 1.0, 1.5, 1.5])
    assert derive_ladder([times], NOISE) == ((None, "one_shot"),)


def test_a_second_wait_must_earn_something() -> None:
    assert derive_ladder([columns(two_shot=[1.0], one_shot=[1.02])], NOISE) == ((None, "one_shot"),)
    assert derive_ladder([columns(two_shot=[1.0], one_shot=[1.04])], NOISE) == ((None, "two_shot"),)


def test_the_algorithm_that_is_bad_nowhere_wins() -> None:
    inside = columns(one_shot=[1.3], two_shot=[1.2], two_shot_direct=[1.0])
    outside = columns(one_shot=[1.0], two_shot=[1.1], two_shot_direct=[2.0])
    assert derive_ladder([inside], NOISE) == ((None, "two_shot_direct"),)
    assert derive_ladder([outside], NOISE) == ((None, "one_shot"),)
    assert derive_ladder([inside, outside], NOISE) == ((None, "two_shot"),)


def test_the_process_group_is_chosen_only_where_it_is_allowed() -> None:
    times = columns(one_shot=[2.0], process_group=[1.0])
    assert derive_ladder([times], NOISE) == ((None, "one_shot"),)
    assert derive_ladder([times], NOISE, tuning.ALGORITHMS) == ((None, "process_group"),)


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=1, max_size=7))
def test_no_ladder_is_better_than_the_one_derived(pairs: list[tuple[float, float]]) -> None:
    times = columns(one_shot=[a for a, _ in pairs], two_shot=[b for _, b in pairs])
    names = ("one_shot", "two_shot")

    def total(way: list[str]) -> float:
        cost = sum(math.log(times[name][i] / min(pairs[i])) for i, name in enumerate(way))
        cost += NOISE * way.count("two_shot")
        return cost + 2 * NOISE * sum(a != b for a, b in itertools.pairwise(way))

    every = [[names[bits >> i & 1] for i in range(len(pairs))] for bits in range(2 ** len(pairs))]
    ladder = derive_ladder([times], NOISE)
    way = [next(name for end, name in ladder if end is None or n <= end) for n in times["bytes"]]
    assert total(way) <= min(map(total, every)) + 1e-9


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        [columns(process_group=[1.0])],
        [{"bytes": [], "one_shot": []}],
        [{"bytes": [2, 1], "one_shot": [1.0, 1.0]}],
        [{"bytes": [1, 2], "one_shot": [1.0]}],
        [columns(one_shot=[1.0]), columns(two_shot=[1.0])],
        [columns(one_shot=[1.0]), columns(one_shot=[1.0, 1.0])],
    ],
)
def test_times_that_are_incomplete_are_an_error(wrong: list[Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        derive_ladder(wrong, NOISE)


def test_row_parallel_linear_is_chosen_by_what_lies_in_symmetric_memory() -> None:
    inside, outside = columns(one_shot=[2.0], two_shot_direct=[1.0]), columns(one_shot=[1.0], two_shot_direct=[9.0])
    choice = derive_choice({"all_reduce": {"inside": {"float32": inside}, "outside": {"float32": outside}}}, NOISE)
    assert choice["all_reduce"] == ((None, "one_shot"),)
    assert choice["row_parallel_linear"] == ((None, "two_shot_direct"),)
    assert choice["broadcast"] == ((None, "one_shot"),)  # an op without a choice on this device


def test_every_form_that_was_measured_counts() -> None:
    inside, new = columns(one_shot=[1.0], two_shot_direct=[1.1]), columns(one_shot=[1.5], two_shot_direct=[1.0])
    times = {"all_reduce": {"inside": {"float32": inside}}}
    assert derive_choice(times, NOISE)["all_reduce"] == ((None, "one_shot"),)
    times["all_reduce"]["inside, new result"] = {"float32": new}
    assert derive_choice(times, NOISE)["all_reduce"] == ((None, "two_shot_direct"),)


KEPT = sorted(tuning.KEPT.glob("*.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_table_kept_with_the_package_follows_from_its_times(path: Path) -> None:
    table, content = load(path), json.loads(path.read_text())
    assert path.name == file_name(table.device, table.world_size)
    assert dict(table.choice) == derive_choice(content["times"], content["noise"])
    assert all(key in content["measured"] for key in ("date", "commit", "machine", "torch", "command"))
