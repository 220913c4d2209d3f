# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Attention over a key/value cache against attention over the whole sequence at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_symm.layers import Attention, KVCache, TokenBatch

HEADS, KV_HEADS, D = 4, 2, 8
LENGTHS = (7, 1, 12, 4)
ROUNDING = 8 * torch.finfo(torch.float32).eps  # values are averages of normal numbers: the softmax's rounding alone


def make_sequences() -> list[tuple[Tensor, Tensor, Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [
        tuple(torch.randn(n, heads, D, generator=g) for heads in (HEADS, KV_HEADS, KV_HEADS))  # type: ignore[misc]
        for n in LENGTHS
    ]


SEQUENCES = make_sequences()


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention written out in fp64."""
    k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, dim=1).transpose(0, 1) for x in (k, v))
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) / D**0.5
    scores.masked_fill_(torch.ones(len(q), len(q), dtype=torch.bool).triu(1), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).float()


def step(cache: KVCache, slots: list[int], starts: list[int], lengths: list[int], layer: int = 1) -> list[Tensor]:
    """Attend with the next tokens of sequences 0, 1, ..., one after the other in a batch."""
    batch = TokenBatch(slots, starts, lengths)
    rows = [
        [x[start : start + n] for x in sequence] for sequence, start, n in zip(SEQUENCES, starts, lengths, strict=False)
    ]
    q, k, v = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return list(Attention(layer)(q, k, v, batch, cache).split(lengths))


def make_cache(slots: int = 6) -> KVCache:
    return KVCache(layers=2, slots=slots, kv_heads=KV_HEADS, max_len=16, head_dim=D)


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [2, 3, 4, 5], [5, 0, 3, 1]])
def test_prefill_of_unequal_sequences_equals_each_alone(slots: list[int]) -> None:
    for y, sequence in zip(step(make_cache(), slots, [0] * 4, list(LENGTHS)), SEQUENCES, strict=True):
        close(y, whole(*sequence))


@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [2, 3, 4, 5], [5, 0, 3, 1]])
def test_decoding_one_token_at_a_time_equals_the_whole_sequence(slots: list[int]) -> None:
    cache = make_cache()
    expected = [whole(*sequence) for sequence in SEQUENCES]
    running = [0, 2, 3]  # sequence 1 has one token only
    step(cache, slots, [0] * 4, [n - 3 if n > 3 else 1 for n in LENGTHS])
    for i in range(3):
        starts = [LENGTHS[s] - 3 + i for s in running]
        batch = TokenBatch([slots[s] for s in running], starts, [1, 1, 1])
        rows = [[x[start : start + 1] for x in SEQUENCES[s]] for s, start in zip(running, starts, strict=True)]
        q, k, v = (torch.cat(parts) for parts in zip(*rows, strict=True))
        for row, (s, start) in enumerate(zip(running, starts, strict=True)):
            close(Attention(1)(q, k, v, batch, cache)[row], expected[s][start])


def test_prefill_in_chunks_equals_prefill_at_once() -> None:
    cache = make_cache()
    first = step(cache, [0, 1, 2, 3], [0] * 4, [3, 1, 5, 2])
    batch = TokenBatch([0, 2], [3, 5], [4, 7])
    q, k, v = (torch.cat([SEQUENCES[0][x][3:], SEQUENCES[2][x][5:]]) for x in range(3))
    second = Attention(1)(q, k, v, batch, cache).split([4, 7])
    close(torch.cat([first[0], second[0]]), whole(*SEQUENCES[0]))
    close(torch.cat([first[2], second[1]]), whole(*SEQUENCES[2]))


def test_layers_and_slots_do_not_touch_each_other() -> None:
    cache = make_cache()
    step(cache, [1, 2, 3, 4], [0] * 4, list(LENGTHS), layer=0)
    assert not cache.keys[1].any()
    assert not cache.keys[0, 0].any()
    assert not cache.keys[0, 5].any()


def test_a_moved_sequence_goes_on_in_its_new_slot() -> None:
    cache = make_cache()
    step(cache, [0, 1, 2, 3], [0] * 4, [6, 1, 11, 3])
    cache.move(2, 0)
    batch = TokenBatch([0], [11], [1])
    q, k, v = (x[11:] for x in SEQUENCES[2])
    close(Attention(1)(q, k, v, batch, cache)[0], whole(*SEQUENCES[2])[11])


def test_a_batch_knows_positions_and_last_rows() -> None:
    batch = TokenBatch([0, 1, 2], [0, 4, 0], [3, 1, 2])
    assert batch.positions.tolist() == [0, 1, 2, 4, 0, 1]
    assert batch.last_rows.tolist() == [2, 3, 5]
    assert (batch.num_tokens, batch.is_decode) == (6, False)
    assert TokenBatch([0, 1], [3, 9], [1, 1]).is_decode


def test_a_batch_of_no_sequences_computes_nothing() -> None:
    batch, none = TokenBatch([], [], []), torch.zeros(0, HEADS, D)
    assert (batch.num_tokens, batch.last_rows.tolist(), batch.is_decode) == (0, [], False)
    assert Attention(0)(none, none[:, :2], none[:, :2], batch, make_cache()).shape == (0, HEADS, D)


def test_a_sequence_without_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="a slot, a start and a length >= 1"):
        TokenBatch([0, 1], [0, 0], [3, 0])
    with pytest.raises(ValueError, match="a slot, a start and a length >= 1"):
        TokenBatch([0], [0, 0], [3, 1])


def test_attention_agrees_with_torch_on_an_ordinary_causal_sequence() -> None:
    q, k, v = SEQUENCES[2]
    y = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True)
    assert torch.equal(step(make_cache(), [0, 1, 2], [0] * 3, list(LENGTHS[:3]))[2], y[0].transpose(0, 1))
