# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Who is measured on GPUs beside this library: NCCL, NCCL on memory registered as a window, and torch's symmetric
memory with its one-shot and its two-shot all-reduce. None of them uses NVLink multicast here."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist

from sglang_symm.bench.cases import Case
from sglang_symm.bench.peers import Peer, Prepared

NAMES = ("nccl", "nccl_window", "torch_one_shot", "torch_two_shot")


class Nccl(Peer):
    """torch.distributed with the nccl backend. ``window``: tensors in memory that NCCL registered (ncclMemAlloc,
    ncclCommWindowRegister), which its symmetric kernels need.

    Raises RuntimeError for an NCCL without windows.
    """

    def __init__(self, device: torch.device, most_bytes: int, window: bool) -> None:
        self.name = "nccl_window" if window else "nccl"
        self._device = device
        self._memory: torch.Tensor | None = None
        if window:
            # One block for input and output, registered once: collective, so every rank does it here.
            backend: Any = cast(Any, dist.group.WORLD)._get_backend(device)
            pool = torch.cuda.MemPool(backend.mem_allocator)
            with torch.cuda.use_mem_pool(pool):
                self._memory = torch.zeros(2 * most_bytes, dtype=torch.uint8, device=device)
            backend.register_mem_pool(pool, symm=True)

    def _empty(self, n: int, dtype: torch.dtype, second: bool = False) -> torch.Tensor:
        if self._memory is None:
            return torch.empty(n, dtype=dtype, device=self._device)
        half = self._memory.numel() // 2
        return self._memory[second * half :].view(dtype)[:n]

    def prepare(self, case: Case, rank: int, in_place: bool) -> Prepared | None:
        value = case.value(rank, self._device)
        x = self._empty(value.numel(), value.dtype)
        if case.op == "all_reduce":
            return Prepared(lambda: dist.all_reduce(x), x, lambda: x, value) if in_place else None
        if case.op == "broadcast":
            return Prepared(lambda: dist.broadcast(x, 0), x, lambda: x, value) if in_place else None
        if in_place:
            return None
        if case.op == "all_gather":
            out = self._empty(case.elements, value.dtype, True)
            return Prepared(lambda: dist.all_gather_into_tensor(out, x), x, lambda: out, value)
        out = self._empty(case.elements // case.world_size, value.dtype, True)
        return Prepared(lambda: dist.reduce_scatter_tensor(out, x), x, lambda: out, value)


class TorchSymm(Peer):
    """torch.ops.symm_mem on a buffer of torch's symmetric memory: one_shot into a new tensor, two_shot in place."""

    def __init__(self, device: torch.device, most_bytes: int, one_shot: bool) -> None:
        import torch.distributed._symmetric_memory as symm_mem

        self.name = "torch_one_shot" if one_shot else "torch_two_shot"
        self._one_shot = one_shot
        self._group = cast(Any, dist.group.WORLD).group_name
        self._buffer = symm_mem.empty(most_bytes, dtype=torch.uint8, device=device)
        symm_mem.rendezvous(self._buffer, self._group)

    def prepare(self, case: Case, rank: int, in_place: bool) -> Prepared | None:
        # Its kernels take whole 16-byte chunks, a share of them a rank.
        if case.op != "all_reduce" or in_place == self._one_shot or case.bytes % (16 * case.world_size) != 0:
            return None
        value = case.value(rank, self._buffer.device)
        x, ops, group = self._buffer.view(value.dtype)[: value.numel()], torch.ops.symm_mem, self._group
        if not self._one_shot:
            return Prepared(lambda: ops.two_shot_all_reduce_(x, "sum", group), x, lambda: x, value)
        kept: list[torch.Tensor] = []

        def call() -> None:
            kept[:] = [ops.one_shot_all_reduce(x, "sum", group)]

        return Prepared(call, x, lambda: kept[0], value)
