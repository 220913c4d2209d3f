"""Tests over ranks on GPUs: a process a rank (torchrun), each on a GPU of its own, or all on one (tools/mps_rig.py)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sglang_symm.distributed.group import Group
from tests.distributed_cases import TIMEOUT

# Elsewhere there is nothing to run.
collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*"]


@pytest.fixture(scope="session", autouse=True)
def world() -> Iterator[None]:
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    shared = int(os.environ.get("WORLD_SIZE", "1")) > torch.cuda.device_count()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29571")
    # NCCL refuses two ranks on one GPU.
    dist.init_process_group("gloo" if shared else "cpu:gloo,cuda:nccl")
    yield
    dist.destroy_process_group()


@pytest.fixture
def size() -> int:
    return dist.get_world_size()


@pytest.fixture
def rank() -> int:
    return dist.get_rank()


@pytest.fixture
def make() -> Iterator[Callable[..., Group]]:
    groups: list[Group] = []

    def make_group(**settings: Any) -> Group:
        groups.append(Group(device="cuda", **{"timeout": TIMEOUT, "arena_bytes": 64 << 20, **settings}))
        return groups[-1]

    yield make_group
    torch.cuda.synchronize()
    for group in groups:
        group.destroy()


def new_shared_group() -> Group:
    return Group(device="cuda", timeout=TIMEOUT, arena_bytes=64 << 20)


@pytest.fixture(scope="session")
def shared_groups(world: None) -> Iterator[list[Group]]:
    groups = [new_shared_group()]
    yield groups
    torch.cuda.synchronize()
    groups[0].destroy()


@pytest.fixture
def shared_group(shared_groups: list[Group]) -> Group:
    """One for many tests; a test that broke it fails alone, the next has another."""
    torch.cuda.synchronize()
    try:
        shared_groups[0].check()
        broken = torch.tensor(0)
    except Exception:  # the others must hear of it, whatever it is
        broken = torch.tensor(1)
    dist.all_reduce(broken)
    if broken > 0:
        shared_groups[0].destroy()
        shared_groups[0] = new_shared_group()
    return shared_groups[0]


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Else the library, which multiplies what the copy engine does not take, may add up parts of k in 16 bits."""
    matmul = torch.backends.cuda.matmul
    before = (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction)
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    yield
    matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = before
