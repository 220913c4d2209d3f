# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Symmetric memory: tensors that lie in a group's arena, where its collectives need no staging copy.

Ops of this package take their outputs from the arena by themselves; ``use_symmetric_memory`` is for what other ops
allocate.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from types import TracebackType

import torch

from sglang_symm import _library
from sglang_symm.distributed.group import Group, group_name
from sglang_symm.distributed.parallel_state import is_allocation_symmetric

__all__ = ["empty", "is_allocation_symmetric", "use_symmetric_memory"]


def _is_tracing() -> bool:
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return True
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


class _ArenaContext:
    """Re-entrant: the stack of entered groups is the native library's, one a thread."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def __enter__(self) -> None:
        self._group._check_usable("use_symmetric_memory")
        torch.ops.sglang_symm._enter_symmetric_memory(self._group.unique_name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.ops.sglang_symm._exit_symmetric_memory(self._group.unique_name)


def use_symmetric_memory(group: Group, disabled: bool = False) -> contextlib.AbstractContextManager[None]:
    """A context in which this thread's allocations on the group's device come from the group's arena.

    Nested, re-entrant, exception-safe. Left in another order than innermost first it raises ValueError, but is left:
    the thread never stays inside. Does nothing when ``disabled``, when the group was made with symmetric memory
    off (``enable_symm_mem=False``) or has one rank. Local: ranks need not enter it alike. When the arena is full a
    tensor gets ordinary memory and a warning tells once; in a strict group it is torch.OutOfMemoryError.

    Raises:
        TypeError: ``group`` is no Group. ValueError: the group's communicator is ``process_group``: it has no arena.
        RuntimeError: the group was destroyed, or the call is being traced: compiled code would lose the context.
    """
    if disabled:
        return contextlib.nullcontext()
    if not hasattr(group, "symmetric_memory_enabled"):  # whatever behaves as a Group will do
        raise TypeError(f"sglang_symm: use_symmetric_memory: expected a sglang_symm.Group, got {group!r}")
    if not group.symmetric_memory_enabled or group.world_size == 1:
        return contextlib.nullcontext()
    if _is_tracing():
        raise RuntimeError(
            "sglang_symm: use_symmetric_memory works in eager code only: a compiled graph would silently lose it; "
            "enter it outside of the compiled function, or use sglang_symm.empty and the package's own ops"
        )
    group._check_usable("use_symmetric_memory")
    group._check_symm("use_symmetric_memory")
    if group.device.type == "cuda":
        from sglang_symm.memory_cuda import CudaArenaContext

        return CudaArenaContext(group)
    return _ArenaContext(group)


def empty(
    *size: int | Sequence[int],
    group: Group | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """An uninitialised contiguous tensor [*size] in the group's arena; it may outlive the group.

    ``dtype`` defaults to torch's default, ``device`` to the group's. Raises torch.OutOfMemoryError when the arena is
    full, ValueError for a wrong device or a group without arena.
    """
    _library.load()
    shape = list(size[0]) if len(size) == 1 and isinstance(size[0], Sequence) else list(size)
    if isinstance(group, Group):
        group._check_usable("empty")
    if device is None:
        device = json.loads(torch.ops.sglang_symm._group_info(group_name(group)))["device"]
    return torch.ops.sglang_symm.empty(
        shape, group_name(group), dtype=dtype or torch.get_default_dtype(), device=torch.device(device)
    )
