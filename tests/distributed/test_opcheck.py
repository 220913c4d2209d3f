"""torch.library.opcheck on every public op but `empty`, over ranks: eager and AOTAutograd make the same calls."""

from __future__ import annotations

import op_cases
import pytest
import torch

from sglang_symm.distributed import Group


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize(("case", "dtype"), op_cases.parameters([torch.uint8, torch.int64]))
def test_opcheck(group: Group, case: op_cases.Case, dtype: torch.dtype) -> None:
    case.check(op_cases.Ranks(group.unique_name, group.rank_in_group, group.world_size), dtype)
