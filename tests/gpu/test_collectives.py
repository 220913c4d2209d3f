"""Collectives between GPUs give the bits of an fp32 sum in rank order, on every rank, by every algorithm."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from tests.distributed_cases import NATIVE, TIMEOUT, inputs, ordered_sum, same_bits
from tests.gpu.test_fused import integers

COUNTS = [0, 1, 3, 8, 127, 1000, 4096, 65_536 + 5, 700_001]
ALGORITHMS = ["one_shot", "two_shot", "two_shot_direct"]


@pytest.fixture(scope="module", params=ALGORITHMS)
def group(request, world):
    from sglang_symm.distributed.group import Group

    group = Group(device="cuda", timeout=TIMEOUT, arena_bytes=64 << 20, algo=request.param)
    yield group
    torch.cuda.synchronize()
    group.destroy()


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_all_reduce_gives_the_bits_of_the_ordered_sum(group, rank, size, dtype, count):
    xs = inputs(size, [count], dtype)
    x = xs[rank].cuda()
    for _ in range(3):
        assert same_bits(group.all_reduce(x).cpu(), ordered_sum(xs))
    assert same_bits(x.cpu(), xs[rank])
    group.all_reduce_(x)
    assert same_bits(x.cpu(), ordered_sum(xs))


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
@pytest.mark.parametrize("count", [5, 4096, 700_001])
def test_in_the_arena_and_in_place(group, rank, size, dtype, count):
    """Where peers may read x, and write over it. On every second rank x lies outside in every second call."""
    name = group.unique_name
    for call in range(6):
        xs = inputs(size, [count], dtype, seed=call)
        x = torch.ops.sglang_symm.empty([count], name, dtype=dtype, device=group.device).copy_(xs[rank])
        if call % 2 == 1 and rank % 2 == 1:
            x = x.clone()
        assert group.contains(x) == (call % 2 == 0 or rank % 2 == 0)
        out = group.all_reduce(x)
        group.all_reduce_(x)
        assert same_bits(out.cpu(), ordered_sum(xs))
        assert same_bits(x.cpu(), ordered_sum(xs))


@pytest.mark.parametrize("count", [8, 1000, 70_000])
def test_calls_in_a_row_are_each_their_own(group, rank, size, count):
    """No host looks in between, so a rank may be a call ahead of another; no two calls in a row have the same data."""
    xs = [inputs(size, [count], torch.bfloat16, seed=seed) for seed in range(5)]
    mine, expected = [x[rank].cuda() for x in xs], [ordered_sum(x) for x in xs]
    for _ in range(4):
        torch.cuda.synchronize()
        outs = [group.all_reduce(mine[i % 5]) for i in range(40)]
        assert all(same_bits(out.cpu(), expected[i % 5]) for i, out in enumerate(outs))
    gathered = [group.all_gather(mine[i % 5]) for i in range(40)]
    assert all(same_bits(out.cpu(), torch.cat(xs[i % 5])) for i, out in enumerate(gathered))


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_any_alignment_and_strides(group, rank, size, dtype):
    for start in (1, 2, 3, 5):
        xs = inputs(size, [5000], dtype, seed=start)
        x = xs[rank].cuda()[start + rank % 2 :][:4000]
        expected = ordered_sum([t[start + r % 2 :][:4000] for r, t in enumerate(xs)])
        assert same_bits(group.all_reduce(x).cpu(), expected)
        group.all_reduce_(x)
        assert same_bits(x.cpu(), expected)
    xs = inputs(size, [40, 60], dtype)
    assert same_bits(group.all_reduce(xs[rank].cuda().t()).cpu(), ordered_sum([t.t() for t in xs]))


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_not_a_number_and_infinity_are_sums_like_others(group, rank, size, dtype):
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    x = torch.full((1000,), -1, dtype=bits).view(dtype) if rank == 0 else torch.ones(1000, dtype=dtype)
    x[500:] = float("inf") if rank == 0 else 1.0
    y = group.all_reduce(x.cuda()).cpu()
    assert y[:500].isnan().all()
    assert (y[500:] == float("inf")).all()


def test_calls_larger_than_the_slots_go_in_rounds(make, rank, size):
    for algo in ALGORITHMS:
        group = make(arena_bytes=8 << 20, algo=algo)
        xs = inputs(size, [3_000_003], torch.bfloat16)
        x = xs[rank].cuda()
        assert same_bits(group.all_reduce(x).cpu(), ordered_sum(xs))
        assert same_bits(group.all_reduce(x).cpu(), ordered_sum(xs))


def test_the_same_bits_whatever_the_grid(group, rank, size):
    xs = inputs(size, [1 << 20], torch.bfloat16)
    x = xs[rank].cuda()
    whole = group.all_reduce(x)
    for step in (1 << 10, 1 << 14, 1 << 18):
        parts = torch.cat([group.all_reduce(x[i : i + step]) for i in range(0, 1 << 18, step)])
        assert same_bits(parts, whole[: 1 << 18])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 512, 40_000])
def test_all_gather_and_broadcast_copy_bits(group, rank, size, dtype, rows):
    xs = inputs(size, [rows, 3], dtype)
    if dtype is torch.int64:
        xs = [x.neg() for x in xs]  # all bits set among them
    assert same_bits(group.all_gather(xs[rank].cuda()).cpu(), torch.cat(xs))
    sizes = [rows + r for r in range(size)]
    ragged = inputs(size, [rows + size, 3], dtype, seed=1)
    mine = ragged[rank][: sizes[rank]].cuda()
    assert same_bits(
        group.all_gather(mine, sizes=sizes).cpu(), torch.cat([t[:n] for t, n in zip(ragged, sizes, strict=True)])
    )
    for src in range(size):
        x = xs[rank].cuda()
        group.broadcast(x, src)
        assert same_bits(x.cpu(), xs[src])


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
@pytest.mark.parametrize("rows", [1, 9, 3000])
def test_reduce_scatter_sums_in_rank_order(group, rank, size, dtype, rows):
    xs = inputs(size, [rows * size, 5], dtype)
    expected = ordered_sum(xs)[rank * rows : (rank + 1) * rows]
    assert same_bits(group.reduce_scatter(xs[rank].cuda()).cpu(), expected)
    sizes = [rows + r for r in range(size)]
    xs = inputs(size, [sum(sizes), 5], dtype, seed=1)
    begin = sum(sizes[:rank])
    expected = ordered_sum(xs)[begin : begin + sizes[rank]]
    assert same_bits(group.reduce_scatter(xs[rank].cuda(), sizes=sizes).cpu(), expected)


def test_barrier_and_rendezvous(shared_group, rank, size):
    from sglang_symm import memory

    shared_group.barrier()
    x = memory.empty(64, group=shared_group, dtype=torch.float32)
    x.fill_(rank)
    handle = shared_group.rendezvous(x)
    shared_group.barrier()
    for peer in range(size):
        assert (handle.get_buffer(peer, [64], torch.float32) == peer).all()
    shared_group.barrier()


def test_row_parallel_linear_is_its_reference(shared_group, rank, size, exact_products):
    if size == 16 and torch.cuda.device_count() < size:
        pytest.skip("cuBLAS launches clusters, which the last of 16 parts of an H200 does not hold (tools/mps_rig.py)")
    for m, (n, k) in itertools.product((1, 2, 7, 16, 33, 64, 65, 200), ((512, 256), (509, 251))):
        x, w = (integers((rows, k), torch.bfloat16, 10 * rank + rows) for rows in (m, n))
        b = integers((n,), torch.bfloat16, 9)
        ops = torch.ops.sglang_symm
        y = ops.row_parallel_linear(x, w, b, shared_group.unique_name)
        expected = ops._row_parallel_linear_reference(x, w, b, shared_group.unique_name)
        assert same_bits(y, expected), (m, n, k)


def test_other_dtypes_go_through_the_process_group(shared_group, rank, size):
    if "nccl" not in dist.get_backend_config():
        pytest.skip("ranks share a GPU")
    x = torch.full((5,), rank + 1, device="cuda", dtype=torch.int64)
    assert (shared_group.all_reduce(x) == size * (size + 1) // 2).all()
    assert (shared_group.all_reduce(x, "max") == size).all()
