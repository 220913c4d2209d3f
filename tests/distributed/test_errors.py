"""Wrong usage is refused before anything is sent; calls that differ raise one sentence on all ranks."""

import time

import pytest
import torch
import torch.distributed as dist
from distributed_cases import DEVICE, failure, gather_objects, raised

pytestmark = pytest.mark.skipif("int(__import__('os').environ.get('WORLD_SIZE', '1')) == 1", reason="one rank")


# What the process group does on GPUs.
NCCL_WAITS = "a call that some ranks hand to NCCL alone waits there for NCCL's own deadline, which ends the process"


def works(group):
    return group.all_reduce(torch.ones(100)).tolist() == [float(group.world_size)] * 100


WRONG = {
    "device": lambda g: g.all_reduce(torch.ones(4, device="meta")),
    "device of all_reduce_": lambda g: g.all_reduce_(torch.ones(4, device="meta")),
    "device of all_gather": lambda g: g.all_gather(torch.ones(4, device="meta")),
    "op": lambda g: g.all_reduce(torch.ones(4), op="median"),
    "src": lambda g: g.broadcast(torch.ones(4), src=g.world_size),
    "negative src": lambda g: g.broadcast(torch.ones(4), src=-1),
    "src of the op": lambda g: torch.ops.sglang_symm.broadcast_(torch.ones(4), g.world_size, g.unique_name),
    "object src": lambda g: g.broadcast_object(1, src=g.world_size),
    "dim of all_gather": lambda g: g.all_gather(torch.ones(4), dim=1),
    "dim of reduce_scatter": lambda g: g.reduce_scatter(torch.ones(4 * g.world_size), dim=-2),
    "scalar": lambda g: g.all_gather(torch.ones(())),
    "indivisible": lambda g: g.reduce_scatter(torch.ones(4 * g.world_size + 1)),
    "number of sizes": lambda g: g.all_gather(torch.ones(4), sizes=[4] * (g.world_size + 1)),
    "own size": lambda g: g.all_gather(torch.ones(4), sizes=[3] * g.world_size),
    "sum of sizes": lambda g: g.reduce_scatter(torch.ones(4), sizes=[4] * g.world_size),
    "negative size": lambda g: g.reduce_scatter(torch.ones(1), sizes=[-1, 2, *[0] * (g.world_size - 2)]),
    # From three ranks on it would wrap around to 4.
    "sizes beyond any tensor": lambda g: g.reduce_scatter(
        torch.ones(4), sizes=[6, *[2**63 - 1] * min(2, g.world_size - 1), *[0] * (g.world_size - 3)]
    ),
    "flat gather": lambda g: g.all_gather_into_tensor(torch.empty(4), torch.ones(4)),
    "flat scatter": lambda g: g.reduce_scatter_tensor(torch.empty(4), torch.ones(4)),
    "flat dtype": lambda g: g.all_gather_into_tensor(torch.empty(4 * g.world_size).half(), torch.ones(4)),
    "flat strides": lambda g: g.all_gather_into_tensor(torch.empty(4 * g.world_size, 2)[:, 0], torch.ones(4)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_usage_is_a_value_error_before_anything_is_sent(group, name):
    calls = group.info()["calls"]
    error = raised(WRONG[name], group)
    assert isinstance(error, (ValueError, NotImplementedError)), error
    assert group.info()["calls"] == calls
    assert group.info()["broken"] is None
    assert works(group)


NO_TENSOR = {
    "all_reduce": lambda g, x: g.all_reduce(x),
    "all_reduce_": lambda g, x: g.all_reduce_(x),
    "all_gather": lambda g, x: g.all_gather(x),
    "all_gather_into_tensor": lambda g, x: g.all_gather_into_tensor(x, torch.ones(2)),
    "reduce_scatter": lambda g, x: g.reduce_scatter(x),
    "reduce_scatter_tensor": lambda g, x: g.reduce_scatter_tensor(torch.ones(2), x),
    "broadcast": lambda g, x: g.broadcast(x),
    "rendezvous": lambda g, x: g.rendezvous(x),
    "contains": lambda g, x: g.contains(x),
}


@pytest.mark.parametrize("x", [None, [1.0], 3], ids=str)
@pytest.mark.parametrize("name", NO_TENSOR)
def test_what_is_no_tensor_is_a_type_error_with_a_sentence(group, name, x):
    error = raised(NO_TENSOR[name], group, x)
    assert isinstance(error, TypeError), error
    assert str(error) == f"sglang_symm: {name} on group {group.unique_name}: expected a torch.Tensor, got {x!r}"
    assert works(group)


@pytest.mark.parametrize("src", [None, 0.5, "0"], ids=str)
def test_a_source_that_is_no_rank_is_a_value_error(group, src):
    for call in (lambda: group.broadcast(torch.ones(1), src), lambda: group.broadcast_object(1, src)):
        error = raised(call)
        assert isinstance(error, ValueError), error
        assert f"expected a rank from 0 to {group.world_size - 1}, got {src!r}" in str(error)
    assert works(group)


@pytest.mark.parametrize(
    ("dtype", "op"),
    [
        (torch.int16, "sum"),
        (torch.uint16, "sum"),
        (torch.uint32, "max"),
        (torch.uint64, "sum"),
        (torch.float8_e4m3fn, "sum"),
        (torch.float8_e5m2, "max"),
        (torch.complex64, "product"),
    ],
    ids=str,
)
def test_a_reduction_that_nobody_does_is_a_value_error_on_every_rank_before_anything_is_sent(group, dtype, op):
    calls = group.info()["calls"]
    x = torch.ones(4 * group.world_size).to(dtype)
    attempts = [lambda: group.all_reduce(x, op), lambda: group.all_reduce_(x, op)]
    if op == "sum":
        attempts.append(lambda: group.reduce_scatter(x))
    for attempt in attempts:
        error = raised(attempt)
        assert isinstance(error, ValueError), error
        assert f"{op} of {str(dtype).removeprefix('torch.')}" in str(error)
        assert group.unique_name in str(error)
    assert group.info()["calls"] == calls
    assert group.info()["broken"] is None
    assert all(gather_objects(works(group)))
    # Copied they are all the same.
    y = group.broadcast(x.clone())
    assert torch.equal(y.view(torch.uint8), x.view(torch.uint8))
    assert group.all_gather(x).shape == (group.world_size * x.numel(),)


# What rank 0 calls, what the last rank calls, and a word of each that the sentence names.
DIFFERENT = {
    "dtype": (lambda g: g.all_reduce(torch.ones(8)), lambda g: g.all_reduce(torch.ones(8).bfloat16()), "f", "b"),
    "count": (lambda g: g.all_reduce(torch.ones(8)), lambda g: g.all_reduce(torch.ones(9)), "8", "9"),
    "large count": (
        lambda g: g.all_reduce(torch.ones(1 << 20)),
        lambda g: g.all_reduce(torch.ones((1 << 20) + 8)),
        "1048576",
        "1048584",
    ),
    "count of another algorithm": (
        lambda g: g.all_reduce(torch.ones(8)),
        lambda g: g.all_reduce(torch.ones(1 << 20)),
        "8",
        "1048576",
    ),
    "op": (lambda g: g.all_reduce(torch.ones(8)), lambda g: g.all_gather(torch.ones(8)), "all_reduce", "all_gather"),
    "empty": (lambda g: g.all_reduce(torch.ones(8)), lambda g: g.all_reduce(torch.ones(0)), "8", "0"),
    "barrier": (lambda g: g.all_reduce(torch.ones(8)), lambda g: g.barrier(), "all_reduce", "barrier"),
    "reduction": (
        lambda g: g.all_reduce(torch.ones(8), "max"),
        lambda g: g.all_reduce(torch.ones(8), "min"),
        "max",
        "min",
    ),
    "native and fallback": (
        lambda g: g.all_reduce(torch.ones(8)),
        lambda g: g.all_reduce(torch.ones(8, dtype=torch.int64)),
        "all_reduce",
        "int64",
    ),
    "src": (lambda g: g.broadcast(torch.ones(8), 0), lambda g: g.broadcast(torch.ones(8), 1), "broadcast", "broadcast"),
    "dim": (
        lambda g: g.all_gather(torch.ones(4, 4), 0),
        lambda g: g.all_gather(torch.ones(4, 4), 1),
        "all_gather",
        "all_gather",
    ),
    "gather length": (
        lambda g: g.all_gather(torch.ones(4)),
        lambda g: g.all_gather(torch.ones(5)),
        "all_gather",
        "all_gather",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_calls_that_differ_raise_one_sentence_that_names_both_on_all_ranks(make, name):
    if name == "native and fallback" and DEVICE != "cpu":
        pytest.skip(NCCL_WAITS)
    first, last, word_of_first, word_of_last = DIFFERENT[name]
    group = make(name="differ", timeout=10, first_timeout=10)
    assert works(group)
    begin = time.monotonic()
    error = failure(group, last if group.rank_in_group == group.world_size - 1 else first, group)
    if error is None:
        # The disagreement may come to light on this rank after its call was done: then at its next.
        error = failure(group, group.all_reduce, torch.ones(1))
    assert isinstance(error, dist.DistBackendError), error
    assert time.monotonic() - begin < 8
    sentence = str(error).splitlines()[0]
    assert "disagree" in sentence
    assert group.unique_name in sentence
    assert "rank 0" in sentence
    assert f"rank {group.world_size - 1}" in sentence
    assert word_of_first in sentence
    assert word_of_last in sentence
    sentences = gather_objects(sentence)
    assert len(set(sentences)) == 1, sentences
    for call in (lambda: group.all_reduce(torch.ones(1)), group.barrier, group.check):
        again = raised(call)
        assert isinstance(again, dist.DistBackendError)
        assert "disagree" in str(again)
    assert group.info()["broken"] is not None
    group.destroy()
    assert works(make(name="differ"))


def test_a_broken_group_does_not_break_another(make):
    broken, healthy = make(name="broken", timeout=5), make(name="healthy")
    raised(broken.all_reduce, torch.ones(8 + broken.rank_in_group))
    assert works(healthy)


def test_a_rank_that_does_not_come_is_named_by_all_others_and_a_new_group_works(make, rank, size):
    group = make(name="waiting", timeout=1, first_timeout=10)
    assert works(group)
    late = size - 1
    if rank == late:
        time.sleep(3)
    begin = time.monotonic()
    error = failure(group, group.all_reduce, torch.ones(8))
    assert isinstance(error, dist.DistBackendError), error
    if rank != late:
        assert f"rank(s) {late} did not arrive within 1 s" in str(error)
        assert 0.9 <= time.monotonic() - begin < 3
    else:
        assert time.monotonic() - begin < 1.5
    gather_objects(None)
    group.destroy()
    assert works(make(name="waiting"))


@pytest.mark.cpu_only(NCCL_WAITS)
def test_a_rank_that_does_not_come_to_a_fallback_is_named_too(make, rank, size):
    group = make(name="waiting", timeout=1, first_timeout=10)
    assert works(group)
    if rank == size - 1:
        time.sleep(3)
    error = raised(group.all_reduce, torch.ones(8, dtype=torch.int64))
    assert isinstance(error, dist.DistBackendError), error
    if rank != size - 1:
        assert f"rank(s) {size - 1} did not arrive within 1 s" in str(error)


@pytest.mark.cpu_only(NCCL_WAITS)
def test_a_failure_of_the_process_group_names_group_and_call(make, rank, size):
    group = make(ranks=list(range(size)), name="plain", communicator="process_group", timeout=1)
    assert works(group)
    if rank == size - 1:
        time.sleep(3)
    begin = time.monotonic()
    error = raised(group.all_reduce, torch.ones(8))
    assert isinstance(error, dist.DistBackendError), error
    assert group.unique_name in str(error)
    assert "all_reduce" in str(error)
    assert time.monotonic() - begin < 5
    assert group.info()["broken"] is not None
    gather_objects(None)
    group.destroy()
    assert works(make(ranks=list(range(size)), name="plain", communicator="process_group"))


def test_a_rank_that_left_is_named(make, rank, size):
    group = make(name="left", timeout=10, first_timeout=10)
    assert works(group)
    gather_objects(None)
    if rank == size - 1:
        group.destroy()
    else:
        begin = time.monotonic()
        error = failure(group, group.all_reduce, torch.ones(8))
        assert isinstance(error, dist.DistBackendError), error
        assert f"rank(s) {size - 1} left" in str(error)
        assert time.monotonic() - begin < 5


def test_leaving_right_after_the_last_call_disturbs_nobody(make):
    """A rank says goodbye while others still finish the call it has left."""
    for _ in range(20):
        group = make(name="hurry", arena_bytes=8 << 20)
        assert works(group)
        assert group.all_reduce(torch.ones(100000))[0].item() == group.world_size
        group.destroy()


def test_the_first_call_has_a_deadline_of_its_own(make, rank, size):
    group = make(name="slow start", timeout=1, first_timeout=20)
    if rank == size - 1:
        time.sleep(2.5)
    assert works(group)
