# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Results as a table, JSON, CSV or a plot. One row is one op, size, implementation, in place or out of place, and on
GPUs in a graph or in eager code."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sglang_symm.bench.cases import format_bytes


@dataclass
class Row:
    """``us``: the slowest rank's microseconds a call, one number a round. ``wrong``: elements, over all ranks.
    ``cpu_us``: of an eager call on a GPU, median of the slowest rank. ``limit_us``: what physics allows, if known."""

    op: str
    dtype: str
    bytes: int
    peer: str
    in_place: bool
    bus_factor: float
    wrong: int
    us: list[float]
    mode: str = "eager"
    cpu_us: float | None = None
    limit_us: float | None = None

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


def _best_other(rows: Iterable[Row], row: Row, any_place: bool = False) -> tuple[float | None, float]:
    """The best median among those who are not this library, and the empty op's, for the same case.

    ``any_place``: a peer's in place call is compared with out of place ones too, as most peers on GPUs have only one.
    """

    def case(r: Row) -> tuple[Any, ...]:
        return (r.op, r.dtype, r.bytes, r.mode, None if any_place else r.in_place)

    same = [r for r in rows if case(r) == case(row) and r.wrong == 0]
    others = [r.median for r in same if r.peer != EMPTY_OP and not r.peer.startswith("symm")]
    return min(others, default=None), min((r.median for r in same if r.peer == EMPTY_OP), default=0.0)


def table(rows: list[Row], environment: dict[str, Any]) -> str:
    """As nccl-tests, with the spread, and two ratios: to the best peer of the same case, and to that peer plus an empty
    op, which is what a peer that is called from C would cost if it were called from Python."""
    width = max([len(r.peer) for r in rows] + [4])
    on_gpu = environment.get("device", "cpu") != "cpu"
    mode = f" {'mode':5}" if on_gpu else ""
    more = f" {'cpu us':>7} {'limit':>8}" if on_gpu else ""
    head = f"{'size':>6} {'op':14} {'dtype':8} {'who':{width}} {'place':5}{mode} {'time':>10} {'p10':>10} {'p90':>10}"
    lines = [
        "# " + "  ".join(f"{k} {v}" for k, v in environment.items() if not isinstance(v, dict | list)),
        f"{head} {'algbw':>7} {'busbw':>7} {'wrong':>6}{more}  over best" + ("" if on_gpu else "   + empty op"),
        f"{'us':>{len(head) - 22}} {'us':>10} {'us':>10} {'GB/s':>7} {'GB/s':>7}",
    ]
    for row in rows:
        best, empty = _best_other(rows, row, any_place=on_gpu)
        low, high = row.spread
        ratio = ""
        if best and row.peer.startswith("symm"):
            ratio = f"{row.median / best:9.2f}" + ("" if on_gpu else f" {row.median / (best + empty):11.2f}")
        if on_gpu:
            mode, more = f" {row.mode:5}", f" {_number(row.cpu_us):>7} {_number(row.limit_us):>8}"
        lines.append(
            f"{format_bytes(row.bytes):>6} {row.op:14} {row.dtype:8} {row.peer:{width}} "
            f"{'in' if row.in_place else 'out':5}{mode} {row.median:10.2f} {low:10.2f} {high:10.2f} "
            f"{row.algbw:7.2f} {row.busbw:7.2f} {row.wrong:6d}{more}  {ratio}"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def to_json(rows: list[Row], environment: dict[str, Any]) -> str:
    """{"environment": ..., "rows": [...]} with medians and all rounds."""
    out = [asdict(r) | {"median_us": r.median, "algbw": r.algbw, "busbw": r.busbw} for r in rows]
    return json.dumps({"environment": environment, "rows": out}, indent=1)


def write_csv(rows: list[Row], path: str) -> None:
    """One line a row."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        names = ["op", "dtype", "bytes", "who", "in_place", "median_us", "p10_us", "p90_us", "algbw", "busbw", "wrong"]
        writer.writerow([*names, "mode", "cpu_us", "limit_us"])
        for r in rows:
            low, high = r.spread
            numbers = [f"{x:.3f}" for x in (r.median, low, high, r.algbw, r.busbw)]
            gpu = [r.mode, *("" if x is None else f"{x:.3f}" for x in (r.cpu_us, r.limit_us))]
            writer.writerow([r.op, r.dtype, r.bytes, r.peer, int(r.in_place), *numbers, r.wrong, *gpu])


def check_plot(path: str) -> None:
    """Raise ValueError where ``plot`` could not write: no matplotlib, a format that it does not know."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'sglang_symm[bench]'") from None
    known = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix.lstrip(".") not in known:
        raise ValueError(f"--plot {path}: expected a name that ends in one of {', '.join(sorted(known))}")


def plot(rows: list[Row], path: str, environment: dict[str, Any]) -> None:
    """Time and bus bandwidth over size, a line an implementation, with the limit; a row of plots an op and mode.

    In place where that exists. Needs matplotlib (pip install sglang_symm[bench])."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    panels = list(dict.fromkeys((r.op, r.mode) for r in rows))
    figure, grid = pyplot.subplots(
        len(panels), 2, figsize=(12, 4.6 * len(panels)), constrained_layout=True, squeeze=False
    )
    for (op, mode), axes in zip(panels, grid, strict=True):
        here = [r for r in rows if (r.op, r.mode) == (op, mode)]
        for peer in dict.fromkeys(r.peer for r in here if r.peer != EMPTY_OP):
            in_place = any(r.in_place for r in here if r.peer == peer)
            mine = sorted((r for r in here if r.peer == peer and r.in_place == in_place), key=lambda r: r.bytes)
            own = peer.startswith("symm")
            style: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 2.2 if own else 1.2, "label": peer}
            x = [r.bytes for r in mine]
            (line,) = axes[0].plot(x, [r.median for r in mine], linestyle="-" if own else "--", **style)
            low, high = [r.spread[0] for r in mine], [r.spread[1] for r in mine]
            axes[0].fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
            axes[1].plot(x, [r.busbw for r in mine], linestyle="-" if own else "--", color=line.get_color(), **style)
        limits = {r.bytes: r.limit_us for r in here if r.limit_us is not None}
        if limits:
            x, bus = sorted(limits), here[0].bus_factor
            style = {"color": "black", "linestyle": ":", "linewidth": 1.2, "label": "physical limit"}
            axes[0].plot(x, [limits[n] for n in x], **style)
            axes[1].plot(x, [n * bus / limits[n] / 1e3 for n in x], **style)
        for axis, what in zip(axes, ("time a call, us (median, p10 to p90)", "bus bandwidth, GB/s"), strict=True):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: format_bytes(int(n))))
            axis.set_xlabel("bytes")
            axis.set_ylabel(what)
            axis.grid(True, which="major", alpha=0.3)
        axes[0].set_yscale("log")
        axes[0].legend(fontsize=8)
        axes[0].set_title(op if environment.get("device", "cpu") == "cpu" else f"{op}, {mode}", fontsize=9)
    machine = f"{rows[0].dtype}, {environment['ranks']} ranks: {environment['machine']}"
    figure.suptitle(machine, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def load(path: str) -> list[Row]:
    """Rows of a JSON file of to_json."""
    names = [f.name for f in fields(Row)]
    rows = json.loads(Path(path).read_text())["rows"]
    return [Row(**{name: row[name] for name in names if name in row}) for row in rows]
