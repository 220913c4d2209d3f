"""Starts ranks, hosts their store, and lets them die one by one.

torchrun would end all ranks when one dies, and a store in rank 0 would die with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_symm.distributed.launch import host_store, rank_environment, start_rank

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Outcome:
    """What became of one rank.

    Attributes: rank, code (negative: the signal that killed it), report (what it told by `report`), output (all that
    it printed).
    """

    rank: int
    code: int
    report: dict[str, Any]
    output: str

    def __str__(self) -> str:
        return f"rank {self.rank}: code {self.code}, {self.report}\n{self.output}"


def run(program: str, nproc: int, folder: Path, *arguments: str, limit: float = 60) -> list[Outcome]:
    """Run a program of this folder as `nproc` ranks until all have ended by themselves; AssertionError after `limit`
    seconds.
    """
    store = host_store()
    argv = [sys.executable, str(Path(__file__).parent / program), str(folder), *arguments]
    base = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": ""}
    outputs = [folder / f"output{rank}" for rank in range(nproc)]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(nproc):
            with outputs[rank].open("wb") as file:
                env = rank_environment(rank, nproc, store.port, base)
                ranks.append(start_rank(argv, env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT))
        end = time.monotonic() + limit
        while any(child.poll() is None for child in ranks):
            hanging = [rank for rank, child in enumerate(ranks) if child.poll() is None]
            assert time.monotonic() < end, f"rank(s) {hanging} hang; " + "\n".join(
                f"rank {rank}: {path.read_text()[-3000:]}" for rank, path in enumerate(outputs)
            )
            time.sleep(0.02)
    finally:
        for child in ranks:
            if child.poll() is None:
                child.kill()
                child.wait()
    return [
        Outcome(rank, child.wait(), _report(folder, rank), outputs[rank].read_text(errors="replace"))
        for rank, child in enumerate(ranks)
    ]


def _report(folder: Path, rank: int) -> dict[str, Any]:
    path = folder / f"report{rank}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def report(folder: Path, **values: Any) -> None:
    """In a rank: leave what the test looks at; a later call adds to an earlier one."""
    rank = int(os.environ["RANK"])
    merged = _report(folder, rank) | values
    path = folder / f"report{rank}.json"
    path.with_suffix(".part").write_text(json.dumps(merged))
    path.with_suffix(".part").rename(path)
