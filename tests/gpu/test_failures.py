"""A missing or disagreeing rank: NaN, one sentence on all ranks, a context that lives, a group that can be made again.

Each failure is a test of all ranks; `dist.barrier` on Gloo keeps them together in between.
"""

from __future__ import annotations

import contextlib
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed_cases import gather_objects, raised

LIMIT = 2.0


def sentence(call) -> str:
    error = raised(call)
    assert isinstance(error, dist.DistBackendError), error
    return str(error).split("\n")[0]


def alive(x: torch.Tensor, group, size: int) -> None:
    assert (group.all_reduce(x) == size).all()
    torch.cuda.synchronize()


@pytest.mark.parametrize("count", [64, 100_000])
@pytest.mark.parametrize("algo", ["one_shot", "two_shot", "two_shot_direct"])
def test_a_missing_rank_is_named_and_nothing_else_breaks(make, shared_group, rank, size, algo, count):
    group = make(timeout=LIMIT, first_timeout=20, algo=algo, arena_bytes=32 << 20)
    x = torch.ones(count, device="cuda")
    alive(x, group, size)
    gather_objects(None)
    if rank != size - 1:
        start = time.monotonic()
        y = group.all_reduce(x)
        torch.cuda.synchronize()
        assert LIMIT - 0.5 < time.monotonic() - start < LIMIT + 2
        assert y.isnan().any()
        said = sentence(group.check)
        assert said == sentence(lambda: group.all_reduce(x))
        assert f"rank(s) {size - 1} did not arrive within {LIMIT:g} s in call" in said
    gather_objects(None)
    if rank == size - 1:  # it is late: the others have given up
        y = group.all_reduce(x) if count == 0 else raised(lambda: group.all_reduce(x))
        said = str(y).split("\n")[0]
    assert len(set(gather_objects(said))) == 1
    alive(x, shared_group, size)
    group.destroy()
    again = make(timeout=LIMIT, algo=algo, arena_bytes=32 << 20)
    alive(x, again, size)


def test_ranks_that_call_different_ops_disagree(make, shared_group, rank, size):
    group = make(timeout=LIMIT, first_timeout=20)
    x = torch.ones(1000, device="cuda")
    alive(x, group, size)
    gather_objects(None)
    start = time.monotonic()
    if rank == 0:
        group.all_reduce(x)
    else:
        group.all_gather(x)
    torch.cuda.synchronize()
    assert time.monotonic() - start < LIMIT
    gather_objects(None)
    said = sentence(group.check)
    assert "ranks disagree in call 2: rank 0 called all_reduce(float32, 1000 elements, sum), rank 1 called" in said
    assert len(set(gather_objects(said))) == 1
    alive(x, shared_group, size)


def test_a_missing_rank_in_a_replay_and_a_replay_after_destroy(make, shared_group, rank, size):
    group = make(timeout=LIMIT, first_timeout=20)
    x = torch.ones(1000, device="cuda")
    alive(x, group, size)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = group.all_reduce(x)
    graph.replay()
    torch.cuda.synchronize()
    assert (y == size).all()
    gather_objects(None)
    if rank == 0:
        graph.replay()
        torch.cuda.synchronize()
        assert y.isnan().all()
        assert "did not arrive" in sentence(group.check)
    gather_objects(None)
    group.destroy()
    y.zero_()
    start = time.monotonic()
    graph.replay()
    torch.cuda.synchronize()
    assert y.isnan().all()
    assert time.monotonic() - start < 1
    alive(x, shared_group, size)


def test_leaving_while_the_last_call_is_pending_disturbs_nobody(make, shared_group, rank, size):
    """`destroy` comes long before the kernel that peers wait for has begun."""
    group = make(timeout=20.0)
    x = torch.ones(1000, device="cuda")
    alive(x, group, size)
    gather_objects(None)
    if rank == size - 1:
        torch.cuda._sleep(400_000_000)
    y = group.all_reduce(x)
    if rank == size - 1:
        group.destroy()
    torch.cuda.synchronize()
    assert (y == size).all()
    if rank != size - 1:
        group.check()
    gather_objects(None)
    alive(x, shared_group, size)


def test_a_rank_that_left_is_named_at_once(make, shared_group, rank, size):
    group = make(timeout=20.0)
    x = torch.ones(1000, device="cuda")
    alive(x, group, size)
    gather_objects(None)
    if rank == size - 1:
        group.destroy()
    else:
        start = time.monotonic()
        with contextlib.suppress(torch.distributed.DistBackendError):  # another survivor may have told already
            group.all_reduce(x)
        torch.cuda.synchronize()
        assert time.monotonic() - start < 10, "the deadline is 20 s"
        assert "left: destroyed the group" in sentence(group.check)
    gather_objects(None)
    alive(x, shared_group, size)
