"""Tests over several ranks: ordinary pytest files, run by `torchrun --nproc-per-node N -m pytest tests/distributed`.

Every test begins with all ranks meeting in the store, so a test that failed on one rank does not shift the calls of
the next. Without torchrun the world is this process alone.

With SGLANG_SYMM_TEST_DEVICE=cuda the same files run on GPUs, a GPU a rank (tools/run_tests.py --device cuda). Ranks
that share one (tools/mps_rig.py) have Gloo alone, which no part of run_tests asks for. What cannot run on GPUs is
marked cpu_only with its reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_cases import DEVICE

from sglang_symm.distributed import Group, destroy_model_parallel
from sglang_symm.distributed.rendezvous import Meeting, default_store

# Short enough that a hang is a failure soon, long enough for more ranks than cores.
SETTINGS: dict[str, Any] = {"device": DEVICE, "arena_bytes": 16 << 20, "timeout": 20.0, "first_timeout": 40.0}


@pytest.fixture(scope="session", autouse=True)
def world() -> Iterator[None]:
    backend = "gloo"
    if DEVICE == "cuda":
        gpu = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        torch.cuda.set_device(gpu)
        torch.set_default_device(f"cuda:{gpu}")
        if int(os.environ.get("WORLD_SIZE", "1")) <= torch.cuda.device_count():  # NCCL refuses two ranks on one GPU
            backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(seconds=20))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)
    yield
    torch.set_default_device(None)
    for group in _groups.values():
        group.destroy()
    _groups.clear()


_groups: dict[str, Group] = {}


@pytest.fixture(autouse=True)
def together(world: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """All ranks begin the same test, without the groups that broke on any of them."""

    def union(reports: list[dict[str, Any]]) -> dict[str, Any]:
        return {"broken": sorted({key for report in reports for key in report["broken"]})}

    broken = [key for key, group in _groups.items() if group.info()["broken"] is not None]
    meeting = Meeting(default_store(), f"test/{request.node.nodeid}", dist.get_rank(), dist.get_world_size(), 120)
    for key in meeting.agree({"broken": broken}, union)["broken"]:
        if key in _groups:
            _groups.pop(key).destroy()
    yield
    destroy_model_parallel()


@pytest.fixture
def shared() -> Callable[..., Group]:
    """Groups of the world that many tests use; asked for by their settings."""

    def get(**settings: Any) -> Group:
        key = repr(sorted(settings.items()))
        if key not in _groups:
            _groups[key] = Group(name="shared", **(SETTINGS | settings))
        return _groups[key]

    return get


@pytest.fixture
def group(shared: Callable[..., Group]) -> Group:
    """A healthy group of the world."""
    return shared()


@pytest.fixture
def make() -> Iterator[Callable[..., Group]]:
    """Makes groups that end with the test: `make(**settings)` of the world, `make(ranks=[...])` of some of it."""
    made: list[Group] = []

    def create(ranks: list[int] | None = None, **settings: Any) -> Group:
        settings = SETTINGS | settings
        made.append(Group(**settings) if ranks is None else Group.of_ranks(ranks, **settings))
        return made[-1]

    yield create
    for group in made:
        group.destroy()


@pytest.fixture
def rank() -> int:
    return dist.get_rank()


@pytest.fixture
def size() -> int:
    return dist.get_world_size()
