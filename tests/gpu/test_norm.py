"""all_reduce_add_rms_norm and row_parallel_linear_add_rms_norm on GPUs, in one kernel and behind one.

One checker for both: the residual stream has the bits of the ordered sum plus the residual; y is within a rounding of
the norm of those bits in fp64; and both paths, and all ranks, give the same bits.
"""

from __future__ import annotations

import time
import zlib

import pytest
import torch
import torch.distributed as dist

from tests.distributed_cases import NATIVE, gather_objects, inputs, ordered_sum, raised, same_bits

EPS = 1e-5
# bf16: whole chunks, more than two a thread, tails; rows of fp32 are twice as many chunks.
COLUMNS = [1, 8, 50, 576, 1000, 2048, 4096, 8192, 8195, 20_000]
ROWS = [1, 3, 64, 200]
OPS = torch.ops.sglang_symm


class Case:
    """One call's inputs on all ranks (every rank draws everybody's)."""

    def __init__(self, size, shape, dtype, seed=0):
        self.xs = inputs(size, shape, dtype, seed)
        self.residual = inputs(1, shape, dtype, seed + 1000)[0]
        self.weight = inputs(1, shape[-1:], dtype, seed + 2000)[0]

    def call(self, group, rank):
        x, residual, weight = self.xs[rank].cuda(), self.residual.cuda(), self.weight.cuda()
        y, hidden = OPS.all_reduce_add_rms_norm(x, residual, weight, EPS, group.unique_name)
        return y.cpu(), hidden.cpu()

    def hidden(self):
        return (ordered_sum(self.xs).float() + self.residual.float()).to(self.residual.dtype)


def problem(result, hidden, weight) -> str:
    """What is wrong with (y, hidden) of these bits of the residual stream; nothing if nothing is."""
    y, got = result
    if not same_bits(got, hidden):
        return "the residual stream has other bits"
    exact = hidden.double() / (hidden.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    # Two roundings of the dtype, and of fp32 what the mean and the root take.
    eps = torch.finfo(y.dtype).eps
    bound = (exact * weight.double()).abs() * (eps + eps**2 + 16 * torch.finfo(torch.float32).eps) + 1e-7
    if y.dtype == torch.float16:
        bound += 2.0**-24 * (1 + weight.double().abs())  # where it has no normal numbers
    worst = ((y.double() - exact * weight.double()).abs() - bound).max() if y.numel() else torch.zeros(())
    return "" if worst <= 0 else f"y is {worst:.3g} beyond a rounding"


def module_group(algo):
    from sglang_symm.distributed.group import Group

    group = Group(device="cuda", timeout=20.0, arena_bytes=64 << 20, algo=algo)
    yield group
    torch.cuda.synchronize()
    group.destroy()


@pytest.fixture(scope="module")
def one_kernel(world):
    yield from module_group("one_shot")


@pytest.fixture(scope="module")
def two_kernels(world):
    """A group whose all-reduce is never one-shot, hence never in one kernel with the norm."""
    yield from module_group("two_shot")


def normed_calls(group):
    return group.info()["normed_calls"]


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_one_kernel_and_two_give_the_bits_of_the_composition(one_kernel, two_kernels, rank, size, dtype, columns):
    before = normed_calls(one_kernel)
    for rows in ROWS:
        case = Case(size, [rows, columns], dtype, seed=rows)
        hidden = case.hidden()
        fused, separate = case.call(one_kernel, rank), case.call(two_kernels, rank)
        assert problem(fused, hidden, case.weight) == ""
        assert problem(separate, hidden, case.weight) == ""
        assert same_bits(fused[0], separate[0])
        # Parities take turns: slots were put back to rest.
        for _ in range(2):
            assert all(same_bits(a, b) for a, b in zip(case.call(one_kernel, rank), fused, strict=True))
    most = one_kernel.info()["settings"]["slot_bytes"] // size
    fits = sum(size == 1 or rows * -(-columns * dtype.itemsize // 16) * 16 <= most for rows in ROWS)
    assert normed_calls(one_kernel) - before == 3 * fits
    assert normed_calls(two_kernels) == 0
    crc = zlib.crc32(fused[0].contiguous().view(torch.uint8).numpy().tobytes())
    assert len(set(gather_objects(crc))) == 1


def test_the_checker_notices_what_may_go_wrong(shared_group, rank, size):
    """Its negative control: each of these results is one that a broken kernel would give."""
    case = Case(size, [7, 576], torch.bfloat16)
    y, hidden = case.call(shared_group, rank)
    expected = case.hidden()
    assert problem((y, hidden), expected, case.weight) == ""
    late = y.clone()
    late[3, 100:108] = float("nan")
    assert "nan" in problem((late, hidden), expected, case.weight)
    unrounded = ordered_sum([x.float() for x in case.xs]) + case.residual.float()
    assert "other bits" in problem((y, unrounded.bfloat16()), expected, case.weight)
    for part in (slice(8, None), slice(None, -8)):  # one chunk of a row left out of the mean
        wide = expected.double()
        mean = wide[:, part].pow(2).sum(-1, keepdim=True) / wide.shape[-1]
        short = (wide / (mean + EPS).sqrt() * case.weight.double()).bfloat16()
        assert "beyond a rounding" in problem((short, hidden), expected, case.weight)
    neighbour = y.roll(1, 0)
    assert "beyond a rounding" in problem((neighbour, hidden), expected, case.weight)


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_alignment_and_strides_change_nothing(shared_group, rank, size, dtype):
    group = shared_group
    case = Case(size, [5, 1001], dtype)
    y, hidden = case.call(group, rank)
    assert problem((y, hidden), case.hidden(), case.weight) == ""

    def shifted(t):
        whole = torch.empty(t.numel() + 16, dtype=dtype, device="cuda")
        start = 1 + rank % 3
        return whole[start : start + t.numel()].view(t.shape).copy_(t)

    x, residual, weight = shifted(case.xs[rank]), shifted(case.residual), shifted(case.weight)
    again = OPS.all_reduce_add_rms_norm(x, residual, weight, EPS, group.unique_name)
    assert same_bits(again[0].cpu(), y)
    assert same_bits(again[1].cpu(), hidden)
    transposed = [t.cuda().t().contiguous().t() for t in (case.xs[rank], case.residual)]
    again = OPS.all_reduce_add_rms_norm(*transposed, case.weight.cuda(), EPS, group.unique_name)
    assert same_bits(again[0].cpu(), y)


def test_no_rows_no_columns_and_more_dimensions(shared_group, rank, size):
    group = shared_group
    for shape in ([0, 64], [3, 0], [2, 3, 64]):
        case = Case(size, shape, torch.bfloat16)
        y, hidden = case.call(group, rank)
        assert y.shape == hidden.shape == torch.Size(shape)
        assert problem((y, hidden), case.hidden(), case.weight) == ""
    group.check()


def test_a_row_with_nan_is_nan_and_no_other(shared_group, rank, size):
    group = shared_group
    xs = inputs(size, [4, 576], torch.bfloat16)
    xs[0][2, 300:302] = torch.full((2,), -1, dtype=torch.int16).view(torch.bfloat16)  # the sentinel
    residual, weight = torch.ones(4, 576, dtype=torch.bfloat16), torch.ones(576, dtype=torch.bfloat16)
    y, hidden = OPS.all_reduce_add_rms_norm(xs[rank].cuda(), residual.cuda(), weight.cuda(), EPS, group.unique_name)
    assert y[2].isnan().all()
    assert hidden[2].isnan().sum() == 2
    assert not y[[0, 1, 3]].isnan().any()


def test_replays_equal_eager_among_other_calls(shared_group, rank, size):
    group = shared_group
    cases = [Case(size, [m, 2048], torch.bfloat16, seed=m) for m in (1, 16)]
    static = [(c.xs[rank].cuda(), c.residual.cuda(), c.weight.cuda()) for c in cases]
    expected = [c.call(group, rank) for c in cases]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = []
        for _ in range(3):
            for inputs_ in static:
                outs.append(OPS.all_reduce_add_rms_norm(*inputs_, EPS, group.unique_name))
                group.all_reduce(inputs_[0])
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    want = [[t.cuda().view(torch.int16) for t in pair] for pair in expected]
    for i in range(300):
        graph.replay()
        if i % 7 == 0:
            group.all_gather(static[0][0])
        for k, pair in enumerate(outs):
            for a, b in zip(pair, want[k % 2], strict=True):
                wrong += (a.view(torch.int16) != b).sum()
    assert wrong.item() == 0
    group.check()


# 40 tokens of 2048 rows: half of the SMs would have no tile, between two GPUs and between two ranks that share one.
@pytest.mark.parametrize("dtype", NATIVE, ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 2176), (16, 2176), (40, 2176), (40, 2048), (200, 2176)])
def test_behind_a_row_parallel_linear(shared_group, rank, size, dtype, m, n):
    group = shared_group
    k = 264
    generator = torch.Generator().manual_seed(m)
    x, w = (torch.randint(-4, 5, s, generator=generator).to(dtype).cuda() * (1 + rank % 2) for s in ((m, k), (n, k)))
    bias, residual, weight = (
        t[0].cuda() for t in (inputs(1, [n], dtype, 1), inputs(1, [m, n], dtype, 2), inputs(1, [n], dtype, 3))
    )
    name = group.unique_name
    for b in (None, bias):
        linear = OPS.row_parallel_linear(x, w, b, name)
        hidden = (linear.float() + residual.float()).to(dtype).cpu()
        for symmetric in (True, False):
            result = OPS.row_parallel_linear_add_rms_norm(x, w, b, residual, weight, EPS, name, symmetric=symmetric)
            assert problem([t.cpu() for t in result], hidden, weight.cpu()) == ""


def test_a_missing_rank_and_a_disagreement_leave_nan_and_a_sentence(make, rank, size):
    if size == 1:
        pytest.skip("needs a peer")
    case = Case(size, [3, 576], torch.bfloat16)
    for wrong_shape in (False, True):
        group = make(timeout=2.0, first_timeout=20.0)
        assert problem(case.call(group, rank), case.hidden(), case.weight) == ""
        gather_objects(None)
        start = time.monotonic()
        if rank != size - 1:
            y, _ = case.call(group, rank)
            assert wrong_shape or y.isnan().all()
        elif wrong_shape:
            Case(size, [6, 288], torch.bfloat16).call(group, rank)
        torch.cuda.synchronize()
        assert time.monotonic() - start < 4
        gather_objects(None)
        error = raised(group.check if rank != size - 1 or wrong_shape else lambda: case.call(group, rank))  # noqa: B023
        assert isinstance(error, dist.DistBackendError)
        said = str(error).split("\n")[0]
        assert "all_reduce_add_rms_norm(bfloat16, 1728 elements in rows of 576, fused)" in said
        assert len(set(gather_objects(said))) == 1
