"""CUDA graphs, streams, and memory that comes back in the order of streams."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sglang_symm import memory
from tests.distributed_cases import gather_objects, inputs, ordered_sum, same_bits

REPLAYS = int(os.environ.get("SGLANG_SYMM_TEST_REPLAYS", "10000"))


def test_replays_equal_eager_to_the_bit_with_allocations_between(shared_group, rank, size):
    group = shared_group
    counts = [8, 1000, 4096, 70_000]
    xs = [inputs(size, [n], torch.bfloat16, seed=n) for n in counts]
    static = [x[rank].cuda() for x in xs]
    expected = [ordered_sum(x).cuda() for x in xs]
    for x in static:
        group.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [group.all_reduce(x) for x in static]
        gathered = group.all_gather(static[0])
        for _ in range(3):
            outs[0] = group.all_reduce(outs[0] * (1.0 / size))
    graph.replay()
    first = outs[0].clone()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    live = []
    bits = [e.view(torch.int16) for e in expected]
    for i in range(REPLAYS):
        graph.replay()
        if i % 10 == 0:
            for out, want in zip(outs[1:], bits[1:], strict=True):
                wrong += (out.view(torch.int16) != want).sum()
            wrong += (outs[0].view(torch.int16) != first.view(torch.int16)).sum()
            # Divergent histories of allocation: ranks hold different blocks.
            live.append(memory.empty(100 * (1 + (i * 7 + rank * 3) % 50), group=group, dtype=torch.float32).fill_(-1.0))
            live = live[-(1 + (i // 10 + rank) % 5) :]
        if i % 50 == 0:
            wrong += (group.all_reduce(static[2]).view(torch.int16) != bits[2]).sum()
    assert wrong.item() == 0
    assert same_bits(gathered.cpu(), torch.cat(xs[0]))
    group.check()


def test_a_block_freed_in_a_capture_is_never_handed_to_eager_code(make):
    group = make()
    x = torch.ones(10_000, device="cuda")
    group.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    captured = set()
    with torch.cuda.graph(graph):
        for _ in range(4):
            y = group.all_reduce(x)
            captured.add(y.data_ptr())
        del y
    eager = [memory.empty(10_000, group=group, dtype=torch.float32) for _ in range(20)]
    assert not captured & {t.data_ptr() for t in eager}
    before = group.memory_stats()["allocated_bytes"]
    torch.cuda.synchronize()
    del graph
    memory.empty(1, group=group)  # what graphs kept is collected at the next allocation
    torch.cuda.synchronize()
    memory.empty(1, group=group)
    assert group.memory_stats()["allocated_bytes"] < before


def test_small_batches_in_graphs(make, rank, size):
    group = make()
    for rows in (1, 2, 3):
        xs = inputs(size, [rows, 64], torch.bfloat16, seed=rows)
        x = xs[rank].cuda()
        group.all_reduce(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = group.all_reduce(x)
        for _ in range(100):
            graph.replay()
            assert same_bits(y.cpu(), ordered_sum(xs))


def test_calls_from_other_streams_are_ordered(shared_group, rank, size):
    xs = inputs(size, [50_000], torch.bfloat16)
    x = xs[rank].cuda()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    outs = []
    for i in range(60):
        with torch.cuda.stream(streams[i % 3]):
            outs.append(shared_group.all_reduce(x))
    torch.cuda.synchronize()
    assert all(same_bits(out.cpu(), ordered_sum(xs)) for out in outs)


def test_a_captured_call_in_between_makes_nobody_forget_the_last_eager_one(shared_group, rank, size):
    """Rank 0's first stream is late: were it not waited for, rank 0 would make the last call first."""
    xs, ys = inputs(size, [5000], torch.bfloat16), inputs(size, [7000], torch.bfloat16, seed=1)
    x, y, z = xs[rank].cuda(), ys[rank].cuda(), torch.ones(100, device="cuda")
    first, captured, last = (torch.cuda.Stream() for _ in range(3))
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        if rank == 0:
            torch.cuda._sleep(100_000_000)
        shared_group.all_reduce_(x)  # in place: an output's block would make the streams wait for one another
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(captured):
        graph.capture_begin(capture_error_mode="thread_local")  # torch.cuda.graph would wait for the device
        shared_group.all_reduce_(z)
        graph.capture_end()
    with torch.cuda.stream(last):
        shared_group.all_reduce_(y)
    torch.cuda.synchronize()
    shared_group.check()
    assert same_bits(x.cpu(), ordered_sum(xs))
    assert same_bits(y.cpu(), ordered_sum(ys))


def test_an_arena_goes_with_its_group_when_its_graphs_went_before(make, rank, size):
    gather_objects(None)
    before = torch.cuda.mem_get_info()[0]
    gather_objects(None)
    group = make(arena_bytes=256 << 20)
    x = torch.ones(1000, device="cuda")
    group.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = group.all_reduce(x)
    graph.replay()
    torch.cuda.synchronize()
    del y, graph
    time.sleep(1)  # CUDA destroys what a graph holds in a thread of its own
    group.destroy()
    gather_objects(None)
    assert before - torch.cuda.mem_get_info()[0] < 128 << 20


def test_a_full_arena_gives_ordinary_memory_or_an_error(make, rank, size):
    group = make(arena_bytes=16 << 20)
    kept = memory.empty(group.memory_stats()["largest_free_bytes"] - 4096, group=group, dtype=torch.uint8)
    x = torch.ones(1 << 20, device="cuda")
    y = group.all_reduce(x)
    assert not torch.ops.sglang_symm._in_arena(y, group.unique_name)
    assert (y == size).all()
    with pytest.raises(torch.OutOfMemoryError, match="arena_bytes"):
        memory.empty(1 << 20, group=group)
    del kept
    torch.cuda.synchronize()
    assert torch.ops.sglang_symm._in_arena(group.all_reduce(x), group.unique_name)


def test_a_full_arena_in_a_capture_is_an_error_before_anything_is_sent(make, rank, size):
    """A graph's memory is its own for ever; what would be ordinary memory now would be so in each replay."""
    group = make(arena_bytes=16 << 20)
    x, y = torch.ones(1 << 20, device="cuda"), torch.ones(1000, device="cuda")
    group.all_reduce(y)
    kept = memory.empty(group.memory_stats()["largest_free_bytes"] - (64 << 10), group=group, dtype=torch.uint8)
    torch.cuda.synchronize()
    calls = group.info()["calls"]
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(torch.OutOfMemoryError, match="arena_bytes"):
        group.all_reduce(x)
    refused = pytest.raises(torch.OutOfMemoryError)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), refused, memory.use_symmetric_memory(group):
        torch.ones(5_000_000, device="cuda")
    assert group.info()["calls"] == calls
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = group.all_reduce(y)
    graph.replay()
    assert (total == size).all()
    del kept
    assert (group.all_reduce(x) == size).all()


def test_destroy_and_create_again(make, rank, size):
    for _ in range(3):
        group = make()
        x = torch.ones(5000, device="cuda")
        y = group.all_reduce(x)
        group.destroy()
        assert (y == size).all()


def test_destroy_in_a_capture_is_refused_and_the_capture_goes_on(make, size):
    group = make()
    x = torch.ones(100, device="cuda")
    group.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = group.all_reduce(x)
        with pytest.raises(RuntimeError, match="is being captured"):
            group.destroy()
    graph.replay()
    assert (y == size).all()
    group.check()


def most_of_the_arena(tensors: int) -> float:
    """What so many bytes of tensors of foreign ops may take of it."""
    return (32 << 20) + 1.3 * tensors


@pytest.mark.parametrize("threads", [1, 4])
def test_at_its_peak_the_arena_has_little_more_than_the_tensors_of_foreign_ops(make, size, threads):
    group = make(arena_bytes=512 << 20)
    # A pool a thread. Tensors from 10 MiB on: of smaller ones PyTorch takes 20 MiB at a time for each pool, so a few in
    # each of many threads waste more than this.
    count, stream, together = 3_000_000, torch.cuda.current_stream(), threading.Barrier(threads)

    def work() -> list[torch.Tensor]:
        torch.cuda.set_device(group.device)  # a new thread's is the first
        with torch.cuda.stream(stream), memory.use_symmetric_memory(group):
            small, x = torch.ones(1000, device="cuda"), torch.ones(count, device="cuda")
            for _ in range(10):
                x = x * 2.0 - 1.0  # three live at a time; without blocks that come back 21 would
            held = [small, x, x * 2.0, x * 3.0]
            together.wait(60)  # all tensors of all threads live now
        return held

    with ThreadPoolExecutor(threads) as pool:
        results = [future.result() for future in [pool.submit(work) for _ in range(threads)]]
    for held in results:
        assert all(torch.ops.sglang_symm._in_arena(t, group.unique_name) for t in held)
        assert [t.unique().tolist() for t in held] == [[1.0], [1.0], [2.0], [3.0]]
    live = sum(t.nbytes for held in results for t in held)
    assert live <= group.memory_stats()["peak_bytes"] <= most_of_the_arena(live)
    assert (group.all_reduce(results[0][1]) == size).all()


def test_foreign_ops_allocate_in_the_arena_under_the_context(make, rank, size):
    group = make(arena_bytes=128 << 20)

    def inside(x: torch.Tensor) -> bool:
        return torch.ops.sglang_symm._in_arena(x, group.unique_name)

    with memory.use_symmetric_memory(group):
        small = torch.ones(1000, device="cuda")
        with memory.use_symmetric_memory(group):
            large = torch.ones(5_000_000, device="cuda")
    outside = torch.ones(1000, device="cuda")
    assert inside(small)
    assert inside(large)
    assert not inside(outside)
    assert group.memory_stats()["peak_bytes"] <= most_of_the_arena(4 * 5_001_000)
    assert (group.all_reduce(large) == size).all()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        with memory.use_symmetric_memory(group):
            captured = torch.ones(3000, device="cuda")
        total = group.all_reduce(captured)
    assert inside(captured)
    with memory.use_symmetric_memory(group):
        eager = [torch.full((3000,), -1.0, device="cuda") for _ in range(50)]
    assert all(map(inside, eager))
    graph.replay()
    assert (total == size).all()
    assert all((x == -1).all() for x in eager)
