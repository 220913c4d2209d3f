# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""The next token: greedy, or drawn from what temperature, top_k and top_p leave."""

from __future__ import annotations

import pytest
import torch

from sglang_symm.sampling import SamplingParams, first_without_choice, generator, sample

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])


def draw(params: SamplingParams, count: int, logits: torch.Tensor = LOGITS) -> list[int]:
    random = generator(params)
    return [sample(logits[None], [params], [random])[0] for _ in range(count)]


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = torch.stack([LOGITS, -LOGITS])
    params = [SamplingParams()] * 2
    assert sample(logits, params, [generator(p) for p in params]) == [1, 3]


def test_equal_logits_take_the_lowest_token() -> None:
    assert draw(SamplingParams(), 3, torch.zeros(5)) == [0, 0, 0]


def test_tokens_come_as_often_as_the_softmax_says() -> None:
    count = 4000
    tokens = torch.tensor(draw(SamplingParams(temperature=2.0, seed=3), count))
    expected = (LOGITS / 2).softmax(0)
    found = tokens.bincount(minlength=5) / count
    # five standard deviations of a binomial share
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()


def test_top_k_and_top_p_keep_the_most_likely() -> None:
    assert set(draw(SamplingParams(temperature=5.0, top_k=2), 200)) == {1, 4}
    assert set(draw(SamplingParams(temperature=1.0, top_k=1), 50)) == {1}
    # softmax: 0.46, 0.28 (token 4), 0.17 (token 2), 0.06, 0.02
    assert set(draw(SamplingParams(temperature=1.0, top_p=0.7), 300)) == {1, 4}
    assert set(draw(SamplingParams(temperature=1.0, top_p=0.8), 300)) == {1, 4, 2}
    assert set(draw(SamplingParams(temperature=1.0, top_p=1e-9), 50)) == {1}


def test_a_request_s_tokens_depend_on_its_seed_and_not_on_its_batch() -> None:
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in (1, 2, 1)]
    generators = [generator(p) for p in params]
    batched = [sample(LOGITS.expand(3, -1), params, generators) for _ in range(20)]
    first, second, third = zip(*batched, strict=True)
    assert first == third
    assert first != second
    assert list(second) == draw(params[1], 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_float_dtype_is_sampled(dtype: torch.dtype) -> None:
    assert draw(SamplingParams(temperature=1.0, top_k=1), 1, LOGITS.to(dtype)) == [1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "expected max_new_tokens at least 1, got 0"),
        ({"temperature": -1.0}, "expected temperature at least 0, got -1.0"),
        ({"top_k": -1}, "expected top_k at least 0, got -1"),
        ({"seed": 1 << 64}, "expected seed a number of 64 bits, got 18446744073709551616"),
        ({"seed": -(1 << 63) - 1}, "expected seed a number of 64 bits"),
        ({"top_p": 0.0}, r"expected top_p in \(0, 1\], got 0.0"),
    ],
)
def test_values_out_of_range_are_errors(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_a_row_without_a_likeliest_token_is_found() -> None:
    row = torch.tensor([1.0, 2.0, -torch.inf])
    assert first_without_choice(torch.stack([row, row])) is None
    assert first_without_choice(torch.empty(0, 3)) is None
    for bad in (torch.nan, torch.inf):
        assert first_without_choice(torch.stack([row, torch.tensor([1.0, bad, 0.0])])) == 1
    assert first_without_choice(torch.full((1, 3), -torch.inf)) == 0
