"""The contexts of use_symmetric_memory on GPUs, with pools that only note who uses them: no GPU is needed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sglang_symm import memory_cuda
from sglang_symm.memory_cuda import CudaArenaContext


class FakeGroup:
    def __init__(self, name: str) -> None:
        self.unique_name, self.device, self.destroyed = name, "cuda:1", False


class Native:
    """The stack of groups that the native library keeps, one a thread."""

    def __init__(self) -> None:
        self.threads = threading.local()
        self.capture = 0

    def stack(self) -> list[str]:
        if not hasattr(self.threads, "stack"):
            self.threads.stack = []
        names: list[str] = self.threads.stack
        return names

    def _enter_symmetric_memory(self, name: str) -> None:
        self.stack().append(name)

    def _capture_id(self, name: str) -> int:
        return self.capture

    def _exit_symmetric_memory(self, name: str) -> None:
        innermost = self.stack()[-1:] == [name]
        if name in self.stack():
            self.stack().reverse()
            self.stack().remove(name)
            self.stack().reverse()
        if not innermost:
            raise ValueError("innermost first")


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`in_use`: the pools that are in use, by thread; `let_go`: whether one went while any was."""
    seen: dict[str, Any] = {"in_use": {}, "let_go": [], "native": Native(), "capturing": False, "devices": []}
    current = threading.local()  # the device of a thread, whose first is cuda:0

    @contextlib.contextmanager
    def on(device: object) -> Iterator[None]:
        before, current.device = getattr(current, "device", "cuda:0"), device
        yield
        current.device = before

    class Pool:
        def __init__(self, allocator: object) -> None:
            seen["devices"].append(getattr(current, "device", "cuda:0"))

        def __del__(self) -> None:
            seen["let_go"].append(any(seen["in_use"].values()))

    @contextlib.contextmanager
    def use(pool: Pool, device: object) -> Iterator[None]:
        assert all(pool not in used for used in seen["in_use"].values()), "a pool is in use twice"
        used = seen["in_use"].setdefault(threading.get_ident(), [])
        used.append(pool)
        yield
        used.remove(pool)

    class Allocator:
        def allocator(self) -> None:
            return None

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "MemPool", Pool)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", use)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: seen["capturing"])
    monkeypatch.setattr(torch.ops, "sglang_symm", seen["native"])
    monkeypatch.setattr(memory_cuda, "_allocator", Allocator)
    monkeypatch.setattr(memory_cuda, "_pools", memory_cuda._Pools())
    monkeypatch.setattr(memory_cuda, "_thread", memory_cuda._Thread())
    return seen


def mine(pools: dict[str, Any]) -> list[Any]:
    return list(pools["in_use"].get(threading.get_ident(), []))


def context(name: str) -> CudaArenaContext:
    return CudaArenaContext(FakeGroup(name))  # type: ignore[arg-type]


def test_a_pool_is_made_on_its_group_s_device_whatever_the_thread_s(pools: dict[str, Any]) -> None:
    def work() -> None:
        with context("first"):
            pass

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert pools["devices"] == ["cuda:1", "cuda:1"]


def test_only_the_innermost_pool_is_in_use_and_the_outer_one_again_afterwards(pools: dict[str, Any]) -> None:
    first, second = context("first"), context("second")
    with first:
        (outer,) = mine(pools)
        with second:
            (inner,) = mine(pools)
            assert inner is not outer
            with first:
                assert mine(pools) == [outer]
                with first:
                    assert mine(pools) == [outer]
                assert mine(pools) == [outer]
            assert mine(pools) == [inner]
        assert mine(pools) == [outer]
    assert mine(pools) == []
    with first:
        assert mine(pools) == [outer], "a group's pool serves it again"


def test_left_in_the_wrong_order_raises_and_leaves_the_thread_outside(pools: dict[str, Any]) -> None:
    first, second = context("first"), context("second")
    first.__enter__()
    second.__enter__()
    (inner,) = mine(pools)
    with pytest.raises(ValueError, match="innermost first"):
        first.__exit__(None, None, None)
    assert mine(pools) == [inner]
    second.__exit__(None, None, None)
    assert mine(pools) == []
    with pytest.raises(ValueError, match="innermost first"):
        first.__exit__(None, None, None)
    assert pools["native"].stack() == []


def test_threads_have_pools_of_their_own_even_of_one_group(pools: dict[str, Any]) -> None:
    group, both, used = FakeGroup("one"), threading.Barrier(2), []

    def work() -> None:
        with CudaArenaContext(group):  # type: ignore[arg-type]
            both.wait(10)
            used.append(mine(pools))
            both.wait(10)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (a,), (b,) = used
    assert a is not b
    assert pools["let_go"] == [], "they outlive their threads"


def test_each_capture_has_one_pool_of_its_own(pools: dict[str, Any]) -> None:
    inside = context("one")
    seen = []
    for capture in (0, 7, 7, 8, 0):
        pools["native"].capture = capture
        pools["capturing"] = capture != 0
        with inside:
            seen += mine(pools)
    eager, first, again, _, after = seen
    assert first is again
    assert eager is after
    assert len({id(pool) for pool in seen}) == 3


def test_a_context_in_a_capture_never_takes_the_eager_pool_of_the_one_around_it(pools: dict[str, Any]) -> None:
    group = context("one")
    with group:
        (eager,) = mine(pools)
        pools["native"].capture, pools["capturing"] = 7, True
        with group:
            (captured,) = mine(pools)
        pools["native"].capture, pools["capturing"] = 0, False
        assert captured is not eager
        assert mine(pools) == [eager]


def test_pools_of_a_destroyed_group_go_when_no_context_is_open(pools: dict[str, Any]) -> None:
    gone, other = FakeGroup("gone"), context("other")
    with CudaArenaContext(gone):  # type: ignore[arg-type]
        gone.destroyed = True
        with other:
            assert pools["let_go"] == []
    with other:
        assert pools["let_go"] == [False]
    assert mine(pools) == []


def test_a_pool_that_cannot_be_used_leaves_nothing_behind(
    pools: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pool: object, device: object) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "use_mem_pool", refuse)
        with pytest.raises(RuntimeError, match="no"):
            context("one").__enter__()
    assert pools["native"].stack() == []
    assert memory_cuda._pools.contexts == 0
    with context("one"):
        assert len(mine(pools)) == 1
