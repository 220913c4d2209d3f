"""What benchmarks/llama_decode.py says of a variant that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

PROGRAM = """
import importlib.util, sys
import torch.distributed as dist
spec = importlib.util.spec_from_file_location("llama_decode", "benchmarks/llama_decode.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
progress = module.Progress(0, seconds=float(sys.argv[1]))
"""


def run(body: str, seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM + body, str(seconds)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_variant_that_fails_is_named_with_its_traceback_and_the_next_one_runs():
    done = run(
        "def broken():\n"
        "    raise ValueError('an odd head')\n"
        "print(progress.attempt('decode 16: symm', broken), progress.attempt('decode 16: nccl', lambda: 7))\n"
        "print(progress.failed)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["None 7", "['decode 16: symm: on rank(s) 0']"]
    said = done.stderr
    assert "rank 0: decode 16: symm failed:\nTraceback" in said
    assert "ValueError: an odd head" in said
    assert said.index("an odd head") < said.index("rank 0: decode 16: nccl")


def test_a_stage_that_does_not_end_prints_where_it_stands_and_ends_the_process():
    done = run(
        "import time\ndef stuck():\n    time.sleep(100)\nprogress.attempt('prefill 2048: nccl', stuck)\n",
        seconds=1.0,
    )
    assert done.returncode == 1
    assert "rank 0: prefill 2048: nccl\n" in done.stderr
    assert "in stuck" in done.stderr
