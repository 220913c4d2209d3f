"""torch.compile(fullgraph=True) over ranks: no graph break, eager's results, a bounded number of graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from conftest import SETTINGS
from distributed_cases import DEVICE, same_bits, seeded
from torch import Tensor, nn

from sglang_symm.distributed import DpPaddingMode, ForwardBatch, ParallelState, initialize_model_parallel
from sglang_symm.layers import ColumnParallelLinear, KVCache, RotaryEmbedding, RowParallelLinear, TokenBatch
from sglang_symm.models import LlamaConfig
from sglang_symm.models.llama import LlamaDecoderLayer

pytestmark = pytest.mark.cpu_only("minutes of compiling; test_fake.py and test_gradients.py compile the ops on GPUs")
# Ranks compile at different speeds, and wait for each other in the first call after.
PATIENT = SETTINGS | {"timeout": 240.0, "first_timeout": 240.0}


@pytest.fixture(autouse=True)
def forget() -> None:
    torch._dynamo.reset()


class Counter:
    """A backend that counts graphs and runs them as eager would, through AOTAutograd."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = ColumnParallelLinear(24, 48), RowParallelLinear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))[0]


def filled(module: nn.Module) -> nn.Module:
    generator = seeded(dist.get_rank())
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return module


def whole_state(**settings: Any) -> ParallelState:
    return initialize_model_parallel(dist.get_world_size(), enable_symm_mem=True, **(PATIENT | settings))


def tokens(n: int, seed: int = 0) -> Tensor:
    """The same on every rank."""
    return torch.randn(n, 24, generator=seeded(seed))


@pytest.mark.world_size(2, 3)
def test_a_two_layer_mlp_is_one_graph_with_eagers_bits() -> None:
    state = whole_state()
    model, counter = filled(nn.Sequential(MLP(), MLP())), Counter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for n in (5, 5, 3, 8, 13):  # the second number of tokens makes it dynamic
            y = compiled(tokens(n))
            assert same_bits(y, model(tokens(n)))
            assert state.tp.contains(y)
    assert counter.graphs == 2


@pytest.mark.world_size(2, 3)
def test_a_compiled_mlp_has_eagers_gradients() -> None:
    whole_state()
    model = filled(nn.Sequential(MLP(), MLP()))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for layer in (model, compiled):
        x = tokens(5).requires_grad_()
        model.zero_grad()
        layer(x).sin().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    assert all(same_bits(found, expected) for found, expected in zip(*gradients, strict=True))


@pytest.mark.world_size(2, 3)
def test_compiled_collectives_have_eagers_gradients() -> None:
    group = whole_state().tp
    name, size = group.unique_name, group.world_size

    def function(x: Tensor) -> Tensor:
        y = torch.ops.sglang_symm.all_gather(x.sin(), name, 1)
        y = torch.ops.sglang_symm.reduce_scatter(y * y, name, 0, [1] * (size - 1) + [x.shape[0] - size + 1])
        return torch.ops.sglang_symm.all_reduce(y.sum(), name, "avg")

    gradients = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        for n in (4, 6):
            x = (tokens(n) + group.rank_in_group).requires_grad_()
            call(x).backward()
            gradients.append(x.grad)
    assert same_bits(gradients[0], gradients[2])
    assert same_bits(gradients[1], gradients[3])


def decoder(state: ParallelState, mlp_group: Any) -> LlamaDecoderLayer:
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=4,
    )
    return filled(LlamaDecoderLayer(config, 0, mlp_group, state))  # type: ignore[return-value]


@torch.no_grad()
def steps(call: Callable[..., Any], state: ParallelState, mode: DpPaddingMode | None, decoded: int) -> list[Tensor]:
    """A prefill of two sequences, and some decoding after it. A DP rank's sequences are its own."""
    cache = KVCache(1, 2, 12 // state.attn_tp_size, 32, 4, device=DEVICE)
    starts, results = [0, 0], []
    lengths = [5 + state.attn_dp_rank, 3]
    for step in range(1 + decoded):
        batch = TokenBatch([0, 1], starts, lengths, DEVICE)
        x, residual = (tokens(batch.num_tokens, seed=100 * state.attn_dp_rank + 10 * step + s) for s in range(2))
        cos, sin = RotaryEmbedding(4).cos_sin(batch.positions, x.dtype)
        counts = state.exchange_token_counts(batch.num_tokens)
        with state.forward(ForwardBatch(counts, is_extend=step == 0, padding_mode=mode)):
            results += call(x, residual, cos, sin, batch, cache)
        starts, lengths = [s + n for s, n in zip(starts, lengths, strict=True)], [1, 1]
    return results


LAYOUTS = [
    pytest.param(1, "tp", None, id="TP", marks=pytest.mark.world_size(2, 3)),
    pytest.param(2, "tp", DpPaddingMode.MAX_LEN, id="2x2 max_len", marks=pytest.mark.world_size(4)),
    pytest.param(2, "tp", DpPaddingMode.SUM_LEN, id="2x2 sum_len", marks=pytest.mark.world_size(4)),
    pytest.param(2, "attn_tp", None, id="2x2 attn_tp", marks=pytest.mark.world_size(4)),
]


@pytest.mark.parametrize(("attn_dp", "mlp_group", "mode"), LAYOUTS)
def test_a_decoder_layer_compiles_without_a_graph_break_to_eagers_bits(
    attn_dp: int, mlp_group: str, mode: DpPaddingMode | None
) -> None:
    state = whole_state(attention_data_parallel_size=attn_dp)
    layer, counter = decoder(state, mlp_group), Counter()
    expected = steps(layer, state, mode, decoded=4)
    found = steps(torch.compile(layer, backend=counter, fullgraph=True), state, mode, decoded=4)
    assert len(found) == 10
    assert all(same_bits(y, z) for y, z in zip(found, expected, strict=True))
    assert counter.graphs == 3  # prefill, decoding at one position, decoding at any position


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.timeout(600)
def test_inductor_compiles_an_mlp_and_a_decoder_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no pool of processes beside the ranks
    # Inductor's fused loops round elsewhere: a few units of eps, not eager's bits.
    bound = 32 * torch.finfo(torch.float32).eps
    state = whole_state()

    def close(found: Tensor, expected: Tensor) -> None:
        assert (found - expected).abs().max() <= bound * expected.abs().max()

    model = filled(nn.Sequential(MLP(), MLP()))
    gradients = []
    for call in (model, torch.compile(model, fullgraph=True)):
        x = tokens(5).requires_grad_()
        model.zero_grad()
        y = call(x)
        y.sin().sum().backward()
        gradients.append([y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())])
    for found, expected in zip(*gradients, strict=True):
        close(found, expected)

    layer = decoder(state, "tp")
    expected = steps(layer, state, None, decoded=2)
    found = steps(torch.compile(layer, fullgraph=True), state, None, decoded=2)
    for y, z in zip(found, expected, strict=True):
        close(y, z)
