# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Open MPI and MPICH as peers, when they are installed: a C program that is compiled with their mpicc and started by
their mpirun. They are called from C, which spares them the time of a Python call."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sglang_symm.bench.cases import Case

SOURCE = Path(__file__).with_name("mpi_peer.c")


@dataclass(frozen=True)
class Mpi:
    """An MPI that is installed."""

    name: str
    compiler: str
    launcher: str

    def run(
        self, op: str, nproc: int, bytes_: list[int], rounds: int, seconds: float
    ) -> dict[int, tuple[list[float], int]]:
        """bytes -> (microseconds of each round, wrong elements). Raises RuntimeError with what MPI said."""
        with tempfile.TemporaryDirectory(prefix="sglang_symm-mpi-") as folder:
            program = str(Path(folder) / "mpi_peer")
            self._do([self.compiler, "-O2", "-o", program, str(SOURCE)], 120)
            extra = ["--oversubscribe", "--allow-run-as-root"] if self.name == "openmpi" else []
            words = [self.launcher, *extra, "-np", str(nproc), program, op, str(rounds), str(seconds)]
            text = self._do([*words, *map(str, bytes_)], 60 + 4 * rounds * len(bytes_) * max(seconds, 0.2))
        rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        return {row["bytes"]: (row["us"], row["wrong"]) for row in rows}

    def _do(self, command: list[str], limit: float) -> str:
        # A session of its own: however this ends, mpirun and its processes end with it.
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            try:
                output, errors = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"{self.name}: no end after {limit:.0f} s: {' '.join(command[:4])} ...") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)  # mpirun ends its processes
                    try:
                        process.wait(5)
                    except subprocess.TimeoutExpired:
                        os.killpg(process.pid, signal.SIGKILL)
        if process.returncode != 0:
            raise RuntimeError(f"{self.name}: {' '.join(command[:4])} ... failed: {errors.strip()[-300:]}")
        return output


def installed() -> list[Mpi]:
    """The MPIs of this machine. On Debian both can be installed side by side; elsewhere mpicc decides."""
    found = []
    for name in ("openmpi", "mpich"):
        compiler, launcher = shutil.which(f"mpicc.{name}"), shutil.which(f"mpirun.{name}")
        if compiler and launcher:
            found.append(Mpi(name, compiler, launcher))
    if not found and (compiler := shutil.which("mpicc")) and (launcher := shutil.which("mpirun")):
        version = subprocess.run([launcher, "--version"], capture_output=True, text=True).stdout
        found.append(Mpi("openmpi" if "Open MPI" in version else "mpich", compiler, launcher))
    return found


def supports(case: Case) -> bool:
    """MPI has no bfloat16 and no float16."""
    return str(case.dtype) == "torch.float32" and os.name == "posix"
