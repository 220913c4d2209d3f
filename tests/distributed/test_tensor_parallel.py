"""SymmRowwiseParallel in parallelize_module: PyTorch's RowwiseParallel in one op, with its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import SETTINGS
from distributed_cases import DEVICE, seeded
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Partial

import sglang_symm
from sglang_symm import SymmRowwiseParallel
from sglang_symm.distributed import Group

pytestmark = pytest.mark.world_size(2, 3)
# Units of eps * max: two layers and a loss, summed in another order than one process does.
BOUND = 64


@pytest.fixture
def mesh(size: int) -> DeviceMesh:
    return init_device_mesh(DEVICE, (size,), mesh_dim_names=("tp",))


class MLP(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(12, 24, bias), nn.Linear(24, 12, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def close(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    found = whole(found)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= BOUND * torch.finfo(found.dtype).eps * expected.abs().max()


def sharded(mesh: DeviceMesh, style: Any = None, column: Any = None, bias: bool = True) -> MLP:
    group = sglang_symm.Group.from_mesh(mesh, **SETTINGS)
    plan = {"up": column or ColwiseParallel(), "down": style or SymmRowwiseParallel(group=group)}
    return parallelize_module(MLP(bias), mesh, plan)  # type: ignore[return-value]


def tokens() -> Tensor:
    return torch.randn(6, 6, 12, generator=seeded(1))


@pytest.mark.parametrize("bias", [True, False])
def test_an_mlp_gives_and_learns_what_one_process_does(mesh: DeviceMesh, bias: bool) -> None:
    ours, reference = sharded(mesh, bias=bias), MLP(bias)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (ours, reference)]
    for _ in range(3):
        x, x_reference = tokens().requires_grad_(), tokens().requires_grad_()
        for model, argument in ((ours, x), (reference, x_reference)):
            model(argument).sin().sum().backward()
        close(x.grad, x_reference.grad)
        for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
            close(mine.grad, theirs.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    close(ours(tokens()).detach(), reference(tokens()).detach())
    ours.down.group.destroy()  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("output", [Replicate(), Shard(0), Shard(1), Shard(-1)], ids=str)
@pytest.mark.parametrize("local", [True, False], ids=["local", "dtensor"])
def test_layouts_are_those_of_rowwise_parallel(mesh: DeviceMesh, output: Any, local: bool) -> None:
    group = Group.from_mesh(mesh, **SETTINGS)
    results = []
    for style in (SymmRowwiseParallel, RowwiseParallel):
        layouts: dict[str, Any] = {"input_layouts": Replicate(), "output_layouts": output, "use_local_output": local}
        if style is SymmRowwiseParallel:
            layouts["group"] = group
        linear = parallelize_module(MLP().down, mesh, style(**layouts))
        x = torch.randn(6, 6, 24, generator=seeded(1)).requires_grad_()
        y = linear(x)
        whole(y).sin().sum().backward()
        results.append((y, x.grad, linear.weight.grad))
    (y, dx, dw), (y_torch, dx_torch, dw_torch) = results
    assert isinstance(y, DTensor) == isinstance(y_torch, DTensor) == (not local)
    if isinstance(y, DTensor):
        # A negative dimension may be written either way.
        assert [p.dim % 3 if isinstance(p, Shard) else p for p in y.placements] == [
            p.dim % 3 if isinstance(p, Shard) else p for p in y_torch.placements
        ]
    close(y.detach(), whole(y_torch.detach()))
    if output == Replicate():
        close(dw, whole(dw_torch))
        close(dx, dx_torch)
    group.destroy()


def test_a_sharded_output_sends_every_ranks_gradient_back(mesh: DeviceMesh) -> None:
    ours = sharded(mesh, SymmRowwiseParallel(output_layouts=Shard(1), group=Group.from_mesh(mesh, **SETTINGS)))
    reference, x, x_reference = MLP(), tokens().requires_grad_(), tokens().requires_grad_()
    y, expected = ours(x), reference(x_reference)
    rank, size = mesh.get_local_rank(), mesh.size()
    close(y, expected.detach().chunk(size, 1)[rank])
    y.sin().sum().backward()  # this rank's part of the loss
    expected.sin().sum().backward()
    close(x.grad, x_reference.grad)
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        close(mine.grad, theirs.grad)
    ours.down.group.destroy()  # type: ignore[operator, union-attr]


def test_a_dtensor_comes_in_by_its_own_layout(mesh: DeviceMesh) -> None:
    ours, reference = sharded(mesh, column=ColwiseParallel(use_local_output=False)), MLP()
    close(ours(tokens()).detach(), reference(tokens()).detach())
    x = torch.randn(3, 24, generator=seeded(1))
    for placement in (Replicate(), Shard(0), Shard(1)):
        given = distribute_tensor(x, mesh, [placement])
        close(ours.down(given).detach(), reference.down(x).detach())
    ours.down.group.destroy()  # type: ignore[operator, union-attr]


def test_the_layers_of_a_mesh_share_one_group(size: int) -> None:
    # A process group of its own: over the world's there may be groups already, which the layers would take.
    mesh = DeviceMesh.from_group(dist.new_group(list(range(size))), DEVICE, mesh_dim_names=("tp",))
    model = nn.Sequential(MLP(), MLP())
    plan = {"*.up": ColwiseParallel(), "*.down": SymmRowwiseParallel()}
    parallelize_module(model, mesh, plan)
    group = model[0].down.group
    assert model[1].down.group is group
    assert (group.world_size, group.communicator) == (size, "symm")
    with torch.no_grad():
        calls = group.info()["calls"]
        model(tokens())
        assert group.info()["calls"] == calls + 2
    state = model.state_dict()
    assert isinstance(state["0.down.weight"], DTensor)
    assert state["0.down.weight"].placements == (Shard(1),)
    assert state["0.down.weight"].shape == (12, 24)
    group.destroy()
    mine = Group.from_mesh(mesh, **SETTINGS)
    later = parallelize_module(MLP().down, mesh, SymmRowwiseParallel(input_layouts=Replicate()))
    assert later.group is mine
    mine.destroy()
    dist.destroy_process_group(mesh.get_group())


def test_it_compiles_without_a_graph_break(mesh: DeviceMesh) -> None:
    torch._dynamo.reset()
    model = sharded(mesh)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for call in (model, compiled):
        x = tokens().requires_grad_()
        model.zero_grad()
        call(x).sin().sum().backward()
        gradients.append([x.grad, *(whole(p.grad) for p in model.parameters())])
    assert all(torch.equal(found, expected) for found, expected in zip(*gradients, strict=True))
    model.down.group.destroy()  # type: ignore[operator, union-attr]


def test_what_it_cannot_do_is_a_value_error(mesh: DeviceMesh, rank: int) -> None:
    with pytest.raises(ValueError, match=r"expected an nn\.Linear, got Embedding"):
        parallelize_module(nn.Embedding(4, 4), mesh, SymmRowwiseParallel())
    with pytest.raises(ValueError, match="output_layouts"):
        parallelize_module(nn.Linear(6, 6), mesh, SymmRowwiseParallel(output_layouts=Partial()))
    alone = Group.of_ranks([rank], **(SETTINGS | {"arena_bytes": 1 << 20}))
    with pytest.raises(ValueError, match="a group of the mesh's ranks"):
        parallelize_module(nn.Linear(6, 6), mesh, SymmRowwiseParallel(group=alone))
    alone.destroy()


def test_columns_need_not_divide_by_the_ranks(mesh: DeviceMesh) -> None:
    torch.manual_seed(3)
    reference = nn.Linear(10, 4)
    torch.manual_seed(3)
    group = Group.from_mesh(mesh, **SETTINGS)
    ours = parallelize_module(nn.Linear(10, 4), mesh, SymmRowwiseParallel(input_layouts=Replicate(), group=group))
    x = torch.randn(3, 10, generator=seeded(1))
    close(ours(x).detach(), reference(x).detach())
    group.destroy()
