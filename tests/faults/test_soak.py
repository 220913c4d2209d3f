"""A short soak (`python tests/faults/soak.py` for a long one)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_many_small_calls_give_the_right_bits_in_flat_memory_whatever_the_ranks_allocated_before(tmp_path):
    report = tmp_path / "soak.json"
    command = [sys.executable, str(Path(__file__).parent / "soak.py"), "--calls", "60000", "--tensors", "6000"]
    run = subprocess.run(
        [*command, "--limit", "60", "--json", str(report)], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for rank in json.loads(report.read_text())["ranks"]:
        assert rank["wrong"] == 0
        assert rank["calls"] > 1000
        assert rank["tensors"] > 100
