"""One call of every public op but `empty`, in all shapes that matter, for torch.library.opcheck."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
COMPLEX = [torch.complex64, torch.complex128]
# These have a gradient: their inputs require one.
DIFFERENTIABLE = ("all_reduce", "all_gather", "reduce_scatter", "row_parallel_linear")


@dataclass(frozen=True)
class Ranks:
    """The group that a call names."""

    name: str
    rank: int
    size: int


@dataclass(frozen=True)
class Case:
    """A call of `op`: make(ranks, tensor) gives its arguments, tensor(*shape) an input of the dtype under test."""

    op: str
    label: str
    make: Callable[[Ranks, Callable[..., Tensor]], tuple[Any, ...]]

    def check(self, ranks: Ranks, dtype: torch.dtype) -> None:
        """opcheck: the schema, the registration of gradients, the fake kernel, and AOTAutograd against eager."""
        grads = self.op in DIFFERENTIABLE and dtype in FLOATS
        generator = torch.Generator().manual_seed(ranks.rank)

        def tensor(*shape: int) -> Tensor:
            x = torch.randint(0, 2 if dtype is torch.bool else 5, shape, generator=generator, device="cpu")
            return x.to(torch.get_default_device(), dtype).requires_grad_(grads)

        torch.library.opcheck(
            getattr(torch.ops.sglang_symm, self.op).default,
            self.make(ranks, tensor),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def uneven(size: int) -> list[int]:
    return [2 * rank % 3 + 1 for rank in range(size)]


# The first case of an op is checked with every dtype, the others with one.
CASES = [
    Case("all_reduce", "plain", lambda g, t: (t(3, 4), g.name)),
    Case("all_reduce", "scalar", lambda g, t: (t(), g.name)),
    Case("all_reduce", "none", lambda g, t: (t(0, 4), g.name)),
    Case("all_reduce", "transposed", lambda g, t: (t(3, 4).t(), g.name)),
    Case("all_reduce", "expanded", lambda g, t: (t(1, 4).expand(3, 4), g.name)),
    Case("all_reduce", "mean", lambda g, t: (t(3, 4), g.name, "avg")),
    Case("all_reduce_", "plain", lambda g, t: (t(3, 4), g.name)),
    Case("all_reduce_", "transposed", lambda g, t: (t(3, 4).t(), g.name)),
    Case("all_reduce_", "maximum", lambda g, t: (t(3, 4), g.name, "max")),
    Case("all_gather", "plain", lambda g, t: (t(3, 4), g.name)),
    Case("all_gather", "dim -1", lambda g, t: (t(3, 4), g.name, -1)),
    Case("all_gather", "sizes", lambda g, t: (t(2, uneven(g.size)[g.rank], 3), g.name, 1, uneven(g.size))),
    Case("reduce_scatter", "plain", lambda g, t: (t(2 * g.size, 3), g.name)),
    Case("reduce_scatter", "dim 1", lambda g, t: (t(3, 2 * g.size), g.name, 1)),
    Case("reduce_scatter", "sizes", lambda g, t: (t(2, sum(uneven(g.size)), 3), g.name, 1, uneven(g.size))),
    Case("broadcast_", "plain", lambda g, t: (t(3, 4), g.size - 1, g.name)),
    Case("barrier", "plain", lambda g, t: (t(1), g.name)),
    Case("row_parallel_linear", "plain", lambda g, t: (t(3, 8), t(5, 8), t(5), g.name)),
    Case("row_parallel_linear", "no bias", lambda g, t: (t(2, 3, 8), t(5, 8), None, g.name)),
    Case("row_parallel_linear", "vector", lambda g, t: (t(8), t(5, 8), t(5), g.name)),
    Case("row_parallel_linear", "no tokens", lambda g, t: (t(0, 8), t(5, 8), t(5), g.name)),
    Case("row_parallel_linear", "flags", lambda g, t: (t(3, 8), t(5, 8), None, g.name, False, True)),
    Case("row_parallel_linear", "transposed", lambda g, t: (t(8, 3).t(), t(8, 5).t(), t(5), g.name)),
    Case("row_parallel_linear_out", "plain", lambda g, t: (t(3, 8), t(5, 8), t(5), g.name, t(3, 5))),
    Case("all_reduce_add_rms_norm", "plain", lambda g, t: (t(3, 8), t(3, 8), t(8), 1e-6, g.name)),
    Case("all_reduce_add_rms_norm", "transposed", lambda g, t: (t(8, 3).t(), t(8, 3).t(), t(8), 1e-6, g.name)),
    Case(
        "row_parallel_linear_add_rms_norm",
        "plain",
        lambda g, t: (t(3, 8), t(5, 8), t(5), t(3, 5), t(5), 1e-6, g.name),
    ),
]
ANY_DTYPE = ("all_reduce", "all_reduce_", "all_gather", "reduce_scatter", "broadcast_", "barrier")


def parameters(others: list[torch.dtype]) -> list[Any]:
    """(case, dtype) for pytest: every op with every floating dtype, and with `others` where it takes any dtype."""
    chosen, seen = [], set()
    for case in CASES:
        dtypes = [torch.float32]
        if case.op not in seen:
            dtypes = FLOATS + (others if case.op in ANY_DTYPE else [])
        seen.add(case.op)
        chosen += [pytest.param(case, dtype, id=f"{case.op}-{case.label}-{dtype}") for dtype in dtypes]
    return chosen
