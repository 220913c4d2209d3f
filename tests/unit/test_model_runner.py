# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Llama and ModelRunner on ranks that are threads: transformers' logits and tokens in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cases
import pytest
import torch
from llama_cases import EIGHT_HEADS, SEQUENCES, SIX_HEADS, Reference, max_error_in_eps, transformers_reference
from thread_ranks import Layout, make_states, run_threads

from sglang_symm import model_runner
from sglang_symm.decode_graphs import DecodeGraphs, default_batch_sizes
from sglang_symm.distributed import DpPaddingMode, ParallelState
from sglang_symm.model_runner import Completion, ModelRunner, ServerArgs
from sglang_symm.models import LlamaConfig, LlamaForCausalLM
from sglang_symm.sampling import SamplingParams

LAYOUTS = [Layout(1, 1), Layout(1, 2), Layout(1, 4), Layout(2, 1), Layout(2, 2), Layout(4, 2), Layout(1, 8)]
PROMPTS = [list(sequence) for sequence in SEQUENCES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_cases.make_folder(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return transformers_reference(folder, new_tokens=12)


@pytest.fixture(scope="module", params=["plain", "biases, tied"])
def six_heads(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Reference]:
    extra = {} if request.param == "plain" else {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    made = llama_cases.make_folder(tmp_path_factory.mktemp("llama") / "model", SIX_HEADS, **extra)
    return made, transformers_reference(made)


def generate(
    layout: Layout, folder: Path, prompts: Any, params: Any, **args: Any
) -> tuple[list[Completion], list[ModelRunner]]:
    """All ranks' completions, which must be equal, and their runners."""

    def body(state: ParallelState) -> tuple[list[Completion], ModelRunner]:
        runner = ModelRunner(folder, ServerArgs(**{"max_len": 64, **args}), state)
        return runner.generate(prompts, params), runner

    results = run_threads(layout, body)
    assert all(completions == results[0][0] for completions, _ in results)
    return results[0][0], [runner for _, runner in results]


@pytest.mark.parametrize("mlp_group", ["tp", "attn_tp"])
@pytest.mark.parametrize("padding_mode", list(DpPaddingMode))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logits_equal_transformers(
    layout: Layout, padding_mode: DpPaddingMode, mlp_group: str, folder: Path, reference: Reference
) -> None:
    results = run_threads(
        layout,
        lambda state: llama_cases.all_logits(llama_cases.load_model(folder, state, mlp_group), padding_mode),
    )
    seen = set()
    for rank, logits in enumerate(results):
        same_dp_rank = results[rank - rank % layout.attn_tp]
        for i, found in logits.items():
            assert max_error_in_eps(found, reference.logits[i]) <= llama_cases.LOGITS_BOUND
            assert torch.equal(found, same_dp_rank[i])
            seen.add(i)
    assert seen == set(range(len(SEQUENCES)))


@pytest.mark.parametrize("mlp_group", ["tp", "attn_tp"])
@pytest.mark.parametrize("layout", [Layout(1, 3), Layout(2, 3)], ids=str)
def test_logits_equal_transformers_with_three_attention_ranks(
    layout: Layout, mlp_group: str, six_heads: tuple[Path, Reference]
) -> None:
    folder, reference = six_heads
    results = run_threads(
        layout, lambda state: llama_cases.all_logits(llama_cases.load_model(folder, state, mlp_group))
    )
    for logits in results:
        for i, found in logits.items():
            assert max_error_in_eps(found, reference.logits[i]) <= llama_cases.LOGITS_BOUND


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_greedy_tokens_equal_transformers(layout: Layout, folder: Path, reference: Reference) -> None:
    completions, _ = generate(layout, folder, PROMPTS, SamplingParams(max_new_tokens=12))
    assert [completion.token_ids for completion in completions] == reference.greedy
    assert {completion.finish_reason for completion in completions} == {"length"}


@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(1, 2), Layout(2, 2), Layout(4, 2)], ids=str)
def test_steps_padded_to_a_batch_size_give_the_same_tokens(layout: Layout, folder: Path, reference: Reference) -> None:
    """What CUDA graphs capture, run eagerly; batches shrink from 6 as requests end, larger than 4 goes unpadded."""
    params = [SamplingParams(max_new_tokens=n) for n in (5, 1, 12, 3, 12, 7)]

    def body(state: ParallelState) -> tuple[list[Completion], list[int]]:
        runner = ModelRunner(folder, ServerArgs(max_len=64), state)
        assert runner.graphs is None
        runner.graphs = graphs = DecodeGraphs(runner.model, runner.cache, [3, 1, 4])
        sizes: list[int] = []
        replay = graphs.replay
        graphs.replay = lambda size: (sizes.append(size), replay(size))[1]  # type: ignore[method-assign]
        return runner.generate(PROMPTS * 2, params), sizes

    for completions, sizes in run_threads(layout, body):
        expected = [tokens[: p.max_new_tokens] for tokens, p in zip(reference.greedy * 2, params, strict=True)]
        assert [completion.token_ids for completion in completions] == expected
        assert sizes == {1: [4] * 2 + [3] * 7, 2: [3] * 11}.get(layout.attn_dp, sizes)
        assert set(sizes) <= {1, 3, 4}


def test_batch_sizes_of_graphs(folder: Path) -> None:
    assert [default_batch_sizes(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
    runner = ModelRunner(folder, ServerArgs(max_len=64, max_batch=4), make_states(Layout(1, 1))[0])
    for sizes in ([], [0, 1], [2, 2], [5]):
        with pytest.raises(ValueError, match="expected distinct batch sizes from 1 to the cache's 4 slots"):
            DecodeGraphs(runner.model, runner.cache, sizes)


def test_requests_beyond_max_batch_run_in_waves(folder: Path, reference: Reference) -> None:
    completions, _ = generate(Layout(2, 1), folder, PROMPTS * 3, SamplingParams(max_new_tokens=12), max_batch=2)
    assert [completion.token_ids for completion in completions] == reference.greedy * 3


def test_requests_end_at_their_own_lengths_while_others_go_on(folder: Path, reference: Reference) -> None:
    lengths = [5, 1, 12, 3, 12, 7]
    params = [SamplingParams(max_new_tokens=n) for n in lengths]
    completions, runners = generate(Layout(2, 2), folder, PROMPTS * 2, params)
    expected = [tokens[:n] for tokens, n in zip(reference.greedy * 2, lengths, strict=True)]
    assert [completion.token_ids for completion in completions] == expected
    throughput = runners[0].throughput  # DP rank 0 has prompts 0, 2, 4
    assert throughput.prefill_tokens == len(PROMPTS[0]) + len(PROMPTS[2]) + len(PROMPTS[1])
    assert throughput.decode_tokens == 4 + 11 + 11


def test_a_dp_rank_with_nothing_to_do_takes_part_until_all_have_finished(folder: Path, reference: Reference) -> None:
    completions, runners = generate(Layout(4, 2), folder, PROMPTS[:1], SamplingParams(max_new_tokens=12))
    assert completions[0].token_ids == reference.greedy[0]
    forwards = {sum(call == "all_reduce" for call in runner.state.tp.calls) for runner in runners}
    assert len(forwards) == 1


def test_no_prompts_give_no_completions(folder: Path) -> None:
    assert generate(Layout(2, 1), folder, [], SamplingParams())[0] == []


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(folder: Path, reference: Reference) -> None:
    stop = reference.greedy[0][3]
    completions, _ = generate(Layout(1, 2), folder, PROMPTS[:1], SamplingParams(12, stop_token_ids=(stop,)))
    first = reference.greedy[0].index(stop)
    assert completions == [Completion(reference.greedy[0][:first], "stop")]


def test_the_model_s_own_stop_token_ends_the_answer_unless_ignored(
    folder: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = reference.greedy[1][2]
    config = LlamaConfig.from_folder(folder)
    changed = LlamaConfig(**{**vars(config), "eos_token_ids": (stop,)})
    monkeypatch.setattr(LlamaConfig, "from_folder", lambda _: changed)
    first = reference.greedy[1].index(stop)
    for ignore in (False, True):
        completions, _ = generate(Layout(1, 1), folder, PROMPTS[1:2], SamplingParams(12, ignore_eos=ignore))
        stopped = Completion(reference.greedy[1][:first], "stop")
        expected = Completion(reference.greedy[1], "length") if ignore else stopped
        assert completions == [expected]


@pytest.mark.parametrize("sync_token_ids", [False, True])
def test_sampled_tokens_are_the_same_on_every_rank_and_in_every_layout(folder: Path, sync_token_ids: bool) -> None:
    params = [SamplingParams(max_new_tokens=12, temperature=1.5, seed=seed) for seed in (4, 5, 4)]
    answers = []
    for layout in (Layout(1, 1), Layout(1, 4), Layout(2, 2)):
        completions, runners = generate(layout, folder, PROMPTS, params, sync_token_ids=sync_token_ids)
        answers.append([completion.token_ids for completion in completions])
        broadcasts = {runner.state.attn_tp.calls.count("broadcast") for runner in runners}
        assert (broadcasts == {0}) == (not sync_token_ids or layout.attn_tp == 1)
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0] != generate(Layout(1, 1), folder, PROMPTS, SamplingParams(12))[0][0].token_ids


def test_only_rank_0_samples_when_token_ids_are_synchronised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 would take other tokens: its generator has another seed."""
    seeds = iter(range(100))
    monkeypatch.setattr(model_runner, "generator", lambda _: torch.Generator().manual_seed(next(seeds)))
    params = SamplingParams(max_new_tokens=12, temperature=2.0)
    generate(Layout(1, 4), folder, PROMPTS[:1], params, sync_token_ids=True)
    with pytest.raises(AssertionError):
        generate(Layout(1, 4), folder, PROMPTS[:1], params, sync_token_ids=False)


def test_groups_are_checked_before_a_token_is_handed_out(folder: Path) -> None:
    def body(state: ParallelState) -> None:
        runner = ModelRunner(folder, ServerArgs(max_len=64), state)
        handed_out: list[int] = []

        def fail() -> None:
            if len(handed_out) == 2:
                raise RuntimeError("a peer died")

        state.attn_tp.check = fail  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="a peer died"):
            runner.generate(PROMPTS[:1], SamplingParams(12), on_token=lambda _, token: handed_out.append(token))
        assert len(handed_out) == 2

    run_threads(Layout(1, 2), body)


def test_on_token_tells_each_token_of_this_dp_rank(folder: Path, reference: Reference) -> None:
    def body(state: ParallelState) -> dict[int, list[int]]:
        told: dict[int, list[int]] = {}
        runner = ModelRunner(folder, ServerArgs(max_len=64), state)
        runner.generate(PROMPTS, SamplingParams(12), on_token=lambda i, token: told.setdefault(i, []).append(token))
        return told

    told = run_threads(Layout(2, 1), body)
    assert told[0] == {0: reference.greedy[0], 2: reference.greedy[2]}
    assert told[1] == {1: reference.greedy[1]}


@pytest.mark.parametrize("enable_symm_mem", [True, False])
def test_the_runner_passes_enable_symm_mem_to_initialize_model_parallel(
    folder: Path, monkeypatch: pytest.MonkeyPatch, enable_symm_mem: bool
) -> None:
    asked: dict[str, Any] = {}

    def initialize(*sizes: int, **kwargs: Any) -> ParallelState:
        asked.update(kwargs, sizes=sizes)
        return make_states(Layout(2, 2, kwargs["enable_symm_mem"]))[0]

    monkeypatch.setattr(model_runner, "initialize_model_parallel", initialize)
    args = ServerArgs(tensor_parallel_size=4, attention_data_parallel_size=2, enable_symm_mem=enable_symm_mem)
    runner = ModelRunner(folder, args)
    assert (asked["sizes"], asked["enable_symm_mem"]) == ((4, 2), enable_symm_mem)
    assert runner.state.enable_symm_mem == enable_symm_mem


@pytest.mark.parametrize("mlp_group", ["tp", "attn_tp"])
def test_the_decoder_layer_passes_use_dp_attention_reduce_to_both_linears_of_the_mlp(mlp_group: Any) -> None:
    for rank, state in enumerate(make_states(Layout(2, 3))):
        model = LlamaForCausalLM(LlamaConfig.from_dict(SIX_HEADS), mlp_group, state)
        over_attn_tp = mlp_group == "attn_tp"
        for layer in model.model.layers:
            down, gate_up = layer.mlp.down_proj, layer.mlp.gate_up_proj
            assert down.use_dp_attention_reduce == over_attn_tp
            assert down.group is gate_up.group is (state.attn_tp if over_attn_tp else state.tp)
            assert (down.tp_rank, down.tp_size) == ((rank % 3, 3) if over_attn_tp else (rank, 6))
            assert layer.exchanges_tokens == (not over_attn_tp)
            assert layer.self_attn.o_proj.group is layer.self_attn.qkv_proj.group is state.attn_tp
            assert layer.self_attn.o_proj.use_dp_attention_reduce


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[1], []], SamplingParams(max_new_tokens=1), "prompt 1 is empty"),
        (
            [[1, 128]],
            SamplingParams(),
            r"prompt 0 holds tokens outside the vocabulary: expected 0 to 127, got .1, 128.",
        ),
        ([[1] * 60], SamplingParams(max_new_tokens=5), "prompt 0 of 60 tokens and max_new_tokens=5 exceed max_len=64"),
        ([[1], [2]], [SamplingParams()], "expected one SamplingParams or 2, one a prompt, got 1"),
    ],
)
def test_requests_that_cannot_be_run_are_errors_before_anything_is_computed(
    folder: Path, prompts: Any, params: Any, message: str
) -> None:
    runner = ModelRunner(folder, ServerArgs(max_len=64), make_states(Layout(1, 1))[0])
    with pytest.raises(ValueError, match=message):
        runner.generate(prompts, params)
    assert runner.state.tp.calls == []


def test_an_unknown_mlp_group_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="expected mlp_group 'tp' or 'attn_tp', got 'dp'"):
        LlamaForCausalLM(LlamaConfig.from_dict(EIGHT_HEADS), "dp", make_states(Layout(1, 1))[0])  # type: ignore[arg-type]
