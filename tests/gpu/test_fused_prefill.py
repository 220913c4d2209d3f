"""The fused row-parallel linear of many tokens: the same checker as for few (test_fused.py), any number of ranks."""

from __future__ import annotations

import math
import os
import random
import time

import pytest
import torch

from tests.distributed_cases import gather_objects
from tests.gpu.test_fused import (
    CALLS,
    DTYPES,
    LIMIT,
    Case,
    check_that_a_weight_is_read_as_written,
    check_that_one_place_serves_all,
    digest,
    fused_calls,
    linear,
    same,
    sentence,
)

SMS = int(os.environ.get("SGLANG_SYMM_SMS", torch.cuda.get_device_properties(0).multi_processor_count))
CLUSTERS = min(SMS // 2, 64)
# Rows of a weight that make enough tiles for every number of tokens, on a GPU or a part of one: one wave of tiles of
# 128 rows for 256 tokens.
WIDE = 128 * CLUSTERS


@pytest.fixture(scope="module")
def group(world):
    from sglang_symm.distributed.group import Group

    group = Group(device="cuda", timeout=20.0, arena_bytes=512 << 20)
    yield group
    torch.cuda.synchronize()
    group.destroy()


TOKENS = [192, 256, 470, 500, 512, 700, 768, 1000, 1024, 1280, 1400, 1536, 1900, 2048, 2100]
# What the table of gemm_config.cpp says: rows of the weight a tile, visits, and how full they must be.
ANY = 1 << 30
TWO_RANKS = [
    (256, range(1, 2), 0.92),
    (256, range(2, 3), 0.91),
    (128, range(3, 4), 0.92),
    (128, range(5, 16, 2), 0.94),
    (256, range(3, ANY), 0.87),
]
MORE_RANKS = [(128, range(3, 5), 0.93), (128, range(5, ANY), 0.853)]


def is_fused(size, m, n=WIDE):
    tiles_m, clusters = -(-m // 256), SMS // 2
    table = {2: TWO_RANKS, 3: MORE_RANKS, 4: MORE_RANKS}.get(size, [])
    for rows, visits, full in table:
        count = math.ceil(tiles_m * -(-n // rows) / clusters)
        if count in visits and m * n >= full * count * clusters * 256 * rows:
            return True
    return False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(WIDE, 200), (WIDE - 192, 72)])
def test_every_number_of_tokens_gives_the_bits_of_the_ordered_sum(group, rank, size, dtype, n, k):
    before, wrong = fused_calls(group), []
    for m in TOKENS:
        case = Case(size, m, n, k, dtype, seed=m, bias=m % 2 == 0)
        want = case.expected()
        for static in (False, True, False):
            if not same(case.call(group, rank, static_weight=static), want):
                wrong.append(m)
    assert wrong == []
    assert fused_calls(group) == before + 3 * sum(is_fused(size, m, n) for m in TOKENS)
    group.check()


@pytest.mark.parametrize("m", [65, 256, 300, 1536])
def test_any_n_and_k(group, rank, size, m):
    """The last two are fused at 1536 tokens, where prefill is at all."""
    # More ranks have staging memory for 1536 x 10922 numbers.
    shapes = [(8, 8), (24, 16), (264, 136), (1000, 4096), (8192, 1024), (10240, 264), (WIDE - 8, 24), (WIDE - 40, 1032)]
    before = fused_calls(group)
    for n, k in shapes:
        case = Case(size, m, n, k, torch.bfloat16, seed=n, bias=m % 2 == 1)
        assert same(case.call(group, rank), case.expected()), (n, k)
    assert fused_calls(group) == before + sum(is_fused(size, m, n) for n, _ in shapes)


def test_real_numbers_are_within_a_rounding_of_each_partial_and_of_the_sum(group, rank, size):
    dtype = torch.bfloat16
    eps = torch.finfo(dtype).eps / 2
    for m, n, k in [(500, 8192, 2048), (1024, 8192, 4096)]:
        generator = torch.Generator("cuda").manual_seed(m)
        xs = [torch.randn(m, k, generator=generator, device="cuda").to(dtype) for _ in range(size)]
        ws = [torch.randn(n, k, generator=generator, device="cuda").to(dtype) for _ in range(size)]
        bias = torch.randn(n, generator=generator, device="cuda").to(dtype)
        y = linear(xs[rank], ws[rank], bias, group)
        partials = [x.double() @ w.double().t() for x, w in zip(xs, ws, strict=True)]
        exact = sum(partials) + bias.double()
        magnitude = sum(x.double().abs() @ w.double().abs().t() for x, w in zip(xs, ws, strict=True))
        bound = eps * (sum(p.abs() for p in partials) + exact.abs()) * 1.02 + k * 2.0**-24 * magnitude
        assert ((y.double() - exact).abs() <= bound).all()
        assert len(set(gather_objects(digest(y)))) == 1


@pytest.mark.parametrize("m", [16, 500, 1400])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_any_two_numbers_are_those_of_fp32_rounded_once(group, rank, size, dtype, m):
    """Bit patterns at random, of numbers whose exponents lie up to 20 apart; a partial is one of them, exactly."""
    if m <= 64 and size not in (2, 4, 8):
        pytest.skip("the decode kernel is for 2, 4 and 8 ranks")
    k, mantissa = 512, 7 if dtype == torch.bfloat16 else 10
    generator = torch.Generator("cuda").manual_seed(m)

    def draw(most):
        return torch.randint(0, most, (m, k), generator=generator, device="cuda", dtype=torch.int32)

    base = draw(31 if dtype == torch.float16 else 255)
    xs = []
    for _ in range(size):
        exponent = (base - draw(20)).clamp(min=0)
        bits = draw(2) << 15 | exponent << mantissa | draw(1 << mantissa)
        xs.append(bits.to(torch.int16).view(dtype))
    w = torch.nn.functional.one_hot(torch.arange(WIDE, device="cuda") % k, k).to(dtype)
    total = xs[0].float() + 0.0  # no partial is -0
    for x in xs[1:]:
        total = total + (x.float() + 0.0)
    want = total.to(dtype)[:, torch.arange(WIDE, device="cuda") % k]
    before = fused_calls(group)
    y = linear(xs[rank], w, None, group)
    assert fused_calls(group) == before + (m <= 64 or is_fused(size, m))
    assert torch.equal(y.isnan(), want.isnan())
    assert same(y.nan_to_num(), want.nan_to_num())


def test_not_a_number_and_infinity_come_out_as_themselves(group, rank, size):
    for m in (500, 1024):
        case = Case(size, m, WIDE, 128, torch.bfloat16, seed=m, bias=True)
        case.xs[0][0, 3] = float("nan")
        case.ws[size - 1][7, 5] = float("inf")
        case.xs[size - 1][:, 5] = 1.0
        case.bias[9] = float("-inf")
        y, want = case.call(group, rank), case.expected()
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(torch.nan_to_num(y), torch.nan_to_num(want))
        assert same(case.call(group, rank), y)


@pytest.mark.parametrize("m", [500, 1000, 1400])
def test_any_strides_alignment_and_place_of_the_output(group, rank, size, m):
    n, k = WIDE, 264
    case = Case(size, m, n, k, torch.bfloat16, bias=True)
    # Signs: the library, which takes the weight of odd rows, may add up parts of k in bf16; such sums are exact in it.
    case.xs, case.ws = [x.sign() for x in case.xs], [w.sign() for w in case.ws]
    want, x, w = case.expected(), case.xs[rank], case.ws[rank]
    odd = torch.full((n, k + 3), float("nan"), dtype=w.dtype, device="cuda")
    odd[:, 1 : k + 1] = w
    columns = torch.full((k, m), 0.0, dtype=w.dtype, device="cuda")
    columns.copy_(x.t())
    shifted = torch.zeros(m * k + 1, dtype=x.dtype, device="cuda")[1:].view(m, k).copy_(x)
    biases = [case.bias, torch.zeros(n + 1, dtype=x.dtype, device="cuda")[1:].copy_(case.bias)]
    # Ranks lie differently, and all are right.
    weights, tokens = [odd[:, 1 : k + 1], w.t().contiguous().t(), w], [columns.t(), shifted, x]
    outs = [torch.zeros(m * n + i, dtype=x.dtype, device="cuda")[i:].view(m, n) for i in (0, 1)]
    before = fused_calls(group)
    for i in range(6):
        mine = (weights[(i + rank) % 3], tokens[(i // 2 + 2 * rank) % 3])
        bias = biases[(i // 3 + rank) % 2]
        y = linear(mine[1], mine[0], bias, group, static_weight=True, symmetric=(i + rank) % 2 == 0)
        assert same(y, want)
        out = outs[(i + rank) % 2].zero_()
        torch.ops.sglang_symm.row_parallel_linear_out(x, w, bias, group.unique_name, out)
        assert same(out, want)
    assert fused_calls(group) == before + 12 * is_fused(size, m)


@pytest.mark.parametrize("m", [3, 40, 500, 1400])
def test_parts_of_k_that_are_and_are_not_multiples_of_8_are_one_call(group, rank, size, m):
    if m <= 64 and size not in (2, 4, 8):
        pytest.skip("the decode kernel is for 2, 4 and 8 ranks")
    before = fused_calls(group)
    for parts in ([520, 515], [4, 64], [0, 72], [7, 9]):
        case = Case(size, m, WIDE, 8, torch.bfloat16, bias=True)
        for r in range(size):
            k = parts[r % 2]
            # Signs: the library may add up parts of an odd k in bf16, and such sums are exact in it.
            one = Case(size, m, WIDE, k, torch.bfloat16, seed=r) if k else None
            case.xs[r] = one.xs[r].sign() if one else case.xs[r][:, :0]
            case.ws[r] = one.ws[r].sign() if one else case.ws[r][:, :0]
        assert same(case.call(group, rank, static_weight=True), case.expected()), parts
    assert fused_calls(group) == before + 4 * (m <= 64 or is_fused(size, m))


@pytest.mark.parametrize(("m", "n"), [(4096, 4096), (8192, 2048)])
def test_a_result_that_outgrows_the_arena_goes_in_rounds_and_too_small_an_arena_is_told(make, rank, size, m, n, capfd):
    # Between two ranks slots hold all tiles, of 1024 tokens 8 or 4 MB; else staging memory holds y.
    case = Case(size, m, n, 136, torch.bfloat16, bias=True)
    want = case.expected()
    if size > 4:
        pytest.skip("not fused")
    rounds = make(arena_bytes=(128 if size == 2 else 256) << 20)
    for _ in range(3):
        assert same(case.call(rounds, rank), want)
    assert fused_calls(rounds) == 3 * is_fused(size, m, n)
    small = make(arena_bytes=(32 if size == 2 else 64) * n // 4096 << 20)
    assert same(case.call(small, rank), want)
    assert fused_calls(small) == 0
    told = capfd.readouterr().err
    assert f"bytes of {'slots' if size == 2 else 'staging memory'}" in told
    assert "bytes are enough" in told


def test_random_calls_differ_in_no_bit_on_any_rank_in_any_run(group, rank, size):
    shapes = random.Random(6)
    cases = []
    for seed in range(16):
        m = shapes.choice(
            [shapes.randint(1, 64), shapes.randint(65, 256), shapes.randint(920, 1024), shapes.randint(257, 1300)]
        )
        n = WIDE - 8 * shapes.randint(0, 64)
        case = Case(size, m, n, 8 * shapes.randint(1, 60), shapes.choice(DTYPES), seed=seed)
        cases.append((case, case.expected().view(torch.int16)))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    noise = [torch.ones(n, device="cuda") for n in (3000, 3_000_000)]
    for i in range(CALLS // 4):
        case, want = shapes.choice(cases)
        y = case.call(group, rank, static_weight=i % 3 == 0, symmetric=(i + rank) % 2 == 0)
        wrong += (y.view(torch.int16) != want).sum()
        if i % 7 == 0:
            wrong += (group.all_reduce(noise[i % 2]) != size).sum()
    assert wrong.item() == 0
    group.check()


def test_graphs_replay_among_eager_calls_and_other_ops(group, rank, size):
    cases = [Case(size, m, WIDE, 264, torch.bfloat16, seed=m) for m in (220, 500, 768, 1400)]
    wants = [case.expected().view(torch.int16) for case in cases]
    for case in cases:
        case.call(group, rank)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [case.call(group, rank, static_weight=True) for case in cases]
        outs += [case.call(group, rank, symmetric=False) for case in cases]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(CALLS // 8):
        graph.replay()
        for out, want in zip(outs, wants + wants, strict=True):
            wrong += (out.view(torch.int16) != want).sum()
        if i % 5 == 0:
            wrong += (cases[i % 4].call(group, rank).view(torch.int16) != wants[i % 4]).sum()
    assert wrong.item() == 0
    group.check()


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("writer", ["copy_", "all_reduce_"])
@pytest.mark.parametrize("m", [500, 1400])
def test_a_weight_written_by_the_kernel_before_is_read_as_written(group, rank, size, m, writer, in_graph):
    # A weight so small that its all-reduce leaves SMs to the linear: there is no room for both on one.
    k = 520 if writer == "copy_" else 40
    check_that_a_weight_is_read_as_written(group, rank, size, m, WIDE, k, writer, in_graph, 30)


def test_a_weight_in_the_place_of_another_is_read_by_its_own_shape_stride_and_dtype(group, rank, size):
    before = fused_calls(group)
    shapes = [
        (500, WIDE, 264, 0, torch.bfloat16),
        (500, WIDE - 192, 264, 24, torch.bfloat16),
        (500, WIDE, 136, 128, torch.bfloat16),
        (1400, WIDE, 136, 128, torch.float16),
        (1400, WIDE - 192, 200, 0, torch.float16),
        (1400, WIDE, 72, 8, torch.bfloat16),
    ]
    check_that_one_place_serves_all(group, rank, size, shapes)
    assert fused_calls(group) == before + 4 * sum(is_fused(size, m, n) for m, n, *_ in shapes)
    group.check()


@pytest.mark.parametrize("m", [500, 1400])
def test_a_missing_rank_is_named_without_a_trap(make, group, rank, size, m):
    broken = make(timeout=LIMIT, first_timeout=20, arena_bytes=512 << 20)
    case = Case(size, m, WIDE, 264, torch.bfloat16)
    want = case.expected()
    assert same(case.call(broken, rank), want)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = case.call(broken, rank)
    gather_objects(None)
    if rank != size - 1:
        start = time.monotonic()
        y = case.call(broken, rank)
        torch.cuda.synchronize()
        assert LIMIT - 0.5 < time.monotonic() - start < LIMIT + 2
        assert y.isnan().all()
        assert f"rank(s) {size - 1} did not arrive within {LIMIT:g} s in call" in sentence(broken.check)
    gather_objects(None)
    said = sentence(lambda: case.call(broken, rank))
    assert len(set(gather_objects(said))) == 1
    broken.destroy()
    graph.replay()
    torch.cuda.synchronize()
    assert replayed.isnan().all()
    assert same(case.call(group, rank), want)


@pytest.mark.parametrize("m", [500, 1400])
def test_calls_that_disagree_are_named(make, group, rank, size, m):
    if not is_fused(size, m):
        pytest.skip("not fused")
    broken = make(timeout=LIMIT, first_timeout=20, arena_bytes=512 << 20)
    case = Case(size, m, WIDE, 264, torch.bfloat16)
    assert same(case.call(broken, rank), case.expected())
    torch.cuda.synchronize()
    gather_objects(None)
    start = time.monotonic()
    linear(case.xs[rank][: m - 1] if rank == 1 else case.xs[rank], case.ws[rank], None, broken)
    torch.cuda.synchronize()
    assert time.monotonic() - start < LIMIT + 2
    gather_objects(None)
    said = sentence(broken.check)
    assert f"y [{m}, {WIDE}], no bias, fused), rank 1 called row_parallel_linear(bfloat16, y [{m - 1}, {WIDE}]" in said
    assert len(set(gather_objects(said))) == 1
    assert same(case.call(group, rank), case.expected())


def test_streams_wait_for_one_another(group, rank, size):
    cases = [Case(size, m, WIDE, 264, torch.bfloat16) for m in (500, 1400)]
    wants = [case.expected().view(torch.int16) for case in cases]
    streams = [torch.cuda.Stream() for _ in range(2)]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    for i in range(60):
        with torch.cuda.stream(streams[i % 2]):
            y = cases[i // 2 % 2].call(group, rank, static_weight=True)
            wrong[i % 2] += (y.view(torch.int16) != wants[i // 2 % 2]).sum()
    torch.cuda.synchronize()
    assert [w.item() for w in wrong] == [0, 0]
