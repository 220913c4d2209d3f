# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""use_symmetric_memory on GPUs: a torch.cuda.MemPool whose segments come from a group's arena.

One pool a group for eager code and one for each graph capture: a block that is freed in a capture must never be handed
to eager code, or a replay would overwrite it. So a context is entered inside of a capture: PyTorch gives what is
captured inside of an open context the pool of that context.
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


class _Pools:
    """The pools of all groups, one a thread, because a pool cannot be in use by two, and one a capture.

    They live as long as their group, and are let go of when no context is open anywhere: PyTorch ends the process when
    a pool goes while another is in use, be it with its thread.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.contexts = 0
        # By thread, group and capture (0: eager).
        self.pools: dict[tuple[int, str, int], tuple[Group, torch.cuda.MemPool]] = {}

    def opened(self) -> None:
        with self.lock:
            if self.contexts == 0 and not torch.cuda.is_current_stream_capturing():
                self.pools = {key: entry for key, entry in self.pools.items() if not entry[0].destroyed}
            self.contexts += 1

    def closed(self) -> None:
        with self.lock:
            self.contexts -= 1

    def of(self, group: Group) -> torch.cuda.MemPool:
        capture = torch.ops.sglang_symm._capture_id(group.unique_name)
        key = (threading.get_ident(), group.unique_name, capture)
        with self.lock:
            if key not in self.pools:
                with torch.cuda.device(group.device):  # a new thread's is the first GPU, and a pool is its device's
                    self.pools[key] = (group, torch.cuda.MemPool(_allocator().allocator()))
            return self.pools[key][1]


class _Thread(threading.local):
    """The contexts that are open in this thread, outermost first. Only the innermost one's pool is in use: of several,
    PyTorch would not take the last."""

    def __init__(self) -> None:
        self.open: list[tuple[CudaArenaContext, torch.cuda.MemPool]] = []
        self.in_use: tuple[torch.cuda.MemPool, contextlib.AbstractContextManager[None]] | None = None

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


_pools = _Pools()
_thread = _Thread()


class CudaArenaContext:
    """Re-entrant; the native library knows the innermost group of each thread."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __enter__(self) -> None:
        torch.ops.sglang_symm._enter_symmetric_memory(self.group.unique_name)
        before = len(_thread.open)
        _pools.opened()
        try:
            _thread.open.append((self, _pools.of(self.group)))
            _thread.use_innermost()
        except BaseException:
            del _thread.open[before:]
            _pools.closed()
            torch.ops.sglang_symm._exit_symmetric_memory(self.group.unique_name)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for i in reversed(range(len(_thread.open))):
            if _thread.open[i][0] is self:
                del _thread.open[i]
                _thread.use_innermost()
                _pools.closed()
                break
        # It says when this is not the innermost one, or not this thread's.
        torch.ops.sglang_symm._exit_symmetric_memory(self.group.unique_name)
