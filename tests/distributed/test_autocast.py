"""torch.autocast treats the row-parallel op as it treats torch.nn.functional.linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed_cases import DEVICE, same_bits, seeded
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_symm.distributed import Group

OPS = torch.ops.sglang_symm


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_the_row_parallel_linear_and_keeps_the_gradients_dtype(
    group: Group, lower: torch.dtype, compiled: bool
) -> None:
    generator = seeded(group.rank_in_group)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((3, 8), (5, 8), (5,)))
    weight.requires_grad_()
    expected = OPS.row_parallel_linear(x.to(lower), weight.to(lower), bias.to(lower), group.unique_name)

    def call() -> torch.Tensor:
        with torch.autocast(DEVICE, lower):
            return OPS.row_parallel_linear(x, weight, bias, group.unique_name)

    y = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)()
    assert y.dtype is lower
    assert same_bits(y.detach(), expected.detach())
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype is torch.float32
    with torch.autocast(DEVICE, lower):  # fp64 stays, as in PyTorch
        z = OPS.row_parallel_linear(x.double(), weight.detach().double(), None, group.unique_name)
    assert z.dtype is torch.float64


class StaticWeights(TorchDispatchMode):
    """What each row-parallel linear below autocast is told of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is OPS.row_parallel_linear.default:
            self.told.append(bool((kwargs or {}).get("static_weight", args[5] if len(args) > 5 else False)))
        return func(*args, **(kwargs or {}))


@pytest.mark.world_size(2)
def test_a_weight_that_autocast_casts_is_not_static_because_the_cast_writes_it(group: Group) -> None:
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    with torch.no_grad(), StaticWeights() as seen, torch.autocast(DEVICE, torch.bfloat16):
        for w in (weight, weight.bfloat16()):
            OPS.row_parallel_linear(x, w, None, group.unique_name, True, True)
    assert seen.told == [False, True]
