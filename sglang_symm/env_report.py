# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""`python -m sglang_symm env`: what this machine has, and whether the native library fits it.

Every part is gathered on its own, so one that is missing (torch, a driver, the library) leaves the others in it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import _library, tuning
from . import nccl as nccl_rules
from ._version import __version__

# Variable -> (default, meaning). The report shows all of them; what is set in the environment is in force.
SETTINGS: dict[str, tuple[str, str]] = {
    "SGLANG_SYMM_ARENA_BYTES": ("64 MiB on CPU", "bytes of a group's arena, per rank; GPUs: min(512 MiB, memory / 64)"),
    "SGLANG_SYMM_TIMEOUT": ("60", "seconds that a call waits for its peers"),
    "SGLANG_SYMM_FIRST_TIMEOUT": ("600", "the same for a group's first call"),
    "SGLANG_SYMM_ALGO": ("auto", "auto, one_shot, two_shot, two_shot_direct, process_group or nccl"),
    "SGLANG_SYMM_PINNED": ("0", "1: the algorithm does not depend on the number of tokens"),
    "SGLANG_SYMM_STRICT": ("0", "1: a full arena is an error, not ordinary memory"),
    "SGLANG_SYMM_TABLES": ("the package's", "tuning table, or a folder of them (tune); built-in: none"),
    "SGLANG_SYMM_NCCL": ("0", "1: groups on GPUs own an NCCL communicator; auto: if it can be had; window: docs"),
    "SGLANG_SYMM_NCCL_LIBRARY": ("the one torch loaded", "path of another libnccl.so.2"),
    "SGLANG_SYMM_CPU": ("best", "portable, avx2 or avx512: instruction set of the sums"),
    "SGLANG_SYMM_CACHE": ("~/.cache/sglang_symm", "where converted models are kept"),
    "SGLANG_SYMM_COMMIT": ("", "the commit that bench and tune write down, where there is no checkout"),
    "SGLANG_SYMM_SMS": ("all", "SMs of the GPU that this rank may fill, others the rest (tools/mps_rig.py sets it)"),
    "SGLANG_SYMM_PROGRAMMATIC_LAUNCH": ("1", "0: a fused kernel starts when the one before has ended (measurements)"),
    "SYNC_TOKEN_IDS_ACROSS_TP": ("0", "1: the attention-TP group gets a symmetric communicator"),
}
OTHER_VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_MPS_PIPE_DIRECTORY", "NCCL_DEBUG")


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB."""
    text = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = set(_first(r"^flags\s*: (.*)$", text).split())
    features = [
        name for name in ("avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16") if name in flags
    ]
    memory = _read("/proc/meminfo")
    return {
        "system": platform.platform(),
        "cpu": model.group(1) if model else platform.machine(),
        "cpu_features": features,
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "memory_gib": _gib(_first(r"^MemTotal:\s+(\d+) kB", memory)),
        "memory_available_gib": _gib(_first(r"^MemAvailable:\s+(\d+) kB", memory)),
    }


def capabilities() -> dict[str, Any]:
    """What arenas between processes are built on."""

    def works(action: Callable[[], int]) -> bool:
        try:
            os.close(action())
        except OSError:
            return False
        return True

    def abstract_socket() -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(f"\0sglang_symm-env-{os.getpid()}")
            return os.dup(listener.fileno())

    return {
        "memfd": works(lambda: os.memfd_create("sglang_symm-env", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)),
        "pidfd": works(lambda: os.pidfd_open(os.getpid())),
        "abstract_unix_sockets": works(abstract_socket),
    }


def torch_report() -> dict[str, Any]:
    """Version of torch, of its CUDA, and the process-group backends that it has."""
    report = _library.found()
    if report["torch"] is None:
        return {"version": None, "error": report["torch_error"]}
    import torch
    import torch.distributed as dist

    here = dist.is_available()
    backends = {"gloo": here and dist.is_gloo_available(), "nccl": here and dist.is_nccl_available()}
    return {
        "version": report["torch"],
        "cuda": report["cuda"],
        "backends": [name for name, there in backends.items() if there],
        "threads": torch.get_num_threads(),
    }


def cuda_report() -> dict[str, Any]:
    """nvcc, the driver and the GPUs, by NVML: no CUDA context is made."""
    report: dict[str, Any] = {"nvcc": None, "driver": None, "gpus": []}
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if nvcc:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        report["nvcc"] = _first(r"release (\d+\.\d+)", text) or "unknown"
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return report
    if nvml.nvmlInit_v2() != 0:
        return report
    try:
        report["driver"] = _nvml_text(nvml.nvmlSystemGetDriverVersion)
        report["gpus"] = _nvml_gpus(nvml)
    finally:
        nvml.nvmlShutdown()
    return report


def nccl_report() -> dict[str, Any]:
    """The NCCL that a group would use: the one that torch loaded, and whether its windows are used."""
    loaded = re.search(r"\S*/libnccl\.so\.2\S*", _read("/proc/self/maps"))
    try:
        nccl = ctypes.CDLL(loaded.group(0) if loaded else "libnccl.so.2")
        code = ctypes.c_int()
        if nccl.ncclGetVersion(ctypes.byref(code)) != 0:
            return {"version": None, "windows": "not used: NCCL does not tell its version"}
    except OSError:
        return {"version": None, "windows": "not used: libnccl.so.2 was not found"}
    version = nccl_rules.version_of(code.value)
    return {"version": ".".join(map(str, version)), "windows": nccl_rules.windows(version)}


def library_report() -> dict[str, Any]:
    """State of the native library: what it was built for, what it says when loaded, or why it is not loaded."""
    report: dict[str, Any] = {"built_for": _library.built_for() or None, "loaded": None, "error": None}
    error = _library.attempt()
    if error is None:
        report["loaded"] = _library.info()
    else:
        report["error"] = str(error)
    return report


def tuning_report() -> dict[str, Any]:
    """Which table a group of 2, 3, 4 or 8 ranks chooses its algorithms by, on this machine."""
    devices = ["cpu", *dict.fromkeys(gpu["name"] for gpu in cuda_report()["gpus"])]
    tables = os.environ.get("SGLANG_SYMM_TABLES", "")
    return {
        device: {f"{ranks} ranks": tuning.find(device, ranks, tables).label for ranks in (2, 3, 4, 8)}
        for device in devices
    }


def settings() -> dict[str, Any]:
    """Our environment variables: value in force, whether it is set, meaning."""
    rows = {
        name: {"value": os.environ.get(name, default), "set": name in os.environ, "meaning": meaning}
        for name, (default, meaning) in SETTINGS.items()
    }
    # A misspelt variable would be ignored in silence; show it.
    for name in sorted(os.environ):
        if name.startswith("SGLANG_SYMM_") and name not in rows:
            rows[name] = {"value": os.environ[name], "set": True, "meaning": "not read when the package runs"}
    return rows


def collect() -> dict[str, Any]:
    """The whole report; a part that fails is replaced by its error."""
    parts: dict[str, Callable[[], Any]] = {
        "machine": machine,
        "capabilities": capabilities,
        "torch": torch_report,
        "cuda": cuda_report,
        "nccl": nccl_report,
        "library": library_report,
        "tuning": tuning_report,
        "settings": settings,
        "environment": lambda: {name: os.environ[name] for name in OTHER_VARIABLES if name in os.environ},
    }
    report: dict[str, Any] = {
        "sglang_symm": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
    }
    for name, part in parts.items():
        try:
            report[name] = part()
        except Exception as error:  # the report must come out whatever is broken
            report[name] = {"error": f"{type(error).__name__}: {error}"}
    return report


def render(report: dict[str, Any]) -> str:
    """The report as text."""

    def show(value: Any) -> str:
        if value is None or value == [] or value == {}:
            return "none"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, list) and isinstance(value[0], dict):  # the GPUs
            return ("\n" + " " * 24).join(f"{index}: {show(item)}" for index, item in enumerate(value))
        if isinstance(value, list):
            return ", ".join(show(item) for item in value)
        if isinstance(value, dict):
            return ", ".join(f"{key} {show(item)}" for key, item in value.items())
        return str(value).replace("\n", "\n" + " " * 24)

    lines = [f"sglang_symm {report['sglang_symm']}"]
    for section, content in report.items():
        if section in ("sglang_symm", "settings") or not content:
            continue
        lines.append(f"\n{section}")
        lines += [f"  {key:22}{show(value)}" for key, value in content.items()]
    lines.append("\nsettings (* set in the environment)")
    for name, row in report["settings"].items():
        lines.append(f"  {'*' if row['set'] else ' '} {name:31} {row['value']:20} {row['meaning']}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def main(args: argparse.Namespace) -> int:
    """Print the report. The exit status is 0 even when the library cannot be loaded: the report says so."""
    report = collect()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    return match.group(1) if match else ""


def _gib(kib: str) -> float | None:
    return round(int(kib) / 2**20, 1) if kib else None


def _nvml_text(function: Callable[..., int], *args: Any) -> str | None:
    buffer = ctypes.create_string_buffer(96)
    return buffer.value.decode() if function(*args, buffer, ctypes.c_uint(len(buffer))) == 0 else None


def _nvml_gpus(nvml: ctypes.CDLL) -> list[dict[str, Any]]:
    """Name, memory, compute capability of each GPU and the GPUs that it reaches by NVLink or by peer access."""

    class Memory(ctypes.Structure):
        _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]

    count = ctypes.c_uint()
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    handles = [ctypes.c_void_p() for _ in range(count.value)]
    for index, handle in enumerate(handles):
        nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))

    def reaches(a: ctypes.c_void_p, b: ctypes.c_void_p, how: int) -> bool:
        status = ctypes.c_int(-1)
        return nvml.nvmlDeviceGetP2PStatus(a, b, how, ctypes.byref(status)) == 0 and status.value == 0

    gpus = []
    for index, handle in enumerate(handles):
        memory, major, minor = Memory(), ctypes.c_int(), ctypes.c_int()
        nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
        others = [(i, other) for i, other in enumerate(handles) if i != index]
        gpus.append(
            {
                "name": _nvml_text(nvml.nvmlDeviceGetName, handle),
                "memory_gib": round(memory.total / 2**30, 1),
                "capability": f"{major.value}.{minor.value}",
                # nvmlGpuP2PCapsIndex_t: write 1, NVLink 2
                "peers": [i for i, other in others if reaches(handle, other, 1)],
                "nvlink": [i for i, other in others if reaches(handle, other, 2)],
            }
        )
    return gpus
