# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""A random Llama over real ranks: transformers' logits in every layout, and what the symmetric memory of each group
does.

Each layout runs when torchrun has its number of ranks (1, 2, 4, 6, 8). Attention-DP x attention-TP of 1 x 2 is TP 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cases
import pytest
import torch
import torch.distributed as dist
from conftest import SETTINGS
from llama_cases import EIGHT_HEADS, LOGITS_BOUND, SEQUENCES, SIX_HEADS, Reference, max_error_in_eps
from torch import Tensor

from sglang_symm.distributed import (
    DpPaddingMode,
    ForwardBatch,
    ParallelState,
    destroy_model_parallel,
    initialize_model_parallel,
)
from sglang_symm.distributed.rendezvous import Meeting, default_store
from sglang_symm.model_runner import ModelRunner, ServerArgs
from sglang_symm.sampling import SamplingParams

pytestmark = pytest.mark.cpu_only("tests/gpu/test_llama.py is its twin, with CUDA graphs and its own bounds")


def layout(attn_dp: int, attn_tp: int) -> Any:
    name = f"TP{attn_tp}" if attn_dp == 1 else f"{attn_dp}x{attn_tp}"
    return pytest.param((attn_dp, attn_tp), id=name, marks=pytest.mark.world_size(attn_dp * attn_tp))


LAYOUTS = [layout(1, 1), layout(1, 2), layout(2, 1), layout(1, 4), layout(2, 2), layout(4, 2)]
# Where attention-TP is neither 1 nor the whole TP group: elsewhere the behaviours cannot be told from their absence.
TRUE_LAYOUTS = [layout(2, 2), layout(2, 3)]


def made_by_rank_0(name: str, make: Any) -> Any:
    """What `make()` returns on rank 0 (JSON), on every rank; the others wait for it in the store."""
    value = make() if dist.get_rank() == 0 else None
    meeting = Meeting(default_store(), f"made/{name}", dist.get_rank(), dist.get_world_size(), 240)
    return meeting.agree({"value": value}, lambda configs: configs[0])["value"]


@pytest.fixture(scope="session")
def llama(world: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    """A random Llama of 8 heads, or of 6 for attention-TP of 3, and transformers' logits and tokens."""

    def make() -> str:
        config = SIX_HEADS if dist.get_world_size() % 3 == 0 else EIGHT_HEADS
        folder = llama_cases.make_folder(tmp_path_factory.mktemp("llama") / "model", config, attention_bias=True)
        torch.save(vars(llama_cases.transformers_reference(folder)), folder / "reference.pt")
        return str(folder)

    folder = Path(made_by_rank_0("llama", make))
    return folder, Reference(**torch.load(folder / "reference.pt"))


def start(layout: tuple[int, int], enable_symm_mem: bool) -> ParallelState:
    attn_dp, attn_tp = layout
    return initialize_model_parallel(attn_dp * attn_tp, attn_dp, enable_symm_mem=enable_symm_mem, **SETTINGS)


@pytest.fixture(autouse=True)
def no_synchronised_token_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would make the attention-TP group symmetric whatever `enable_symm_mem` says."""
    monkeypatch.delenv("SYNC_TOKEN_IDS_ACROSS_TP", raising=False)


@pytest.mark.parametrize("mlp_group", ["attn_tp", "tp"])
@pytest.mark.parametrize("padding_mode", list(DpPaddingMode), ids=lambda mode: mode.name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers_and_their_bits_on_all_ranks_with_memory_on_and_off(
    layout: tuple[int, int], padding_mode: DpPaddingMode, mlp_group: str, llama: tuple[Path, Reference]
) -> None:
    folder, reference = llama
    logits: dict[bool, dict[int, Tensor]] = {}
    for enable_symm_mem in (True, False):
        state = start(layout, enable_symm_mem)
        logits[enable_symm_mem] = llama_cases.all_logits(llama_cases.load_model(folder, state, mlp_group), padding_mode)
        destroy_model_parallel()
    for i, found in logits[True].items():
        assert torch.equal(found, logits[False][i])
        assert max_error_in_eps(found, reference.logits[i]) <= LOGITS_BOUND
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {i: found.numpy().tobytes() for i, found in logits[True].items()})
    first_of_dp_rank = dist.get_rank() - dist.get_rank() % layout[1]
    assert everyone[dist.get_rank()] == everyone[first_of_dp_rank]
    assert set().union(*everyone) == set(range(len(SEQUENCES)))


@pytest.mark.parametrize("layout", [*LAYOUTS, layout(1, 3), layout(2, 3)])
@pytest.mark.parametrize("enable_symm_mem", [True, False])
def test_greedy_tokens_equal_transformers(
    layout: tuple[int, int], enable_symm_mem: bool, llama: tuple[Path, Reference]
) -> None:
    folder, reference = llama
    runner = ModelRunner(folder, ServerArgs(max_len=64), start(layout, enable_symm_mem))
    completions = runner.generate([list(sequence) for sequence in SEQUENCES], SamplingParams(max_new_tokens=6))
    assert [completion.token_ids for completion in completions] == reference.greedy


@pytest.mark.parametrize("layout", [*LAYOUTS, layout(1, 3), layout(2, 3)])
@pytest.mark.parametrize("sync_token_ids", [True, False])
def test_sampled_tokens_are_the_same_on_every_rank(
    layout: tuple[int, int], sync_token_ids: bool, llama: tuple[Path, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNC_TOKEN_IDS_ACROSS_TP", str(int(sync_token_ids)))
    args = ServerArgs(max_len=64)
    assert args.sync_token_ids == sync_token_ids
    runner = ModelRunner(llama[0], args, start(layout, enable_symm_mem=False))
    told: list[tuple[int, int]] = []
    runner.generate(
        [list(sequence) for sequence in SEQUENCES],
        SamplingParams(max_new_tokens=6, temperature=1.5, seed=3),
        on_token=lambda i, token: told.append((i, token)),
    )
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, told)
    assert told == everyone[dist.get_rank() - dist.get_rank() % layout[1]]


class Spy:
    """Notes for each row-parallel op: over which group, whether asked for symmetric memory, whether it is there."""

    def __init__(self, state: ParallelState, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, bool, bool]] = []
        roles = {state.tp.unique_name: state.tp, state.attn_tp.unique_name: state.attn_tp}
        op = torch.ops.sglang_symm.row_parallel_linear

        def spied(
            x: Tensor, weight: Tensor, bias: Tensor | None, group: str, symmetric: bool = True, **kwargs: Any
        ) -> Tensor:
            y: Tensor = op(x, weight, bias, group, symmetric=symmetric, **kwargs)
            role = "attn_tp" if group == state.attn_tp.unique_name else "tp"
            if y.numel():  # an idle rank's output has no memory anywhere
                self.calls.append((role, symmetric, roles[group].contains(y)))
            return y

        with_norm = torch.ops.sglang_symm.row_parallel_linear_add_rms_norm

        def spied_with_norm(*args: Any, symmetric: bool = True, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """What GPUs take: the sum is inside of the op, so it is found by the group's count."""
            name = args[6]
            before = roles[name].info()["outputs_inside"]
            result: tuple[Tensor, Tensor] = with_norm(*args, symmetric=symmetric, **kwargs)
            role = "attn_tp" if name == state.attn_tp.unique_name else "tp"
            if result[0].numel():
                self.calls.append((role, symmetric, roles[name].info()["outputs_inside"] > before))
            return result

        monkeypatch.setattr(torch.ops.sglang_symm, "row_parallel_linear", spied)
        monkeypatch.setattr(torch.ops.sglang_symm, "row_parallel_linear_add_rms_norm", spied_with_norm)


@pytest.mark.parametrize("mlp_group", ["attn_tp", "tp"])
@pytest.mark.parametrize("padding_mode", list(DpPaddingMode), ids=lambda mode: mode.name)
@pytest.mark.parametrize("enable_symm_mem", [True, False])
@pytest.mark.parametrize("layout", TRUE_LAYOUTS)
def test_behaviours_1_2_4_outputs_over_attention_tp_are_symmetric_ungated_and_over_tp_only_if_padded_to_the_maximum(
    layout: tuple[int, int],
    enable_symm_mem: bool,
    padding_mode: DpPaddingMode,
    mlp_group: str,
    llama: tuple[Path, Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, reference = llama
    state = start(layout, enable_symm_mem)
    spy = Spy(state, monkeypatch)
    logits = llama_cases.all_logits(llama_cases.load_model(folder, state, mlp_group), padding_mode)
    over_attn_tp = ("attn_tp", enable_symm_mem, enable_symm_mem)
    gated = enable_symm_mem and padding_mode is DpPaddingMode.MAX_LEN
    down_proj = over_attn_tp if mlp_group == "attn_tp" else ("tp", gated, gated)
    assert spy.calls == [over_attn_tp, down_proj] * (2 * (1 + llama_cases.DECODED))  # o_proj, down_proj of 2 layers
    for i, found in logits.items():
        assert max_error_in_eps(found, reference.logits[i]) <= LOGITS_BOUND


@pytest.mark.parametrize("sync", [None, "1"])
@pytest.mark.parametrize("enable_symm_mem", [True, False])
@pytest.mark.parametrize("layout", TRUE_LAYOUTS)
def test_behaviour_1_attention_tp_has_a_symmetric_communicator_if_memory_is_on_or_token_ids_are_synchronised(
    layout: tuple[int, int], enable_symm_mem: bool, sync: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sync is not None:
        monkeypatch.setenv("SYNC_TOKEN_IDS_ACROSS_TP", sync)
    state = start(layout, enable_symm_mem)
    assert state.tp.communicator == "symm"
    assert state.attn_tp is not state.tp
    assert state.attn_tp.communicator == ("symm" if enable_symm_mem or sync else "process_group")


@pytest.mark.parametrize("layout", TRUE_LAYOUTS)
def test_behaviour_3_allocation_is_symmetric_only_in_a_forward_that_is_padded_to_the_maximum(
    layout: tuple[int, int],
) -> None:
    state = start(layout, enable_symm_mem=True)
    assert not state.is_allocation_symmetric()
    for mode in DpPaddingMode:
        with state.forward(ForwardBatch([5, 3], is_extend=False, padding_mode=mode)):
            assert state.is_allocation_symmetric() == (mode is DpPaddingMode.MAX_LEN)
    assert not state.is_allocation_symmetric()


@pytest.fixture
def from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_SYMM_TIMEOUT", "20")
    monkeypatch.setenv("SGLANG_SYMM_FIRST_TIMEOUT", "40")


@pytest.mark.parametrize("enable_symm_mem", [True, False])
@pytest.mark.parametrize("layout", TRUE_LAYOUTS)
def test_behaviour_5_the_runner_passes_its_enable_symm_mem_to_the_groups_it_makes(
    layout: tuple[int, int], enable_symm_mem: bool, llama: tuple[Path, Reference], from_environment: None
) -> None:
    attn_dp, attn_tp = layout
    args = ServerArgs(attn_dp * attn_tp, attn_dp, enable_symm_mem, max_len=64, arena_bytes=SETTINGS["arena_bytes"])
    runner = ModelRunner(llama[0], args)
    assert runner.state.enable_symm_mem == enable_symm_mem
    assert runner.state.attn_tp.communicator == ("symm" if enable_symm_mem else "process_group")
    completions = runner.generate([list(SEQUENCES[0])], SamplingParams(max_new_tokens=6))
    assert completions[0].token_ids == llama[1].greedy[0]
    inside = runner.state.attn_tp.info()["outputs_inside"]
    assert (inside > 0) == (enable_symm_mem and runner.state.attn_dp_rank == 0)


@pytest.mark.parametrize("layout", TRUE_LAYOUTS)
@pytest.mark.parametrize("mlp_group", ["attn_tp", "tp"])
def test_a_dp_rank_without_a_prompt_takes_part_until_all_have_finished(
    layout: tuple[int, int], mlp_group: Any, llama: tuple[Path, Reference]
) -> None:
    args = ServerArgs(max_len=64, mlp_group=mlp_group)
    runner = ModelRunner(llama[0], args, start(layout, enable_symm_mem=True))
    completions = runner.generate([list(SEQUENCES[2])], SamplingParams(max_new_tokens=6))
    assert [completion.token_ids for completion in completions] == [llama[1].greedy[2]]
    assert runner.throughput.decode_tokens == (5 if runner.state.attn_dp_rank == 0 else 0)
