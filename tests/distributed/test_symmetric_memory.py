"""use_symmetric_memory, empty, a full arena, and what becomes of memory."""

import gc
import threading
import warnings

import pytest
import torch
from distributed_cases import gather_objects, inputs, ordered_sum, same_bits, seeded

import sglang_symm.memory as memory

MiB = 1 << 20
several_ranks = pytest.mark.skipif("int(__import__('os').environ.get('WORLD_SIZE', '1')) == 1", reason="one rank")


def inside(group):
    return group.contains(torch.empty(1000, device=group.device))  # torch's default device is its thread's own


@several_ranks
def test_allocations_inside_the_context_lie_in_the_arena_and_those_outside_do_not(group):
    before = torch.empty(1000)
    with memory.use_symmetric_memory(group):
        x = torch.randn(1000)
        y = x + 1
    assert [group.contains(t) for t in (before, x, y, torch.empty(1000))] == [False, True, True, False]
    assert torch.equal(y, x + 1)


@several_ranks
def test_contexts_nest_and_the_innermost_counts(make):
    first, second = make(name="first"), make(name="second")
    with memory.use_symmetric_memory(first):
        assert inside(first)
        with memory.use_symmetric_memory(second):
            assert inside(second)
            assert not inside(first)
            with memory.use_symmetric_memory(first):
                assert inside(first)
        assert inside(first)
    assert not inside(first)


@several_ranks
def test_one_context_object_can_be_entered_again(group):
    context = memory.use_symmetric_memory(group)
    for _ in range(2):
        with context:
            with context:
                assert inside(group)
            assert inside(group)
        assert not inside(group)


@several_ranks
def test_contexts_left_in_the_wrong_order_raise_and_leave_the_thread_outside(make):
    first, second = make(name="first"), make(name="second")
    outer, inner = memory.use_symmetric_memory(first), memory.use_symmetric_memory(second)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(ValueError, match="innermost first"):
        outer.__exit__(None, None, None)
    assert inside(second)
    inner.__exit__(None, None, None)
    assert not inside(first)
    assert not inside(second)
    with pytest.raises(ValueError, match="this thread is inside none"):
        outer.__exit__(None, None, None)
    assert not inside(first)


@several_ranks
def test_a_context_that_another_thread_leaves_raises_there_and_stays_with_its_own(group):
    context = memory.use_symmetric_memory(group)
    errors = []

    def leave():
        try:
            context.__exit__(None, None, None)
        except ValueError as error:
            errors.append(str(error))

    with context:
        thread = threading.Thread(target=leave)
        thread.start()
        thread.join()
        assert inside(group)
    assert not inside(group)
    assert len(errors) == 1
    assert "one thread" in errors[0]


@pytest.mark.parametrize("wrong", ["x", None, 3])
def test_a_thing_that_is_no_group_has_no_context(wrong):
    with pytest.raises(TypeError, match=f"use_symmetric_memory: expected a sglang_symm.Group, got {wrong!r}"):
        memory.use_symmetric_memory(wrong)


@several_ranks
def test_an_exception_leaves_the_context(group):
    with pytest.raises(ZeroDivisionError), memory.use_symmetric_memory(group):
        raise ZeroDivisionError
    assert not inside(group)


@several_ranks
def test_a_disabled_context_does_nothing(group):
    with memory.use_symmetric_memory(group, disabled=True):
        assert not inside(group)
    with memory.use_symmetric_memory(group), memory.use_symmetric_memory(group, disabled=True):
        assert inside(group), "a disabled context leaves the outer one as it is"


@several_ranks
def test_a_group_made_with_the_feature_off_has_a_null_context(make):
    group = make(symmetric_memory_enabled=False)
    with memory.use_symmetric_memory(group):
        assert not inside(group)


@several_ranks
def test_other_threads_stay_outside(group):
    results = []
    with memory.use_symmetric_memory(group):
        thread = threading.Thread(target=lambda: results.append(inside(group)))
        thread.start()
        thread.join()
        assert inside(group)
    assert results == [False]


@several_ranks
def test_two_threads_are_inside_of_two_groups(make):
    first, second = make(name="first"), make(name="second")
    seen, both = {}, threading.Barrier(2)

    def work(name, group):
        with memory.use_symmetric_memory(group):
            both.wait(10)
            seen[name] = (inside(first), inside(second))
            both.wait(10)

    threads = [threading.Thread(target=work, args=args) for args in (("first", first), ("second", second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": (True, False), "second": (False, True)}


def test_a_group_of_one_rank_has_a_null_context(make, rank):
    group = make(ranks=[rank])
    with memory.use_symmetric_memory(group):
        assert not inside(group)


@several_ranks
def test_a_group_without_arena_refuses_the_context(make):
    group = make(communicator="process_group")
    with pytest.raises(ValueError, match="process_group"):
        memory.use_symmetric_memory(group)
    with pytest.raises(ValueError, match="process_group"):
        memory.empty(4, group=group)


@several_ranks
def test_tracing_refuses_the_context_with_a_sentence(group):
    def function(x):
        with memory.use_symmetric_memory(group):
            return x + 1

    with pytest.raises(Exception, match="eager code only"):
        torch.compile(function, backend="eager", fullgraph=True)(torch.ones(3))
    from torch.fx.experimental.proxy_tensor import make_fx

    with pytest.raises(RuntimeError, match="eager code only"):
        make_fx(function)(torch.ones(3))


@several_ranks
def test_a_null_context_can_be_traced(group):
    def function(x):
        with memory.use_symmetric_memory(group, disabled=True):
            return x + 1

    traced = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(traced(torch.ones(3)), torch.full((3,), 2.0))


def test_empty_gives_memory_of_the_arena(group):
    x = memory.empty(3, 5, group=group, dtype=torch.bfloat16)
    assert (x.shape, x.dtype, x.is_contiguous()) == ((3, 5), torch.bfloat16, True)
    assert group.contains(x)
    assert memory.empty([2, 2], group=group).dtype == torch.float32
    assert memory.empty(2, group=group.unique_name).shape == (2,)
    assert memory.empty(0, 4, group=group).shape == (0, 4)


def test_empty_refuses_a_wrong_device_and_a_negative_size(group):
    with pytest.raises(ValueError, match="meta"):
        memory.empty(2, group=group, device="meta")
    with pytest.raises((ValueError, RuntimeError), match="-2"):
        memory.empty(-2, group=group)


def test_outputs_of_ops_lie_in_the_arena(group):
    x = torch.ones(group.world_size * 8)
    before = group.info()
    outputs = [group.all_reduce(x), group.all_gather(x), group.reduce_scatter(x)]
    after = group.info()
    assert all(group.contains(y) for y in outputs)
    assert after["outputs_inside"] - before["outputs_inside"] == 3
    assert after["outputs_outside"] == before["outputs_outside"]


@several_ranks
@pytest.mark.cpu_only("PyTorch's pool keeps its segments for the next tensor")
def test_memory_is_back_when_the_last_user_is_gone(make):
    group = make()
    assert group.memory_stats()["live_blocks"] == 0
    with memory.use_symmetric_memory(group):
        x = torch.randn(1000, 10)
    view, y = x[5:, 3], group.all_reduce(torch.ones(77))
    assert group.memory_stats()["live_blocks"] == 2
    assert group.memory_stats()["allocated_bytes"] >= 40000 + 308
    del x
    gc.collect()
    assert group.memory_stats()["live_blocks"] == 2, "the view still uses it"
    del view, y
    gc.collect()
    stats = group.memory_stats()
    assert (stats["live_blocks"], stats["allocated_bytes"]) == (0, 0)
    assert stats["largest_free_bytes"] == stats["free_bytes"] == stats["heap_bytes"]
    assert stats["peak_bytes"] >= 40308


@several_ranks
def test_storage_that_grows_or_is_copied_in_the_context_keeps_its_data(group):
    with memory.use_symmetric_memory(group):
        x = torch.arange(10.0)
        x.resize_(1000)
        y = x.clone()
        z = torch.cat([x, y])
    assert torch.equal(x[:10], torch.arange(10.0))
    assert torch.equal(z[1000:1010], torch.arange(10.0))
    assert group.contains(z)
    storage = torch.empty(4).untyped_storage()
    with memory.use_symmetric_memory(group):
        storage.resize_(4096)
    storage.resize_(8)


@several_ranks
def test_histories_of_allocation_may_differ_between_ranks(group):
    """Offsets differ on every rank after this; sums must not."""
    generator = seeded(group.rank_in_group)
    kept = []
    for step in range(60):
        for _ in range(int(torch.randint(0, 6, (), generator=generator))):
            kept.append(memory.empty(int(torch.randint(1, 5000, (), generator=generator)), group=group))
        while len(kept) > 20:
            kept.pop(int(torch.randint(0, len(kept), (), generator=generator)))
        count = 1 + (step * 977) % 60000
        everyone = inputs(group.world_size, [count], torch.bfloat16, seed=step)
        x = memory.empty(count, group=group, dtype=torch.bfloat16).copy_(everyone[group.rank_in_group])
        assert same_bits(group.all_reduce(x), ordered_sum(everyone))
    assert len(set(gather_objects(memory.empty(1, group=group).data_ptr()))) >= 1


@several_ranks
def test_a_full_arena_gives_ordinary_memory_with_one_warning_and_a_counter(make, capfd):
    group = make(arena_bytes=8 * MiB)
    heap = group.memory_stats()["heap_bytes"]
    everyone = inputs(group.world_size, [heap // 4 // 2], torch.float32)
    mine, expected = everyone[group.rank_in_group], ordered_sum(everyone)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = [group.all_reduce(mine) for _ in range(4)]
        with memory.use_symmetric_memory(group):
            outputs.append(torch.empty(heap))
    assert not group.contains(outputs[3])
    assert not group.contains(outputs[4])
    assert all(same_bits(y, expected) for y in outputs[:4])
    assert group.info()["outputs_outside"] >= 3
    # torch shows warnings of ops as Python warnings or on stderr, by the way the op was called.
    lines = [*map(str, (warning.message for warning in caught)), *capfd.readouterr().err.splitlines()]
    lines = [line for line in lines if group.unique_name in line]
    assert len(lines) == 1, lines
    assert str(group.memory_stats()["arena_bytes"]) in lines[0]
    assert "SGLANG_SYMM_ARENA_BYTES" in lines[0]


@several_ranks
def test_a_full_strict_arena_raises_out_of_memory_before_anything_is_sent_and_the_group_stays_usable(make):
    group = make(arena_bytes=8 * MiB, strict=True)
    heap, calls = group.memory_stats()["heap_bytes"], group.info()["calls"]
    with pytest.raises(torch.OutOfMemoryError, match=str(group.memory_stats()["arena_bytes"])):
        group.all_reduce(torch.ones(heap))
    with pytest.raises(torch.OutOfMemoryError), memory.use_symmetric_memory(group):
        torch.empty(heap)
    assert not inside(group), "the context was left"
    with pytest.raises(torch.OutOfMemoryError):
        memory.empty(heap, group=group)
    assert group.info()["calls"] == calls
    assert group.all_reduce(torch.ones(3)).tolist() == [float(group.world_size)] * 3


def test_empty_on_a_full_arena_raises_out_of_memory_and_the_group_stays_usable(make):
    group = make(arena_bytes=8 * MiB)
    heap = group.memory_stats()["heap_bytes"]
    with pytest.raises(torch.OutOfMemoryError):
        memory.empty(heap + 1, group=group, dtype=torch.uint8)
    x = memory.empty(heap - 4096, group=group, dtype=torch.uint8)
    with pytest.raises(torch.OutOfMemoryError):
        memory.empty(8192, group=group, dtype=torch.uint8)
    del x
    assert group.contains(memory.empty(8192, group=group, dtype=torch.uint8))
    assert group.all_reduce(torch.ones(1)).item() == group.world_size


@several_ranks
def test_a_rank_with_a_full_arena_and_one_with_room_sum_alike(make):
    for algo in ("one_shot", "two_shot", "two_shot_direct"):
        group = make(arena_bytes=8 * MiB, algo=algo)
        room = group.memory_stats()["free_bytes"]
        filler = memory.empty(room - 4096, group=group, dtype=torch.uint8) if group.rank_in_group == 0 else None
        everyone = inputs(group.world_size, [100000], torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = group.all_reduce(everyone[group.rank_in_group])
        assert group.contains(y) == (filler is None)
        assert same_bits(y, ordered_sum(everyone))


@several_ranks
def test_tensors_outlive_their_group(make):
    group = make()
    with memory.use_symmetric_memory(group):
        x = torch.arange(1000.0)
    y = group.all_reduce(x)
    expected = y.clone()
    group.destroy()
    assert torch.equal(x, torch.arange(1000.0))
    assert torch.equal(y, expected)
    x += y
    again = make()
    assert torch.equal(again.all_reduce(torch.ones(5)), torch.full((5,), float(again.world_size)))
    assert not again.contains(x)
    del x, y
    gc.collect()


@several_ranks
def test_a_context_left_after_its_group_was_destroyed_restores_the_thread(make):
    group = make()
    with memory.use_symmetric_memory(group):
        group.destroy()
        torch.empty(10)
    x = torch.empty(1000)
    other = make()
    assert not other.contains(x)
    assert not inside(other)


@several_ranks
def test_rendezvous_gives_views_of_every_peer_s_tensor(group):
    rank, size = group.rank_in_group, group.world_size
    # Offsets differ on purpose.
    filler = [memory.empty(64 * (rank + 1), group=group) for _ in range(rank)]
    x = memory.empty(4, 5, group=group).fill_(float(rank))
    handle = group.rendezvous(x)
    assert len(handle.offsets) == size
    handle.barrier()
    for peer in range(size):
        assert torch.equal(handle.get_buffer(peer), torch.full((4, 5), float(peer)))
    handle.barrier()
    handle.get_buffer((rank + 1) % size, [20], torch.int32)[0] = rank
    handle.barrier()
    assert x.view(-1)[:1].view(torch.int32).item() == (rank - 1) % size
    assert torch.equal(x.view(-1)[1:], torch.full((19,), float(rank)))
    handle.barrier()
    del filler


@several_ranks
def test_rendezvous_of_a_part_of_a_tensor_starts_at_the_part(group):
    rank = group.rank_in_group
    x = memory.empty(8, group=group).copy_(torch.arange(8.0) + 10 * rank)
    handle = group.rendezvous(x[3:])
    handle.barrier()
    assert handle.get_buffer(0).tolist() == [3.0, 4.0, 5.0, 6.0, 7.0]
    handle.barrier()


@several_ranks
def test_rendezvous_refuses_on_all_ranks_when_a_tensor_is_outside_on_one(group):
    x = torch.ones(4) if group.rank_in_group == 1 else memory.empty(4, group=group)
    with pytest.raises(ValueError, match=r"rank\(s\) 1 .*not in symmetric memory"):
        group.rendezvous(x)
    group.barrier()


@several_ranks
def test_views_of_peers_are_checked(group):
    handle = group.rendezvous(memory.empty(4, group=group))
    with pytest.raises(ValueError, match=str(group.world_size)):
        handle.get_buffer(group.world_size)
    with pytest.raises(ValueError, match="bytes"):
        handle.get_buffer(0, [1 << 40])
    group.barrier()


@several_ranks
def test_views_end_where_the_tensor_ends_and_not_the_arena(group):
    x = memory.empty(6, group=group)
    handle = group.rendezvous(x[1:5])
    for shape, dtype, asked in (
        ([5], None, 20),
        ([17], torch.uint8, 17),
        (None, torch.float64, 32),
        ([1 << 62], torch.float32, 1 << 64),
    ):
        with pytest.raises(ValueError, match=f"takes {asked} bytes, the tensor of rank 0 has 16"):
            handle.get_buffer(0, shape, dtype)
    for shape, dtype in (([4], None), ([2, 2], None), ([16], torch.uint8), ([0], None)):
        assert handle.get_buffer(0, shape, dtype).shape == tuple(shape)
    with pytest.raises(ValueError, match="negative"):
        handle.get_buffer(0, [-2, -2])
    group.barrier()


def test_a_process_group_group_has_no_rendezvous(make):
    group = make(communicator="process_group")
    with pytest.raises(ValueError, match="process_group"):
        group.rendezvous(torch.ones(4))
