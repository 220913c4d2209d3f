"""Gradients over ranks against one process.

Which loss? Collectives know nothing of what is replicated: their loss is the sum of the ranks' losses, L = L_0 + L_1 +
..., each rank's of its own output. The row-parallel linear layer, and the layers of sglang_symm.layers, follow
Megatron: activations between layers and the loss are replicated, and the loss counts once.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import SETTINGS
from distributed_cases import DEVICE, same_bits, seeded
from torch import Tensor, nn

from sglang_symm.distributed import ForwardBatch, Group, ParallelState, initialize_model_parallel
from sglang_symm.layers import (
    ColumnParallelLinear,
    KVCache,
    ParallelLMHead,
    RotaryEmbedding,
    RowParallelLinear,
    TokenBatch,
    VocabParallelEmbedding,
)
from sglang_symm.models import LlamaConfig
from sglang_symm.models.llama import LlamaDecoderLayer

OPS = torch.ops.sglang_symm
SEVERAL = pytest.mark.world_size(2, 3)
# In units of eps * max |gradient|: a sum of some ten rounded products, or of a layer's worth of them in another order.
SUM_BOUND, LAYER_BOUND = 8, 64


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def close(found: Tensor | None, expected: Tensor | None, bound: float = SUM_BOUND) -> None:
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    eps = torch.finfo(found.dtype).eps
    assert (found.double() - expected.double()).abs().max() <= bound * eps * expected.abs().max()


def sum_of_losses(outputs: list[Tensor]) -> Tensor:
    """L = sum over ranks s of sum(c_s * sin(y_s)): every rank has another loss of its output."""
    return sum((rank_loss(y, rank) for rank, y in enumerate(outputs)), torch.zeros((), dtype=torch.float64))


def rank_loss(y: Tensor, rank: int) -> Tensor:
    return (rand(*y.shape, seed=100 + rank) * y.double().sin()).sum()


# --- collectives: the sum of the ranks' losses ----------------------------------------------------------------------


@SEVERAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", ["sum", "avg"])
def test_all_reduce_sends_back_the_sum_of_the_ranks_gradients(
    group: Group, rank: int, size: int, op: str, dtype: torch.dtype
) -> None:
    xs = [rand(3, 4, seed=r, dtype=dtype).requires_grad_() for r in range(size)]
    y = sum(x.double() for x in xs) / (size if op == "avg" else 1)
    sum_of_losses([y] * size).backward()
    x = xs[rank].detach().requires_grad_()
    rank_loss(group.all_reduce(x, op), rank).backward()
    close(x.grad, xs[rank].grad)


@SEVERAL
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("uneven", [False, True])
def test_all_gather_and_reduce_scatter_are_each_others_gradient(
    group: Group, rank: int, size: int, dim: int, uneven: bool
) -> None:
    sizes = [2 + (r if uneven else 0) for r in range(size)]
    given = sizes if uneven else None

    def shape(length: int) -> list[int]:
        return [length if d == dim % 3 else 2 for d in range(3)]

    xs = [rand(*shape(n), seed=r, dtype=torch.float32).requires_grad_() for r, n in enumerate(sizes)]
    sum_of_losses([torch.cat(xs, dim)] * size).backward()
    x = xs[rank].detach().requires_grad_()
    rank_loss(group.all_gather(x, dim, given), rank).backward()
    close(x.grad, xs[rank].grad)

    xs = [rand(*shape(sum(sizes)), seed=r, dtype=torch.float32).requires_grad_() for r in range(size)]
    sum_of_losses(list(sum(x.double() for x in xs).split(sizes, dim))).backward()
    x = xs[rank].detach().requires_grad_()
    rank_loss(group.reduce_scatter(x, dim, given), rank).backward()
    close(x.grad, xs[rank].grad)


@SEVERAL
def test_a_second_derivative_of_a_collective_is_the_sum_of_losses_too(group: Group, rank: int, size: int) -> None:
    def second(xs: list[Tensor]) -> Tensor:
        y = sum(xs)
        first = torch.autograd.grad(sum_of_losses([y] * size), xs, create_graph=True)
        return sum((g.pow(2).sum() for g in first), torch.zeros((), dtype=torch.float64))

    xs = [rand(3, seed=r).requires_grad_() for r in range(size)]
    second(xs).backward()
    x = rand(3, seed=rank).requires_grad_()
    (first,) = torch.autograd.grad(rank_loss(group.all_reduce(x), rank), x, create_graph=True)
    first.pow(2).sum().backward()
    close(x.grad, xs[rank].grad, bound=64)


# --- row_parallel_linear: replicated output, the loss counts once ---------------------------------------------------


@SEVERAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (5,), ()], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_row_parallel_linear_is_the_whole_linear_backwards_too(
    group: Group, rank: int, size: int, shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool
) -> None:
    k, n = 6 * size, 5
    whole = [rand(*shape, k, seed=1, dtype=dtype), rand(n, k, seed=2, dtype=dtype), rand(n, seed=3, dtype=dtype)]
    dy = rand(*shape, n, seed=4, dtype=dtype)  # alike on all ranks, as the loss is
    x, weight, bias = (t.detach().clone().double().requires_grad_() for t in whole)
    F.linear(x, weight, bias if with_bias else None).backward(dy.double())

    part = slice(6 * rank, 6 * rank + 6)
    x_r, weight_r = (t[..., part].clone().requires_grad_() for t in whole[:2])
    bias_r = whole[2].clone().requires_grad_() if with_bias else None
    calls = group.info()["calls"]
    y = OPS.row_parallel_linear(x_r, weight_r, bias_r, group.unique_name)
    y.backward(dy)
    assert x.grad is not None
    assert weight.grad is not None
    close(x_r.grad, x.grad[..., part])
    close(weight_r.grad, weight.grad[:, part])
    if bias_r is not None:
        close(bias_r.grad, bias.grad)
    assert group.info()["calls"] == calls + 1  # backward needs no communication


@SEVERAL
def test_only_what_is_asked_for_has_a_gradient(group: Group, rank: int) -> None:
    x, weight, bias = rand(3, 4, seed=1), rand(5, 4, seed=2), rand(5, seed=3)
    for asked in (x, weight, bias):
        y = OPS.row_parallel_linear(
            *(t.clone().requires_grad_() if t is asked else t for t in (x, weight, bias)), group.unique_name
        )
        saved = [t for name in ("x", "weight") if (t := getattr(y.grad_fn, name, None)) is not None]
        assert y.requires_grad
        assert not saved
    with torch.no_grad():
        assert not OPS.row_parallel_linear(x.requires_grad_(), weight, bias, group.unique_name).requires_grad


@SEVERAL
def test_row_parallel_linear_has_no_second_derivative_and_says_so(group: Group) -> None:
    x, weight = rand(3, 4, seed=1).requires_grad_(), rand(5, 4, seed=2)
    y = OPS.row_parallel_linear(x, weight, None, group.unique_name)
    (dx,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="row_parallel_linear has no second derivative"):
        dx.sum().backward()


# --- what has no gradient -------------------------------------------------------------------------------------------

REFUSED = {
    "all_reduce_": lambda g, t: (t(3, 4), g),
    "broadcast_": lambda g, t: (t(3, 4), 0, g),
    "barrier": lambda g, t: (t(1), g),
    "row_parallel_linear_out": lambda g, t: (t(3, 4), t(5, 4), t(5), g, t(3, 5)),
    "all_reduce_add_rms_norm": lambda g, t: (t(3, 4), t(3, 4), t(4), 1e-6, g),
    "row_parallel_linear_add_rms_norm": lambda g, t: (t(3, 4), t(5, 4), t(5), t(3, 5), t(5), 1e-6, g),
}


@pytest.mark.parametrize("op", REFUSED)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_ops_without_a_gradient_name_the_input_that_requires_one(group: Group, op: str, compiled: bool) -> None:
    def call(*arguments: object) -> None:
        getattr(OPS, op)(*arguments)

    called = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    plain = REFUSED[op](group.unique_name, lambda *shape: torch.ones(shape))
    schema = getattr(OPS, op).default._schema
    calls = group.info()["calls"]
    for i, value in enumerate(plain):
        if not isinstance(value, Tensor):
            continue
        arguments = [t.clone().requires_grad_() if j == i else t for j, t in enumerate(plain)]
        sentence = f"{op} has no gradient, and its input '{schema.arguments[i].name}' requires one"
        with pytest.raises(RuntimeError, match=sentence):
            called(*arguments)
        assert group.info()["calls"] == calls  # before anything is sent
        with torch.no_grad():
            call(*arguments)
        calls += 1
        if compiled:  # one input is enough
            break


def test_only_sums_and_means_have_a_gradient(group: Group) -> None:
    x = torch.ones(3, requires_grad=True)
    for op in ("product", "min", "max"):
        with pytest.raises(RuntimeError, match=f"all_reduce with op '{op}' has no gradient"):
            group.all_reduce(x, op)
        assert not group.all_reduce(x.detach(), op).requires_grad


def test_a_write_is_noticed_by_a_backward_that_saved_the_old_value(group: Group) -> None:
    weight = torch.ones(3, requires_grad=True)
    for write in (group.all_reduce_, group.broadcast):
        x = torch.ones(3)
        loss = (weight * x).sum()
        write(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# --- layers: activations are replicated, the loss counts once -------------------------------------------------------


@pytest.fixture
def state() -> ParallelState:
    return initialize_model_parallel(dist.get_world_size(), enable_symm_mem=True, **SETTINGS)


@pytest.fixture
def alone(rank: int, make: object) -> ParallelState:
    """The parallel state of this process alone: the reference."""
    one = make(ranks=[rank], arena_bytes=1 << 20)  # type: ignore[operator]
    return ParallelState(one, one, one, one)


def pair(make_layer: object, state: ParallelState, alone: ParallelState) -> tuple[nn.Module, nn.Module]:
    """A layer over the ranks and the same layer in one process."""
    ours, whole = make_layer(state), make_layer(alone)  # type: ignore[operator]
    for seed, (mine, all_of_it) in enumerate(zip(ours.parameters(), whole.parameters(), strict=True)):
        all_of_it.data.copy_(rand(*all_of_it.shape, seed=seed) * 0.3)
        for source, target in parts(mine, all_of_it, mine.data, all_of_it.data):
            source.copy_(target)
    return ours, whole


def parts(mine: nn.Parameter, all_of_it: nn.Parameter, m: Tensor, w: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(this rank's part, the same of the whole) for each tensor that a parameter is made of."""
    pairs = []
    for part, shard in mine.shards.items():  # type: ignore[attr-defined]
        first = all_of_it.shards[part].offset + shard.start  # type: ignore[attr-defined]
        pairs.append((m.narrow(shard.dim, shard.offset, shard.size), w.narrow(shard.dim, first, shard.size)))
    return pairs


def compare(ours: nn.Module, whole: nn.Module) -> None:
    for (name, mine), all_of_it in zip(ours.named_parameters(), whole.parameters(), strict=True):
        assert mine.grad is not None, name
        assert all_of_it.grad is not None, name
        for found, expected in parts(mine, all_of_it, mine.grad, all_of_it.grad):
            close(found, expected, LAYER_BOUND)


class TwoLayers(nn.Module):
    def __init__(self, state: ParallelState, whole_between: bool) -> None:
        super().__init__()
        common = {"parallel_state": state}
        self.up = ColumnParallelLinear(12, 24, gather_output=whole_between, **common)
        self.down = RowParallelLinear(24, 12, input_is_parallel=not whole_between, **common)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))[0]


@SEVERAL
@pytest.mark.parametrize("whole_between", [False, True], ids=["parallel between", "gathered between"])
def test_an_mlp_learns_what_one_process_learns(state: ParallelState, alone: ParallelState, whole_between: bool) -> None:
    ours, whole = pair(lambda s: nn.Sequential(*(TwoLayers(s, whole_between) for _ in range(2))), state, alone)
    x, x_whole = (rand(5, 12, seed=9, dtype=torch.float32).requires_grad_() for _ in range(2))
    for layer, argument in ((ours, x), (whole, x_whole)):
        rank_loss(layer(argument), rank=0).backward()  # the same loss on every rank
    compare(ours, whole)
    close(x.grad, x_whole.grad, LAYER_BOUND)
    everyone = [torch.empty_like(x) for _ in range(state.tp_size)]
    dist.all_gather(everyone, x.grad)
    assert all(same_bits(x.grad, other) for other in everyone)


class Vocabulary(nn.Module):
    def __init__(self, state: ParallelState) -> None:
        super().__init__()
        self.embed, self.head = VocabParallelEmbedding(12, 6, state), ParallelLMHead(12, 6, state)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).tanh())


@SEVERAL
def test_embedding_and_head_learn_what_one_process_learns(state: ParallelState, alone: ParallelState) -> None:
    ours, whole = pair(Vocabulary, state, alone)
    tokens, targets = torch.tensor([0, 11, 3, 3, 7]), torch.tensor([11, 2, 3, 0, 0])
    for model in (ours, whole):
        F.cross_entropy(model(tokens), targets).backward()
    compare(ours, whole)


@SEVERAL
def test_a_decoder_layer_learns_what_one_process_learns(state: ParallelState, alone: ParallelState) -> None:
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=8,
    )
    ours, whole = pair(lambda s: LlamaDecoderLayer(config, 0, "tp", s), state, alone)
    # Of two sequences, the second would write to the cache that the first one's backward needs.
    batch = TokenBatch([0], [0], [7], DEVICE)
    cos, sin = RotaryEmbedding(8).cos_sin(batch.positions, torch.float32)
    for layer in (ours, whole):
        x, residual = (rand(7, 48, seed=s, dtype=torch.float32) for s in (20, 21))
        cache = KVCache(1, 1, 6 // layer.state.attn_tp_size, 8, 8, device=DEVICE)
        with layer.state.forward(ForwardBatch([7], is_extend=True)):
            y, stream = layer(x, residual, cos, sin, batch, cache)
        rank_loss(y + stream, rank=0).backward()
    compare(ours, whole)


@pytest.mark.world_size(2)
def test_data_parallel_attention_refuses_a_backward() -> None:
    state = initialize_model_parallel(2, attention_data_parallel_size=2, enable_symm_mem=True, **SETTINGS)
    from sglang_symm.distributed import dp_gather

    x = torch.ones(2, 3, requires_grad=True)
    with state.forward(ForwardBatch([2, 2], is_extend=False)):
        y = dp_gather(x, state)
    with pytest.raises(RuntimeError, match=r"dp_gather .* has no gradient"):
        y.sum().backward()
