# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""A random Llama over GPUs: transformers' tokens and logits in every layout, eagerly and in CUDA graphs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cases
import pytest
import torch
import torch.distributed as dist
from llama_cases import EIGHT_HEADS, SEQUENCES, SIX_HEADS, Reference, max_error_in_eps, transformers_reference

from sglang_symm.distributed import ParallelState, destroy_model_parallel, initialize_model_parallel
from sglang_symm.model_runner import ModelRunner, ServerArgs
from sglang_symm.sampling import SamplingParams

SIZE = int(os.environ.get("WORLD_SIZE", "1"))
pytestmark = pytest.mark.skipif(SIZE not in (1, 2, 3, 4, 6, 8), reason="no model's heads divide by these ranks")
# As SmolLM2's: 9 heads in groups of 3, which 2 ranks cannot share.
NINE_HEADS = SIX_HEADS | {"hidden_size": 72, "num_attention_heads": 9}
MODEL = NINE_HEADS if SIZE % 3 == 0 else EIGHT_HEADS
# attention-DP x attention-TP.
LAYOUTS = [(2, 3)] if SIZE == 6 else [(dp, SIZE // dp) for dp in (1, 2, 3, 4, 8) if SIZE % dp == 0]
PROMPTS = [list(sequence) for sequence in SEQUENCES]
NEW_TOKENS = 12
# Kernels of other libraries add in yet other orders than those of the CPU (llama_cases.LOGITS_BOUND).
LOGITS_BOUND = 2 * llama_cases.LOGITS_BOUND


@pytest.fixture(scope="module")
def llama(world: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference, list[torch.Tensor]]:
    """A random Llama; transformers' logits and tokens in fp32, and its logits in bf16, on the CPU."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        from transformers import AutoModelForCausalLM

        folder = llama_cases.make_folder(tmp_path_factory.mktemp("llama") / "model", MODEL, attention_bias=True)
        narrow = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        with torch.inference_mode():
            bf16 = [narrow(torch.tensor([sequence])).logits[0].float() for sequence in SEQUENCES]
        torch.save((vars(transformers_reference(folder, NEW_TOKENS)), bf16), folder / "reference.pt")
        box = [str(folder)]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    reference, bf16 = torch.load(Path(box[0]) / "reference.pt")
    return Path(box[0]), Reference(**reference), bf16


@pytest.fixture
def start(world: None) -> Iterator[Callable[..., ParallelState]]:
    assert not torch.backends.cuda.matmul.allow_tf32

    def make(layout: tuple[int, int], enable_symm_mem: bool = True, **settings: Any) -> ParallelState:
        dp, tp = layout
        settings = {"timeout": 20.0, "arena_bytes": 64 << 20, **settings}
        return initialize_model_parallel(dp * tp, dp, enable_symm_mem=enable_symm_mem, device="cuda", **settings)

    yield make
    torch.cuda.synchronize()
    destroy_model_parallel()


@pytest.mark.parametrize("mlp_group", ["attn_tp", "tp"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fp32_logits_equal_transformers(layout, mlp_group, llama, start, record_property):
    folder, reference, _ = llama
    state = start(layout)
    logits = llama_cases.all_logits(llama_cases.load_model(folder, state, mlp_group))
    errors = [max_error_in_eps(found.cpu(), reference.logits[i]) for i, found in logits.items()]
    print(f"{layout} {mlp_group}: fp32 logits within {max(errors, default=0):.1f} eps")
    assert max(errors, default=0) <= LOGITS_BOUND
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {i: found.cpu().numpy().tobytes() for i, found in logits.items()})
    assert everyone[dist.get_rank()] == everyone[dist.get_rank() - state.attn_tp_rank]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bf16_logits_are_no_further_from_fp32_than_those_of_one_process(layout, llama, start):
    """Twice the error of transformers in bf16, whose roundings are others."""
    folder, reference, bf16 = llama
    model = llama_cases.load_model(folder, start(layout), dtype=torch.bfloat16)
    for i, found in llama_cases.all_logits(model).items():
        exact = reference.logits[i]
        error, usual = (float((y.float().cpu() - exact).abs().max() / exact.abs().max()) for y in (found, bf16[i]))
        print(f"{layout} sequence {i}: bf16 logits within {error:.4f} of the largest; transformers' {usual:.4f}")
        assert error <= 2 * usual


@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("enable_symm_mem", [True, False], ids=["symm", "off"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_greedy_tokens_equal_transformers(layout, enable_symm_mem, cuda_graphs, llama, start):
    folder, reference, _ = llama
    args = ServerArgs(max_len=64, max_batch=4, device="cuda", cuda_graphs=cuda_graphs)
    state = start(layout, enable_symm_mem)
    runner = ModelRunner(folder, args, state)
    by_gloo = dist.get_world_size() > torch.cuda.device_count() and not enable_symm_mem and min(layout) > 1
    assert (runner.graphs is not None) == (cuda_graphs and not by_gloo)
    lengths = [12, 5, 9, 12, 1, 7]
    completions = runner.generate(PROMPTS * 2, [SamplingParams(max_new_tokens=n) for n in lengths])
    expected = [tokens[:n] for tokens, n in zip(reference.greedy * 2, lengths, strict=True)]
    assert [completion.token_ids for completion in completions] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_replay_equals_eager_to_the_bit(layout, dtype, llama, start):
    """The same padded step from the same cache: logits, and the keys and values that it stored."""
    args = ServerArgs(max_len=64, max_batch=8, device="cuda", dtype=dtype)
    runner = ModelRunner(llama[0], args, start(layout))
    graphs, cache = runner.graphs, runner.cache
    generator = torch.Generator().manual_seed(runner.state.attn_dp_rank)
    cache.keys.copy_(torch.randn(cache.keys.shape[0], generator=generator)[:, None, None, None, None])
    assert graphs.batch_sizes == [1, 2, 4, 8]
    for step in range(24):
        size = graphs.batch_sizes[step % 4]
        rows = int(torch.randint(0, size + 1, (), generator=generator))
        tokens = torch.randint(0, MODEL["vocab_size"], (rows,), generator=generator).tolist()
        positions = torch.randint(0, 64, (rows,), generator=generator).tolist()
        before = cache.keys.clone(), cache.values.clone()
        graphs.fill(tokens, positions, size)
        eager = graphs.step(size).clone()
        after = cache.keys.clone(), cache.values.clone()
        cache.keys.copy_(before[0]), cache.values.copy_(before[1])
        assert torch.equal(graphs.replay(size), eager)
        assert torch.equal(cache.keys, after[0])
        assert torch.equal(cache.values, after[1])
        assert eager.isfinite().all()
    runner.check()


@pytest.mark.skipif(SIZE in (1, 6), reason="needs a peer, and heads that divide by all ranks")
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "eager"])
def test_no_token_is_handed_out_after_a_rank_was_missing(cuda_graphs, llama, start):
    class Stopped(Exception):
        pass

    told: list[int] = []

    def on_token(index: int, token: int) -> None:
        told.append(token)
        if len(told) == 3 and dist.get_rank() == SIZE - 1:
            raise Stopped

    state = start((1, SIZE), timeout=2.0, first_timeout=20.0)
    args = ServerArgs(max_len=64, max_batch=1, device="cuda", cuda_graphs=cuda_graphs)
    runner = ModelRunner(llama[0], args, state)
    error = Stopped if dist.get_rank() == SIZE - 1 else dist.DistBackendError
    with pytest.raises(error) as raised:
        runner.generate(PROMPTS[:1], SamplingParams(NEW_TOKENS), on_token)
    assert told == llama[1].greedy[0][:3]
    if dist.get_rank() != SIZE - 1:
        assert f"rank(s) {SIZE - 1} did not arrive" in str(raised.value)
    dist.barrier(group=dist.new_group(backend="gloo"))
