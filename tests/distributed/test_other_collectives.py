"""all_gather, reduce_scatter, broadcast, barrier."""

import time

import pytest
import torch
from distributed_cases import NATIVE, gather_objects, inputs, ordered_sum, same_bits

ANY = [*NATIVE, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]


def uneven(size):
    """Lengths of the ranks: 0, 3, 1, 4, ... ."""
    return [(rank * 3) % 5 for rank in range(size)]


@pytest.mark.parametrize("dtype", ANY)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_all_gather_concatenates_in_rank_order_along_any_dimension(group, dtype, dim):
    for shape in ([2, 3, 4], [1, 1, 1], [0, 2, 3], [5, 17, 33]):
        everyone = inputs(group.world_size, shape, dtype)
        y = group.all_gather(everyone[group.rank_in_group], dim=dim)
        assert same_bits(y, torch.cat(everyone, dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("dim", [0, 1])
def test_all_gather_with_sizes_takes_a_different_length_from_each_rank(group, dtype, dim):
    sizes = uneven(group.world_size)
    everyone = []
    for rank, length in enumerate(sizes):
        shape = [length, 7] if dim == 0 else [7, length]
        everyone.append(inputs(group.world_size, shape, dtype, seed=5)[rank])
    y = group.all_gather(everyone[group.rank_in_group], dim=dim, sizes=sizes)
    assert same_bits(y, torch.cat(everyone, dim))


@pytest.mark.parametrize("count", [0, 1, 7, 1000, (1 << 18) - 1, (1 << 18) + 1, 1 << 20, 3 << 20])
def test_all_gather_of_any_size(group, count):
    everyone = inputs(group.world_size, [count], torch.float32)
    assert same_bits(group.all_gather(everyone[group.rank_in_group]), torch.cat(everyone))


def test_all_gather_of_one_row_along_its_columns(shared, rank, size):
    for communicator in ("symm", "process_group"):
        xs = inputs(size, [1, 7])
        y = shared(communicator=communicator).all_gather(xs[rank], dim=1)
        assert same_bits(y, torch.cat(xs, dim=1))


def test_all_gather_moves_not_a_number_unchanged(group):
    patterns = torch.tensor([-1, 0x7FC00001, -0x00400000 - 1, 0x7F800000, -(1 << 31)], dtype=torch.int32)
    y = group.all_gather(patterns.view(torch.float32))
    assert torch.equal(y.view(torch.int32), patterns.repeat(group.world_size))


def test_all_gather_of_non_contiguous_tensors(group):
    everyone = inputs(group.world_size, [9, 4], torch.float32)
    x = everyone[group.rank_in_group].t().contiguous().t()
    assert same_bits(group.all_gather(x, dim=1), torch.cat(everyone, 1))


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_reduce_scatter_gives_each_rank_its_part_of_the_ordered_sum(group, dtype, dim):
    size = group.world_size
    for other in (1, 2, 33):
        shape = [other, 3, 2]
        shape[dim] = 4 * size
        everyone = inputs(size, shape, dtype)
        y = group.reduce_scatter(everyone[group.rank_in_group], dim=dim)
        assert same_bits(y, ordered_sum(everyone).chunk(size, dim)[group.rank_in_group].contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("dim", [0, 1])
def test_reduce_scatter_with_sizes_gives_each_rank_a_different_length(group, dtype, dim):
    sizes = uneven(group.world_size)
    shape = [sum(sizes), 5] if dim == 0 else [5, sum(sizes)]
    everyone = inputs(group.world_size, shape, dtype)
    total = ordered_sum(everyone) if dtype.is_floating_point else torch.stack(everyone).sum(0)
    y = group.reduce_scatter(everyone[group.rank_in_group], dim=dim, sizes=sizes)
    assert same_bits(y, total.split(sizes, dim)[group.rank_in_group].contiguous())


@pytest.mark.parametrize("count", [0, 1, 17, (1 << 16) + 1, 1 << 18, (1 << 20) + 3])
def test_reduce_scatter_of_any_size(group, count):
    everyone = inputs(group.world_size, [group.world_size * count], torch.bfloat16)
    y = group.reduce_scatter(everyone[group.rank_in_group])
    assert same_bits(y, ordered_sum(everyone).chunk(group.world_size)[group.rank_in_group])


def test_flat_forms_equal_the_others(group):
    size = group.world_size
    everyone = inputs(size, [3, 4], torch.float32)
    out = torch.empty(size * 3, 4)
    group.all_gather_into_tensor(out, everyone[group.rank_in_group])
    assert same_bits(out, torch.cat(everyone))
    everyone = inputs(size, [2 * size, 4], torch.float32)
    out = torch.empty(2, 4)
    group.reduce_scatter_tensor(out, everyone[group.rank_in_group])
    assert same_bits(out, ordered_sum(everyone).chunk(size)[group.rank_in_group])


@pytest.mark.parametrize("dtype", ANY)
def test_broadcast_from_each_rank(group, dtype):
    for src in range(group.world_size):
        for shape in ([], [0], [1], [3, 5], [1 << 16]):
            everyone = inputs(group.world_size, shape, dtype, seed=src)
            x = everyone[group.rank_in_group].clone()
            assert group.broadcast(x, src) is x
            assert same_bits(x, everyone[src])


def test_broadcast_of_many_megabytes_and_of_views(group):
    src = group.world_size - 1
    everyone = inputs(group.world_size, [(5 << 20) + 1], torch.bfloat16)
    x = everyone[group.rank_in_group].clone()
    group.broadcast(x, src)
    assert same_bits(x, everyone[src])
    everyone = inputs(group.world_size, [6, 5], torch.float32)
    base = torch.zeros(6, 10)
    base[:, ::2] = everyone[group.rank_in_group]
    group.broadcast(base[:, ::2], src)
    assert same_bits(base[:, ::2].contiguous(), everyone[src])
    assert not base[:, 1::2].any()


def test_broadcast_object_from_each_rank(group):
    for src in range(group.world_size):
        value = {"from": group.rank_in_group, "text": "x" * 1000}
        assert group.broadcast_object(value, src)["from"] == src


def test_no_rank_leaves_a_barrier_before_the_last_has_entered(group):
    for late in range(group.world_size):
        group.barrier()
        if group.rank_in_group == late:
            time.sleep(0.2)
        entered = time.monotonic()
        group.barrier()
        if group.device.type == "cuda":  # a barrier of streams: the host has only enqueued it
            torch.cuda.synchronize()
        left = time.monotonic()
        # One clock on one host.
        assert max(gather_objects(entered)) <= left


def test_collectives_of_different_kinds_follow_each_other(group):
    rank, size = group.rank_in_group, group.world_size
    for step in range(30):
        x = torch.full((size * 2, 3), float(rank + step))
        total = sum(float(other + step) for other in range(size))
        assert torch.equal(group.all_reduce(x), torch.full_like(x, total))
        assert torch.equal(group.reduce_scatter(x), torch.full((2, 3), total))
        assert group.all_gather(x[:1, 0]).tolist() == [float(other + step) for other in range(size)]
        assert group.broadcast(x.clone(), step % size)[0, 0] == step % size + step
        group.barrier()
