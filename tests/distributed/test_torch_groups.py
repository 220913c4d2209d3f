"""Groups and parallel states over what torch.distributed has made already: process groups and device meshes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SETTINGS
from distributed_cases import DEVICE, inputs, ordered_sum, same_bits
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sglang_symm.distributed import ForwardBatch, Group, ParallelState
from sglang_symm.layers import RowParallelLinear

SMALL = SETTINGS | {"arena_bytes": 4 << 20}
EVEN = pytest.mark.world_size(2, 4)


@pytest.fixture
def mesh(size: int) -> DeviceMesh:
    """Two rows of ranks: ("dp", "tp")."""
    return init_device_mesh(DEVICE, (2, size // 2), mesh_dim_names=("dp", "tp"))


@pytest.fixture
def state_of() -> Iterator[Callable[..., ParallelState]]:
    """Makes states that end with the test."""
    made: list[ParallelState] = []

    def create(make: Callable[..., ParallelState], *args: Any, **kwargs: Any) -> ParallelState:
        made.append(make(*args, **(SMALL | kwargs)))
        return made[-1]

    yield create
    for state in made:
        state.destroy()


@EVEN
@pytest.mark.parametrize("dim", ["tp", "dp", 0, 1, -1])
def test_a_group_is_made_along_any_dimension_of_a_mesh(mesh: DeviceMesh, dim: str | int, rank: int, size: int) -> None:
    group = Group.from_mesh(mesh, dim, **SMALL)
    row = [r for r in range(size) if r // (size // 2) == rank // (size // 2)]
    column = [r for r in range(size) if r % (size // 2) == rank % (size // 2)]
    assert group.ranks == (column if dim in ("dp", 0) else row)
    assert group.device_group is mesh.get_group(dim)
    assert group.unique_name.startswith("dp" if dim in ("dp", 0) else "tp")
    xs = inputs(size, [9])
    assert same_bits(group.all_reduce(xs[rank]), ordered_sum([xs[r] for r in group.ranks]))
    group.destroy()


@EVEN
def test_a_one_dimensional_mesh_needs_no_dimension(mesh: DeviceMesh) -> None:
    for group in (Group.from_mesh(mesh["tp"], **SMALL), Group(mesh["tp"], name="tp", **SMALL)):
        assert group.ranks == mesh["tp"].mesh.tolist()
        assert group.unique_name.startswith("tp")
        group.destroy()


@EVEN
def test_a_wrong_dimension_is_a_value_error_that_names_the_right_ones(mesh: DeviceMesh) -> None:
    for make in (
        lambda: Group.from_mesh(mesh, "pp"),
        lambda: Group.from_mesh(mesh),
        lambda: Group.from_mesh(mesh, 5),
        lambda: Group(mesh),
        lambda: ParallelState.from_mesh(mesh, "pp"),
    ):
        with pytest.raises(ValueError, match=r"expected one of the mesh's dimensions \['dp', 'tp'\]"):
            make()


@pytest.mark.world_size(2, 3, 4)
def test_a_parallel_state_over_a_process_group_works_through_it(
    state_of: Callable[..., ParallelState], rank: int, size: int
) -> None:
    pg = dist.new_group(list(range(size)))
    assert isinstance(pg, dist.ProcessGroup)
    state = state_of(ParallelState.from_process_group, pg, enable_symm_mem=True)
    assert state.tp is state.attn_tp is state.world
    assert state.tp.device_group is pg
    assert (state.tp_rank, state.tp_size, state.attn_dp_size) == (rank, size, 1)
    assert state.tp.communicator == "symm"
    layer = RowParallelLinear(4 * size, 5, bias=False, parallel_state=state)
    layer.weight.data.fill_(1.0)
    with torch.no_grad():
        y, _ = layer(torch.full((3, 4), float(rank)))
    assert y.tolist() == [[4.0 * sum(range(size))] * 5] * 3
    assert state.tp.contains(y)
    state.destroy()
    dist.all_reduce(torch.ones(1), group=pg)  # what was made elsewhere lives on
    dist.destroy_process_group(pg)


@pytest.mark.world_size(4)
def test_only_the_members_take_part_and_replicas_do_not_meet(
    state_of: Callable[..., ParallelState], mesh: DeviceMesh, rank: int
) -> None:
    if rank >= 2:  # one row of the mesh, alone
        state = state_of(ParallelState.from_mesh, mesh, "tp", enable_symm_mem=True)
        assert state.world.ranks == state.tp.ranks == [2, 3]
        assert (state.tp_rank, state.attn_dp.ranks) == (rank - 2, [rank])
        assert state.tp.all_reduce(torch.full((3,), float(rank))).tolist() == [5.0] * 3


@pytest.mark.world_size(4)
def test_attention_groups_divide_the_given_group(state_of: Callable[..., ParallelState], rank: int, size: int) -> None:
    flat = init_device_mesh(DEVICE, (size,), mesh_dim_names=("tp",))
    state = state_of(ParallelState.from_mesh, flat, attention_data_parallel_size=2, enable_symm_mem=True)
    assert state.tp.ranks == [0, 1, 2, 3]
    assert state.attn_tp.ranks == [[0, 1], [0, 1], [2, 3], [2, 3]][rank]
    assert state.attn_dp.ranks == [[0, 2], [1, 3], [0, 2], [1, 3]][rank]
    assert [group.communicator for group in (state.tp, state.attn_tp, state.attn_dp)] == [
        "symm",
        "symm",
        "process_group",
    ]
    with state.forward(ForwardBatch([3, 2], is_extend=True)):
        assert not state.is_allocation_symmetric()
    with pytest.raises(ValueError, match="attention_data_parallel_size 3 does not divide"):
        ParallelState.from_mesh(flat, attention_data_parallel_size=3)
