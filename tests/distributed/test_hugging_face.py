"""tensor_parallelize: an unmodified transformers model over ranks gives the tokens of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SETTINGS
from distributed_cases import same_bits
from llama_cases import EIGHT_HEADS, LOGITS_BOUND, SEQUENCES, SIX_HEADS, max_error_in_eps
from torch import Tensor

import sglang_symm
from sglang_symm.distributed import initialize_model_parallel

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.cpu_only("the bounds are those of the CPU's sums; the op below is tested on GPUs by others")

FEW_KV_HEADS = EIGHT_HEADS | {"num_key_value_heads": 2}  # on 4 ranks two hold the same one


def random_model(model_type: str = "llama", **config: Any) -> Any:
    """The same on every rank."""
    torch.manual_seed(0)
    sizes = (SIX_HEADS if dist.get_world_size() % 3 == 0 else EIGHT_HEADS) | config
    settings = transformers.AutoConfig.for_model(
        model_type, **sizes, pad_token_id=0, eos_token_id=None, bos_token_id=None
    )
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.2 if weight.dim() > 1 else 0.5)
            if "norm" in name:
                weight.add_(1)
    return model


@torch.inference_mode()
def greedy(model: Any, tokens: int = 6) -> list[list[int]]:
    return [
        model.generate(torch.tensor([s]), do_sample=False, max_new_tokens=tokens)[0, len(s) :].tolist()
        for s in SEQUENCES
    ]


@torch.inference_mode()
def logits(model: Any) -> list[Tensor]:
    return [model(torch.tensor([s])).logits[0] for s in SEQUENCES]


def check(model_type: str = "llama", attn_dp: int = 1, **config: Any) -> None:
    state = initialize_model_parallel(
        dist.get_world_size(), attention_data_parallel_size=attn_dp, enable_symm_mem=True, **SETTINGS
    )
    model = random_model(model_type, **config)
    expected, expected_logits = greedy(model), logits(model)
    weights = sum(p.numel() for p in model.model.layers.parameters())
    assert sglang_symm.tensor_parallelize(model, state) is model
    assert sum(p.numel() for p in model.model.layers.parameters()) < weights

    calls = state.attn_tp.info()["calls"]
    found = logits(model)
    assert state.attn_tp.info()["calls"] == calls + 2 * model.config.num_hidden_layers * len(SEQUENCES)
    for mine, theirs in zip(found, expected_logits, strict=True):
        assert max_error_in_eps(mine, theirs) <= LOGITS_BOUND
        everyone = [torch.empty_like(mine) for _ in range(state.attn_tp_size)]
        dist.all_gather(everyone, mine, group=state.attn_tp.device_group)
        assert all(same_bits(mine, other) for other in everyone)
    assert greedy(model) == expected


@pytest.mark.world_size(2, 3, 4)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_llama_keeps_its_tokens(biases: bool, attention: str) -> None:
    check(attention_bias=biases, mlp_bias=biases, attn_implementation=attention)


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
def test_its_relatives_do_too(model_type: str) -> None:
    heads = SIX_HEADS if dist.get_world_size() == 3 else EIGHT_HEADS
    check(model_type, head_dim=heads["hidden_size"] // heads["num_attention_heads"])


@pytest.mark.world_size(2, 3)
def test_so_does_one_whose_head_is_its_embedding() -> None:
    check(tie_word_embeddings=True)


@pytest.mark.world_size(4)
def test_ranks_share_key_value_heads_where_there_are_too_few() -> None:
    check(**FEW_KV_HEADS)


@pytest.mark.world_size(4)
def test_each_dp_rank_has_a_model_of_its_own() -> None:
    check(attn_dp=2)


@pytest.mark.world_size(2)
def test_it_learns_what_one_process_learns() -> None:
    state = initialize_model_parallel(2, enable_symm_mem=True, **SETTINGS)
    ours, whole = sglang_symm.tensor_parallelize(random_model(), state), random_model()
    tokens = torch.tensor([SEQUENCES[0]])
    for model in (ours, whole):
        model.train()(tokens, labels=tokens).loss.backward()
    rank = state.attn_tp_rank
    for mine, theirs in zip(ours.parameters(), whole.parameters(), strict=True):
        expected = theirs.grad
        for dim in range(theirs.dim()):
            if mine.shape[dim] != theirs.shape[dim]:
                expected = expected.chunk(2, dim)[rank]
        assert max_error_in_eps(mine.grad, expected) <= 4 * LOGITS_BOUND


@pytest.mark.world_size(2, 3)
def test_what_it_cannot_do_is_a_value_error_and_changes_nothing() -> None:
    state = initialize_model_parallel(dist.get_world_size(), **SETTINGS)

    def refuses(model: Any, sentence: str) -> None:
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=sentence):
            sglang_symm.tensor_parallelize(model, state)
        assert [type(module) for module in model.modules()] == kinds

    refuses(random_model("gpt2", n_embd=48, n_head=6, n_layer=1), "expected a model of llama, .* got 'gpt2'")
    refuses(random_model(num_attention_heads=1, num_key_value_heads=1), "attention heads 1 does not divide")
    refuses(random_model(intermediate_size=95), "intermediate_size 95 does not divide")
    model = sglang_symm.tensor_parallelize(random_model(), state)
    refuses(model, "layers.0.self_attn.q_proj to be an nn.Linear, got _Rows")
