"""torch.autocast treats the row-parallel op as it treats torch.nn.functional.linear."""

from __future__ import annotations

import pytest
import torch
from distributed_cases import DEVICE, same_bits, seeded

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
