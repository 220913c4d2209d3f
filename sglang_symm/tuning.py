# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Which algorithm a call takes: tables that `python -m sglang_symm tune` measures, read when a group is made.

A table is a JSON file of one kind of device and one number of ranks:

    {"format": 1, "device": "NVIDIA H100 80GB HBM3", "world_size": 2, "measured": {...},
     "noise": 0.02, "choice": {"all_reduce": [[65536, "one_shot"], [null, "two_shot"]], ...},
     "times": {"all_reduce": {"inside": {"bfloat16": {"bytes": [...], "one_shot": [...], ...}}, "outside": ...}, ...}}

``choice`` is what groups use: for each op the algorithm up to so many bytes of a rank's contribution, the last without
an end. ``times`` (microseconds) and ``noise`` are what it was derived from: tensors in symmetric memory and outside of
it, an all_reduce in place and (tables of H200s for four and eight ranks, and what ``tune`` writes now) into a new
tensor. That differs from rank to rank, so it cannot enter the choice; the algorithm that is bad nowhere is taken.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

FORMAT = 1
# In the order in which the native library reads them.
OPS = ("all_reduce", "row_parallel_linear", "reduce_scatter", "all_gather", "broadcast")
ALGORITHMS = ("one_shot", "two_shot", "two_shot_direct", "process_group")  # that `tune` measures
CHOICES = (*ALGORITHMS, "nccl")  # that a table may name; a group without NCCL passes over it
KEPT = Path(__file__).with_name("tables")  # with the package
BUILT_IN_NAME = "built-in"

Ladder = tuple[tuple[int | None, str], ...]
Columns = Mapping[str, Sequence[Any]]  # "bytes" and one of microseconds for each algorithm


@dataclass(frozen=True)
class Tuning:
    """What a group chooses by.

    Attributes:
        source: the table's name, or ``built-in``.
        text: the ladders as the native library reads them; empty for the built-in ones, which it has itself.
    """

    source: str
    text: str

    @property
    def label(self) -> str:
        """What members of a group compare: the source, and a digest of its ladders."""
        return f"{self.source} {digest(self.text)}" if self.text else self.source

    def native(self) -> list[str]:
        """As a setting of the native library."""
        return [f"tuning={self.text}"] if self.text else []


BUILT_IN = Tuning(BUILT_IN_NAME, "")


@dataclass(frozen=True)
class Table:
    """One file."""

    device: str
    world_size: int
    choice: Mapping[str, Ladder]

    @property
    def text(self) -> str:
        """The ladders as the native library reads them."""

        def steps(ladder: Ladder) -> str:
            return ",".join(algorithm + ("" if end is None else f"<={end}") for end, algorithm in ladder)

        return ";".join(f"{op}:{steps(self.choice[op])}" for op in OPS)


def digest(text: str) -> str:
    """FNV-1a of 64 bits, as ``Group.info()`` shows it."""
    value = 14695981039346656037
    for byte in text.encode():
        value = (value ^ byte) * 1099511628211 % 2**64
    return f"{value:016x}"


def file_name(device: str, world_size: int) -> str:
    """The name of the file that holds the table of a device ("cpu", or a GPU's name) and a number of ranks."""
    return re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_") + f"_p{world_size}.json"


def find(device: str, world_size: int, tables: str = "") -> Tuning:
    """The tuning of a group.

    Args:
        device: "cpu", or the GPU's name as torch.cuda.get_device_name gives it.
        tables: a table's file, or a folder of them, asked before those kept with the package; ``built-in``: no table.

    A table of another device or number of ranks is passed over, with a warning where it was named itself. Raises
    ValueError for a path that is none, and for a file that is no table.
    """
    if tables == BUILT_IN_NAME:
        return BUILT_IN
    candidates = [KEPT / file_name(device, world_size)]
    if tables:
        given = Path(tables).expanduser()
        if not given.is_dir() and not given.is_file():
            found = "what is neither" if given.exists() else "nothing there"
            raise ValueError(
                f"sglang_symm: expected a tuning table or a folder of them at {tables!r}, got {found} "
                "(tables=, SGLANG_SYMM_TABLES; made by python -m sglang_symm tune)"
            )
        candidates.insert(0, given / file_name(device, world_size) if given.is_dir() else given)
    for path in candidates:
        if not path.is_file():
            continue
        table = _load(str(path), path.stat().st_mtime_ns)
        if (table.device, table.world_size) == (device, world_size):
            return Tuning(path.name, table.text)
        warnings.warn(
            f"sglang_symm: tuning table {path} is of {table.world_size} ranks of {table.device}, so a group of "
            f"{world_size} ranks of {device} does not use it",
            stacklevel=2,
        )
    return BUILT_IN


@lru_cache(maxsize=64)
def _load(path: str, changed: int) -> Table:
    return load(path)


def load(path: str | Path) -> Table:
    """Read a table. Raises ValueError that names the file, what was expected and what was found."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"sglang_symm: tuning table {path}: cannot be read: {error}") from None
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"sglang_symm: tuning table {path}: expected JSON: {error}") from None
    try:
        return parse(document)
    except ValueError as error:
        raise ValueError(f"sglang_symm: tuning table {path}: {error}") from None


def parse(document: Any) -> Table:
    """A table from a file's JSON. Raises ValueError with what was expected and what was got."""

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def expect(good: bool, what: str, got: Any) -> None:
        if not good:
            raise ValueError(f"expected {what}, got {got!r:.200}")

    expect(isinstance(document, dict), "an object", document)
    expect(document.get("format") == FORMAT, f"format {FORMAT}", document.get("format"))
    device, world_size, choice = (document.get(key) for key in ("device", "world_size", "choice"))
    expect(isinstance(device, str) and device != "", "device: a name", device)
    expect(whole(world_size) and 1 <= world_size <= 16, "world_size: 1 to 16", world_size)
    expect(isinstance(choice, dict), "choice: an object", choice)
    expect(set(choice) == set(OPS), f"choice: {', '.join(OPS)}", sorted(choice))
    ladders: dict[str, Ladder] = {}
    for op, ladder in choice.items():
        steps = f"choice of {op}: a list of [bytes, algorithm], bytes ascending, the last null"
        expect(isinstance(ladder, list) and ladder != [], steps, ladder)
        before = -1
        for number, step in enumerate(ladder):
            expect(isinstance(step, list) and len(step) == 2, steps, step)
            end, algorithm = step
            expect(algorithm in CHOICES, f"choice of {op}: one of {', '.join(CHOICES)}", algorithm)
            if number == len(ladder) - 1:
                expect(end is None, steps, step)
            else:
                expect(whole(end) and before < end < 10**18, steps, step)
                before = end
        ladders[op] = tuple((end, algorithm) for end, algorithm in ladder)
    return Table(device, world_size, ladders)


# --- from times to a choice -----------------------------------------------------------------------------------------


def noise_of(device: str, shares_cores: bool = False) -> float:
    """By which part a time differs when it is measured again; ``shares_cores``: more ranks than cores."""
    if device != "cpu":
        return 0.02
    return 0.2 if shares_cores else 0.1


def derive_ladder(columns: Sequence[Columns], noise: float, allowed: Sequence[str] = ALGORITHMS[:3]) -> Ladder:
    """The ladder for sizes and times of the same calls under several circumstances (place, dtype).

    What an algorithm costs at a size is log(its time / the best time) in its worst circumstance. An algorithm that
    waits twice (all but one_shot) must earn the noise at each size: a second wait is a second chance to be held up. A
    change of algorithm must earn twice the noise. The ladder has the least sum over the sizes, and changes half-way
    between two sizes.

    Raises ValueError when an algorithm was not measured everywhere or none was.
    """
    sizes = list(columns[0]["bytes"]) if columns else []
    names = [name for name in allowed if columns and name in columns[0]]
    for each in columns:
        lengths = {len(each[name]) for name in ("bytes", *names) if name in each}
        if list(each["bytes"]) != sizes or lengths != {len(sizes)} or any(name not in each for name in names):
            raise ValueError("expected the same sizes and algorithms in every column")
    if not sizes or not names or sizes != sorted(set(sizes)):
        raise ValueError(f"expected times of {', '.join(allowed)} at ascending sizes, got {names} at {sizes}")

    def cost(name: str, i: int) -> float:
        worst = max(math.log(each[name][i] / min(each[n][i] for n in names)) for each in columns)
        return worst + (0.0 if name == "one_shot" else noise)

    # best[name]: the least cost of all sizes so far that ends with `name`, and the way there.
    best = {name: (cost(name, 0), [name]) for name in names}
    for i in range(1, len(sizes)):
        following = {}
        for name in names:
            ways = [(c + (2 * noise if way[-1] != name else 0.0), way) for c, way in best.values()]
            least, way = min(ways, key=lambda pair: pair[0])
            following[name] = (least + cost(name, i), [*way, name])
        best = following
    _, way = min(best.values(), key=lambda pair: pair[0])
    ladder: list[tuple[int | None, str]] = []
    for i, name in enumerate(way):
        if i == len(way) - 1:
            ladder.append((None, name))
        elif way[i + 1] != name:
            ladder.append(((sizes[i] + sizes[i + 1]) // 2, name))
    return tuple(ladder)


def derive_choice(times: Mapping[str, Any], noise: float, allowed: Sequence[str] = ALGORITHMS[:3]) -> dict[str, Ladder]:
    """The choice of a table from its ``times``. Partial results of row_parallel_linear lie in symmetric memory."""

    def columns(op: str, places: Sequence[str]) -> list[Columns]:
        return [each for place in places for each in times[op].get(place, {}).values()]

    choice = {op: derive_ladder(columns(op, list(times[op])), noise, allowed) for op in times}
    choice["row_parallel_linear"] = derive_ladder(columns("all_reduce", ["inside"]), noise, allowed)
    return {op: choice.get(op, ((None, "one_shot"),)) for op in OPS}
