"""Fake kernels give the shapes and dtypes of the real ones; collectives can be traced and compiled."""

import pytest
import torch
from distributed_cases import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode

OPS = torch.ops.sglang_symm


def calls(group):
    """One call of each functional op, by name."""
    name, size, rank = group.unique_name, group.world_size, group.rank_in_group
    sizes = [other + 1 for other in range(size)]

    def rand(*shape, dtype=torch.bfloat16):
        return torch.ones(shape, dtype=dtype)

    return {
        "all_reduce": lambda: OPS.all_reduce(rand(3, 4), name),
        "all_reduce of ints": lambda: OPS.all_reduce(rand(3, 4, dtype=torch.int64), name, "max"),
        "all_gather": lambda: OPS.all_gather(rand(3, 4), name, 1),
        "all_gather with sizes": lambda: OPS.all_gather(rand(2, rank + 1), name, -1, sizes),
        "reduce_scatter": lambda: OPS.reduce_scatter(rand(3, 2 * size), name, 1),
        "reduce_scatter with sizes": lambda: OPS.reduce_scatter(rand(sum(sizes), 2), name, 0, sizes),
        "row_parallel_linear": lambda: OPS.row_parallel_linear(rand(2, 3, 8), rand(5, 8), rand(5), name),
        "row_parallel_linear without bias": lambda: OPS.row_parallel_linear(rand(0, 8), rand(5, 8), None, name),
        "all_reduce_add_rms_norm": lambda: OPS.all_reduce_add_rms_norm(rand(3, 8), rand(3, 8), rand(8), 1e-6, name),
        "row_parallel_linear_add_rms_norm": lambda: OPS.row_parallel_linear_add_rms_norm(
            rand(3, 8), rand(5, 8), rand(5), rand(3, 5), rand(5), 1e-6, name
        ),
    }


def outline(result):
    tensors = result if isinstance(result, tuple | list) else [result]
    # The stride of a dimension of one element says nothing.
    strides = [[stride for size, stride in zip(y.shape, y.stride(), strict=True) if size > 1] for y in tensors]
    return [(tuple(y.shape), y.dtype, y.device, stride) for y, stride in zip(tensors, strides, strict=True)]


@pytest.mark.parametrize("op", calls(type("", (), {"unique_name": "", "world_size": 1, "rank_in_group": 0})))
def test_a_fake_kernel_outlines_what_the_real_one_gives(group, op):
    real = outline(calls(group)[op]())
    with FakeTensorMode():
        assert outline(calls(group)[op]()) == real


# name -> a call of group name and world size that every op refuses, before anything is sent.
WRONG = {
    "unknown group": lambda g, n: OPS.all_reduce(torch.ones(2), "nobody"),
    "reduction": lambda g, n: OPS.all_reduce(torch.ones(2), g, "median"),
    "avg of ints": lambda g, n: OPS.all_reduce_(torch.ones(2, dtype=torch.int64), g, "avg"),
    "all_reduce_ of an expanded tensor": lambda g, n: OPS.all_reduce_(torch.ones(1).expand(3), g),
    "sparse": lambda g, n: OPS.all_gather(torch.ones(2, 2).to_sparse(), g),
    "dim of all_gather": lambda g, n: OPS.all_gather(torch.ones(3), g, 1),
    "scalar": lambda g, n: OPS.all_gather(torch.ones(()), g),
    "number of sizes": lambda g, n: OPS.all_gather(torch.ones(3), g, 0, [3] * (n + 1)),
    "negative size": lambda g, n: OPS.all_gather(torch.ones(3), g, 0, [-1] * n),
    "own size": lambda g, n: OPS.all_gather(torch.ones(3), g, 0, [4] * n),
    "sum of sizes": lambda g, n: OPS.reduce_scatter(torch.ones(3), g, 0, [9] * n),
    "sizes beyond any tensor": lambda g, n: OPS.reduce_scatter(torch.ones(3), g, 0, [2**63 - 1] * n),
    "dim of reduce_scatter": lambda g, n: OPS.reduce_scatter(torch.ones(3), g, -2),
    "src": lambda g, n: OPS.broadcast_(torch.ones(3), n, g),
    "broadcast_ of an expanded tensor": lambda g, n: OPS.broadcast_(torch.ones(1).expand(3), 0, g),
    "weight's shape": lambda g, n: OPS.row_parallel_linear(torch.ones(3, 8), torch.ones(5, 7), None, g),
    "weight's dtype": lambda g, n: OPS.row_parallel_linear(torch.ones(3, 8), torch.ones(5, 8).double(), None, g),
    "ints": lambda g, n: OPS.row_parallel_linear(torch.ones(3, 8).int(), torch.ones(5, 8).int(), None, g),
    "bias": lambda g, n: OPS.row_parallel_linear(torch.ones(3, 8), torch.ones(5, 8), torch.ones(8), g),
    "out": lambda g, n: OPS.row_parallel_linear_out(torch.ones(3, 8), torch.ones(5, 8), None, g, torch.ones(3, 4)),
    "out's strides": lambda g, n: OPS.row_parallel_linear_out(
        torch.ones(3, 8), torch.ones(5, 8), None, g, torch.ones(5, 3).t()
    ),
    "residual": lambda g, n: OPS.all_reduce_add_rms_norm(torch.ones(3, 8), torch.ones(8), torch.ones(8), 1e-6, g),
    "norm weight": lambda g, n: OPS.row_parallel_linear_add_rms_norm(
        torch.ones(3, 8), torch.ones(5, 8), None, torch.ones(3, 5), torch.ones(8), 1e-6, g
    ),
    "residual's dtype": lambda g, n: OPS.all_reduce_add_rms_norm(
        torch.ones(3, 8), torch.ones(3, 8).half(), torch.ones(8), 1e-6, g
    ),
}
SEVERAL_RANKS = {
    "indivisible": lambda g, n: OPS.reduce_scatter(torch.ones(2 * n + 1), g),
    "sum that nobody does": lambda g, n: OPS.all_reduce(torch.ones(3, dtype=torch.int16), g),
    "product of complex numbers": lambda g, n: OPS.all_reduce(torch.ones(3, dtype=torch.complex64), g, "product"),
}
# Layouts, and dtypes in sentences about calls, have names of their own in C++.
TORCH_NAMES = [
    ("product of torch.", "product of "),
    ("sum of torch.", "sum of "),
    ("torch.sparse_coo", "Sparse"),
]


@pytest.mark.parametrize("name", WRONG | SEVERAL_RANKS)
def test_fake_kernels_refuse_what_the_real_ones_refuse_in_their_words(group, name):
    if name in SEVERAL_RANKS and group.world_size == 1:
        pytest.skip("one rank sends nothing")
    call = (WRONG | SEVERAL_RANKS)[name]
    with pytest.raises(ValueError, match=r"^sglang_symm: \w+") as real:
        call(group.unique_name, group.world_size)
    with FakeTensorMode(), pytest.raises(ValueError, match=r"^sglang_symm: \w+") as fake:
        call(group.unique_name, group.world_size)
    sentence = str(fake.value)
    for python, cxx in TORCH_NAMES:
        sentence = sentence.replace(python, cxx)
    assert sentence == str(real.value).splitlines()[0]


META = {
    "weight": lambda g: OPS.row_parallel_linear(torch.ones(3, 8), torch.ones(5, 8, device="meta"), None, g),
    "bias": lambda g: OPS.row_parallel_linear(torch.ones(3, 8), torch.ones(5, 8), torch.ones(5, device="meta"), g),
    "x": lambda g: OPS.row_parallel_linear(torch.ones(3, 8, device="meta"), torch.ones(5, 8), None, g),
    "out": lambda g: OPS.row_parallel_linear_out(
        torch.ones(3, 8), torch.ones(5, 8), None, g, torch.ones(3, 5, device="meta")
    ),
    "residual": lambda g: OPS.all_reduce_add_rms_norm(
        torch.ones(3, 8), torch.ones(3, 8, device="meta"), torch.ones(8), 1e-6, g
    ),
    "norm weight": lambda g: OPS.row_parallel_linear_add_rms_norm(
        torch.ones(3, 8), torch.ones(5, 8), None, torch.ones(3, 5), torch.ones(5, device="meta"), 1e-6, g
    ),
}


@pytest.mark.parametrize("name", META)
def test_a_meta_tensor_among_real_ones_is_refused_and_gives_no_memory_that_nobody_wrote(group, name):
    calls = group.info()["calls"]
    with pytest.raises(ValueError, match=rf"expected .* on {DEVICE}.* on meta|expected .* on meta.* on {DEVICE}"):
        META[name](group.unique_name)
    assert group.info()["calls"] == calls


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_collectives_compile_into_one_graph(group, backend):
    name = group.unique_name

    def function(x):
        y = torch.ops.sglang_symm.all_reduce(x * 2, name) + 1
        return torch.ops.sglang_symm.all_gather(y, name, 0).sum()

    x = torch.full((4, 3), float(group.rank_in_group))
    expected = function(x)
    assert torch.equal(torch.compile(function, backend=backend, fullgraph=True)(x), expected)


def test_methods_of_a_group_compile_too(group):
    x = torch.ones(4)
    compiled = torch.compile(lambda x: group.all_reduce(x) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), torch.full((4,), group.world_size + 1.0))


def test_an_in_place_collective_compiles(group):
    name = group.unique_name

    def function(x):
        y = x + 1
        torch.ops.sglang_symm.all_reduce_(y, name)
        torch.ops.sglang_symm.broadcast_(y, 0, name)
        return y * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 4.0 * group.world_size))
