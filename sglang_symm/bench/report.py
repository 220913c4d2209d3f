# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Results as a table, JSON, CSV or a plot. One row is one op, size, implementation, in place or out of place."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_symm.bench.cases import format_bytes


@dataclass
class Row:
    """``us``: the slowest rank's microseconds a call, one number a round. ``wrong``: elements, over all ranks."""

    op: str
    dtype: str
    bytes: int
    peer: str
    in_place: bool
    bus_factor: float
    wrong: int
    us: list[float]

    @property
    def median(self) -> float:
        """Median over the rounds, microseconds."""
        return statistics.median(self.us)

    @property
    def spread(self) -> tuple[float, float]:
        """10th and 90th percentile (the ends, when rounds are few)."""
        ordered = sorted(self.us)
        cut = len(ordered) // 10
        return ordered[cut], ordered[-1 - cut]

    @property
    def algbw(self) -> float:
        """GB/s: bytes over time."""
        return self.bytes / self.median / 1e3

    @property
    def busbw(self) -> float:
        """GB/s, comparable over world sizes."""
        return self.algbw * self.bus_factor


EMPTY_OP = "empty op"


def _best_other(rows: Iterable[Row], row: Row) -> tuple[float | None, float]:
    """The best median among those who are not this library, and the empty op's, for the same case."""
    same = [
        r
        for r in rows
        if (r.op, r.dtype, r.bytes, r.in_place) == (row.op, row.dtype, row.bytes, row.in_place) and r.wrong == 0
    ]
    others = [r.median for r in same if r.peer != EMPTY_OP and not r.peer.startswith("symm")]
    return min(others, default=None), min((r.median for r in same if r.peer == EMPTY_OP), default=0.0)


def table(rows: list[Row], environment: dict[str, Any]) -> str:
    """As nccl-tests, with the spread, and two ratios: to the best peer of the same case, and to that peer plus an empty
    op, which is what a peer that is called from C would cost if it were called from Python."""
    width = max([len(r.peer) for r in rows] + [4])
    head = f"{'size':>6} {'op':14} {'dtype':8} {'who':{width}} {'place':5} {'time':>10} {'p10':>10} {'p90':>10}"
    lines = [
        "# " + "  ".join(f"{k} {v}" for k, v in environment.items() if not isinstance(v, dict | list)),
        f"{head} {'algbw':>7} {'busbw':>7} {'wrong':>6}  over best   + empty op",
        f"{'us':>{len(head) - 22}} {'us':>10} {'us':>10} {'GB/s':>7} {'GB/s':>7}",
    ]
    for row in rows:
        best, empty = _best_other(rows, row)
        low, high = row.spread
        ratio = (
            f"{row.median / best:9.2f} {row.median / (best + empty):11.2f}"
            if best and row.peer.startswith("symm")
            else ""
        )
        lines.append(
            f"{format_bytes(row.bytes):>6} {row.op:14} {row.dtype:8} {row.peer:{width}} "
            f"{'in' if row.in_place else 'out':5} {row.median:10.2f} {low:10.2f} {high:10.2f} "
            f"{row.algbw:7.2f} {row.busbw:7.2f} {row.wrong:6d}  {ratio}"
        )
    return "\n".join(lines)


def to_json(rows: list[Row], environment: dict[str, Any]) -> str:
    """{"environment": ..., "rows": [...]} with medians and all rounds."""
    out = [asdict(r) | {"median_us": r.median, "algbw": r.algbw, "busbw": r.busbw} for r in rows]
    return json.dumps({"environment": environment, "rows": out}, indent=1)


def write_csv(rows: list[Row], path: str) -> None:
    """One line a row."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["op", "dtype", "bytes", "who", "in_place", "median_us", "p10_us", "p90_us", "algbw", "busbw", "wrong"]
        )
        for r in rows:
            low, high = r.spread
            numbers = [f"{x:.3f}" for x in (r.median, low, high, r.algbw, r.busbw)]
            writer.writerow([r.op, r.dtype, r.bytes, r.peer, int(r.in_place), *numbers, r.wrong])


def plot(rows: list[Row], path: str, environment: dict[str, Any]) -> None:
    """Time and bus bandwidth over size, a line an implementation. Needs matplotlib (pip install sglang_symm[bench])."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    in_place = any(r.in_place for r in rows)
    chosen = [r for r in rows if r.in_place == in_place]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    for peer in dict.fromkeys(r.peer for r in chosen if r.peer != EMPTY_OP):
        mine = sorted((r for r in chosen if r.peer == peer), key=lambda r: r.bytes)
        own = peer.startswith("symm")
        style: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 2.2 if own else 1.2, "label": peer}
        x = [r.bytes for r in mine]
        (line,) = axes[0].plot(x, [r.median for r in mine], linestyle="-" if own else "--", **style)
        low, high = [r.spread[0] for r in mine], [r.spread[1] for r in mine]
        axes[0].fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axes[1].plot(x, [r.busbw for r in mine], linestyle="-" if own else "--", color=line.get_color(), **style)
    for axis, what in zip(axes, ("time a call, us (median, p10 to p90)", "bus bandwidth, GB/s"), strict=True):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: format_bytes(int(n))))
        axis.set_xlabel("bytes")
        axis.set_ylabel(what)
        axis.grid(True, which="major", alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=8)
    first = chosen[0]
    place = "in place" if in_place else "out of place"
    figure.suptitle(
        f"{first.op}, {first.dtype}, {environment['ranks']} ranks, {place}: {environment['machine']}", fontsize=10
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def load(path: str) -> list[Row]:
    """Rows of a JSON file of to_json."""
    names = ("op", "dtype", "bytes", "peer", "in_place", "bus_factor", "wrong", "us")
    return [Row(**{k: r[k] for k in names}) for r in json.loads(Path(path).read_text())["rows"]]
