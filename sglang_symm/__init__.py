"""Symmetric memory, collectives and a fused row-parallel linear layer for tensor-parallel PyTorch models.

Importing this package registers the operators `torch.ops.sglang_symm.*`. It needs no GPU and no process group; when the
native library cannot be loaded, the first use of an operator says why. The names below are imported when they are used.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._library import LibraryError, load_or_defer
from ._version import __version__

# Public name -> module that defines it.
_EXPORTS: dict[str, str] = {}

__all__ = ["LibraryError", "__version__", *_EXPORTS]

load_or_defer()


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'sglang_symm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
