"""Every example runs over two ranks and finds what it expects."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed.run
from preloaded import Process

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
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    torchrun = Process(
        torch.distributed.run.main,
        ["--standalone", "--nproc-per-node=2", str(ROOT / "examples" / f"{name}.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )
    out, err = torchrun.communicate(timeout=240)
    assert torchrun.returncode == 0, err
    assert out.count(EXPECTED[name]) == 2, out
