"""Making and ending groups: members only, several at once, in any order, again after an error."""

import itertools
import os
import time

import pytest
import torch
import torch.distributed as dist
from distributed_cases import DEVICE, gather_objects, raised, seeded

import sglang_symm.memory as memory
from sglang_symm import _library
from sglang_symm.distributed import Group, new_process_group

several_ranks = pytest.mark.skipif("int(__import__('os').environ.get('WORLD_SIZE', '1')) == 1", reason="one rank")

FORKED = "CUDA itself refuses to work in a forked child"


def works(group):
    """The group sums over its members."""
    y = group.all_reduce(torch.full((100,), float(dist.get_rank())))
    return torch.equal(y, torch.full((100,), float(sum(group.ranks))))


def test_a_group_knows_its_members_and_has_one_name_on_all_of_them(make, rank, size):
    group = make(name="mine")
    assert (group.rank_in_group, group.world_size, group.ranks) == (rank, size, list(range(size)))
    assert (group.device, group.communicator) == (torch.get_default_device(), "symm")
    assert group.cpu_group is group.device_group is dist.group.WORLD
    assert len(set(gather_objects(group.unique_name))) == 1
    assert "mine" in group.unique_name
    info = group.info()
    assert (info["name"], info["rank"], info["world_size"], info["broken"]) == (group.unique_name, rank, size, None)
    group.check()


def test_two_groups_of_equal_name_and_members_have_different_names(make):
    first, second = make(name="twin"), make(name="twin")
    assert first.unique_name != second.unique_name
    assert works(first)
    assert works(second)


def test_overlapping_groups_made_by_their_members_only(make, rank, size):
    """Ranks belong to different numbers of groups, so nothing that counts groups in a process may decide."""
    groups = []
    for length in (1, 2, 3):
        for ranks in itertools.combinations(range(size), length):
            if rank in ranks:
                groups.append(make(ranks=list(ranks), arena_bytes=8 << 20))
    for _ in range(3):
        assert all(works(group) for group in groups)
    # Each rank destroys in an order of its own, with live tensors; nobody waits for anybody.
    outputs = [group.all_reduce(torch.ones(10)) for group in groups]
    gather_objects(None)
    generator = seeded(rank)
    for index in torch.randperm(len(groups), generator=generator).tolist():
        groups[index].destroy()
    assert [y[0].item() for y in outputs] == [float(group.world_size) for group in groups]


@several_ranks
def test_a_rank_that_is_no_member_takes_no_part(make, rank, size):
    if rank < size - 1:
        group = make(ranks=list(range(size - 1)))
        assert group.ranks == list(range(size - 1))
        assert works(group)
    else:
        with pytest.raises(ValueError, match=f"rank {rank} is not a member"):
            Group.of_ranks(list(range(size - 1)))


@pytest.mark.parametrize("ranks", [[], [1, 0], [0, 0], [0, 99]])
def test_impossible_members_are_refused(ranks):
    with pytest.raises(ValueError, match="ascending ranks"):
        new_process_group(ranks)


def test_a_group_of_a_device_mesh(make, size):
    if size % 2:
        mesh = dist.init_device_mesh(DEVICE, (1, size), mesh_dim_names=("dp", "tp"))
    else:
        mesh = dist.init_device_mesh(DEVICE, (2, size // 2), mesh_dim_names=("dp", "tp"))
    for sub in (mesh["tp"], mesh["dp"]):
        group = make(process_group=sub)
        assert group.ranks == sub.mesh.tolist()
        assert works(group)


def test_a_thing_that_is_no_process_group_is_refused():
    with pytest.raises(ValueError, match="ProcessGroup"):
        Group("world")


def test_a_group_can_be_made_again_and_again(make):
    names = set()
    for _ in range(10):
        group = make(name="again", arena_bytes=8 << 20)
        names.add(group.unique_name)
        assert works(group)
        group.destroy()
    assert len(names) == 10


@several_ranks
def test_process_groups_of_its_own_can_be_made_again_and_again(make, size):
    for _ in range(5):
        group = make(ranks=list(range(size)), communicator="process_group")
        assert works(group)
        group.destroy()


def test_destroy_is_idempotent_and_ends_every_method_with_the_group_s_name(make):
    group = make(name="gone")
    x = torch.ones(4)
    group.destroy()
    group.destroy()
    assert group.destroyed
    calls = {
        "all_reduce": lambda: group.all_reduce(x),
        "all_reduce_": lambda: group.all_reduce_(x),
        "all_gather": lambda: group.all_gather(x),
        "all_gather_into_tensor": lambda: group.all_gather_into_tensor(x, x),
        "reduce_scatter": lambda: group.reduce_scatter(x),
        "reduce_scatter_tensor": lambda: group.reduce_scatter_tensor(x, x),
        "broadcast": lambda: group.broadcast(x),
        "broadcast_object": lambda: group.broadcast_object(x),
        "barrier": group.barrier,
        "rendezvous": lambda: group.rendezvous(x),
        "contains": lambda: group.contains(x),
        "check": group.check,
        "info": group.info,
        "memory_stats": group.memory_stats,
        "empty": lambda: memory.empty(4, group=group),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError) as caught:
            call()
        assert group.unique_name in str(caught.value), name
        assert "destroyed" in str(caught.value), name
    if group.world_size > 1:
        with pytest.raises(RuntimeError, match="destroyed"):
            memory.use_symmetric_memory(group)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        torch.ops.sglang_symm.all_reduce(x, group.unique_name)
    assert group.unique_name in str(caught.value)
    assert torch.equal(x, torch.ones(4))


def test_an_op_on_an_unknown_group_names_it():
    with pytest.raises((RuntimeError, ValueError), match="no such group anywhere"):
        torch.ops.sglang_symm.all_reduce(torch.ones(1), "no such group anywhere")


@several_ranks
def test_a_missing_member_is_named_within_first_timeout_and_the_next_attempt_works(make, rank):
    sentence = "none"
    gather_objects(None)  # it is short: who came late from the test before would be missed too
    if rank != 1:
        begin = time.monotonic()
        with pytest.raises(dist.DistBackendError, match=r"rank\(s\) 1 .*did not arrive within 3 s") as caught:
            Group(name="partial", first_timeout=3)
        sentence = str(caught.value)
        assert time.monotonic() - begin < 10
    assert len(set(gather_objects(sentence)) - {"none"}) == 1
    assert works(make(name="partial"))


@several_ranks
def test_a_missing_member_0_is_named_too(make, rank):
    if rank != 0:
        with pytest.raises(dist.DistBackendError, match=r"rank\(s\) 0.* did not arrive within 1 s"):
            Group(name="headless", first_timeout=1)
    gather_objects(None)
    assert works(make(name="headless"))


@several_ranks
def test_a_late_member_is_waited_for(make, rank, size):
    if rank == size - 1:
        time.sleep(1)
    assert works(make(name="late"))


@several_ranks
def test_members_that_disagree_about_settings_all_raise_the_same_sentence(make, rank, size):
    error = raised(make, name="odd", algo="two_shot" if rank == size - 1 else "auto")
    assert isinstance(error, ValueError)
    assert str(error).endswith(
        f"the members of a group disagree about algo: rank 0 has algo='auto', rank {size - 1} has algo='two_shot'"
    )
    assert len(set(gather_objects(str(error)))) == 1
    error = raised(make, name="odd", communicator="symm" if rank else "process_group")
    assert isinstance(error, ValueError)
    assert len(set(gather_objects(str(error)))) == 1
    assert works(make(name="odd"))


@several_ranks
def test_a_wrong_setting_on_one_rank_is_raised_on_all(make, rank):
    error = raised(make, algo="fastest" if rank == 1 else "auto")
    assert isinstance(error, ValueError)
    assert "'fastest'" in str(error)
    assert "rank 1" in str(error)
    assert len(set(gather_objects(str(error)))) == 1


WRONG = [
    ({"device": "meta"}, "expected device to be cpu, cuda or cuda:N, got 'meta'"),
    ({"device": "foo"}, "expected device to be cpu, cuda or cuda:N, got 'foo'"),
    ({"device": "cuda:77"}, "device cuda:77: torch sees"),
    ({"process_group": "x"}, "expected a ProcessGroup that this process belongs to, got 'x'"),
    ({"timeout": "60"}, "expected timeout to be seconds, more than 0 and at most 1e9, got '60'"),
    ({"first_timeout": float("nan")}, "expected first_timeout to be seconds, more than 0 and at most 1e9, got nan"),
    ({"arena_bytes": "64M"}, "expected arena_bytes to be a whole number of bytes below 2**63, got '64M'"),
    ({"arena_bytes": 1 << 70}, "expected arena_bytes to be a whole number of bytes below 2**63, got"),
    ({"communicator": "x"}, "expected communicator 'symm' or 'process_group', got 'x'"),
    ({"name": 3}, "expected name to be a str, got 3"),
    ({"pinned": "no"}, "expected pinned to be 0 or 1, got 'no'"),
    ({"arena_size": 1}, "expected settings among arena_bytes, "),
    ({"SGLANG_SYMM_ARENA_BYTES": "inf"}, "expected SGLANG_SYMM_ARENA_BYTES to be a whole number of bytes below"),
    ({"SGLANG_SYMM_STRICT": "maybe"}, "expected SGLANG_SYMM_STRICT to be 0 or 1, got 'maybe'"),
]


@several_ranks
@pytest.mark.parametrize("wrong_rank", [0, 1])
@pytest.mark.parametrize(("wrong", "sentence"), WRONG, ids=str)
def test_any_wrong_argument_of_one_rank_is_told_to_all_at_once(rank, wrong_rank, wrong, sentence, monkeypatch):
    arguments = {"arena_bytes": 8 << 20, "timeout": 20.0, "first_timeout": 40.0}
    if rank == wrong_rank:
        for name, value in wrong.items():
            if name.isupper():
                monkeypatch.setenv(name, value)
                arguments.pop(name.removeprefix("SGLANG_SYMM_").lower(), None)
            else:
                arguments[name] = value
    begin = time.monotonic()
    error = raised(Group, **arguments)
    assert isinstance(error, ValueError), error
    assert time.monotonic() - begin < 20
    assert str(error).startswith(f"sglang_symm: {sentence}")
    assert str(error).endswith(f"(on rank {wrong_rank} of the group)")
    assert len(set(gather_objects(str(error)))) == 1


@several_ranks
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"timeout": "60"}, "expected timeout to be seconds"), ({"backend": "goo"}, "expected backend to be among")],
    ids=str,
)
def test_a_wrong_argument_of_a_group_of_ranks_is_told_to_its_members(make, rank, size, wrong, sentence):
    error = raised(make, list(range(size)), **(wrong if rank == size - 1 else {}))
    assert isinstance(error, ValueError), error
    assert sentence in str(error)
    assert len(set(gather_objects(str(error)))) == 1
    assert works(make(list(range(size))))


@several_ranks
def test_a_wrong_process_group_of_which_nobody_can_be_told_is_raised_soon(rank):
    if rank == 0:
        begin = time.monotonic()
        with pytest.raises(ValueError, match="expected a ProcessGroup"):
            Group("tp")
        assert time.monotonic() - begin < 15
    gather_objects(None)


@several_ranks
@pytest.mark.parametrize("step", ["_group_listen", "_group_connect"])
def test_a_failure_on_one_rank_is_raised_on_all_and_leaves_nothing(make, rank, monkeypatch, step):
    descriptors = len(os.listdir("/proc/self/fd"))

    class Failing:
        def __getattr__(self, name):
            if name == step:

                def fail(*args):
                    raise RuntimeError("the segment is on fire")

                return fail
            return getattr(real, name)

    real = torch.ops.sglang_symm
    if rank == 1:
        monkeypatch.setattr(torch.ops, "sglang_symm", Failing())
    begin = time.monotonic()
    error = raised(make, name="burning", first_timeout=5)
    monkeypatch.undo()
    assert isinstance(error, dist.DistBackendError), error
    assert "rank 1: the segment is on fire" in str(error)
    assert time.monotonic() - begin < 20
    gather_objects(None)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert works(make(name="burning"))


@several_ranks
def test_a_library_that_cannot_be_loaded_on_one_rank_is_raised_on_all(make, rank, monkeypatch):
    if rank == 0:

        def fail():
            raise ImportError("built for torch 1.0")

        monkeypatch.setattr(_library, "load", fail)
    error = raised(make)
    assert isinstance(error, dist.DistBackendError)
    assert "rank 0: built for torch 1.0" in str(error)


def test_what_fails_when_a_group_is_almost_made_leaves_no_group(make, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError("no room for a token")

    monkeypatch.setattr(torch, "zeros", fail)
    error = raised(make, name="stillborn")
    monkeypatch.undo()
    assert isinstance(error, MemoryError), error
    assert "stillborn" not in str(raised(torch.ops.sglang_symm._group_info, "which are there?"))
    assert works(make(name="stillborn"))


def test_no_key_of_a_creation_stays_in_the_store(make, rank):
    make(name="tidy")
    gather_objects(None)
    store = dist.PrefixStore("sglang_symm", dist.distributed_c10d._get_default_store())
    try:
        keys = [key for key in store.list_keys() if "tidy" in key]
    except (NotImplementedError, RuntimeError):
        pytest.skip("this store does not list its keys")
    assert [key for key in keys if not key.endswith("/generation")] == []


def test_a_group_whose_object_is_forgotten_lives_on_under_its_name(make):
    name = make(name="forgotten").unique_name
    assert torch.ops.sglang_symm.all_reduce(torch.ones(1), name).item() == dist.get_world_size()


@several_ranks
@pytest.mark.cpu_only(FORKED)
def test_a_forked_child_does_not_say_goodbye_for_its_parent(make):
    group = make()
    child = os.fork()
    if child == 0:
        group.destroy()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    time.sleep(0.2)
    assert works(group)


@several_ranks
@pytest.mark.cpu_only(FORKED)
def test_a_forked_child_cannot_use_its_parent_s_group_and_the_parent_goes_on(make):
    group = make()
    assert works(group)
    child = os.fork()
    if child == 0:
        x = torch.ones(3)
        calls = (lambda: group.all_reduce(x), lambda: group.all_reduce_(x), lambda: group.all_gather(x), group.barrier)
        refused = ["forked" in str(raised(call)) for call in calls]
        os._exit(0 if all(refused) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert works(group)


@several_ranks
def test_an_arena_that_is_too_small_is_an_error_with_numbers(make):
    error = raised(make, arena_bytes=4096)
    assert isinstance(error, ValueError), error
    assert "an arena of 4096 bytes" in str(error)
    assert "arena_bytes" in str(error)
    assert len(set(gather_objects(str(error)))) == 1
