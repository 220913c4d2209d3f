# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""The matrix product of one rank: another order of the same product for few rows, and only where it is meant."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sglang_symm.layers import local

K, N = 64, 96


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(0,), (1,), (2,), (3,), (4,), (1, 2), (3, 1), (2, 2)])
def test_every_number_of_rows_gives_the_linear_layer(rows: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x, w = torch.randn(*rows, K, generator=generator), torch.randn(N, K, generator=generator)
    b = torch.randn(N, generator=generator) if bias else None
    with torch.inference_mode():
        found = local.linear(x, w, b)
    expected = F.linear(x.double(), w.double(), None if b is None else b.double())
    assert found.shape == expected.shape
    assert found.is_contiguous()
    bound = K * torch.finfo(torch.float32).eps * (x.abs() @ w.abs().T).max() if x.numel() else 0
    assert ((found - expected).abs() <= bound).all()


def test_few_rows_take_the_transposed_product_in_inference_mode_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(2, K), torch.randn(N, K)
    taken = []
    transposed = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: taken.append(a.shape) or transposed(a, b))
    assert torch.equal(local.linear(x, w), F.linear(x, w))
    assert not taken
    with torch.inference_mode():
        local.linear(x, w)
        local.linear(x.bfloat16(), w.bfloat16())
        local.linear(torch.randn(4, K), w)
    assert taken == [w.shape]


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_autocast_has_one_dtype_for_every_number_of_rows(rows: int) -> None:
    x, w, b = torch.randn(rows, K), torch.randn(N, K), torch.randn(N)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert local.linear(x, w, b).dtype == torch.bfloat16
