# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Symmetric memory, collectives and a fused row-parallel linear layer for tensor-parallel PyTorch models.

Importing this package registers the operators `torch.ops.sglang_symm.*`. It needs no GPU and no process group; when the
native library cannot be loaded, the first use of an operator says why. The names below are imported when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._library import LibraryError, load_or_defer
from ._version import __version__

if TYPE_CHECKING:
    from .distributed import (
        Group,
        ParallelState,
        destroy_model_parallel,
        get_parallel_state,
        initialize_model_parallel,
    )
    from .hugging_face import tensor_parallelize
    from .layers import RowParallelLinear
    from .memory import empty, use_symmetric_memory
    from .model_runner import ModelRunner
    from .tensor_parallel import SymmRowwiseParallel

__all__ = [
    "LibraryError",
    "__version__",
    "Group",
    "ParallelState",
    "initialize_model_parallel",
    "get_parallel_state",
    "destroy_model_parallel",
    "empty",
    "use_symmetric_memory",
    "RowParallelLinear",
    "ModelRunner",
    "SymmRowwiseParallel",
    "tensor_parallelize",
]

# Public name -> module that defines it.
_EXPORTS = {
    "Group": ".distributed",
    "ParallelState": ".distributed",
    "initialize_model_parallel": ".distributed",
    "get_parallel_state": ".distributed",
    "destroy_model_parallel": ".distributed",
    "empty": ".memory",
    "use_symmetric_memory": ".memory",
    "RowParallelLinear": ".layers",
    "ModelRunner": ".model_runner",
    "SymmRowwiseParallel": ".tensor_parallel",
    "tensor_parallelize": ".hugging_face",
}

load_or_defer()


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'sglang_symm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
