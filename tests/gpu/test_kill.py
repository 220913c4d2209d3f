"""A peer that is killed while this rank waits for it in a kernel (kill_a_peer.py, processes of its own)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed_cases import gather_objects
from tests.gpu.kill_a_peer import MODES

SCRIPT = Path(__file__).with_name("kill_a_peer.py")


@pytest.mark.parametrize("mode", MODES)
def test_a_survivor_of_a_killed_peer_raises_within_a_second_and_its_context_lives(rank, mode):
    if torch.cuda.device_count() < 2:
        pytest.skip("under MPS a rank that is killed with a kernel in flight takes the others' contexts along")
    output = ""
    if rank == 0:
        done = subprocess.run([sys.executable, SCRIPT, mode], capture_output=True, text=True, timeout=50)
        output = done.stdout + done.stderr if done.returncode else "PASS"
    assert gather_objects(output)[0] == "PASS"
