"""Several ranks on one GPU: NVIDIA MPS, each rank in a green context of its own, so that all run at the same time.

    python tools/mps_rig.py --ranks 4 -- -m pytest -q tests/gpu          a module or a script, as after `python`

Starts MPS (unless one runs), starts the ranks with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as
torchrun does, ends them when one fails, and stops the MPS that it started. A rank's current stream, and every
torch.cuda.Stream that it makes, lies in a green context of 132 / P SMs (rounded down to 8) of the GPU, and
SGLANG_SYMM_SMS says so: a grid that waits must fit there.

Ranks on real GPUs and ranks here run the same code. Differences: all share memory bandwidth and L2; a rank killed with
a kernel in flight takes the others along, so kill tests need GPUs of their own; NCCL before 2.30 refuses two ranks on
one GPU. The GPU is the first that CUDA_VISIBLE_DEVICES names.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Beside the PATH, where drivers put it.
MPS = shutil.which("nvidia-cuda-mps-control") or "/usr/local/nvidia/bin/nvidia-cuda-mps-control"
STREAMS = 6  # of a rank


class GreenContext:
    """The `part`-th of `parts` pieces of the GPU, of `sms` SMs each, and streams in it. Raises RuntimeError."""

    def __init__(self, part: int, parts: int, sms: int) -> None:
        self.driver = driver = ctypes.CDLL("libcuda.so.1")

        class Resource(ctypes.Structure):
            _fields_ = [("opaque", ctypes.c_byte * 144)]

        whole, split, rest, count = Resource(), (Resource * 16)(), Resource(), ctypes.c_uint(parts)
        description, self.context = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(driver.cuDeviceGetDevResource(0, ctypes.byref(whole), 1), "cuDeviceGetDevResource")
        self._check(
            driver.cuDevSmResourceSplitByCount(
                split, ctypes.byref(count), ctypes.byref(whole), ctypes.byref(rest), 0, sms
            ),
            "cuDevSmResourceSplitByCount",
        )
        self._check(
            driver.cuDevResourceGenerateDesc(ctypes.byref(description), ctypes.byref(split, part * 144), 1),
            "cuDevResourceGenerateDesc",
        )
        self._check(driver.cuGreenCtxCreate(ctypes.byref(self.context), description, 0, 1), "cuGreenCtxCreate")

    def stream(self) -> int:
        """A new stream of it, as an address."""
        stream = ctypes.c_void_p()
        self._check(
            self.driver.cuGreenCtxStreamCreate(ctypes.byref(stream), self.context, 1, 0), "cuGreenCtxStreamCreate"
        )
        assert stream.value is not None
        return stream.value

    @staticmethod
    def _check(code: int, call: str) -> None:
        if code != 0:
            raise RuntimeError(f"{call}: CUDA error {code}. Green contexts need a driver of CUDA 12.4 or newer")


def streams_of(context: GreenContext) -> type:
    """torch.cuda.Stream whose new streams lie in this context, taking turns, as torch's own do from a pool. All have
    one priority."""
    import torch

    addresses = itertools.cycle([context.stream() for _ in range(STREAMS)])

    class Stream(torch.cuda.Stream):
        def __new__(cls, device: object = None, priority: int = 0, **address: int) -> Stream:
            return super().__new__(cls, device, **(address or {"stream_ptr": next(addresses)}))

    return Stream


def run_rank(program: list[str]) -> None:
    """The body of one rank: streams in its green context, then the program."""
    import torch

    torch.cuda.set_device(0)
    torch.zeros(1, device="cuda")
    sms = int(os.environ["SGLANG_SYMM_SMS"])
    context = GreenContext(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sms)
    # Outside of the context a kernel takes SMs of other ranks, and those that wait for them cannot start.
    torch.cuda.Stream = streams_of(context)  # type: ignore[misc]
    torch.cuda.set_stream(torch.cuda.ExternalStream(context.stream()))
    sys.path.insert(0, os.getcwd())
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.insert(0, str(Path(program[0]).resolve().parent))
        runpy.run_path(program[0], run_name="__main__")


def start_mps(folder: str) -> bool:
    """True when this call started it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ.setdefault("CUDA_MPS_PIPE_DIRECTORY", folder)
    os.environ.setdefault("CUDA_MPS_LOG_DIRECTORY", folder)
    if Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"], "control").exists():
        return False
    if not Path(MPS).exists():
        raise SystemExit(
            f"mps_rig: expected nvidia-cuda-mps-control on the PATH or as {MPS}, found neither: no driver?"
        )
    subprocess.run([MPS, "-d"], check=True)
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # MPS numbers the GPUs that it sees
    return True


def run_ranks(ranks: int, program: list[str]) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "SGLANG_SYMM_SMS": str(132 // ranks // 8 * 8),
            "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks))),
        }
        processes.append(subprocess.Popen([sys.executable, __file__, "--rank", "--", *program], env=env))
    status = 0
    while any(p.poll() is None for p in processes) and status == 0:
        status = next((p.returncode for p in processes if p.returncode), 0)
        time.sleep(0.1)
    for p in processes:  # one has failed, or all have ended
        try:
            p.wait(20 if status else None)
        except subprocess.TimeoutExpired:
            p.send_signal(signal.SIGTERM)
            p.wait()
    return status or max(p.returncode for p in processes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("program", nargs="+", metavar="-- PROGRAM")
    args = parser.parse_args()
    if args.rank:
        run_rank(args.program)
        return 0
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        started = start_mps(folder)
        try:
            return run_ranks(args.ranks, args.program)
        finally:
            if started:
                subprocess.run([MPS], input=b"quit\n", check=False)
                time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
