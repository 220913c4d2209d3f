"""The fused row-parallel linear: the bits of the ordered sum of rounded partials, at every number of tokens.

Inputs are small integers, so a partial is exact in fp32 whatever the order of its additions, and what is left is
decided by rounding alone: results are compared bit by bit with a sum in fp64.
"""

from __future__ import annotations

import os
import random
import re
import time
import warnings
import zlib

import pytest
import torch
import torch.distributed as dist

from tests.distributed_cases import gather_objects, raised

LIMIT = 2.0
CALLS = int(os.environ.get("SGLANG_SYMM_TEST_CALLS", "2000"))
DTYPES = [torch.bfloat16, torch.float16]
FUSED_WORLDS = (2, 4, 8)


@pytest.fixture(autouse=True)
def fused_world(size):
    if size not in FUSED_WORLDS:
        pytest.skip("the fused kernel is for 2, 4 and 8 ranks")


def integers(shape, dtype, seed, most=8):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator, device="cuda").to(dtype)


class Case:
    """One call's inputs on all ranks (every rank draws everybody's), and its result."""

    def __init__(self, size, m, n, k, dtype, seed=0, bias=False):
        self.xs = [integers((m, k), dtype, 1000 * seed + r) for r in range(size)]
        self.ws = [integers((n, k), dtype, 1000 * seed + 100 + r) for r in range(size)]
        self.bias = integers((n,), dtype, 1000 * seed + 200) / 4 if bias else None

    def expected(self):
        total = None
        for x, w in zip(self.xs, self.ws, strict=True):
            partial = (x.double() @ w.double().t()).to(x.dtype).float()
            total = partial if total is None else total + partial
        if self.bias is not None:
            total = total + self.bias.float()
        return total.to(self.xs[0].dtype)

    def call(self, group, rank, **options):
        return linear(self.xs[rank], self.ws[rank], self.bias, group, **options)


def linear(x, w, bias, group, **options):
    return torch.ops.sglang_symm.row_parallel_linear(x, w, bias, group.unique_name, **options)


def same(a, b):
    return a.shape == b.shape and torch.equal(a.view(torch.int16), b.view(torch.int16))


def fused_calls(group):
    return group.info()["fused_calls"]


def sms_of(group):
    """The SMs that the group's kernels may fill."""
    return int(re.search(r"max_ctas=(\d+)", group.info()["settings"]["agreed"])[1])


def tile_rows(size):
    """Rows of the weight that a tile of the decode kernel has where tiles take turns on the SMs."""
    return 64 if size == 2 else 128


def digest(y):
    return zlib.crc32(y.cpu().view(torch.int16).numpy().tobytes())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(2184, 520), (2120, 72)])
def test_every_number_of_tokens_gives_the_bits_of_the_ordered_sum(shared_group, rank, size, dtype, n, k):
    before, wrong = fused_calls(shared_group), []
    for m in range(1, 65):
        case = Case(size, m, n, k, dtype, seed=m, bias=m % 2 == 0)
        want = case.expected()
        for static in (False, True, False):
            if not same(case.call(shared_group, rank, static_weight=static), want):
                wrong.append(m)
    assert wrong == []
    assert fused_calls(shared_group) == before + 3 * 64
    shared_group.check()


SHAPES = [(8, 8), (16, 24), (72, 1544), (584, 512), (8200, 264), (8192, 4096), (14336, 1000), (4096, 14336)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_any_n_and_k_that_are_multiples_of_8(make, rank, size, dtype, n, k):
    group = make(arena_bytes=256 << 20)
    for m in (1, 5, 9, 16, 17, 33, 64):
        case = Case(size, m, n, k, dtype, seed=m, bias=m % 2 == 1)
        assert same(case.call(group, rank), case.expected()), m
    assert fused_calls(group) == 7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [2048, 2200, 4104])
@pytest.mark.parametrize("tiles_an_sm", [0.3, 0.5, 1, 1.25, 2.2])
def test_pairs_of_ctas_give_the_bits_of_all_of_k(shared_group, exact_products, rank, size, dtype, k, tiles_an_sm):
    """Each CTA multiplies half of k: of a tile (0.3; 0.5: k = 4104), and between two ranks of two in turn (3 and 17
    tokens, k = 4104), three, five. More ranks have tiles of 128 rows from 1.25 on, and no pairs."""
    sms = sms_of(shared_group) // 2 * 2
    before, n = fused_calls(shared_group), 64 * int(tiles_an_sm * sms) - 8
    for m in (3, 17, 64):
        case = Case(size, m, n, k, dtype, seed=m, bias=m == 17)
        want, differ = case.expected(), torch.zeros((), dtype=torch.int64, device="cuda")
        # A rank whose weight the copy engine does not take has no pairs, and its peers still do.
        odd = torch.zeros(n, k + 1, dtype=dtype, device="cuda")[:, 1:].copy_(case.ws[rank])
        for i in range(30):
            weight = odd if i % 5 == 3 and rank == size - 1 else case.ws[rank]
            y = linear(case.xs[rank], weight, case.bias, shared_group, static_weight=i % 2 == 0)
            differ += (y.view(torch.int16) != want.view(torch.int16)).sum()
        assert differ.item() == 0, m
    assert fused_calls(shared_group) == before + 90
    shared_group.check()


def test_other_shapes_and_dtypes_take_the_other_path(shared_group, rank, size):
    before = fused_calls(shared_group)
    for m, n, k, dtype in [
        (65, 64, 64, torch.bfloat16),
        (3, 60, 64, torch.bfloat16),
        (0, 64, 64, torch.bfloat16),
        (3, 64, 64, torch.float32),
    ]:
        case = Case(size, m, n, k, dtype)
        assert torch.equal(case.call(shared_group, rank), case.expected())
    assert fused_calls(shared_group) == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_numbers_are_within_a_rounding_of_each_partial_and_of_the_sum(shared_group, rank, size, dtype):
    eps = torch.finfo(dtype).eps / 2
    for m, n, k in [(1, 8192, 4096), (16, 4096, 4096), (64, 4096, 4096)]:
        generator = torch.Generator("cuda").manual_seed(m)
        xs = [torch.randn(m, k, generator=generator, device="cuda").to(dtype) for _ in range(size)]
        ws = [torch.randn(n, k, generator=generator, device="cuda").to(dtype) for _ in range(size)]
        bias = torch.randn(n, generator=generator, device="cuda").to(dtype)
        y = linear(xs[rank], ws[rank], bias, shared_group)
        partials = [x.double() @ w.double().t() for x, w in zip(xs, ws, strict=True)]
        exact = sum(partials) + bias.double()
        magnitude = sum(x.double().abs() @ w.double().abs().t() for x, w in zip(xs, ws, strict=True))
        bound = eps * (sum(p.abs() for p in partials) + exact.abs()) * 1.02 + k * 2.0**-24 * magnitude
        assert ((y.double() - exact).abs() <= bound).all()
        assert len(set(gather_objects(digest(y)))) == 1


def test_not_a_number_and_infinity_come_out_as_themselves(shared_group, rank, size):
    for dtype in DTYPES:
        for m in (1, 8, 40):
            case = Case(size, m, 2200, 128, dtype, seed=m, bias=True)
            case.xs[0][0, 3] = float("nan")
            case.ws[size - 1][7, 5] = float("inf")
            case.xs[size - 1][:, 5] = 1.0
            case.bias[9] = float("-inf")
            y, want = case.call(shared_group, rank), case.expected()
            assert torch.equal(y.isnan(), want.isnan())
            assert y[0].isnan().all()
            assert not y[1:].isnan().any()
            assert torch.equal(torch.nan_to_num(y), torch.nan_to_num(want))
            assert same(case.call(shared_group, rank), y)


def test_overflow_of_half_is_infinity(shared_group, rank, size):
    x = torch.full((3, 1024), 16.0, dtype=torch.float16, device="cuda")
    w = torch.full((72, 1024), 16.0, dtype=torch.float16, device="cuda")
    assert (linear(x, w, None, shared_group) == float("inf")).all()


def test_any_strides_and_alignment(shared_group, rank, size):
    m, n, k = 6, 136, 264
    case = Case(size, m, n, k, torch.bfloat16, bias=True)
    want, x, w = case.expected(), case.xs[rank], case.ws[rank]
    strided = torch.full((n, k + 24), float("nan"), dtype=w.dtype, device="cuda")
    strided[:, :k] = w
    odd = torch.full((n, k + 3), float("nan"), dtype=w.dtype, device="cuda")
    odd[:, 1 : k + 1] = w
    columns = torch.full((k, m), 0.0, dtype=w.dtype, device="cuda")
    columns.copy_(x.t())
    shifted = torch.zeros(m * k + 1, dtype=x.dtype, device="cuda")[1:].view(m, k).copy_(x)
    biases = [case.bias, torch.zeros(n + 1, dtype=x.dtype, device="cuda")[1:].copy_(case.bias)]
    # Ranks lie differently, and all are right.
    weights = [strided[:, :k], odd[:, 1 : k + 1], w.t().contiguous().t(), w]
    tokens = [x, columns.t(), shifted, x.view(2, 3, k)]
    for i in range(8):
        bias = biases[(i + rank) % 2]
        y = linear(tokens[(i + rank) % 4], weights[(i // 2 + 3 * rank) % 4], bias, shared_group, static_weight=True)
        assert same(y.view(m, n), want)
    out = torch.zeros(m * n + 1, dtype=x.dtype, device="cuda")[1:].view(m, n)
    torch.ops.sglang_symm.row_parallel_linear_out(x, w, case.bias, shared_group.unique_name, out)
    assert same(out, want)


def test_random_calls_differ_in_no_bit_on_any_rank_in_any_run(shared_group, rank, size):
    shapes = random.Random(5)
    cases = []
    for seed in range(24):
        m, k = shapes.randint(1, 64), 8 * shapes.randint(1, 150)
        n = 8 * shapes.randint(1, 400)
        case = Case(size, m, n, k, shapes.choice(DTYPES), seed=seed, bias=shapes.random() < 0.5)
        cases.append((case, case.expected().view(torch.int16)))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    noise = torch.ones(3000, device="cuda")
    for i in range(CALLS):
        case, want = shapes.choice(cases)
        wrong += (case.call(shared_group, rank, static_weight=i % 3 == 0).view(torch.int16) != want).sum()
        if i % 7 == 0:
            wrong += (shared_group.all_reduce(noise) != size).sum()
    assert wrong.item() == 0
    shared_group.check()


def test_graphs_replay_among_eager_calls_and_other_ops(shared_group, rank, size):
    group = shared_group
    cases = [Case(size, m, 2184, 520, torch.bfloat16, seed=m) for m in (1, 8, 30, 64)]
    wants = [case.expected().view(torch.int16) for case in cases]
    noise = torch.ones(5000, device="cuda")
    for case in cases:
        case.call(group, rank)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [case.call(group, rank, static_weight=True) for case in cases]
        total = group.all_reduce(noise)
        outs += [case.call(group, rank) for case in cases]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(CALLS // 4):
        graph.replay()
        if i % 3 == 0:
            for out, want in zip(outs, wants + wants, strict=True):
                wrong += (out.view(torch.int16) != want).sum()
            wrong += (total != size).sum()
        if i % 5 == 0:
            wrong += (cases[i % 4].call(group, rank).view(torch.int16) != wants[i % 4]).sum()
    assert wrong.item() == 0
    group.check()


def check_that_a_weight_is_read_as_written(group, rank, size, m, n, k, writer, in_graph, times):
    """`all_reduce_`: by a kernel that lets the linear's in while it still writes; behind a copy nothing overlaps."""
    cases = [Case(size, m, n, k, torch.bfloat16, seed=i) for i in range(3)]
    if writer == "all_reduce_":
        for case in cases:
            case.ws = [case.ws[0]] * size
    wants = [case.expected().view(torch.int16) for case in cases]
    weight, x = torch.zeros_like(cases[0].ws[rank]), torch.zeros_like(cases[0].xs[rank])
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def calls():
        nonlocal wrong
        for case, want in zip(cases, wants, strict=True):
            x.copy_(case.xs[rank])
            if writer == "copy_":
                weight.copy_(case.ws[rank])
            else:
                weight.copy_(case.ws[0]) if rank == 0 else weight.zero_()
                torch.ops.sglang_symm.all_reduce_(weight, group.unique_name)
            wrong += (linear(x, weight, None, group).view(torch.int16) != want).sum()

    calls()
    torch.cuda.synchronize()
    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
    for _ in range(times):
        graph.replay() if in_graph else calls()
    assert wrong.item() == 0
    group.check()


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("writer", ["copy_", "all_reduce_"])
def test_a_weight_written_by_the_kernel_before_is_read_as_written(shared_group, rank, size, writer, in_graph):
    check_that_a_weight_is_read_as_written(shared_group, rank, size, 4, 4096, 2048, writer, in_graph, 100)


def said_not_fused(caught, capfd):
    """torch shows warnings of ops as Python warnings or on stderr, by the way the op was called."""
    said = [*map(str, (warning.message for warning in caught)), *capfd.readouterr().err.splitlines()]
    return [line for line in said if "is not fused" in line]


def bytes_that_are_enough(line):
    return int(line.split("slower. ")[1].split(" ")[0])


def test_an_arena_whose_slots_are_too_small_says_how_much_is_needed(make, rank, size, capfd):
    group = make(arena_bytes=4 << 20)
    case = Case(size, 64, 8192, 64, torch.bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert same(case.call(group, rank), case.expected())
    said = said_not_fused(caught, capfd)
    assert len(said) == 1
    assert "bytes are enough" in said[0]
    assert fused_calls(group) == 0
    enough = bytes_that_are_enough(said[0])
    larger = make(arena_bytes=enough)
    assert same(case.call(larger, rank), case.expected())
    assert fused_calls(larger) == 1
    # A call that needs more is told of, one that needs less is not.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in (16384, 8192):
            more = Case(size, 64, n, 64, torch.bfloat16)
            assert same(more.call(group, rank), more.expected())
    said = said_not_fused(caught, capfd)
    assert len(said) == 1
    assert bytes_that_are_enough(said[0]) > enough


class Place:
    """Memory in which one matrix lies after the other, each of its own shape, stride and dtype."""

    def __init__(self, bytes):
        self.memory = torch.empty(bytes, dtype=torch.uint8, device="cuda")

    def hold(self, matrix, stride):
        """A copy of `matrix` at the beginning, `stride` elements a row; all around it is NaN."""
        self.memory.fill_(0xFF)
        held = self.memory.view(matrix.dtype).as_strided(matrix.shape, (stride, 1))
        assert held.data_ptr() == self.memory.data_ptr()
        return held.copy_(matrix)


def check_that_one_place_serves_all(group, rank, size, shapes):
    """shapes: m, n, k, elements between the end of a row and the next, dtype. A call that had kept what it knew of the
    place would read NaN there, or rows from where another weight's began."""
    weights, tokens = (Place(2 * max((m + n) * (k + pad) for m, n, k, pad, _ in shapes)) for _ in range(2))
    cases = [Case(size, m, n, k, dtype, seed=i) for i, (m, n, k, _, dtype) in enumerate(shapes)]
    for case in cases:  # the library, which has the shapes that are not fused, may add up parts of k in the dtype
        case.xs, case.ws = [x.sign() for x in case.xs], [w.sign() for w in case.ws]
    wants = [case.expected() for case in cases]
    for static in (False, True):
        for i in [*range(len(cases)), *reversed(range(len(cases)))]:
            pad = shapes[i][3]
            w = weights.hold(cases[i].ws[rank], cases[i].ws[rank].shape[1] + pad)
            x = tokens.hold(cases[i].xs[rank], cases[i].xs[rank].shape[1] + pad)
            torch.cuda.synchronize()  # a static weight is one that no kernel in flight writes
            assert same(linear(x, w, None, group, static_weight=static), wants[i]), shapes[i]


def test_a_weight_in_the_place_of_another_is_read_by_its_own_shape_stride_and_dtype(shared_group, rank, size):
    before = fused_calls(shared_group)
    shapes = [
        (8, 2184, 520, 0, torch.bfloat16),
        (8, 1032, 520, 24, torch.bfloat16),
        (8, 2184, 264, 256, torch.bfloat16),
        (8, 2184, 264, 256, torch.float16),
        (33, 2184, 264, 0, torch.float16),
        (33, 2120, 1024, 8, torch.bfloat16),
    ]
    check_that_one_place_serves_all(shared_group, rank, size, shapes)
    assert fused_calls(shared_group) == before + 4 * len(shapes)
    shared_group.check()


def sentence(call) -> str:
    error = raised(call)
    assert isinstance(error, dist.DistBackendError), error
    return str(error).split("\n")[0]


@pytest.mark.parametrize(
    ("m", "k"), [(1, 520), (33, 520), (33, 2056), (3, 4104)], ids=["few", "many", "pairs", "pairs_of_few"]
)
def test_a_missing_rank_is_named_without_a_trap(make, shared_group, rank, size, m, k):
    group = make(timeout=LIMIT, first_timeout=20)
    n = {520: 2184, 2056: 64 * (sms_of(group) // 3), 4104: 64 * (sms_of(group) // 2 * 2)}[k]
    case = Case(size, m, n, k, torch.bfloat16)
    want = case.expected()
    assert same(case.call(group, rank), want)
    torch.cuda.synchronize()
    gather_objects(None)
    if rank != size - 1:
        start = time.monotonic()
        y = case.call(group, rank)
        torch.cuda.synchronize()
        assert LIMIT - 0.5 < time.monotonic() - start < LIMIT + 2
        assert y.isnan().all()
        assert f"rank(s) {size - 1} did not arrive within {LIMIT:g} s in call" in sentence(group.check)
    gather_objects(None)
    said = sentence(lambda: case.call(group, rank))
    assert len(set(gather_objects(said))) == 1
    assert same(case.call(shared_group, rank), want)


def test_a_missing_rank_in_a_replay_and_a_replay_after_destroy(make, shared_group, rank, size):
    group = make(timeout=LIMIT, first_timeout=20)
    case = Case(size, 8, 2184, 520, torch.bfloat16)
    want = case.expected()
    case.call(group, rank)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = case.call(group, rank, static_weight=True)
    graph.replay()
    assert same(y, want)
    torch.cuda.synchronize()
    gather_objects(None)
    if rank == 0:
        graph.replay()
        torch.cuda.synchronize()
        assert y.isnan().all()
        assert "did not arrive" in sentence(group.check)
    gather_objects(None)
    group.destroy()
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert y.isnan().all()
    assert same(case.call(shared_group, rank), want)


@pytest.mark.parametrize("what", ["tokens", "columns", "bias", "op"])
def test_calls_that_disagree_are_named(make, shared_group, rank, size, what):
    group = make(timeout=LIMIT, first_timeout=20)
    case = Case(size, 4, 2184, 520, torch.bfloat16, bias=True)
    assert same(case.call(group, rank), case.expected())
    torch.cuda.synchronize()
    gather_objects(None)
    x, w, bias = case.xs[rank], case.ws[rank], case.bias
    start = time.monotonic()
    if rank == 0:
        linear(x, w, bias, group)
    elif what == "tokens":
        linear(x[:3], w, bias, group)
    elif what == "columns":
        linear(x, w[:512], bias[:512], group)
    elif what == "bias":
        linear(x, w, None, group)
    else:
        group.all_reduce(x)
    torch.cuda.synchronize()
    assert time.monotonic() - start < LIMIT
    gather_objects(None)
    said = sentence(group.check)
    reference = "rank 0 called row_parallel_linear(bfloat16, y [4, 2184], bias, fused), rank 1 called "
    other = {
        "tokens": "row_parallel_linear(bfloat16, y [3, 2184], bias, fused)",
        "columns": "row_parallel_linear(bfloat16, y [4, 512], bias, fused)",
        "bias": "row_parallel_linear(bfloat16, y [4, 2184], no bias, fused)",
        "op": "all_reduce(bfloat16, 2080 elements, sum)",
    }[what]
    assert reference + other in said
    assert len(set(gather_objects(said))) == 1
    assert same(case.call(shared_group, rank), case.expected())


def test_streams_wait_for_one_another(shared_group, rank, size):
    case = Case(size, 16, 2056, 520, torch.bfloat16)
    want = case.expected().view(torch.int16)
    streams = [torch.cuda.Stream() for _ in range(2)]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    for i in range(100):
        with torch.cuda.stream(streams[i % 2]):
            wrong[i % 2] += (case.call(shared_group, rank, static_weight=True).view(torch.int16) != want).sum()
    torch.cuda.synchronize()
    assert [w.item() for w in wrong] == [0, 0]
