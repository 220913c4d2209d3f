"""all_reduce: the fp32 sum in rank order, rounded once, to the bit, whatever the dtype, count, memory and algorithm."""

import pytest
import torch
from distributed_cases import NATIVE, gather_objects, inputs, ordered_sum, same_bits, seeded

import sglang_symm.memory as memory

ALGORITHMS = ["one_shot", "two_shot", "two_shot_direct"]
SMALL = [*range(18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1023, 1024, 1025, 4095, 4097]
# Around the sizes at which algorithms change, and around slots of 1 MiB.
MEDIUM = [(1 << power) + delta for power in (14, 16, 18, 20) for delta in (-1, 0, 1, 3)]


def check(group, shape, dtype, seed=0, arrange=lambda x: x):
    """all_reduce and all_reduce_ of the ranks' inputs, each put into memory by `arrange`."""
    size = group.world_size
    everyone = inputs(size, shape, dtype, seed)
    expected = ordered_sum(everyone)
    x = arrange(everyone[group.rank_in_group])
    kept = x.clone()
    y = group.all_reduce(x)
    assert same_bits(y, expected), (shape, dtype, (y.float() - expected.float()).abs().max())
    assert same_bits(x, kept), "the input changed"
    assert y.data_ptr() != x.data_ptr() or y.numel() == 0
    assert group.all_reduce_(x) is x
    assert same_bits(x, expected), (shape, dtype, "in place")


@pytest.mark.parametrize("dtype", NATIVE)
def test_small_counts_are_summed_in_rank_order_with_one_rounding(group, dtype):
    for count in SMALL:
        check(group, [count], dtype, seed=count)


@pytest.mark.parametrize("dtype", NATIVE)
def test_counts_around_slot_boundaries_are_summed_alike(group, dtype):
    for count in MEDIUM:
        check(group, [count], dtype, seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tens_of_megabytes_that_outgrow_the_arena_are_summed_alike(group, dtype):
    check(group, [(24 << 20) // dtype.itemsize + 1], dtype)


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("dtype", NATIVE)
def test_every_algorithm_gives_the_same_bits(shared, algo, dtype):
    forced = shared(algo=algo)
    for count in [0, 1, 2, 3, 7, 16, 17, 63, 65, 1000, 4097, 70001, (1 << 19) + 5]:
        check(forced, [count], dtype, seed=count)
    used = forced.info()["calls_by_algorithm"]
    if forced.world_size > 1:
        assert used[algo] > 0, used


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_forced_algorithm_accepts_tensors_inside_and_outside_of_the_arena(shared, algo):
    forced = shared(algo=algo)

    def inside_on_even_ranks(x):
        if forced.rank_in_group % 2:
            return x.clone()
        out = memory.empty(*x.shape, group=forced, dtype=x.dtype)
        return out.copy_(x)

    def inside(x):
        return memory.empty(*x.shape, group=forced, dtype=x.dtype).copy_(x)

    for count in [1, 17, 5000, 300001]:
        for arrange in (inside, inside_on_even_ranks):
            check(forced, [count], torch.bfloat16, arrange=arrange)


@pytest.mark.parametrize("algo", ["auto", *ALGORITHMS])
@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_views_are_summed_alike(shared, algo, dtype, offset):
    def unaligned(x):
        base = torch.empty(x.numel() + offset, dtype=x.dtype)
        return base[offset:].copy_(x)

    for count in [1, 2, 15, 16, 17, 33, 1001, 40003]:
        check(shared(algo=algo), [count], dtype, arrange=unaligned)


@pytest.mark.parametrize("dtype", NATIVE)
def test_alignment_may_differ_between_ranks(group, dtype):
    def by_rank(x):
        base = torch.empty(x.numel() + 16, dtype=x.dtype)
        return base[group.rank_in_group : group.rank_in_group + x.numel()].copy_(x)

    for count in [1, 17, 999, 20001]:
        check(group, [count], dtype, arrange=by_rank)


@pytest.mark.parametrize("shape", [[6, 10], [1, 7], [130, 257]])
def test_non_contiguous_tensors_are_summed_and_written_in_place(group, shape):
    check(group, shape, torch.bfloat16, arrange=lambda x: x.t().contiguous().t())
    check(group, shape, torch.float32, arrange=lambda x: torch.stack([x, -x], -1)[..., 0])

    def only_some_ranks(x):
        return x.t().contiguous().t() if group.rank_in_group == 0 else x

    check(group, shape, torch.float32, arrange=only_some_ranks)


def test_what_lies_between_the_elements_of_a_view_stays(group):
    base = torch.full((6, 8), 7.0)
    view = base[:, ::2]
    group.all_reduce_(view.fill_(1.0))
    assert torch.equal(view, torch.full((6, 4), float(group.world_size)))
    assert torch.equal(base[:, 1::2], torch.full((6, 4), 7.0))


def test_an_expanded_tensor_is_summed(group):
    x = torch.full((1, 5), float(group.rank_in_group + 1)).expand(4, 5)
    total = group.world_size * (group.world_size + 1) / 2
    assert torch.equal(group.all_reduce(x), torch.full((4, 5), total))


def test_an_expanded_tensor_in_place_is_refused_before_anything_is_sent(group):
    calls = group.info()["calls"]
    with pytest.raises((ValueError, RuntimeError)):
        group.all_reduce_(torch.ones(1, 5).expand(4, 5))
    assert group.info()["calls"] == calls
    check(group, [3], torch.float32)


@pytest.mark.parametrize("shape", [[], [0], [3, 0, 2], [1], [2, 3, 4]])
def test_scalars_and_empty_tensors_keep_their_shape(group, shape):
    check(group, shape, torch.float32)


def test_nan_and_infinity_arrive_on_every_rank(group):
    x = torch.zeros(4)
    if group.rank_in_group == group.world_size - 1:
        x[0], x[1], x[2] = float("nan"), float("inf"), float("-inf")
    y = group.all_reduce(x)
    assert y[0].isnan()
    assert y[1:].tolist() == [float("inf"), float("-inf"), 0.0]


def test_low_precision_is_accumulated_in_fp32(group):
    """256 + 1 is 256 in bf16, so adding in bf16 would lose what the later ranks send."""
    x = torch.tensor([256.0 if group.rank_in_group == 0 else 1.0], dtype=torch.bfloat16)
    expected = torch.tensor([256.0 + group.world_size - 1]).to(torch.bfloat16)
    assert same_bits(group.all_reduce(x), expected)


def test_sums_over_bf16s_range_round_to_infinity_alike(group):
    x = torch.full((9,), 3e38 if group.rank_in_group < 2 else 0.0, dtype=torch.bfloat16)
    everyone = [torch.full((9,), 3e38 if rank < 2 else 0.0, dtype=torch.bfloat16) for rank in range(group.world_size)]
    assert same_bits(group.all_reduce(x), ordered_sum(everyone))


def test_each_run_gives_the_same_bits(group):
    x = inputs(group.world_size, [50001], torch.float32)[group.rank_in_group]
    first = group.all_reduce(x)
    for _ in range(5):
        assert same_bits(group.all_reduce(x), first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64, torch.int8, torch.uint8])
def test_other_dtypes_are_summed_by_the_process_group(group, dtype):
    before = group.info()["calls_by_algorithm"]["process_group"]
    for count in (0, 1, 1000):
        everyone = inputs(group.world_size, [count], dtype)
        expected = torch.stack(everyone).sum(0, dtype=dtype)
        y = group.all_reduce(everyone[group.rank_in_group])
        assert y.dtype is dtype
        torch.testing.assert_close(y, expected, rtol=1e-15, atol=1e-13)
        assert all(same_bits(y, other) for other in gather_objects(y))
    if group.world_size > 1:
        assert group.info()["calls_by_algorithm"]["process_group"] > before


@pytest.mark.parametrize(
    ("op", "reference"),
    [
        ("max", lambda x: x.amax(0)),
        ("min", lambda x: x.amin(0)),
        ("product", lambda x: x.prod(0)),
        ("avg", lambda x: x.mean(0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_reductions_are_the_process_group_s(group, op, reference, dtype):
    everyone = torch.stack(inputs(group.world_size, [33], dtype))
    for in_place in (False, True):
        x = everyone[group.rank_in_group].clone()
        y = group.all_reduce_(x, op) if in_place else group.all_reduce(x, op)
        torch.testing.assert_close(y, reference(everyone), rtol=1e-5, atol=1e-5)
        assert all(same_bits(y, other) for other in gather_objects(y))


@pytest.mark.parametrize("op", ["max", "min", "product"])
def test_other_reductions_of_integers(group, op):
    everyone = torch.stack(inputs(group.world_size, [33], torch.int64))
    reference = {"max": everyone.amax(0), "min": everyone.amin(0), "product": everyone.prod(0)}[op]
    assert torch.equal(group.all_reduce(everyone[group.rank_in_group], op), reference)


def test_a_group_without_arena_works_through_its_process_group(make):
    group = make(communicator="process_group")
    assert group.communicator == "process_group"
    for dtype in NATIVE:
        everyone = inputs(group.world_size, [1000], dtype)
        y = group.all_reduce(everyone[group.rank_in_group])
        reference = torch.stack(everyone).double().sum(0)
        # One rounding in fp32 or fp16's and bf16's sums for each addition.
        tolerance = group.world_size * torch.finfo(dtype).eps * torch.stack(everyone).double().abs().sum(0)
        assert ((y.double() - reference).abs() <= tolerance).all()
        assert all(same_bits(y, other) for other in gather_objects(y))


def test_many_calls_in_a_row_of_changing_size_and_kind(group):
    """Slots are reused every second call: a stale slot would show."""
    generator = seeded(3)
    for step in range(300):
        count = int(torch.randint(0, 3000, (), generator=generator))
        x = torch.full((count,), float(group.rank_in_group + step))
        expected = sum(float(rank + step) for rank in range(group.world_size))
        y = group.all_reduce(x) if step % 3 else group.all_reduce_(x)
        assert torch.equal(y, torch.full((count,), expected)), step
        if step % 7 == 0:
            group.barrier()
