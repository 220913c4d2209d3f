"""The groups of a process, and the behaviours of symmetric memory with data-parallel attention that rest on them."""

import time

import pytest
import torch
import torch.distributed as dist
from distributed_cases import DEVICE, gather_objects, inputs, raised, same_bits

import sglang_symm.distributed as sd
import sglang_symm.memory as memory
from sglang_symm.distributed import DpPaddingMode, ForwardBatch, ParallelState

SMALL = {"device": DEVICE, "arena_bytes": 8 << 20, "timeout": 20.0, "first_timeout": 40.0}
MAX_LEN, SUM_LEN = DpPaddingMode.MAX_LEN, DpPaddingMode.SUM_LEN

two_by_two = pytest.mark.world_size(4)
two_by_three = pytest.mark.world_size(6)
several_ranks = pytest.mark.skipif("int(__import__('os').environ.get('WORLD_SIZE', '1')) == 1", reason="one rank")


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    monkeypatch.delenv("SYNC_TOKEN_IDS_ACROSS_TP", raising=False)


def initialize(**kwargs):
    return sd.initialize_model_parallel(**(SMALL | kwargs))


def in_arena(group, context):
    with context:
        return group.contains(torch.empty(1000))


def test_tensor_parallel_only_makes_one_group_of_all_ranks(size, rank):
    state = initialize(tensor_model_parallel_size=size)
    assert state.tp is state.attn_tp is state.world
    assert (state.tp_size, state.tp_rank, state.attn_tp_size, state.attn_dp_size) == (size, rank, size, 1)
    assert state.attn_dp.ranks == [rank]
    assert not state.enable_dp_attention
    assert state.tp.communicator == "symm"
    assert state.tp.all_reduce(torch.ones(3)).tolist() == [float(size)] * 3
    assert sd.get_parallel_state() is state
    assert sd.get_tp_group() is state.tp
    assert sd.get_attention_tp_group() is state.attn_tp


@two_by_two
def test_two_times_two(rank):
    state = initialize(tensor_model_parallel_size=4, attention_data_parallel_size=2)
    assert state.tp.ranks == [0, 1, 2, 3]
    assert state.attn_tp.ranks == [[0, 1], [0, 1], [2, 3], [2, 3]][rank]
    assert state.attn_dp.ranks == [[0, 2], [1, 3], [0, 2], [1, 3]][rank]
    assert state.tp_rank == state.attn_dp_rank * 2 + state.attn_tp_rank == rank
    for group in state.groups:
        y = group.all_reduce(torch.full((5,), float(rank)))
        assert y.tolist() == [float(sum(group.ranks))] * 5


@two_by_three
def test_two_times_three(rank):
    state = initialize(tensor_model_parallel_size=6, attention_data_parallel_size=2, enable_symm_mem=True)
    assert state.attn_tp.ranks == ([0, 1, 2] if rank < 3 else [3, 4, 5])
    assert state.attn_dp.ranks == [rank % 3, rank % 3 + 3]
    assert state.attn_tp.communicator == "symm"
    for group in state.groups:
        assert group.all_reduce(torch.full((5,), float(rank)))[0].item() == sum(group.ranks)


@two_by_two
def test_several_tensor_parallel_groups_in_one_world(rank):
    state = initialize(tensor_model_parallel_size=2, enable_symm_mem=True)
    first = rank // 2 * 2
    assert state.world.ranks == [0, 1, 2, 3]
    assert state.tp.ranks == [first, first + 1]
    assert state.attn_tp is state.tp
    assert state.world.communicator == "process_group"
    assert state.tp.all_reduce(torch.full((1,), float(rank))).item() == 2 * first + 1
    assert state.world.all_reduce(torch.full((1,), float(rank))).item() == 6


@pytest.mark.world_size(4, 8)
def test_several_tensor_parallel_groups_with_data_parallel_attention(rank, size):
    tp = size // 2
    state = initialize(tensor_model_parallel_size=tp, attention_data_parallel_size=2)
    first = rank // tp * tp
    assert state.tp.ranks == list(range(first, first + tp))
    assert state.tp_rank == state.attn_dp_rank * state.attn_tp_size + state.attn_tp_rank
    assert state.exchange_token_counts(10 * state.attn_dp_rank + first) == [first, 10 + first]


# Behaviour 1: the attention-TP group is symmetric when token ids are synchronised over it or symmetric memory is on.


@two_by_two
@pytest.mark.parametrize(
    ("sync", "enable", "communicator"),
    [(None, False, "process_group"), (None, True, "symm"), ("1", False, "symm"), ("1", True, "symm")],
)
def test_the_attention_tp_group_is_symmetric_iff_token_ids_are_synchronised_or_symmetric_memory_is_on(
    monkeypatch, sync, enable, communicator
):
    if sync is not None:
        monkeypatch.setenv("SYNC_TOKEN_IDS_ACROSS_TP", sync)
    state = initialize(tensor_model_parallel_size=4, attention_data_parallel_size=2, enable_symm_mem=enable)
    assert state.attn_tp is not state.tp
    assert state.attn_tp.communicator == communicator
    assert state.attn_tp.info()["communicator"] == communicator
    assert state.tp.communicator == "symm"
    assert state.attn_dp.communicator == "process_group"
    assert (state.attn_tp.memory_stats().get("heap_bytes", 0) > 0) == (communicator == "symm")


# Behaviours 2 and 3, as far as groups go: over attention-TP memory is symmetric without a gate, over TP only when it
# is allocated alike.


@two_by_two
@pytest.mark.parametrize(("mode", "symmetric"), [(None, False), (MAX_LEN, True), (SUM_LEN, False)])
def test_memory_of_the_tp_group_is_gated_by_symmetric_allocation_and_that_of_attention_tp_is_not(mode, symmetric):
    state = initialize(tensor_model_parallel_size=4, attention_data_parallel_size=2, enable_symm_mem=True)

    def check():
        assert sd.is_allocation_symmetric() is memory.is_allocation_symmetric() is symmetric
        gate = not state.is_allocation_symmetric()
        assert in_arena(state.tp, state.use_symmetric_memory(state.tp, disabled=gate)) is symmetric
        assert in_arena(state.attn_tp, state.use_symmetric_memory(state.attn_tp))
        assert in_arena(state.attn_tp, sd.use_symmetric_memory(sd.get_attention_tp_group()))

    if mode is None:
        check()
    else:
        with state.forward(ForwardBatch([5, 3], False, mode)):
            check()
    assert not state.is_allocation_symmetric()


@several_ranks
def test_without_data_parallel_attention_allocation_is_symmetric_in_and_out_of_a_forward(size):
    state = initialize(tensor_model_parallel_size=size, enable_symm_mem=True)
    assert state.is_allocation_symmetric()
    assert in_arena(state.tp, state.use_symmetric_memory(state.tp, disabled=not state.is_allocation_symmetric()))
    with state.forward(ForwardBatch([5], True)):
        assert state.is_allocation_symmetric()


@several_ranks
def test_symmetric_memory_that_is_off_is_a_null_context_for_every_group(size):
    state = initialize(tensor_model_parallel_size=size, enable_symm_mem=False)
    assert not in_arena(state.tp, state.use_symmetric_memory(state.tp))
    assert not in_arena(state.tp, sd.use_symmetric_memory(state.tp))
    assert not in_arena(state.tp, memory.use_symmetric_memory(state.tp))


@two_by_two
def test_a_group_without_arena_refuses_symmetric_memory_only_when_it_is_on(monkeypatch):
    state = initialize(tensor_model_parallel_size=4, attention_data_parallel_size=2, enable_symm_mem=True)
    with pytest.raises(ValueError, match="process_group"):
        state.use_symmetric_memory(state.attn_dp)
    sd.destroy_model_parallel()
    state = initialize(tensor_model_parallel_size=4, attention_data_parallel_size=2, enable_symm_mem=False)
    with state.use_symmetric_memory(state.attn_tp):
        pass


@pytest.mark.world_size(4, 6)
@pytest.mark.parametrize("counts", [[5, 3], [0, 4], [7, 0], [0, 0], [1, 9]])
@pytest.mark.parametrize("mode", [MAX_LEN, SUM_LEN])
@pytest.mark.parametrize("enable", [True, False])
def test_gathered_tokens_are_the_same_on_all_ranks_and_scatter_gives_them_back(size, counts, mode, enable):
    state = initialize(tensor_model_parallel_size=size, attention_data_parallel_size=2, enable_symm_mem=enable)
    rows = [inputs(1, [count, 16], torch.bfloat16, seed=dp)[0] for dp, count in enumerate(counts)]
    mine = rows[state.attn_dp_rank]
    assert state.exchange_token_counts(len(mine)) == counts
    batch = ForwardBatch(state.exchange_token_counts(len(mine)), False, mode)
    with state.forward(batch):
        y = sd.dp_gather(mine, state)
        assert len(y) == batch.global_len(state.attn_tp_size)
        for dp, expected in enumerate(rows):
            first = batch.offset(dp, state.attn_tp_size)
            assert same_bits(y[first : first + len(expected)], expected)
        assert same_bits(sd.dp_scatter(y, state), mine)
    assert all(same_bits(y, other) for other in gather_objects(y))


@two_by_two
def test_token_counts_that_differ_inside_a_dp_rank_raise_alike_on_all_ranks(rank):
    state = initialize(tensor_model_parallel_size=4, attention_data_parallel_size=2)
    with pytest.raises(ValueError, match=r"DP rank 1 .*\[2, 3\]"):
        state.exchange_token_counts(rank if rank >= 2 else 0)
    assert state.exchange_token_counts(rank // 2) == [0, 1]


@several_ranks
def test_a_parallel_state_can_be_made_and_passed_explicitly(make, rank, size):
    world = make()
    alone = make(ranks=[rank])
    state = ParallelState(world, world, world, alone, enable_symm_mem=True)
    assert not sd.model_parallel_is_initialized()
    assert state.groups == [world, alone]
    with pytest.raises(RuntimeError, match="initialize_model_parallel"):
        sd.get_parallel_state()
    with pytest.raises(RuntimeError, match="initialize_model_parallel"):
        sd.is_allocation_symmetric()
    x = torch.ones(3)
    assert sd.dp_gather(x, state) is x
    with sd.graph_capture(state) as stream:
        assert (stream is None) == (DEVICE == "cpu")


def test_a_second_default_is_refused_and_a_destroyed_one_can_be_made_again(size):
    for _ in range(3):
        state = initialize(tensor_model_parallel_size=size)
        with pytest.raises(RuntimeError, match="destroy_model_parallel"):
            initialize(tensor_model_parallel_size=size)
        assert sd.get_tp_group().all_reduce(torch.ones(1)).item() == size
        sd.destroy_model_parallel()
        sd.destroy_model_parallel()
        assert all(group.destroyed for group in state.groups)
        assert not sd.model_parallel_is_initialized()
    assert dist.is_initialized()


@pytest.mark.world_size(4, 6)
def test_another_layout_can_follow(size):
    for attn_dp in (1, 2, size, 2):
        state = initialize(tensor_model_parallel_size=size, attention_data_parallel_size=attn_dp)
        for group in state.groups:
            assert group.all_reduce(torch.ones(1)).item() == group.world_size
        sd.destroy_model_parallel()


def test_sizes_that_do_not_divide_are_named_and_nothing_is_made(size):
    with pytest.raises(ValueError, match=f"{size + 1} does not divide the world size {size}"):
        initialize(tensor_model_parallel_size=size + 1)
    with pytest.raises(ValueError, match=f"{size + 1} does not divide tensor_model_parallel_size {size}"):
        initialize(tensor_model_parallel_size=size, attention_data_parallel_size=size + 1)
    assert not sd.model_parallel_is_initialized()


WRONG = [
    ({"device": "foo"}, "expected device to be cpu, cuda or cuda:N, got 'foo'"),
    ({"device": "cuda:77"}, "device cuda:77: torch sees"),
    ({"tensor_model_parallel_size": "2"}, "expected tensor_model_parallel_size to be a whole number, got '2'"),
    ({"attention_data_parallel_size": 1.0}, "expected attention_data_parallel_size to be a whole number, got 1.0"),
    ({"backend": "goo"}, "expected backend to be among"),
    ({"timeout": "60"}, "expected timeout to be seconds"),
    ({"SYNC_TOKEN_IDS_ACROSS_TP": "maybe"}, "expected SYNC_TOKEN_IDS_ACROSS_TP to be 0 or 1, got 'maybe'"),
    (
        {"enable_symm_mem": True},
        "the ranks of initialize_model_parallel disagree about enable_symm_mem: rank 0 has enable_symm_mem=False, "
        "rank 1 has enable_symm_mem=True",
    ),
    ({"tensor_model_parallel_size": 1}, "the ranks of initialize_model_parallel disagree about tensor_model_"),
]


@several_ranks
@pytest.mark.parametrize(("wrong", "sentence"), WRONG, ids=str)
def test_a_wrong_argument_of_one_rank_is_told_to_all_at_once(size, rank, wrong, sentence, monkeypatch):
    arguments = {"tensor_model_parallel_size": size}
    if rank == 1:
        for name, value in wrong.items():
            if name.isupper():
                monkeypatch.setenv(name, value)
            else:
                arguments[name] = value
    begin = time.monotonic()
    error = raised(initialize, **arguments)
    assert isinstance(error, ValueError), error
    assert time.monotonic() - begin < 20
    assert str(error).startswith(f"sglang_symm: {sentence}")
    assert len(set(gather_objects(str(error)))) == 1
    monkeypatch.undo()
    assert initialize(tensor_model_parallel_size=size).tp.all_reduce(torch.ones(1)).item() == size


@two_by_two
def test_the_deadline_of_fallbacks_is_the_group_s():
    from sglang_symm.distributed.rendezvous import process_group_timeout

    state = initialize(tensor_model_parallel_size=4, attention_data_parallel_size=2, timeout=7.0)
    for group in state.groups:
        assert process_group_timeout(group.cpu_group, torch.device("cpu")) == 7.0


def test_graph_capture_gives_a_side_stream_and_on_cpu_nothing(size):
    initialize(tensor_model_parallel_size=size)
    with sd.graph_capture() as stream:
        assert (stream is None) == (DEVICE == "cpu")
