"""Every example runs over two ranks and finds what it expects."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What both ranks print, where an error would be printed as a number rather than raised.
EXPECTED = {
    "device_mesh": "y[0, 0] = 64",
    "hugging_face": "as the whole model's: True",
    "layers_in_a_model": "down [64, 128]",
    "parallelize_module": "weight [64, 128] of [64, 256]",
    "peer_views": "sum 21, expected 21",
    "row_parallel_linear": "in the arena: True",
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXPECTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_example(name: str) -> None:
    if name == "hugging_face":
        pytest.importorskip("transformers")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*torchrun, str(ROOT / "examples" / f"{name}.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(EXPECTED[name]) == 2, done.stdout
