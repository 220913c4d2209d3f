"""A group's own NCCL communicator: other dtypes and reductions, graphs, failures that are named and never hang.

Skipped where NCCL cannot be had (ranks that share a GPU); tests/unit/test_nccl.py has what is said then.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sglang_symm.distributed.group import Group
from tests.distributed_cases import gather_objects, inputs, raised, same_bits

LIMIT = 2.0
SCRIPT = Path(__file__).with_name("kill_a_peer_nccl.py")
OTHER = [torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool]
OPS = {
    "sum": lambda a, b: a | b if a.dtype == torch.bool else a + b,
    "product": lambda a, b: a & b if a.dtype == torch.bool else a * b,
    "min": torch.minimum,
    "max": torch.maximum,
}


@pytest.fixture(scope="module", autouse=True)
def own_gpus(world):
    if dist.get_world_size() == 1 or "nccl" not in dist.get_backend_config():
        pytest.skip("NCCL needs two ranks, each on a GPU of its own")


@pytest.fixture(scope="module")
def group(own_gpus):
    group = Group(device="cuda", timeout=20.0, arena_bytes=64 << 20, nccl="1")
    yield group
    torch.cuda.synchronize()
    group.destroy()


def calls(group):
    return group.info()["calls_by_algorithm"]["nccl"]


def close(a, b):
    return torch.allclose(a.double(), b.double(), rtol=2 * torch.finfo(b.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", OTHER, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_other_dtypes_and_reductions(group, rank, size, dtype, op):
    before = calls(group)
    for count in (1, 1000, 70_001):
        xs = inputs(size, [count], dtype, seed=count)
        want = functools.reduce(OPS[op], xs)
        got = group.all_reduce(xs[rank].cuda(), op).cpu()
        assert got.dtype == dtype
        assert close(got, want) if dtype.is_floating_point else torch.equal(got, want)
    assert calls(group) == before + 3


def test_reductions_of_native_dtypes_and_means(group, rank, size):
    before = calls(group)
    xs = inputs(size, [999], torch.bfloat16)
    assert same_bits(group.all_reduce(xs[rank].cuda(), "max").cpu(), functools.reduce(torch.maximum, xs))
    assert calls(group) == before + 1
    xs = inputs(size, [999], torch.float64)
    assert close(group.all_reduce(xs[rank].cuda(), "avg").cpu(), sum(xs) / size)
    xs = [torch.complex(x.float(), -x.float()) for x in xs]
    assert torch.allclose(group.all_reduce(xs[rank].cuda()).cpu(), sum(xs), rtol=1e-5, atol=1e-5)
    assert calls(group) == before + 3
    x = torch.full((5,), rank, dtype=torch.int16, device="cuda")
    assert same_bits(group.all_reduce(torch.ones(8, device="cuda")).cpu(), torch.full((8,), float(size)))
    assert calls(group) == before + 3  # sums of fp32 stay ours
    assert "avg" in str(raised(lambda: group.all_reduce(x, "avg")))
    group.check()


def test_reduce_scatter_of_other_dtypes(group, rank, size):
    sizes = [3 + 2 * r for r in range(size)]
    xs = inputs(size, [sum(sizes), 5], torch.int64)
    begin = sum(sizes[:rank])
    want = sum(xs)[begin : begin + sizes[rank]]
    assert torch.equal(group.reduce_scatter(xs[rank].cuda(), sizes=sizes).cpu(), want)


def test_all_collectives_by_nccl_when_it_is_forced(make, rank, size):
    group = make(nccl="1", algo="nccl")
    before = calls(group)
    xs = inputs(size, [300, 7], torch.float32)
    # NCCL adds in an order of its own, and each of size - 1 additions rounds a sum that may be larger than the last.
    error = group.all_reduce(xs[rank].cuda()).cpu().double() - sum(x.double() for x in xs)
    bound = (size - 1) * torch.finfo(torch.float32).eps / 2 * sum(x.double().abs() for x in xs)
    assert (error.abs() <= 1.01 * bound).all()
    sizes = [10 * r for r in range(size)]
    mine = xs[rank][: sizes[rank]].cuda()
    want = torch.cat([x[:n] for x, n in zip(xs, sizes, strict=True)])
    assert same_bits(group.all_gather(mine, sizes=sizes).cpu(), want)
    assert same_bits(group.all_gather(xs[rank].cuda()).cpu(), torch.cat(xs))
    for src in range(size):
        assert same_bits(group.broadcast(xs[rank].cuda(), src).cpu(), xs[src])
    assert group.all_reduce(torch.empty(0, device="cuda")).numel() == 0
    w, x, b = torch.ones(16, 8, device="cuda"), torch.ones(3, 8, device="cuda"), torch.ones(16, device="cuda")
    assert (torch.ops.sglang_symm.row_parallel_linear(x, w, b, group.unique_name) == 8 * size + 1).all()
    assert calls(group) == before + 5 + size
    group.barrier()
    group.check()


def test_replays_among_eager_and_native_calls(group, rank, size):
    counts = [10, 5000, 300_000]
    xs = [inputs(size, [n], torch.int64, seed=n) for n in counts]
    static = [x[rank].cuda() for x in xs]
    want = [sum(x).cuda() for x in xs]
    native = torch.ones(1000, device="cuda")
    for x in static:
        group.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = []
        for x in static:
            outs.append(group.all_reduce(x))
            between = group.all_reduce(native)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(200):
        graph.replay()
        for out, expected in zip(outs, want, strict=True):
            wrong += (out != expected).sum()
        wrong += (between != size).sum()
        if i % 10 == 0:
            wrong += (group.all_reduce(static[1]) != want[1]).sum()
    assert wrong.item() == 0
    group.check()


def sentence(call):
    error = raised(call)
    assert isinstance(error, dist.DistBackendError), error
    return str(error).split("\n")[0]


@pytest.mark.parametrize("replay", [False, True], ids=["eager", "replay"])
def test_a_missing_rank_is_named_and_nothing_hangs(make, group, rank, size, replay):
    failing = make(timeout=LIMIT, first_timeout=20.0, nccl="1")
    x = torch.ones(100_000, dtype=torch.float64, device="cuda")
    assert (failing.all_reduce(x) == size).all()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = failing.all_reduce(x)
    graph.replay()
    torch.cuda.synchronize()
    assert (captured == size).all()
    gather_objects(None)
    if rank != size - 1:
        start = time.monotonic()
        y = captured
        if replay:
            graph.replay()
        else:
            y = failing.all_reduce(x)
        torch.cuda.synchronize()
        assert LIMIT - 0.5 < time.monotonic() - start < LIMIT + 2
        assert y.isnan().all()
    gather_objects(None)
    said = sentence(lambda: failing.all_reduce(x))
    assert f"rank(s) {size - 1} did not arrive within {LIMIT:g} s in call" in said
    assert len(set(gather_objects(said))) == 1
    start = time.monotonic()
    failing.destroy()
    captured.zero_()
    graph.replay()  # after destroy: it leaves
    torch.cuda.synchronize()
    assert captured.isnan().all()
    assert time.monotonic() - start < 5
    del graph
    i = torch.ones(1000, dtype=torch.int64, device="cuda")
    assert (group.all_reduce(i) == size).all()
    again = make(timeout=LIMIT, nccl="1")
    assert (again.all_reduce(i) == size).all()


def test_ranks_that_disagree_are_told(make, rank, size):
    group = make(timeout=LIMIT, first_timeout=20.0, nccl="1")
    x = torch.ones(1000, dtype=torch.int64, device="cuda")
    assert (group.all_reduce(x) == size).all()
    gather_objects(None)
    start = time.monotonic()
    raised(lambda: group.all_reduce(x, "max" if rank == 0 else "min"))  # it may know already
    torch.cuda.synchronize()
    assert time.monotonic() - start < LIMIT + 1
    gather_objects(None)
    said = sentence(group.check)
    assert "ranks disagree in call" in said
    assert len(set(gather_objects(said))) == 1


def test_a_survivor_of_a_peer_killed_under_nccls_kernels_raises_within_a_second(rank):
    output = ""
    if rank == 0:
        done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=90)
        output = done.stdout + done.stderr if done.returncode else "PASS"
    assert gather_objects(output)[0] == "PASS"


def test_destroy_and_create_again(make, size):
    for _ in range(3):
        group = make(nccl="1")
        y = group.all_reduce(torch.ones(5000, dtype=torch.float64, device="cuda"))
        start = time.monotonic()
        group.destroy()
        assert time.monotonic() - start < 3
        assert (y == size).all()


def test_the_arena_as_a_window(make, rank, size):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        group = make(nccl="window", algo="nccl")
    assert group.info()["settings"]["nccl"] == "window"
    unsafe = 22809 <= sum(a * b for a, b in zip(torch.cuda.nccl.version(), (10000, 100, 1), strict=True)) <= 23006
    assert any("miss a sync" in str(w.message) for w in said) == (unsafe and rank == 0)
    x = torch.ops.sglang_symm.empty([50_000], group.unique_name, dtype=torch.bfloat16, device=group.device)
    for i in range(20):
        x.fill_(i)
        assert (group.all_reduce(x) == i * size).all()
    group.check()
