"""Several ranks on one GPU: NVIDIA MPS, each rank in a green context of its own, so that all run at the same time.

    python tools/mps_rig.py --ranks 4 -- -m pytest -q tests/gpu          a module or a script, as after `python`

Starts MPS (unless one runs), starts the ranks with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as
torchrun does, ends them when one fails, and stops the MPS that it started; so it does on SIGTERM. A rank's current
stream, and every torch.cuda.Stream that it makes, lies in a green context of a P-th of the GPU's SMs (rounded down to
8), and SGLANG_SYMM_SMS says so: a grid that waits must fit there.

Ranks on real GPUs and ranks here run the same code. Differences: all share memory bandwidth and L2; a rank killed with
a kernel in flight takes the others along, so kill tests need GPUs of their own; NCCL before 2.30 refuses two ranks on
one GPU; the last of 16 ranks on an H100 or H200 has SMs that need not be neighbours, so clusters of CTAs may not fit
there. The GPU is the first that CUDA_VISIBLE_DEVICES names.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

# Beside the PATH, where drivers put it.
MPS = shutil.which("nvidia-cuda-mps-control") or "/usr/local/nvidia/bin/nvidia-cuda-mps-control"
RANK = [sys.executable, __file__, "--rank", "--"]  # before a rank's program
MOST_RANKS = 16
STREAMS = 6  # of a rank
PATIENCE, GRACE = 20.0, 10.0  # seconds: for the others when a rank has failed; between SIGTERM and SIGKILL


def sms_of_a_rank(all_sms: int, ranks: int) -> int:
    """A multiple of 8, as green contexts are made of eights. Raises SystemExit when there are not enough."""
    sms = all_sms // ranks // 8 * 8
    if sms == 0:
        raise SystemExit(
            f"mps_rig: expected at least 8 SMs for each of {ranks} ranks, the GPU has {all_sms}: at most "
            f"--ranks {all_sms // 8} here"
        )
    return sms


class GreenContext:
    """The `part`-th of `parts` pieces of the GPU, of at least `sms` SMs, and streams in it. Raises RuntimeError."""

    def __init__(self, part: int, parts: int, sms: int) -> None:
        self.driver = driver = ctypes.CDLL("libcuda.so.1")
        if not hasattr(driver, "cuGreenCtxStreamCreate"):
            raise RuntimeError("mps_rig: this driver has no green contexts: expected one of CUDA 12.5 or newer")

        class Resource(ctypes.Structure):
            _fields_ = [("opaque", ctypes.c_byte * 96), ("sms", ctypes.c_uint), ("more", ctypes.c_byte * 44)]

        whole, split, rest, count = Resource(), (Resource * MOST_RANKS)(), Resource(), ctypes.c_uint(parts)
        description, self.context = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(driver.cuDeviceGetDevResource(0, ctypes.byref(whole), 1), "cuDeviceGetDevResource")
        self._check(
            driver.cuDevSmResourceSplitByCount(
                split, ctypes.byref(count), ctypes.byref(whole), ctypes.byref(rest), 0, sms
            ),
            f"cuDevSmResourceSplitByCount into {parts} parts of {sms} SMs",
        )
        # What is left need not be neighbours, and may be more.
        found = [*split[: count.value], *([rest] if rest.sms >= sms else [])]
        if len(found) < parts:
            raise RuntimeError(
                f"mps_rig: expected {parts} parts of {sms} SMs, the GPU splits into {len(found)}: fewer --ranks"
            )
        self._check(
            driver.cuDevResourceGenerateDesc(ctypes.byref(description), ctypes.byref(found[part]), 1),
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

    def _check(self, code: int, call: str) -> None:
        if code != 0:
            why = ctypes.c_char_p()
            self.driver.cuGetErrorString(code, ctypes.byref(why))
            raise RuntimeError(f"mps_rig: {call}: CUDA error {code}, {(why.value or b'unknown').decode()}")


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
    ranks = int(os.environ["WORLD_SIZE"])
    sms = sms_of_a_rank(torch.cuda.get_device_properties(0).multi_processor_count, ranks)
    os.environ["SGLANG_SYMM_SMS"] = str(sms)
    context = GreenContext(int(os.environ["RANK"]), ranks, sms)
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


@contextlib.contextmanager
def mps() -> Iterator[None]:
    """MPS as long as this lasts; one that runs already is used, and left alone."""
    with tempfile.TemporaryDirectory(prefix="mps-", ignore_cleanup_errors=True) as folder:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        os.environ.setdefault("CUDA_MPS_PIPE_DIRECTORY", folder)
        os.environ.setdefault("CUDA_MPS_LOG_DIRECTORY", folder)
        if Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"], "control").exists():
            yield
            return
        if not Path(MPS).exists():
            raise SystemExit(
                f"mps_rig: expected nvidia-cuda-mps-control on the PATH or as {MPS}, found neither: a machine "
                "with a GPU is needed, and NVIDIA's driver (nvidia-smi tells)"
            )
        try:
            # A session of its own: a signal to all of the rig's processes leaves it to be stopped in its turn.
            subprocess.run([MPS, "-d"], check=True, start_new_session=True)
            os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # MPS numbers the GPUs that it sees
            yield
        finally:
            try:
                subprocess.run([MPS], input=b"quit\n", check=False, timeout=30)
            except subprocess.TimeoutExpired:
                print("mps_rig: MPS did not quit within 30 s", file=sys.stderr, flush=True)
            time.sleep(1)


def status_of(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """That of a rank that has failed; 0 when all have ended well; None before that."""
    codes = [p.poll() for p in processes]
    failed = next((code for code in codes if code), 0)
    return failed or (None if None in codes else 0)


def wait(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(p.poll() is None for p in processes) and time.monotonic() < end:
        time.sleep(0.1)


def run_ranks(ranks: int, program: list[str]) -> int:
    """The status of the first that failed (128 + N for signal N), or 0. No rank outlives it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks))),
            }
            processes.append(subprocess.Popen([*RANK, *program], env=env))
        while (status := status_of(processes)) is None:
            time.sleep(0.1)
        wait(processes, PATIENCE)  # their own errors say whom they missed
        return status if status >= 0 else 128 - status
    finally:
        for stop in (signal.SIGTERM, signal.SIGKILL):
            for p in processes:
                if p.poll() is None:
                    p.send_signal(stop)
            wait(processes, GRACE)


def number_of_ranks(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_RANKS:
        raise argparse.ArgumentTypeError(f"expected 1 to {MOST_RANKS}, got {text}")
    return int(text)


def end_by_signal(number: int, frame: FrameType | None) -> None:
    # Once: `timeout` and a signal to the process group come twice, the second one in the middle of tidying up.
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=number_of_ranks, default=2, help=f"1 to {MOST_RANKS} (default 2)")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("program", nargs="+", metavar="-- PROGRAM")
    args = parser.parse_args()
    if args.rank:
        run_rank(args.program)
        return 0
    signal.signal(signal.SIGTERM, end_by_signal)
    with mps():
        return run_ranks(args.ranks, args.program)


if __name__ == "__main__":
    sys.exit(main())
