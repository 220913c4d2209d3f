"""torch.library.opcheck on every public op but `empty` (which is eager only), in a group of one rank."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import op_cases
import pytest
import torch
import torch.distributed as dist

from sglang_symm.distributed import Group


@pytest.fixture(scope="module")
def ranks() -> Iterator[op_cases.Ranks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = Group(arena_bytes=1 << 20)
    yield op_cases.Ranks(group.unique_name, 0, 1)
    group.destroy()
    dist.destroy_process_group()


def test_every_public_op_is_checked() -> None:
    library = Path(__file__).resolve().parents[2] / "csrc" / "ops" / "library.cpp"
    public = set(re.findall(r'm\.def\(\s*"([a-z]\w*)\(', library.read_text()))
    assert {case.op for case in op_cases.CASES} == public - {"empty"}


@pytest.mark.parametrize(("case", "dtype"), op_cases.parameters(op_cases.INTEGERS + op_cases.COMPLEX))
def test_opcheck(ranks: op_cases.Ranks, case: op_cases.Case, dtype: torch.dtype) -> None:
    case.check(ranks, dtype)
