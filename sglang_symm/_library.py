# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Loads the native library, once, and explains it when it cannot be loaded.

The library `_C.abi3.so` registers its operators under `torch.ops.sglang_symm`. It fits one minor version of torch
(C++ has no stable ABI there), so a torch upgrade breaks it: what it was built for stands beside it in `_C.json`,
which can be read in any case.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

FOLDER = Path(__file__).resolve().parent
LIBRARY = FOLDER / "_C.abi3.so"


class LibraryError(ImportError):
    """The native library cannot be loaded. Says what it was built for, what was found, what mends it."""


def built_for() -> dict[str, Any]:
    """What the library was built for: `torch`, `cuda`, `arch`, `compiler`. Empty when nothing was built."""
    try:
        info: dict[str, Any] = json.loads((FOLDER / "_C.json").read_text())
    except (OSError, ValueError):
        return {}
    return info


def found() -> dict[str, Any]:
    """What this process has: `torch` and its `cuda`, None where there is none, and `python`."""
    versions: dict[str, Any] = {"torch": None, "cuda": None, "python": sys.version.split()[0]}
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken torch raises more than ImportError (OSError for a missing CUDA library)
        versions["torch_error"] = f"{type(error).__name__}: {error}"
    else:
        versions["torch"] = str(torch.__version__)
        versions["cuda"] = torch.version.cuda
    return versions


def _numbers(version: str, count: int) -> str:
    """The first numbers of a version: ("2.11.0+cu130", 2) is "2.11"."""
    return ".".join(version.split("+")[0].split(".")[:count])


def mismatch(built: dict[str, Any], have: dict[str, Any]) -> str | None:
    """The reason why a library built for `built` does not fit `have`, or None when it fits or nothing is known."""

    if have["torch"] is None:
        return f"torch cannot be imported ({have.get('torch_error', 'not installed')})"
    if not built:
        return None
    if _numbers(built["torch"], 2) != _numbers(have["torch"], 2):
        return "it was built for another torch"
    if built["cuda"] and not have["cuda"]:
        return "it was built with CUDA and this torch is a build without CUDA"
    if built["cuda"] and _numbers(built["cuda"], 1) != _numbers(have["cuda"], 1):
        return "it was built for another CUDA"
    return None


def mend(built: dict[str, Any], have: dict[str, Any]) -> str:
    """The command after which the library loads."""
    pip = f"{sys.executable} -m pip install"
    fitting_torch = f'{pip} "torch=={_numbers(built["torch"], 2)}.*"' if built else f"{pip} torch==2.11.0"
    root = FOLDER.parent
    if have["torch"] is None:
        return fitting_torch
    if (root / "setup.py").is_file():
        return f"{pip} --no-build-isolation --no-deps -e {root}"
    if built and _numbers(built["torch"], 2) != _numbers(have["torch"], 2):
        return f"{fitting_torch}  (or build sglang_symm for the torch that is there)"
    return f"{pip} --no-build-isolation --no-deps --force-reinstall .  (in a checkout of sglang_symm)"


def explain(reason: str) -> str:
    """The whole message of a `LibraryError`."""
    built, have = built_for(), found()

    def line(versions: dict[str, Any]) -> str:
        if not versions or versions["torch"] is None:
            return "nothing"
        return f"torch {versions['torch']}, CUDA {versions['cuda'] or 'none'}"

    return (
        f"sglang_symm cannot load its native library {LIBRARY}: {reason}.\n"
        f"  built for: {line(built)}\n"
        f"  found:     {line(have)}, Python {have['python']}\n"
        f"  mend it:   {mend(built, have)}"
    )


@functools.cache
def attempt() -> LibraryError | None:
    """Load the library and the fake kernels; return the error instead of raising it. Runs once a process."""
    reason = mismatch(built_for(), found())
    if reason is None and not LIBRARY.is_file():
        reason = "the file does not exist, it was not built"
    if reason is not None:
        return LibraryError(explain(reason))
    import torch

    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        # torch wraps the loader's error, which names the missing symbol or library.
        return LibraryError(explain(str(error.__cause__ or error)))
    importlib.import_module("sglang_symm._fake")
    return None


def load() -> None:
    """Load the library.

    Raises:
        LibraryError: it cannot be loaded; every call raises it again.
    """
    error = attempt()
    if error is not None:
        raise LibraryError(str(error))


def load_or_defer() -> None:
    """Load the library; when that fails, let the first use of an operator raise the error.

    So `import sglang_symm` and `python -m sglang_symm env` work beside a broken library.
    """
    error = attempt()
    if error is None or found()["torch"] is None:
        return
    import torch

    torch.ops.__dict__["sglang_symm"] = _Unavailable(str(error))


class _Unavailable:
    """Stands at `torch.ops.sglang_symm` when the library is not loaded."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # inspection by tools is no use of an operator
            raise AttributeError(name)
        raise LibraryError(self._message)


def info() -> dict[str, Any]:
    """What the loaded library says of itself: `torch`, `cuda`, `compiler`, and `cpu`, the vector path in use.

    Raises:
        LibraryError: it cannot be loaded.
    """
    load()
    import torch

    loaded: dict[str, Any] = json.loads(torch.ops.sglang_symm._build_info())
    return loaded


def describe() -> str:
    """One line on the loaded library.

    Raises:
        LibraryError: it cannot be loaded.
    """
    about = info()
    cuda = f"CUDA {about['cuda']}" if about["cuda"] else "CPU only"
    return f"sglang_symm: built for torch {about['torch']}, {cuda}, CPU path {about['cpu']}"
