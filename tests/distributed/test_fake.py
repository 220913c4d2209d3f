"""Fake kernels give the shapes and dtypes of the real ones; collectives can be traced and compiled."""

import pytest
import torch
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


def test_fake_kernels_refuse_what_the_real_ones_refuse(group):
    wrong = [
        lambda: OPS.all_gather(torch.ones(3), group.unique_name, 1),
        lambda: OPS.all_gather(torch.ones(()), group.unique_name),
        lambda: OPS.reduce_scatter(torch.ones(2 * group.world_size + 1), group.unique_name),
        lambda: OPS.reduce_scatter(torch.ones(3), group.unique_name, 0, [9] * group.world_size),
        lambda: OPS.row_parallel_linear(torch.ones(3, 8), torch.ones(5, 7), None, group.unique_name),
    ]
    if group.world_size == 1:
        del wrong[2]
    for call in wrong:
        with pytest.raises(ValueError):  # noqa: PT011 - the texts are each op's own
            call()
        with FakeTensorMode(), pytest.raises(ValueError):  # noqa: PT011
            call()


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
