"""Runs a function as a process of its own that finds torch imported: a fork of a server that has done nothing else.

Importing torch takes seconds, longer than the rest of most tests of a launcher or a command. What such a process starts
is not forked, but begins as ever. It differs from a program in two ways: its environment is set after the imports, and
functions of `atexit` do not run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# pytest too: the test modules, in which functions lie, import it.
_PRELOADED = ["pytest", "torch", "torch.distributed.run", "sglang_symm.generate", "sglang_symm.bench"]
_CONTEXT.set_forkserver_preload(_PRELOADED)
_LEAVE_SECONDS = 10.0  # for what the process has started, when it has ended itself


def _run(function: Callable[..., int | None], args: tuple[Any, ...], environment: dict[str, str], folder: Path) -> None:
    os.setsid()  # with all that it starts it can be ended, and seen to have ended
    for name, number in (("out", 1), ("err", 2)):
        with (folder / name).open("wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(function(*args))


class Process:
    """The part of subprocess.Popen that tests use. The output is there when the process has ended."""

    def __init__(self, function: Callable[..., int | None], *args: Any, env: dict[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        for name in ("out", "err"):
            (folder / name).touch()
        given = dict(os.environ) if env is None else env
        self._process = _CONTEXT.Process(target=_run, args=(function, args, given, folder), daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """(stdout, stderr) of the process and all that it has started, none of which may outlive it for long."""
        self._process.join(timeout)
        late = self.returncode is None
        left = self._others_stay(0.0 if late else _LEAVE_SECONDS)
        if left:
            assert self._process.pid is not None
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.join()
        # Text: a carriage return is read as the end of a line.
        out, err = (Path(self._folder.name, name).read_text() for name in ("out", "err"))
        if late:
            raise subprocess.TimeoutExpired(str(self._process), timeout, out, err)
        assert not left, f"processes outlived {self._process}:\n{out}\n{err}"
        return out, err

    def _others_stay(self, seconds: float) -> bool:
        """Whether anything of the process's session is still there so many seconds later."""
        assert self._process.pid is not None
        end = time.monotonic() + seconds
        while True:
            try:
                os.killpg(self._process.pid, 0)
            except ProcessLookupError:
                return False
            if time.monotonic() >= end:
                return True
            time.sleep(0.02)
