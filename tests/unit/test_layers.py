# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""The linear layers, embedding, head and norm against one-process PyTorch, on ranks that are threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from thread_ranks import Layout, make_states, run_threads
from torch import Tensor, nn

from sglang_symm.distributed import DpPaddingMode, ForwardBatch, ParallelState
from sglang_symm.layers import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    weights_are_static,
)
from sglang_symm.layers.sharding import WeightError, load_shard

EPS = torch.finfo(torch.float32).eps
K, N = 24, 12
X, W, B = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((5, K), (N, K), (N,)))


def fill(layer: nn.Module, weight: Tensor = W, bias: Tensor | None = B) -> None:
    load_shard(layer.weight, weight)
    if layer.bias is not None and bias is not None:
        load_shard(layer.bias, bias)


def close(found: Tensor, expected: Tensor) -> None:
    """Within the rounding of one fp32 dot product of length K."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= K * EPS * (X.abs() @ W.abs().T).max()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_row_parallel_linear_is_the_whole_linear_with_the_bias_added_once(ranks: int, bias: bool) -> None:
    def body(state: ParallelState) -> Tensor:
        layer = RowParallelLinear(K, N, bias=bias, parallel_state=state)
        fill(layer)
        y, output_bias = layer(X.chunk(ranks, dim=1)[state.tp_rank])
        assert output_bias is None
        return y

    outputs = run_threads(Layout(1, ranks), body)
    close(outputs[0], F.linear(X, W, B if bias else None))
    assert all(torch.equal(y, outputs[0]) for y in outputs)


def test_row_parallel_linear_takes_its_part_of_a_whole_input() -> None:
    def body(state: ParallelState) -> Tensor:
        layer = RowParallelLinear(K, N, input_is_parallel=False, parallel_state=state)
        fill(layer)
        return layer(X)[0]

    close(run_threads(Layout(1, 3), body)[1], F.linear(X, W, B))


@pytest.mark.parametrize("how", ["reduce_results=False", "skip_all_reduce=True"])
def test_without_a_reduction_rank_0_adds_the_bias_to_its_partial_sum(how: str) -> None:
    def body(state: ParallelState) -> Tensor:
        layer = RowParallelLinear(K, N, reduce_results=how != "reduce_results=False", parallel_state=state)
        fill(layer)
        y, _ = layer(X.chunk(3, dim=1)[state.tp_rank], skip_all_reduce=how == "skip_all_reduce=True")
        assert state.tp.calls == []
        return y

    partials = run_threads(Layout(1, 3), body)
    close(partials[0], F.linear(X[:, :8], W[:, :8], B))
    close(partials[2], F.linear(X[:, 16:], W[:, 16:]))
    close(sum(partials), F.linear(X, W, B))


def test_skip_bias_add_returns_the_bias_instead_of_adding_it() -> None:
    def body(state: ParallelState) -> tuple[Tensor, Tensor | None]:
        layer = RowParallelLinear(K, N, skip_bias_add=True, parallel_state=state)
        fill(layer)
        return layer(X.chunk(2, dim=1)[state.tp_rank])

    for y, bias in run_threads(Layout(1, 2), body):
        close(y, F.linear(X, W))
        assert bias is not None
        assert torch.equal(bias, B)


@pytest.mark.parametrize("enable_symm_mem", [True, False])
@pytest.mark.parametrize("padding_mode", list(DpPaddingMode))
@pytest.mark.parametrize("over_attn_tp", [True, False])
@pytest.mark.parametrize("attn_tp", [2, 3])
def test_output_is_symmetric_always_over_attention_tp_and_over_tp_only_if_allocation_is(
    enable_symm_mem: bool, padding_mode: DpPaddingMode, over_attn_tp: bool, attn_tp: int
) -> None:
    def body(state: ParallelState) -> list[str]:
        layer = RowParallelLinear(K, N, use_dp_attention_reduce=over_attn_tp, parallel_state=state)
        group = state.attn_tp if over_attn_tp else state.tp
        with state.forward(ForwardBatch([5, 3], is_extend=False, padding_mode=padding_mode)):
            layer(torch.zeros(5, K // group.world_size))
        return state.attn_tp.calls if over_attn_tp else state.tp.calls

    symmetric = enable_symm_mem and (over_attn_tp or padding_mode is DpPaddingMode.MAX_LEN)
    for calls in run_threads(Layout(2, attn_tp, enable_symm_mem), body):
        assert calls == [f"row_parallel_linear symmetric={symmetric}"]


def test_a_weight_is_static_only_while_somebody_promises_it() -> None:
    def body(state: ParallelState) -> list[str]:
        layer = RowParallelLinear(K, N, parallel_state=state)
        for promised in (None, True, False):
            if promised is not None:
                weights_are_static(torch.nn.Sequential(layer), promised)
            layer(torch.zeros(5, K // 2))
        return [call.partition(" static_weight")[1] for call in state.tp.calls]

    for calls in run_threads(Layout(1, 2), body):
        assert calls == ["", " static_weight", ""]


def test_a_group_of_one_rank_means_no_communication() -> None:
    def body(state: ParallelState) -> None:
        RowParallelLinear(K, N, parallel_state=state)(X)
        ColumnParallelLinear(K, N, gather_output=True, parallel_state=state)(X)
        VocabParallelEmbedding(10, K, state)(torch.tensor([1, 2]))
        ParallelLMHead(10, K, state)(X)
        assert state.tp.calls == []

    run_threads(Layout(1, 1), body)


@pytest.mark.parametrize("layer", [RowParallelLinear, ColumnParallelLinear])
def test_a_rank_or_size_of_another_group_is_an_error(layer: type[nn.Module]) -> None:
    state = make_states(Layout(2, 2))[3]  # TP rank 3 of 4, attention-TP rank 1 of 2
    layer(K, N, use_dp_attention_reduce=True, tp_rank=1, tp_size=2, parallel_state=state)
    layer(K, N, tp_rank=3, tp_size=4, parallel_state=state)
    with pytest.raises(ValueError, match=r"tp_rank=1, tp_size=2 do not match the TP group .*rank 3 of 4"):
        layer(K, N, tp_rank=1, tp_size=2, parallel_state=state)
    with pytest.raises(ValueError, match=r"tp_rank=3, tp_size=4 do not match the attention-TP group .*rank 1 of 2"):
        layer(K, N, use_dp_attention_reduce=True, tp_rank=3, tp_size=4, parallel_state=state)
    with pytest.raises(ValueError, match="tp_size=3"):
        layer(K, N, tp_size=3, parallel_state=state)


def test_sizes_that_do_not_divide_are_named() -> None:
    state = make_states(Layout(1, 4))[0]
    with pytest.raises(ValueError, match="input_size 10 does not divide by the 4 ranks"):
        RowParallelLinear(10, N, parallel_state=state)
    with pytest.raises(ValueError, match="output_size 10 does not divide by the 4 ranks"):
        ColumnParallelLinear(K, 10, parallel_state=state)
    with pytest.raises(ValueError, match=r"output_sizes\[1\] 6 does not divide by the 4 ranks"):
        MergedColumnParallelLinear(K, [8, 6], parallel_state=state)
    with pytest.raises(ValueError, match="number of attention heads 6 does not divide by the 4 ranks"):
        QKVParallelLinear(K, 4, 6, 2, parallel_state=state)
    with pytest.raises(ValueError, match="number of key/value heads 3 does not divide by the 4 ranks"):
        QKVParallelLinear(K, 4, 12, 3, parallel_state=state)
    with pytest.raises(ValueError, match="vocabulary size 10 does not divide by the 4 ranks"):
        VocabParallelEmbedding(10, K, state)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_column_parallel_linear_holds_rows_and_gathers_columns(ranks: int) -> None:
    def body(state: ParallelState) -> tuple[Tensor, Tensor]:
        outputs = []
        for gather in (False, True):
            layer = ColumnParallelLinear(K, N, gather_output=gather, parallel_state=state)
            fill(layer)
            outputs.append(layer(X))
        return outputs[0], outputs[1]

    outputs = run_threads(Layout(1, ranks), body)
    close(torch.cat([part for part, _ in outputs], dim=1), F.linear(X, W, B))
    for _, whole in outputs:
        close(whole, F.linear(X, W, B))


def test_merged_column_parallel_linear_holds_its_share_of_each_part() -> None:
    other = -2 * W[:6]

    def body(state: ParallelState) -> Tensor:
        layer = MergedColumnParallelLinear(K, [N, 6], bias=False, parallel_state=state)
        load_shard(layer.weight, W, 0)
        load_shard(layer.weight, other, 1)
        return layer(X)

    parts = [y.split([4, 2], dim=1) for y in run_threads(Layout(1, 3), body)]
    close(torch.cat([first for first, _ in parts], dim=1), F.linear(X, W))
    close(torch.cat([second for _, second in parts], dim=1), F.linear(X, other))


@pytest.mark.parametrize(
    ("ranks", "heads_of_rank", "kv_heads_of_rank"),
    [
        (1, [range(8)], [range(2)]),
        (2, [range(4), range(4, 8)], [[0], [1]]),
        (4, [[0, 1], [2, 3], [4, 5], [6, 7]], [[0], [0], [1], [1]]),
        (8, [[i] for i in range(8)], [[0]] * 4 + [[1]] * 4),
    ],
)
def test_each_rank_has_the_kv_heads_that_its_query_heads_need(
    ranks: int, heads_of_rank: list, kv_heads_of_rank: list
) -> None:
    d = 3
    whole = {"q": torch.arange(8.0), "k": 100 + torch.arange(2.0), "v": 200 + torch.arange(2.0)}
    weights = {part: head.repeat_interleave(d)[:, None].expand(-1, K).clone() for part, head in whole.items()}
    for rank, state in enumerate(make_states(Layout(1, ranks))):
        layer = QKVParallelLinear(K, d, 8, 2, bias=True, parallel_state=state)
        for part, weight in weights.items():
            load_shard(layer.weight, weight, part)
            load_shard(layer.bias, weight[:, 0].clone(), part)
        nn.init.zeros_(layer.weight)
        q, k, v = layer.split(layer(X))
        assert (layer.heads, layer.kv_heads) == (len(heads_of_rank[rank]), len(kv_heads_of_rank[rank]))
        assert q[0, :, 0].tolist() == list(heads_of_rank[rank])
        assert k[0, :, 0].tolist() == [100 + head for head in kv_heads_of_rank[rank]]
        assert v[0, :, 2].tolist() == [200 + head for head in kv_heads_of_rank[rank]]


@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(1, 3), Layout(2, 2)])
def test_vocabulary_is_sharded_over_attention_tp_and_nothing_is_rounded(layout: Layout) -> None:
    table = torch.randn(12, K)
    tokens = torch.tensor([0, 11, 5, 5, 3, 8])

    def body(state: ParallelState) -> tuple[Tensor, Tensor]:
        embedding, head = VocabParallelEmbedding(12, K, state), ParallelLMHead(12, K, state)
        load_shard(embedding.weight, table)
        load_shard(head.weight, table)
        assert embedding.weight.shape == (12 // layout.attn_tp, K)
        return embedding(tokens), head(X)

    outputs = run_threads(layout, body)
    for rows, logits in outputs:
        assert torch.equal(rows, table[tokens])
        assert torch.equal(logits, outputs[0][1])
        assert (logits - X @ table.T).abs().max() <= K * EPS * (X.abs() @ table.abs().T).max()


def test_layers_take_a_batch_of_no_tokens() -> None:
    def body(state: ParallelState) -> None:
        assert RowParallelLinear(K, N, parallel_state=state)(torch.zeros(0, K // 2))[0].shape == (0, N)
        assert VocabParallelEmbedding(12, K, state)(torch.zeros(0, dtype=torch.int64)).shape == (0, K)
        assert ParallelLMHead(12, K, state)(torch.zeros(0, K)).shape == (0, 12)

    run_threads(Layout(1, 2), body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_has_the_bits_of_hugging_face(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, residual = (torch.randn(7, K, dtype=dtype) for _ in range(2))
    ours, theirs = RMSNorm(K, 1e-5, dtype=dtype), LlamaRMSNorm(K, 1e-5).to(dtype)
    with torch.no_grad():
        theirs.weight.normal_()
        load_shard(ours.weight, theirs.weight)
        y, r = ours(x)
        assert r is x
        assert torch.equal(y, theirs(x))
        y, r = ours(x, residual)
        assert torch.equal(r, residual + x)
        assert torch.equal(y, theirs(residual + x))


def test_a_shard_of_another_shape_is_an_error_with_expected_and_found() -> None:
    layer = RowParallelLinear(K, N, parallel_state=make_states(Layout(1, 2))[1])
    with pytest.raises(WeightError, match=r"o_proj.weight: expected shape \[12, 24\], found \[24, 12\]"):
        load_shard(layer.weight, W.T, name="o_proj.weight")
