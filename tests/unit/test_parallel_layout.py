"""The arithmetic of ranks and the choice of communicators: no process group, no library."""

import re

import pytest
import torch

from sglang_symm.distributed.group import GroupSettings, _decide
from sglang_symm.distributed.parallel_state import Layout, ParallelState, communicators
from sglang_symm.distributed.settings import checked_device, sync_token_ids_across_tp
from sglang_symm.model_runner import ServerArgs


class FakeGroup:
    def __init__(self, rank, size):
        self.rank_in_group, self.world_size = rank, size


@pytest.mark.parametrize(("tp", "attn_dp"), [(1, 1), (2, 1), (2, 2), (4, 2), (6, 2), (8, 4), (6, 3), (6, 6)])
@pytest.mark.parametrize("tp_groups", [1, 2, 3])
def test_each_rank_finds_itself_at_dp_rank_times_attn_tp_size_plus_attn_tp_rank(tp, attn_dp, tp_groups):
    world = tp * tp_groups
    for rank in range(world):
        layout = Layout.of(rank, world, tp, attn_dp)
        assert len(layout.tp) == tp
        assert len(layout.attn_dp) == attn_dp
        assert len(layout.attn_tp) * attn_dp == tp
        tp_rank = layout.attn_dp.index(rank) * len(layout.attn_tp) + layout.attn_tp.index(rank)
        assert layout.tp.index(rank) == tp_rank
        assert set(layout.attn_tp) & set(layout.attn_dp) == {rank}


@pytest.mark.parametrize(("tp", "attn_dp"), [(4, 1), (4, 2), (6, 2), (6, 3)])
def test_the_groups_of_one_role_partition_the_world(tp, attn_dp):
    world = 2 * tp
    layouts = [Layout.of(rank, world, tp, attn_dp) for rank in range(world)]
    for role in ("tp", "attn_tp", "attn_dp"):
        groups = {getattr(layout, role) for layout in layouts}
        assert sorted(rank for group in groups for rank in group) == list(range(world))


def test_two_times_three_is_laid_out_as_documented():
    layout = Layout.of(4, 6, 6, 2)
    assert layout.attn_tp == (3, 4, 5)
    assert layout.attn_dp == (1, 4)


@pytest.mark.parametrize(("tp", "attn_dp", "numbers"), [(3, 1, "3.*4"), (4, 3, "3.*4"), (0, 1, "0"), (4, 0, "0")])
def test_sizes_that_do_not_divide_are_named(tp, attn_dp, numbers):
    with pytest.raises(ValueError, match=numbers):
        Layout.of(0, 4, tp, attn_dp)


@pytest.mark.parametrize(
    ("environment", "enable", "attn_tp"),
    [
        ({}, False, "process_group"),
        ({}, True, "symm"),
        ({"SYNC_TOKEN_IDS_ACROSS_TP": "1"}, False, "symm"),
        ({"SYNC_TOKEN_IDS_ACROSS_TP": "true"}, False, "symm"),
        ({"SYNC_TOKEN_IDS_ACROSS_TP": "0"}, False, "process_group"),
        ({"SYNC_TOKEN_IDS_ACROSS_TP": "0"}, True, "symm"),
    ],
)
def test_attention_tp_is_symmetric_when_token_ids_are_synchronised_or_symmetric_memory_is_on(
    monkeypatch, environment, enable, attn_tp
):
    monkeypatch.delenv("SYNC_TOKEN_IDS_ACROSS_TP", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    wanted = communicators(enable)
    assert wanted == {"world": "process_group", "tp": "symm", "attn_tp": attn_tp, "attn_dp": "process_group"}


def test_groups_that_do_not_fit_make_no_parallel_state():
    with pytest.raises(ValueError, match="tp rank = attn_dp rank"):
        ParallelState(FakeGroup(2, 4), FakeGroup(2, 4), FakeGroup(1, 2), FakeGroup(1, 2))
    with pytest.raises(ValueError, match="tp size"):
        ParallelState(FakeGroup(0, 4), FakeGroup(0, 4), FakeGroup(0, 2), FakeGroup(0, 1))


def config(**changes):
    return {
        "device": "cpu",
        "communicator": "symm",
        "timeout": 60.0,
        "algo": "auto",
        "nccl": "0",
        "host": "a",
    } | changes


def test_equal_configurations_keep_the_communicator():
    assert _decide([config(), config()])["communicator"] == "symm"
    assert _decide([config(communicator="process_group")] * 2)["communicator"] == "process_group"


def test_members_on_several_hosts_fall_back_to_the_process_group_and_say_so():
    decision = _decide([config(), config(host="b")])
    assert decision["communicator"] == "process_group"
    assert "several hosts" in decision["note"]


def test_more_than_sixteen_members_fall_back_to_the_process_group_and_say_so():
    assert _decide([config()] * 16)["communicator"] == "symm"
    decision = _decide([config()] * 17)
    assert decision["communicator"] == "process_group"
    assert "17" in decision["note"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"device": "cuda"}, "disagree about device: rank 0 has device='cpu', rank 2 has device='cuda'"),
        ({"timeout": 5.0}, "disagree about timeout: rank 0 has timeout=60.0, rank 2 has timeout=5.0"),
        (
            {"communicator": "process_group", "algo": "two_shot"},
            "disagree about communicator, algo: rank 0 has communicator='symm', algo='auto', "
            "rank 2 has communicator='process_group', algo='two_shot'",
        ),
    ],
)
def test_members_that_disagree_are_named_with_what_differs_alone(change, sentence):
    with pytest.raises(ValueError, match=rf"{sentence}$"):
        _decide([config(), config(), config(**change)])


def test_a_member_s_own_error_is_everyone_s():
    with pytest.raises(ValueError, match=r"broken.*rank 1"):
        _decide([config(), {"error": "broken"}])


def test_settings_come_from_arguments_then_the_environment_then_the_defaults(monkeypatch):
    cpu = torch.device("cpu")
    for name in ("ARENA_BYTES", "TIMEOUT", "FIRST_TIMEOUT", "ALGO", "PINNED", "STRICT"):
        monkeypatch.delenv(f"SGLANG_SYMM_{name}", raising=False)
    assert GroupSettings.resolve(cpu) == GroupSettings(64 << 20, 60.0, 600.0, "auto", False, False, "")
    monkeypatch.setenv("SGLANG_SYMM_ARENA_BYTES", "4096")
    monkeypatch.setenv("SGLANG_SYMM_TIMEOUT", "2.5")
    monkeypatch.setenv("SGLANG_SYMM_ALGO", "two_shot")
    monkeypatch.setenv("SGLANG_SYMM_STRICT", "true")
    settings = GroupSettings.resolve(cpu, timeout=7, strict=False)
    assert settings == GroupSettings(4096, 7.0, 600.0, "two_shot", False, False, "")


WRONG_TEXTS = [
    *[("ARENA_BYTES", text, repr(text)) for text in ("64M", "inf", "nan", "1e30", "100000.7")],
    *[("ARENA_BYTES", text, text) for text in ("-1", str(1 << 63))],
    *[("TIMEOUT", text, text) for text in ("inf", "nan")],
    ("TIMEOUT", "0", "0.0"),
    ("TIMEOUT", "1e10", "10000000000.0"),
    ("FIRST_TIMEOUT", "abc", "'abc'"),
    ("ALGO", "fast", "'fast'"),
    ("PINNED", "maybe", "'maybe'"),
    ("STRICT", "2", "'2'"),
]


@pytest.mark.parametrize(("name", "text", "got"), WRONG_TEXTS)
def test_a_wrong_environment_variable_is_named_with_what_was_expected_and_its_value(monkeypatch, name, text, got):
    monkeypatch.setenv(f"SGLANG_SYMM_{name}", text)
    with pytest.raises(ValueError, match=rf"expected SGLANG_SYMM_{name} to be .*, got {re.escape(got)}$"):
        GroupSettings.resolve(torch.device("cpu"))


WRONG_ARGUMENTS = [
    {"arena_bytes": "64M"},
    {"arena_bytes": 1e6},
    {"arena_bytes": True},
    {"arena_bytes": -1},
    {"arena_bytes": 1 << 70},
    {"timeout": "60"},
    {"timeout": float("nan")},
    {"first_timeout": float("inf")},
    {"first_timeout": 0},
    {"algo": ["auto"]},
    {"pinned": "no"},
    {"strict": 2},
]


@pytest.mark.parametrize("given", WRONG_ARGUMENTS, ids=str)
def test_a_wrong_argument_is_named_with_its_value_and_what_was_expected(given):
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=rf"expected {name} to be .*, got {re.escape(repr(value))}"):
        GroupSettings.resolve(torch.device("cpu"), **given)


def test_an_unknown_setting_is_refused_by_name():
    with pytest.raises(ValueError, match=r"expected settings among arena_bytes, .*, got arena_size"):
        GroupSettings.resolve(torch.device("cpu"), arena_size=5)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("meta", "expected device to be cpu, cuda or cuda:N, got 'meta'"),
        ("foo", "got 'foo'"),
        (None, "got 'None'"),
        ("cuda:99", "device cuda:99: torch sees [0-9]+ GPU"),
    ],
)
def test_a_device_that_is_none_is_named(device, message):
    with pytest.raises(ValueError, match=message):
        checked_device(device)


@pytest.mark.parametrize(
    ("text", "value"), [("", False), ("1", True), ("TRUE", True), (" yes ", True), ("on", True), ("0", False)]
)
def test_synchronised_token_ids_are_told_in_the_words_of_the_other_flags(monkeypatch, text, value):
    monkeypatch.setenv("SYNC_TOKEN_IDS_ACROSS_TP", text)
    assert sync_token_ids_across_tp() is value
    assert (communicators(False)["attn_tp"] == "symm") is value
    assert ServerArgs().sync_token_ids is value
    monkeypatch.setenv("SYNC_TOKEN_IDS_ACROSS_TP", "maybe")
    with pytest.raises(ValueError, match="expected SYNC_TOKEN_IDS_ACROSS_TP to be 0 or 1, got 'maybe'"):
        sync_token_ids_across_tp()
