"""Runs a function as a process of its own that finds torch imported: a fork of a server that has done nothing else.

Importing torch takes seconds, of most tests of a launcher or a command more than all the rest. What such a process
starts is not forked, but begins as ever.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["pytest", "torch", "torch.distributed.run", "sglang_symm.generate", "sglang_symm.bench"]
)


def _run(function: Callable[..., int | None], args: tuple[Any, ...], environment: dict[str, str], folder: Path) -> None:
    os.setsid()
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
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        # Text: a carriage return is read as the end of a line.
        return Path(self._folder.name, "out").read_text(), Path(self._folder.name, "err").read_text()
