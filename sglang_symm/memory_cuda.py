# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""use_symmetric_memory on GPUs: a torch.cuda.MemPool whose segments come from a group's arena.

One pool a group for eager code, and a new one for every use inside a graph capture: a block that is freed in a capture
must never be handed to eager code, or a replay would overwrite it.
"""

from __future__ import annotations

import contextlib
import functools
from types import TracebackType
from typing import Any

import torch

from sglang_symm import _library
from sglang_symm.distributed.group import Group

# The eager pool of each group, and the pools of captures: they live as long as their group.
_pools: dict[str, tuple[Group, torch.cuda.MemPool, list[torch.cuda.MemPool]]] = {}


@functools.cache
def _allocator() -> Any:
    """PyTorch's view of the native allocator; kept for ever, because pools refer to it."""
    return torch.cuda.memory.CUDAPluggableAllocator(
        str(_library.LIBRARY), "sglang_symm_cuda_malloc", "sglang_symm_cuda_free"
    )


def _pool(group: Group) -> torch.cuda.MemPool:
    for name in [name for name, (owner, _, _) in _pools.items() if owner.destroyed]:
        del _pools[name]
    allocator = _allocator().allocator()
    if group.unique_name not in _pools:
        _pools[group.unique_name] = (group, torch.cuda.MemPool(allocator), [])
    _, eager, captured = _pools[group.unique_name]
    if not torch.cuda.is_current_stream_capturing():
        return eager
    captured.append(torch.cuda.MemPool(allocator))
    return captured[-1]


class CudaArenaContext:
    """Re-entrant; the native library knows the innermost group of each thread."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._entered: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        stack = contextlib.ExitStack()
        name = self._group.unique_name
        torch.ops.sglang_symm._enter_symmetric_memory(name)
        stack.callback(torch.ops.sglang_symm._exit_symmetric_memory, name)
        nested = any(context._entered for context in _active if context._group is self._group)
        try:
            if not nested:  # a pool that is in use already cannot be entered again, and need not be
                stack.enter_context(torch.cuda.use_mem_pool(_pool(self._group), self._group.device))
        except BaseException:
            stack.close()
            raise
        _active.append(self)
        self._entered.append(stack)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.remove(self)
        self._entered.pop().close()


# The contexts that are open, of all threads.
_active: list[CudaArenaContext] = []
