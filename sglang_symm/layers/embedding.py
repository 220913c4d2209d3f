# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Vocabulary-parallel embedding and language-model head: rank r of attention-TP holds rows [r V/P, (r+1) V/P) of the
[V, H] table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang_symm._autograd import copy_to_ranks, gather_from_ranks, sum_over_ranks
from sglang_symm.layers.local import linear
from sglang_symm.layers.sharding import Shard, divide, resolve_group, resolve_state, sharded_parameter

if TYPE_CHECKING:
    from sglang_symm.distributed.parallel_state import ParallelState


class _VocabParallel(nn.Module):
    """A [V, H] table sharded by vocabulary over the attention-TP group."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        parallel_state: ParallelState | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.group = resolve_group(resolve_state(parallel_state), use_dp_attention_reduce=True)
        self.tp_rank, self.tp_size = self.group.rank_in_group, self.group.world_size
        self.vocab_size, self.vocab_per_rank = vocab_size, divide("vocabulary size", vocab_size, self.tp_size)
        self.first_token = self.tp_rank * self.vocab_per_rank
        shard = Shard((vocab_size, hidden_size), dim=0, start=self.first_token, size=self.vocab_per_rank)
        self.weight = sharded_parameter((self.vocab_per_rank, hidden_size), {None: shard}, dtype, device)


class VocabParallelEmbedding(_VocabParallel):
    """`y[i] = sum over ranks of (E_r[token_i] if rank r holds token_i else 0)`: exactly E[token_i], since one term is
    not zero.

    forward: token ids [n] (int64) -> [n, H]. Raises ValueError when P does not divide V."""

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.tp_size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.first_token
        elsewhere = (local < 0) | (local >= self.vocab_per_rank)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return sum_over_ranks(rows.masked_fill(elsewhere.unsqueeze(-1), 0), self.group)


class ParallelLMHead(_VocabParallel):
    """`logits = gather over ranks of (h @ W_r^T)`: h [n, H] -> [n, V], the same bits on every rank of attention-TP.

    Logits stay inside their DP rank. Raises ValueError when P does not divide V."""

    def forward(self, hidden: Tensor) -> Tensor:
        logits = linear(copy_to_ranks(hidden, self.group), self.weight)
        return logits if self.tp_size == 1 else gather_from_ranks(logits, self.group, dim=1)
