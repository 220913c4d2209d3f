"""Calls with one wrong argument: an exception each, a sentence in it, never a crash, and the group stays usable.

SGLANG_SYMM_TEST_N=50000 makes a long run of it.
"""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sglang_symm import _library

N = int(os.environ.get("SGLANG_SYMM_TEST_N", "3000"))
ops = torch.ops.sglang_symm
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(scope="module")
def group() -> Iterator[str]:
    _library.load()
    name = "bad-arguments"
    address = ops._group_listen(name, "cpu", 0, 1, 1 << 20, "", ["timeout=5"])
    ops._group_connect(name, [address])
    yield name
    ops._group_destroy(name)


def shape(r: random.Random, dims: int) -> list[int]:
    return [r.choice([1, 2, 3, 5, 8]) for _ in range(dims)]


def floats(r: random.Random, size: list[int]) -> torch.Tensor:
    return torch.ones(size, dtype=r.choice(FLOATS))


def wrong_group(r: random.Random) -> Any:
    return r.choice(["", "nobody", "bad-arguments ", "\0", "x" * 5000, None, 7, 1.5, ["bad-arguments"]])


def wrong_tensor(r: random.Random) -> Any:
    return r.choice([None, "x", 3, [1.0], torch.ones(2, 2).to_sparse(), object()])


def wrong_dim(r: random.Random, dims: int) -> Any:
    return r.choice([dims, dims + 7, -dims - 1, 1 << 40, "0", 0.5, None])


# Each returns a call that must raise.
def all_reduce(r: random.Random, g: str) -> Callable[[], Any]:
    x, op = floats(r, shape(r, 2)), r.choice([ops.all_reduce, ops.all_reduce_])
    return r.choice(
        [
            lambda: op(x, wrong_group(r)),
            lambda: op(wrong_tensor(r), g),
            lambda: op(x, g, r.choice(["", "SUM", "mean", "sum ", 3, None])),
            lambda: op(torch.ones(3, dtype=torch.int32), g, "avg"),
            lambda: ops.all_reduce_(torch.ones(1, 3).expand(4, 3), g),
            lambda: op(x, g, "sum", "more"),
            lambda: op(),
        ]
    )


def scatter_or_gather(r: random.Random, g: str) -> Callable[[], Any]:
    dims = r.choice([1, 2, 3])
    x, op = floats(r, shape(r, dims)), r.choice([ops.reduce_scatter, ops.all_gather])
    return r.choice(
        [
            lambda: op(x, wrong_group(r)),
            lambda: op(wrong_tensor(r), g),
            lambda: op(x, g, wrong_dim(r, dims)),
            lambda: op(torch.ones(()), g),
            lambda: op(x, g, 0, [x.shape[0] + r.choice([1, 5, 1 << 40])]),
            lambda: op(x, g, 0, []),
            lambda: op(x, g, 0, [x.shape[0], 0]),
            lambda: op(x, g, 0, [-1]),
            lambda: op(x, g, 0, ["1"]),
        ]
    )


def others(r: random.Random, g: str) -> Callable[[], Any]:
    x = floats(r, shape(r, 2))
    return r.choice(
        [
            lambda: ops.broadcast_(x, r.choice([1, -1, 1 << 50, "0", None, 0.5]), g),
            lambda: ops.broadcast_(torch.ones(1, 3).expand(4, 3), 0, g),
            lambda: ops.broadcast_(wrong_tensor(r), 0, g),
            lambda: ops.barrier(x, wrong_group(r)),
            lambda: ops.barrier(wrong_tensor(r), g),
            lambda: ops.empty([r.choice([-1, -(1 << 40)]), 3], g, dtype=torch.float32, device="cpu"),
            lambda: ops.empty([1 << 40], g, dtype=torch.float32, device="cpu"),
            lambda: ops.empty([1 << 62, 1 << 62], g, dtype=torch.float32, device="cpu"),
            lambda: ops.empty([2], g, dtype=torch.float32, device=r.choice(["meta", "nowhere", 3])),
            lambda: ops.empty([2], g, dtype="float32", device="cpu"),
            lambda: ops.empty(["2"], g, dtype=torch.float32, device="cpu"),
            lambda: ops._peer_view(g, r.choice([1, -1, 1 << 40]), 0, [1], torch.float32),
            lambda: ops._peer_view(g, 0, r.choice([-4, 1 << 40, 2]), [1], torch.float32),
            lambda: ops._peer_view(g, 0, 0, [r.choice([1 << 40, -1, 1 << 62])], torch.float32),
            lambda: ops._rendezvous(torch.ones(3), g),
            lambda: ops._rendezvous(torch.ones(3, 3).t()[:, :2], g),
            lambda: ops._exit_symmetric_memory(g),
            lambda: ops._enter_symmetric_memory(wrong_group(r)),
            lambda: ops._group_destroy("nobody"),
            lambda: ops._group_connect(g, r.choice([[], ["nonsense"], ["a|b|c|d|e"]])),
            lambda: ops._group_listen(g, "cpu", 0, 1, 1 << 20, "", []),
            lambda: ops._group_listen("new", "cpu", *r.choice([(1, 1), (-1, 2), (0, 0), (0, 17)]), 1 << 20, "", []),
            lambda: ops._group_listen("new", r.choice(["tpu", "cuda:99", ""]), 0, 1, 1 << 20, "", []),
            lambda: ops._group_listen("new", "cpu", 0, 1, r.choice([-1, 1, 1 << 60]), "", []),
            lambda: ops._group_listen(
                "new", "cpu", 0, 1, 1 << 20, "", [r.choice(["timeout", "timeout=x", "algo=fast"])]
            ),
            lambda: ops._group_listen(r.choice(["", "y" * 101]), "cpu", 0, 1, 1 << 20, "", []),
        ]
    )


def linear(r: random.Random, g: str) -> Callable[[], Any]:
    k, n, dtype = r.choice([1, 4, 7]), r.choice([1, 4, 9]), r.choice(FLOATS)
    x, w, b = torch.ones(3, k, dtype=dtype), torch.ones(n, k, dtype=dtype), torch.ones(n, dtype=dtype)
    other = torch.int32 if dtype is torch.float32 else torch.float32
    f = ops.row_parallel_linear
    norm = ops.row_parallel_linear_add_rms_norm
    return r.choice(
        [
            lambda: f(x, torch.ones(n, k + 1, dtype=dtype), None, g),
            lambda: f(x, w.to(other), None, g),
            lambda: f(x, torch.ones(n, dtype=dtype), None, g),
            lambda: f(x, torch.ones(1, n, k, dtype=dtype), None, g),
            lambda: f(torch.ones((), dtype=dtype), w, None, g),
            lambda: f(x.to(torch.int64), w.to(torch.int64), None, g),
            lambda: f(x, w, torch.ones(n + 1, dtype=dtype), g),
            lambda: f(x, w, torch.ones(1, n, dtype=dtype), g),
            lambda: f(x, w, b.to(other), g),
            lambda: f(x, w, b, wrong_group(r)),
            lambda: f(wrong_tensor(r), w, b, g),
            lambda: ops.row_parallel_linear_out(x, w, b, g, torch.ones(3, n + 1, dtype=dtype)),
            lambda: ops.row_parallel_linear_out(x, w, b, g, torch.ones(3, n, dtype=other)),
            lambda: ops.row_parallel_linear_out(x, w, b, g, torch.ones(n + 1, 4, dtype=dtype).t()[:3]),
            lambda: norm(x, w, b, torch.ones(3, n + 1, dtype=dtype), b, 1e-5, g),
            lambda: norm(x, w, b, torch.ones(3, n, dtype=other), b, 1e-5, g),
            lambda: norm(x, w, b, torch.ones(3, n, dtype=dtype), torch.ones(n + 1, dtype=dtype), 1e-5, g),
            lambda: norm(x, w, b, torch.ones(3, n, dtype=dtype), b, "eps", g),
            lambda: ops.all_reduce_add_rms_norm(x, torch.ones(2, k, dtype=dtype), torch.ones(k, dtype=dtype), 1e-5, g),
            lambda: ops.all_reduce_add_rms_norm(x, x, torch.ones(k + 1, dtype=dtype), 1e-5, g),
        ]
    )


def test_every_call_with_a_wrong_argument_raises_and_the_group_stays_usable(group: str) -> None:
    r = random.Random(5)
    kinds = [all_reduce, scatter_or_gather, others, linear]
    for number in range(N):
        call = r.choice(kinds)(r, group)
        error: Exception | None = None
        try:
            call()
        except (ValueError, RuntimeError, TypeError, OverflowError) as raised:
            error = raised
        assert error is not None, f"call {number}, in {inspect.getsourcelines(call)[1]}: nothing was raised"
        assert len(str(error)) > 10, f"call {number}: an error without a sentence: {error!r}"
    x = torch.arange(5.0)
    assert torch.equal(ops.all_reduce(x, group), x)
