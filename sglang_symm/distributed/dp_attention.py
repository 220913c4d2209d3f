# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Data-parallel attention: each DP rank attends to its own tokens, and an MLP over the whole TP group sees all of them.

With D DP ranks of A attention-TP ranks each, tp_rank = dp_rank * A + attn_tp_rank, and n_d tokens on DP rank d:

    MAX_LEN   every DP rank is padded to L = max(n_d) rounded up to a multiple of A; global rows = D * L
              gather: rank (d, a) gives rows [a*L/A, (a+1)*L/A) of DP rank d, all_gather over TP
    SUM_LEN   no padding; global rows = sum(n_d)
              gather: zeros everywhere, rank (d, 0) writes its rows at n_0 + ... + n_(d-1), all_reduce over TP

MAX_LEN moves each row once; SUM_LEN computes no padding rows.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sglang_symm._autograd import without_gradient

if TYPE_CHECKING:
    from sglang_symm.distributed.parallel_state import ParallelState


class DpPaddingMode(enum.Enum):
    """How the tokens of several DP ranks are laid side by side."""

    MAX_LEN = "max_len"
    SUM_LEN = "sum_len"


@dataclass(frozen=True)
class ForwardBatch:
    """What every rank knows about the tokens of one forward.

    Attributes:
        token_counts: tokens of each DP rank, 0 for an idle one; equal on all ranks
            (``ParallelState.exchange_token_counts``).
        is_extend: whether the batch is a prefill.
        padding_mode: None: chosen, see ``mode``. Batches in a captured graph use MAX_LEN.

    Raises ValueError for no DP rank or a negative count.
    """

    token_counts: Sequence[int]
    is_extend: bool
    padding_mode: DpPaddingMode | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_counts", [int(count) for count in self.token_counts])
        if not self.token_counts or min(self.token_counts) < 0:
            raise ValueError(f"sglang_symm: expected a token count >= 0 for each DP rank, got {self.token_counts}")

    @property
    def mode(self) -> DpPaddingMode:
        """The padding mode of this forward.

        Prefills of several DP ranks use SUM_LEN, for their lengths differ much. Others use MAX_LEN if 2 * sum >= max
        * D: at most half of the rows are padding.
        """
        if self.padding_mode is not None:
            return self.padding_mode
        ranks = len(self.token_counts)
        if self.is_extend and ranks > 1:
            return DpPaddingMode.SUM_LEN
        dense = 2 * sum(self.token_counts) >= max(self.token_counts) * ranks
        return DpPaddingMode.MAX_LEN if dense else DpPaddingMode.SUM_LEN

    def padded_len(self, attn_tp_size: int) -> int:
        """Rows of each DP rank in MAX_LEN: the longest count, rounded up to a multiple of ``attn_tp_size``."""
        return -(-max(self.token_counts) // attn_tp_size) * attn_tp_size

    def global_len(self, attn_tp_size: int) -> int:
        """Rows of the gathered tensor."""
        if self.mode is DpPaddingMode.MAX_LEN:
            return len(self.token_counts) * self.padded_len(attn_tp_size)
        return sum(self.token_counts)

    def offset(self, dp_rank: int, attn_tp_size: int) -> int:
        """First row of ``dp_rank`` in the gathered tensor."""
        if self.mode is DpPaddingMode.MAX_LEN:
            return dp_rank * self.padded_len(attn_tp_size)
        return sum(self.token_counts[:dp_rank])


def dp_gather(x: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """The rows of all DP ranks, on every rank of the TP group, bit for bit (but -0.0 becomes 0.0 in SUM_LEN).

    Args:
        x: [n, H], this DP rank's rows, equal on its attention-TP ranks.
            n = token_counts[dp_rank], or padded_len in MAX_LEN.

    Returns [global_len, H]; padding rows that this function adds are zero. Collective over TP, also on ranks without
    tokens. Raises RuntimeError outside ``state.forward(batch)``, ValueError for another number of rows.
    """
    if state.attn_dp_size == 1:
        return x
    x = without_gradient(x, "dp_gather (data-parallel attention with one MLP over all ranks)")
    batch, attn_tp = state.current_batch(), state.attn_tp_size
    count, dp_rank = batch.token_counts[state.attn_dp_rank], state.attn_dp_rank
    max_len = batch.mode is DpPaddingMode.MAX_LEN
    padded = batch.padded_len(attn_tp) if max_len else count
    if x.dim() != 2 or x.shape[0] not in (count, padded):
        wanted = f"{count}" if count == padded else f"{count} or {padded}"
        raise ValueError(f"sglang_symm: dp_gather: expected [{wanted}, H] on DP rank {dp_rank}, got {list(x.shape)}")
    if max_len:
        share = padded // attn_tp
        first = state.attn_tp_rank * share
        part = x[first : first + share]
        if part.shape[0] < share:
            part = torch.cat([part, x.new_zeros(share - part.shape[0], x.shape[1])])
        return state.tp.all_gather(part)
    with state.use_symmetric_memory(state.tp, disabled=not state.is_allocation_symmetric()):
        rows = x.new_zeros(batch.global_len(attn_tp), x.shape[1])
    if state.attn_tp_rank == 0:
        first = batch.offset(dp_rank, attn_tp)
        rows[first : first + count] = x
    return state.tp.all_reduce(rows)


def dp_scatter(y: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """This DP rank's rows of the gathered ``y`` [global_len, H]: a view [token_counts[dp_rank], H]; no communication.

    Raises RuntimeError outside ``state.forward(batch)``, ValueError for another number of rows.
    """
    if state.attn_dp_size == 1:
        return y
    batch, attn_tp = state.current_batch(), state.attn_tp_size
    if y.shape[0] != batch.global_len(attn_tp):
        raise ValueError(f"sglang_symm: dp_scatter: expected {batch.global_len(attn_tp)} rows, got {list(y.shape)}")
    first = batch.offset(state.attn_dp_rank, attn_tp)
    return y[first : first + batch.token_counts[state.attn_dp_rank]]
