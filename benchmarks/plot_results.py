#!/usr/bin/env python3
# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""A plot of a kept result of all_reduce_cuda.py or row_parallel_linear.py, beside it as .png. Needs matplotlib.

python benchmarks/plot_results.py benchmarks/results/2026-11-25_all_reduce_2xh100.json ...
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

LABELS = {
    "ours": "sglang_symm",
    "nccl": "NCCL",
    "nccl_window": "NCCL, registered window",
    "torch_one_shot": "torch symmetric memory, one-shot",
    "torch_two_shot": "torch symmetric memory, two-shot",
}


def plot_all_reduce(kept: dict[str, Any], path: Path) -> None:
    """Time in a graph over size, a line a peer, and the physical limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    from sglang_symm.bench.cases import format_bytes

    rows = kept["results"]
    figure, axis = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    x = [row["bytes"] for row in rows]
    for name, label in LABELS.items():
        own = name == "ours"
        axis.plot(
            x,
            [row[name]["graph"]["median"] for row in rows],
            linestyle="-" if own else "--",
            linewidth=2.4 if own else 1.3,
            marker="o",
            markersize=3,
            label=label,
        )
    axis.plot(
        x, [row["limit"] for row in rows], color="gray", linestyle=":", label="limit: link bandwidth, flight of a flag"
    )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: format_bytes(int(n))))
    axis.set_xlabel("bytes")
    axis.set_ylabel("microseconds a call, in a CUDA graph, median")
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(f"all_reduce, bf16, {kept['ranks']} ranks on {kept['gpus']} x {kept['device']}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> int:
    """Exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    for file in parser.parse_args().files:
        kept = json.loads(file.read_text())
        if "row_parallel_linear" in kept["what"]:
            from row_parallel_linear import plot

            plot(
                kept["results"],
                str(file.with_suffix(".png")),
                f"{kept['ranks']} ranks on {kept['gpus']} x {kept['device']}",
            )
        else:
            plot_all_reduce(kept, file.with_suffix(".png"))
        print(file.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
