# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Linear layers sharded over a group of P ranks: by output (column) or by input (row) of `y = x @ W^T + b`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sglang_symm._autograd import copy_to_ranks, gather_from_ranks
from sglang_symm.layers.local import linear
from sglang_symm.layers.sharding import Shard, divide, replicated, resolve_group, resolve_state, sharded_parameter

if TYPE_CHECKING:
    from sglang_symm.distributed.parallel_state import ParallelState
    from sglang_symm.layers.norm import RMSNorm


class ColumnParallelLinear(nn.Module):
    """`y_r = x @ W_r^T + b_r`, where W_r [N/P, K] is rank r's rows of W [N, K]; with `gather_output` y [..., N] on
    every rank.

    Arguments: input_size K, output_size N (a multiple of P), bias, gather_output; use_dp_attention_reduce picks the
    attention-TP group instead of TP; tp_rank and tp_size default from the group and must match it.
    Raises ValueError for sizes that do not divide and for a tp_rank or tp_size of another group."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = False,
        use_dp_attention_reduce: bool = False,
        tp_rank: int | None = None,
        tp_size: int | None = None,
        parallel_state: ParallelState | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.state = resolve_state(parallel_state)
        self.group = resolve_group(self.state, use_dp_attention_reduce, tp_rank, tp_size)
        self.tp_rank, self.tp_size = self.group.rank_in_group, self.group.world_size
        self.gather_output = gather_output
        rows = self.rows()
        local = sum(size for _, size in rows.values())

        def parameter(*columns: int) -> nn.Parameter:
            shards, offset = {}, 0
            for part, (start, size) in rows.items():
                shards[part] = Shard((self.part_size(part), *columns), dim=0, start=start, size=size, offset=offset)
                offset += size
            return sharded_parameter((local, *columns), shards, dtype, device)

        self.weight = parameter(input_size)
        self.bias = parameter() if bias else None

    def part_size(self, part: int | str | None) -> int:
        """Rows of the checkpoint's tensor `part`."""
        return self.output_size

    def rows(self) -> dict[int | str | None, tuple[int, int]]:
        """(first row, number of rows) that this rank holds of each of the checkpoint's tensors."""
        local = divide("output_size", self.output_size, self.tp_size)
        return {None: (self.tp_rank * local, local)}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N/P], or [..., N] with gather_output."""
        y = linear(copy_to_ranks(x, self.group), self.weight, self.bias)
        if self.gather_output and self.tp_size > 1:
            y = gather_from_ranks(y, self.group, dim=y.dim() - 1)
        return y


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel layers of one input in one GEMM: `y_r = [x @ A_r^T, x @ B_r^T, ...]`.

    So are gate and up of an MLP. output_sizes: the N of each, every one a multiple of P. The checkpoint's tensors are
    parts 0, 1, ..."""

    def __init__(self, input_size: int, output_sizes: Sequence[int], bias: bool = True, **kwargs: Any) -> None:
        if kwargs.get("gather_output"):
            raise ValueError("MergedColumnParallelLinear cannot gather: the ranks' parts would interleave")
        self.output_sizes = list(output_sizes)
        super().__init__(input_size, sum(output_sizes), bias, **kwargs)

    def part_size(self, part: int | str | None) -> int:
        return self.output_sizes[part]  # type: ignore[index]

    def rows(self) -> dict[int | str | None, tuple[int, int]]:
        local = [divide(f"output_sizes[{i}]", size, self.tp_size) for i, size in enumerate(self.output_sizes)]
        return {i: (self.tp_rank * size, size) for i, size in enumerate(local)}


class QKVParallelLinear(ColumnParallelLinear):
    """`[q_r, k_r, v_r] = x @ [Q_r, K_r, V_r]^T`: rank r has heads/P query heads and the key/value heads that they need.

    P ranks share `kv_heads` key/value heads: kv_heads/P each, or, where ranks outnumber them, one head that P/kv_heads
    ranks hold alike. Arguments: hidden_size, head_dim, heads, kv_heads. The checkpoint's tensors are the parts "q",
    "k", "v".
    Raises ValueError when P does not divide heads, or neither of P and kv_heads divides the other."""

    def __init__(
        self, hidden_size: int, head_dim: int, heads: int, kv_heads: int, bias: bool = False, **kwargs: Any
    ) -> None:
        if kwargs.get("gather_output"):
            raise ValueError("QKVParallelLinear cannot gather: the ranks' parts would interleave")
        self.head_dim, self.total_heads, self.total_kv_heads = head_dim, heads, kv_heads
        super().__init__(hidden_size, (heads + 2 * kv_heads) * head_dim, bias, **kwargs)

    def part_size(self, part: int | str | None) -> int:
        return self.head_dim * (self.total_heads if part == "q" else self.total_kv_heads)

    def rows(self) -> dict[int | str | None, tuple[int, int]]:
        self.heads = divide("number of attention heads", self.total_heads, self.tp_size)
        if self.tp_size > self.total_kv_heads and self.tp_size % self.total_kv_heads == 0:
            self.kv_heads, first_kv_head = 1, self.tp_rank // (self.tp_size // self.total_kv_heads)
        else:
            self.kv_heads = divide("number of key/value heads", self.total_kv_heads, self.tp_size)
            first_kv_head = self.tp_rank * self.kv_heads
        d = self.head_dim
        kv = (first_kv_head * d, self.kv_heads * d)
        return {"q": (self.tp_rank * self.heads * d, self.heads * d), "k": kv, "v": kv}

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n, (heads + 2 kv_heads) head_dim] -> q [n, heads, head_dim], k and v [n, kv_heads, head_dim]."""
        q, k, v = qkv.split(
            [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim], dim=-1
        )
        return (
            q.unflatten(-1, (self.heads, self.head_dim)),
            k.unflatten(-1, (self.kv_heads, self.head_dim)),
            v.unflatten(-1, (self.kv_heads, self.head_dim)),
        )


class RowParallelLinear(nn.Module):
    """`y = sum over ranks r of x_r @ W_r^T (+ b)`, where W_r [N, K/P] is rank r's columns of W [N, K]: GEMM and
    all-reduce in one op.

    Arguments
        input_size K (a multiple of P), output_size N
        bias                     b [N], the same on every rank, added once
        input_is_parallel        x is already this rank's [..., K/P]; else forward takes its part of [..., K]
        skip_bias_add            do not add b, return it as `output_bias` for a later kernel to fuse
        reduce_results           False: return this rank's partial sum (rank 0's carries the bias)
        use_dp_attention_reduce  the group is attention-TP instead of TP
        tp_rank, tp_size         default from the group; a mismatch is a ValueError
    `static_weight`, an attribute, False at first: see `weights_are_static`.
    Where the output is allocated (with `enable_symm_mem`): over attention-TP always in the group's symmetric memory,
    because inside one DP rank every rank has the same number of tokens; over TP only if
    `parallel_state.is_allocation_symmetric()`."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        reduce_results: bool = True,
        use_dp_attention_reduce: bool = False,
        tp_rank: int | None = None,
        tp_size: int | None = None,
        parallel_state: ParallelState | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.state = resolve_state(parallel_state)
        self.group = resolve_group(self.state, use_dp_attention_reduce, tp_rank, tp_size)
        self.tp_rank, self.tp_size = self.group.rank_in_group, self.group.world_size
        self.input_is_parallel, self.skip_bias_add, self.reduce_results = (
            input_is_parallel,
            skip_bias_add,
            reduce_results,
        )
        self.use_dp_attention_reduce = use_dp_attention_reduce
        self.static_weight = False
        self.input_size_per_rank = local = divide("input_size", input_size, self.tp_size)
        shard = Shard((output_size, input_size), dim=1, start=self.tp_rank * local, size=local)
        self.weight = sharded_parameter((output_size, local), {None: shard}, dtype, device)
        self.bias = sharded_parameter((output_size,), {None: replicated(output_size)}, dtype, device) if bias else None

    def forward(self, x: Tensor, skip_all_reduce: bool = False) -> tuple[Tensor, Tensor | None]:
        """x [..., K/P] (or [..., K] without input_is_parallel) -> (y [..., N], the bias if skip_bias_add else None)."""
        if not self.input_is_parallel:
            x = copy_to_ranks(x, self.group).narrow(
                -1, self.tp_rank * self.input_size_per_rank, self.input_size_per_rank
            )
        bias = None if self.skip_bias_add else self.bias
        if self.tp_size == 1 or skip_all_reduce or not self.reduce_results:
            y = linear(x, self.weight, bias if self.tp_rank == 0 else None)
        else:
            y = torch.ops.sglang_symm.row_parallel_linear(
                x,
                self.weight,
                bias,
                self.group.unique_name,
                symmetric=self.output_is_symmetric(),
                static_weight=self.static_weight,
            )
        return y, self.bias if self.skip_bias_add else None

    def forward_add_norm(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """`norm(y, residual)` of `y = self(x)`, y and residual [..., N] -> (normed, y + residual), both [..., N].

        On GPUs, where no gradient is asked for, one op: residual and norm in the kernel behind the GEMM's. Else two."""
        fused = x.is_cuda and self.tp_size > 1 and self.reduce_results and self.input_is_parallel
        if not fused or self.skip_bias_add or torch.is_grad_enabled():
            return norm(self(x)[0], residual)
        return torch.ops.sglang_symm.row_parallel_linear_add_rms_norm(
            x,
            self.weight,
            self.bias,
            residual,
            norm.weight,
            norm.eps,
            self.group.unique_name,
            static_weight=self.static_weight,
            symmetric=self.output_is_symmetric(),
        )

    def output_is_symmetric(self) -> bool:
        """Whether the output goes to the group's symmetric memory: ungated over attention-TP, gated over TP."""
        gate = self.use_dp_attention_reduce or self.state.is_allocation_symmetric()
        return self.state.enable_symm_mem and gate


def weights_are_static(model: nn.Module, static: bool = True) -> None:
    """Promise that no kernel in flight writes the weights of the model's row-parallel layers while it runs.

    Their op may then fetch its weight while the kernel before it still ends (`static_weight`), which saves 2 to 3 us of
    a decode step's each. An optimizer step, a LoRA merge or a dequantisation right before a forward breaks the promise:
    take it back before with static=False, or call `torch.cuda.synchronize()` behind the change. On GPUs this waits for
    what is in flight now. ModelRunner promises it for the model that it runs."""
    layers = [module for module in model.modules() if isinstance(module, RowParallelLinear)]
    for device in {layer.weight.device for layer in layers if static and layer.weight.is_cuda}:
        torch.cuda.synchronize(device)
    for layer in layers:
        layer.static_weight = static
