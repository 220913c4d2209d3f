# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""use_symmetric_memory on GPUs: a torch.cuda.MemPool whose segments come from a group's arena.

One pool a group for eager code, and a new one for every use inside a graph capture: a block that is freed in a capture
must never be handed to eager code, or a replay would overwrite it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from types import TracebackType
from typing import Any

import torch

from sglang_symm import _library
from sglang_symm.distributed.group import Group


@functools.cache
def _allocator() -> Any:
    """PyTorch's view of the native allocator; kept for ever, because pools refer to it."""
    return torch.cuda.memory.CUDAPluggableAllocator(
        str(_library.LIBRARY), "sglang_symm_cuda_malloc", "sglang_symm_cuda_free"
    )


class _Thread(threading.local):
    """The contexts that are open in this thread, outermost first, and its pools, which live as long as their group.

    Only the innermost context's pool is in use: of several, PyTorch would not take the last one.
    """

    def __init__(self) -> None:
        self.open: list[tuple[CudaArenaContext, torch.cuda.MemPool]] = []
        self.in_use: tuple[torch.cuda.MemPool, contextlib.AbstractContextManager[None]] | None = None
        self.pools: dict[str, tuple[Group, torch.cuda.MemPool]] = {}
        self.captured: list[tuple[Group, torch.cuda.MemPool]] = []

    def pool_of(self, group: Group) -> torch.cuda.MemPool:
        self.pools = {name: entry for name, entry in self.pools.items() if not entry[0].destroyed}
        self.captured = [entry for entry in self.captured if not entry[0].destroyed]
        if self.open and self.open[-1][0].group is group:
            return self.open[-1][1]
        if torch.cuda.is_current_stream_capturing():
            self.captured.append((group, torch.cuda.MemPool(_allocator().allocator())))
            return self.captured[-1][1]
        if group.unique_name not in self.pools:
            self.pools[group.unique_name] = (group, torch.cuda.MemPool(_allocator().allocator()))
        return self.pools[group.unique_name][1]

    def use_innermost(self) -> None:
        context, pool = self.open[-1] if self.open else (None, None)
        if self.in_use is not None:
            if self.in_use[0] is pool:
                return
            used, self.in_use = self.in_use[1], None
            used.__exit__(None, None, None)
        if context is not None and pool is not None:
            use = torch.cuda.use_mem_pool(pool, context.group.device)
            use.__enter__()
            self.in_use = (pool, use)


_thread = _Thread()


class CudaArenaContext:
    """Re-entrant; the native library knows the innermost group of each thread."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __enter__(self) -> None:
        torch.ops.sglang_symm._enter_symmetric_memory(self.group.unique_name)
        before = len(_thread.open)
        try:
            _thread.open.append((self, _thread.pool_of(self.group)))
            _thread.use_innermost()
        except BaseException:
            del _thread.open[before:]
            torch.ops.sglang_symm._exit_symmetric_memory(self.group.unique_name)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for i in reversed(range(len(_thread.open))):
            if _thread.open[i][0] is self:
                del _thread.open[i]
                _thread.use_innermost()
                break
        # It says when this is not the innermost one, or not this thread's.
        torch.ops.sglang_symm._exit_symmetric_memory(self.group.unique_name)
