# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""The layers over real ranks and the native op, against one-process PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import SETTINGS
from distributed_cases import seeded
from torch import Tensor, nn

from sglang_symm.distributed import ParallelState, initialize_model_parallel
from sglang_symm.layers import ColumnParallelLinear, ParallelLMHead, RowParallelLinear, VocabParallelEmbedding
from sglang_symm.layers.sharding import load_shard

K, N = 48, 36  # of 2, 3, 4 ranks
# The fp32 sum of K products, and the rounding of the result to the dtype.
BOUND = {
    torch.float32: K * torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
}


@pytest.fixture(params=[True, False], ids=["memory on", "memory off"])
def state(request: pytest.FixtureRequest) -> ParallelState:
    return initialize_model_parallel(dist.get_world_size(), enable_symm_mem=request.param, **SETTINGS)


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = seeded(5)
    return tuple(torch.randn(shape, generator=g).to(dtype) for shape in ((7, K), (N, K), (N,)))  # type: ignore[return-value]


def check(y: Tensor, expected: Tensor, scale: Tensor) -> None:
    assert (y.double() - expected).abs().max() <= BOUND[y.dtype] * scale.max()
    everyone = [torch.empty_like(y) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, y.contiguous())
    assert all(torch.equal(y, other) for other in everyone)


def fill(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    load_shard(layer.weight, weight)
    load_shard(layer.bias, bias)


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("skip_bias_add", [True, False])
def test_row_parallel_linear_is_the_whole_linear(state: ParallelState, dtype: torch.dtype, skip_bias_add: bool) -> None:
    x, weight, bias = data(dtype)
    layer = RowParallelLinear(K, N, input_is_parallel=False, skip_bias_add=skip_bias_add, dtype=dtype)
    fill(layer, weight, bias)
    with torch.inference_mode():
        y, output_bias = layer(x)
    scale = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    added = torch.zeros_like(bias) if skip_bias_add else bias
    check(y, F.linear(x.double(), weight.double(), added.double()), scale)
    assert (output_bias is not None) == skip_bias_add
    assert state.tp.contains(y) == (state.enable_symm_mem and state.tp_size > 1)


def test_column_then_row_is_an_mlp(state: ParallelState) -> None:
    x, weight, bias = data()
    up, down = ColumnParallelLinear(K, N), RowParallelLinear(N, K)
    fill(up, weight, bias)
    fill(down, weight.T.contiguous(), x[0].clone())
    with torch.inference_mode():
        y, _ = down(torch.relu(up(x)))
    inner = torch.relu(F.linear(x.double(), weight.double(), bias.double()))
    check(y, F.linear(inner, weight.T.double(), x[0].double()), inner.abs() @ weight.double().abs() * 2)


def test_embedding_and_head(state: ParallelState) -> None:
    x, table, _ = data()
    embedding, head = VocabParallelEmbedding(N, K), ParallelLMHead(N, K)
    load_shard(embedding.weight, table)
    load_shard(head.weight, table)
    tokens = torch.tensor([0, N - 1, 7, 7, 20])
    with torch.inference_mode():
        assert torch.equal(embedding(tokens), table[tokens])
        check(head(x), x.double() @ table.double().T, x.double().abs() @ table.double().abs().T)


def test_no_tokens_are_a_batch_too(state: ParallelState) -> None:
    with torch.inference_mode():
        local = K // state.tp_size
        assert RowParallelLinear(K, N)(torch.zeros(0, local))[0].shape == (0, N)
        assert VocabParallelEmbedding(N, K)(torch.zeros(0, dtype=torch.int64)).shape == (0, K)
        assert ParallelLMHead(N, K)(torch.zeros(0, K)).shape == (0, N)
