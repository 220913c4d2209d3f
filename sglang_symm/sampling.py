# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""The next token of each sequence from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued.

    max_new_tokens    at least 1
    temperature       0: the most likely token (greedy); else the logits are divided by it
    top_k, top_p      keep the k most likely tokens (0: all), then the fewest whose probabilities reach p
    seed              of the request's own random numbers: its tokens do not depend on what else is in the batch
    stop_token_ids    end after any of these, besides the model's own
    ignore_eos        go on after the model's own stop tokens

    Raises ValueError for values out of range."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("seed", -(1 << 63) <= self.seed < 1 << 64, "a number of 64 bits"),
        ):
            if not good:
                raise ValueError(f"expected {name} {expected}, got {getattr(self, name)}")


def generator(params: SamplingParams) -> torch.Generator:
    """The random numbers of one request, alike on every rank (on the CPU whatever the device, so that a layout does not
    matter)."""
    return torch.Generator().manual_seed(params.seed)


def first_without_choice(logits: Tensor) -> int | None:
    """The first row of logits [n, V] that says nothing, because it holds NaN or infinity or is empty of numbers."""
    largest = logits.amax(dim=-1)  # NaN if any is
    rows = (~largest.isfinite()).nonzero()
    return int(rows[0]) if len(rows) else None


def sample(logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]) -> list[int]:
    """`token_i = argmax(logits_i)`, or one drawn from `softmax(logits_i / temperature)` cut to top_k and top_p.

    logits [n, V] of any float dtype; one of params and generators a row. One uniform number u is drawn a token; the
    token is the first whose cumulative probability, most likely first, exceeds u. So equal logits and seeds give equal
    tokens on every rank."""
    tokens = logits.argmax(dim=-1).tolist()
    for row, (p, random) in enumerate(zip(params, generators)):
        if p.temperature > 0:
            tokens[row] = _draw(logits[row], p, float(torch.rand((), generator=random, dtype=torch.float64)))
    return tokens


def _draw(logits: Tensor, params: SamplingParams, u: float) -> int:
    ordered, ids = (logits.double() / params.temperature).sort(descending=True, stable=True)
    if params.top_k:
        ordered = ordered[: params.top_k]
    cumulative = ordered.softmax(dim=0).cumsum(dim=0)
    kept = 1 + int((cumulative[:-1] < params.top_p).sum())
    cumulative = cumulative[:kept]
    index = torch.searchsorted(cumulative, u * cumulative[-1], right=True)
    return int(ids[min(int(index), kept - 1)])
