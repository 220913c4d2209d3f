# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Causal attention over a key/value cache, for a batch of sequences without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """Keys and values of every layer: two tensors [layers, slots, kv_heads, max_len, head_dim]; one slot a sequence.

    Zero-filled, because masked places are multiplied by a weight of zero and must be finite."""

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        max_len: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.slots, self.max_len = slots, max_len
        shape = (layers, slots, kv_heads, max_len, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def move(self, source: int, target: int) -> None:
        """Copy a sequence to another slot (so that the running sequences stay side by side when one ends)."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]


@dataclass
class TokenBatch:
    """The tokens of one forward: sequence i has `lengths[i]` new ones after `starts[i]` in the cache's slot `slots[i]`.

    All sequences lie behind each other in one dimension of n = sum(lengths) rows. Zero sequences are allowed.
    Raises ValueError when the lists differ in length or a sequence has no token."""

    slots: Sequence[int]
    starts: Sequence[int]
    lengths: Sequence[int]
    device: torch.device | str = "cpu"
    positions: Tensor = field(init=False)  # [n]
    last_rows: Tensor = field(init=False)  # [sequences]
    is_decode: bool = field(init=False)

    def __post_init__(self) -> None:
        if not len(self.slots) == len(self.starts) == len(self.lengths) or any(n < 1 for n in self.lengths):
            raise ValueError(
                "a batch needs a slot, a start and a length >= 1 for each sequence, "
                f"got {self.slots=} {self.starts=} {self.lengths=}"
            )
        positions = [p for start, n in zip(self.starts, self.lengths) for p in range(start, start + n)]
        self.positions = torch.tensor(positions, dtype=torch.int64, device=self.device)
        self.last_rows = torch.tensor(self.lengths, dtype=torch.int64, device=self.device).cumsum(0) - 1
        self.is_decode = bool(self.lengths) and max(self.lengths) == 1
        if self.is_decode:
            self.slot_ids = torch.tensor(self.slots, dtype=torch.int64, device=self.device)
            self.longest = max(self.starts) + 1
            self.mask = (torch.arange(self.longest, device=self.device) <= self.positions[:, None])[:, None, None]

    @property
    def num_tokens(self) -> int:
        return self.positions.numel()


class Attention:
    """`softmax(q k^T / sqrt(d) + causal) v` for each sequence of a batch, with its cached keys and values before the
    new ones.

    __call__: q [n, heads, d], k and v [n, kv_heads, d] of the n new tokens -> [n, heads, d]; stores k and v in the
    cache. heads must be a multiple of kv_heads (each key/value head serves heads / kv_heads query heads)."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, batch: TokenBatch, cache: KVCache) -> Tensor:
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        attend = self._decode if batch.is_decode else self._extend
        return attend(q, k, v, batch, keys, values)

    @staticmethod
    def _decode(q: Tensor, k: Tensor, v: Tensor, batch: TokenBatch, keys: Tensor, values: Tensor) -> Tensor:
        """One new token a sequence: all sequences at once, each masked to its length."""
        keys[batch.slot_ids, :, batch.positions] = k
        values[batch.slot_ids, :, batch.positions] = v
        first, count = batch.slots[0], len(batch.slots)
        if list(batch.slots) == list(range(first, first + count)):  # a view instead of a copy of the cache
            keys, values = keys[first : first + count], values[first : first + count]
        else:
            keys, values = keys[batch.slot_ids], values[batch.slot_ids]
        keys, values = keys[:, :, : batch.longest], values[:, :, : batch.longest]
        if q.is_cuda:
            # Query heads that share a key/value head as rows of one query: with a mask and enable_gqa PyTorch may copy
            # the cache for every query head instead.
            rows = q.unflatten(1, (keys.shape[1], -1))
            return F.scaled_dot_product_attention(rows, keys, values, attn_mask=batch.mask).flatten(1, 2)
        y = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=batch.mask, enable_gqa=True)
        return y[:, :, 0]

    @staticmethod
    def _extend(q: Tensor, k: Tensor, v: Tensor, batch: TokenBatch, keys: Tensor, values: Tensor) -> Tensor:
        """Any number of new tokens: one sequence after the other, so that no padding is computed."""
        y, row = torch.empty_like(q), 0
        for slot, start, n in zip(batch.slots, batch.starts, batch.lengths):
            rows, end = slice(row, row + n), start + n
            keys[slot, :, start:end] = k[rows].transpose(0, 1)
            values[slot, :, start:end] = v[rows].transpose(0, 1)
            # is_causal aligns the mask with the first key; after cached tokens it must be aligned with the last.
            mask = None if start == 0 else torch.ones(n, end, dtype=torch.bool, device=q.device).tril(start)
            heads = F.scaled_dot_product_attention(
                q[rows].transpose(0, 1)[None],
                keys[None, slot, :, :end],
                values[None, slot, :, :end],
                attn_mask=mask,
                is_causal=start == 0,
                enable_gqa=True,
            )
            y[rows] = heads[0].transpose(0, 1)
            row += n
        return y
