# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""What is measured: ops, sizes, and the bandwidths that nccl-tests' readers expect."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")
# GB/s a direction of all NVLinks of a GPU together, by a word of its name, as the vendor says (Hopper: 18 links of 25).
# Between two H200s benchmarks/link.cu measured less: 361 of stores, 384 of the copy engine, both directions at a time.
LINK_GB_S = {"H100": 450.0, "H200": 450.0, "A100": 300.0, "B200": 900.0}
FLAG_US = 0.6  # one flag over NVLink, measured
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def parse_bytes(text: str) -> int:
    """ "2048", "2K", "32M" -> bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d+)\s*([kmg]?)i?b?", text.strip().lower())
    if match is None:
        raise ValueError(f"expected a size such as 2048, 2K or 32M, got {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def format_bytes(n: int) -> str:
    """2048 -> "2K"; what is no whole multiple stays a number."""
    for unit, scale in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if n >= scale and n % scale == 0:
            return f"{n // scale}{unit}"
    return str(n)


def sizes(begin: int, end: int, factor: int) -> list[int]:
    """begin, begin * factor, ... up to end. Raises ValueError."""
    if begin < 1 or end < begin or factor < 2:
        raise ValueError(f"expected 1 <= -b <= -e and -f >= 2, got -b {begin} -e {end} -f {factor}")
    out = []
    while begin <= end:
        out.append(begin)
        begin *= factor
    return out


@dataclass(frozen=True)
class Case:
    """One op on one size: ``bytes`` are those of the larger of input and output, as in nccl-tests."""

    op: str
    bytes: int
    dtype: torch.dtype
    world_size: int

    @property
    def elements(self) -> int:
        """Elements of the larger buffer: whole rows for every rank where the op splits it."""
        n = max(1, self.bytes // self.dtype.itemsize)
        if self.op in ("reduce_scatter", "all_gather"):
            n = max(1, n // self.world_size) * self.world_size
        return n

    @property
    def bus_factor(self) -> float:
        """busbw / algbw: what a link carries for each byte of the result (nccl-tests, PERFORMANCE.md)."""
        p = self.world_size
        return {"all_reduce": 2 * (p - 1) / p, "broadcast": 1.0}.get(self.op, (p - 1) / p)

    def limit_us(self, link_gb_s: float) -> float:
        """What no implementation goes below: the bytes that a link must carry, and the flight of one flag."""
        return FLAG_US + self.bytes * self.bus_factor / link_gb_s / 1e3

    def value(self, rank: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Rank's input: small integers, so every sum is exact in every dtype."""
        n = self.elements // self.world_size if self.op == "all_gather" else self.elements
        return ((torch.arange(n, device=device) * 7 + rank * 3) % 5 - 2).to(self.dtype)

    def expected(self, rank: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """What the op leaves on this rank."""
        if self.op == "broadcast":
            return self.value(0, device)
        if self.op == "all_gather":
            return torch.cat([self.value(r, device) for r in range(self.world_size)])
        total = self.value(0, device).float()
        for r in range(1, self.world_size):
            total += self.value(r, device).float()
        total = total.to(self.dtype)
        return total if self.op == "all_reduce" else total.chunk(self.world_size)[rank]
