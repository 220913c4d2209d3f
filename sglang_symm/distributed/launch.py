# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Start the ranks of a program on this host, when it was not started by torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from types import FrameType
from typing import IO, Any

import torch
import torch.distributed as dist

# A child runs this first: it asks the kernel to be killed when its parent dies, checks that the parent did not die
# before, and becomes the program. In a fresh interpreter rather than between fork and exec, where a threaded parent
# may not run Python safely.
_BOOTSTRAP = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
os.getppid() == int(sys.argv[1]) or sys.exit("the launcher is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""
_HOST = "127.0.0.1"
_POLL_SECONDS = 0.02


def under_launcher() -> bool:
    """Whether this process is a rank already: started by torchrun, by ``run_ranks``, or by anything that set RANK and
    WORLD_SIZE.
    """
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def require_gpu_ranks(program: str) -> None:
    """Ends a program of ranks on GPUs that no launcher has started, or that finds no GPU, and says what it needs."""
    if not under_launcher() or "LOCAL_RANK" not in os.environ:
        raise SystemExit(f"{program}: expected to run under torchrun: torchrun --nproc-per-node 2 ...")
    if not torch.cuda.is_available():
        raise SystemExit(f"{program}: expected a GPU, torch sees none (nvidia-smi tells why)")


def host_store(timeout: float = 600.0) -> dist.TCPStore:
    """A store on a free port of this host. It lives in the caller, so it survives every rank."""
    return dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))


def rank_environment(rank: int, nproc: int, port: int, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of one rank, as torchrun sets it: the store is there already (TORCHELASTIC_USE_AGENT_STORE)."""
    env = dict(os.environ if base is None else base)
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    return env | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "GROUP_RANK": "0",
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def start_rank(argv: Sequence[str], env: Mapping[str, str], **kwargs: Any) -> subprocess.Popen[bytes]:
    """Start ``argv`` as a child that dies with this process. ``kwargs`` as for subprocess.Popen."""
    boot = [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, str(os.getpid()), *argv]
    return subprocess.Popen(boot, env=dict(env), **kwargs)


def run_ranks(
    nproc: int,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    grace: float = 5.0,
    quiet: Collection[int] = (),
) -> int:
    """Run ``argv`` as ``nproc`` ranks on this host; returns the exit code.

    Rank 0 has this process's stdin and stdout. Everything else that ranks print goes to stderr, each line behind
    ``[rank R] ``. When a rank fails, the others get ``grace`` seconds to end by themselves (their own errors say whom
    they missed), then SIGTERM, and ``grace`` seconds later SIGKILL. No rank outlives this call, Ctrl-C and SIGTERM
    included, nor this process, however it ends.

    Args:
        env: added to this process's environment. timeout: seconds for all of it; None: no limit.
        quiet: exit codes that the ranks explain themselves: nothing is added to what they print.

    Returns 0 if all ranks returned 0, else the code of the first that failed (128 + N for signal N), 124 after
    ``timeout``, 130 after Ctrl-C. Raises ValueError for nproc < 1.
    """
    if nproc < 1:
        raise ValueError(f"sglang_symm: expected at least 1 rank, got {nproc}")
    sys.stdout.flush()
    store = host_store()
    base = {**os.environ, **(env or {})}
    ranks: list[subprocess.Popen[bytes]] = []
    readers: list[threading.Thread] = []
    lock = threading.Lock()
    restore = raise_on_sigterm()
    try:
        for rank in range(nproc):
            child = start_rank(
                argv,
                rank_environment(rank, nproc, store.port, base),
                stdin=None if rank == 0 else subprocess.DEVNULL,
                stdout=None if rank == 0 else subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            ranks.append(child)
            for stream in (child.stdout, child.stderr):
                if stream is not None:
                    prefix = f"[rank {rank}] " if nproc > 1 else ""
                    readers.append(threading.Thread(target=_forward, args=(stream, prefix.encode(), lock), daemon=True))
                    readers[-1].start()
        return _supervise(ranks, timeout, grace, quiet)
    except KeyboardInterrupt:
        _end(ranks, grace)
        return 128 + signal.SIGINT
    finally:
        _end(ranks, 0)
        for reader in readers:
            # Not for ever: a grandchild may have inherited the pipe.
            reader.join(timeout=1)
        restore()


def _supervise(
    ranks: Sequence[subprocess.Popen[bytes]], timeout: float | None, grace: float, quiet: Collection[int]
) -> int:
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        codes = [child.poll() for child in ranks]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            rank, code = failed[0]
            if code not in quiet:
                left = any(code is None for code in codes)
                _say(f"rank {rank} {_describe(code)}" + (f"; the other ranks get {grace:g} s to end" if left else ""))
            _wait(ranks, grace)
            _end(ranks, grace)
            return code if code > 0 else 128 - code
        if all(code == 0 for code in codes):
            return 0
        if end is not None and time.monotonic() > end:
            _say(f"not finished after {timeout:g} s: ending all ranks")
            _end(ranks, grace)
            return 124
        time.sleep(_POLL_SECONDS)


def _describe(code: int) -> str:
    if code > 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _wait(ranks: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(child.poll() is None for child in ranks) and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)


def _end(ranks: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """SIGTERM, ``grace`` seconds, SIGKILL; returns when all are gone. An interrupt meanwhile shortens the grace, no
    more.
    """
    for stop in (signal.SIGTERM, signal.SIGKILL):
        for child in ranks:
            if child.poll() is None:
                child.send_signal(stop)
        try:
            _wait(ranks, grace if stop == signal.SIGTERM else 10)
        except KeyboardInterrupt:
            continue


def raise_on_sigterm() -> Any:
    """Make SIGTERM end the ranks as Ctrl-C does; returns what restores the former handler. Only the main thread may
    do so.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    former = signal.signal(signal.SIGTERM, interrupt)
    return lambda: signal.signal(signal.SIGTERM, former)


def _say(text: str) -> None:
    print(f"sglang_symm: {text}", file=sys.stderr, flush=True)


def _forward(source: IO[bytes], prefix: bytes, lock: threading.Lock) -> None:
    """Copy ``source`` to stderr in whole lines; a carriage return ends a line too, so that progress bars move."""
    pending = b""
    while chunk := os.read(source.fileno(), 1 << 16):
        pending += chunk
        cut = max(pending.rfind(b"\n"), pending.rfind(b"\r")) + 1
        _write(pending[:cut], prefix, lock)
        pending = pending[cut:]
    _write(pending + b"\n" if pending else b"", prefix, lock)


def _write(data: bytes, prefix: bytes, lock: threading.Lock) -> None:
    if not data:
        return
    # A progress bar begins with a carriage return; the prefix belongs to what follows.
    lines = b"".join(line if line == b"\r" else prefix + line for line in data.splitlines(keepends=True))
    with lock:
        sys.stderr.flush()
        while lines:
            lines = lines[os.write(2, lines) :]
