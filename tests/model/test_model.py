"""Every order of steps of 2, 3 and 4 ranks in 3 calls, with and without faults; 32 broken protocols that are caught.

What is modelled, the properties and the limits: README.md. `pytest -s` shows the counterexamples of the mutants.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from explore import caught, holds, mutants, run

ALL = "one_shot,two_shot,in_place,mixed,broadcast,broadcast_in_place,zero"


@pytest.mark.parametrize(
    ("ranks", "kinds"),
    [(2, ALL), (3, ALL), (4, "one_shot,two_shot,in_place,broadcast,zero")],
    ids=["2 ranks", "3 ranks", "4 ranks"],
)
def test_in_every_order_of_steps_each_rank_returns_the_right_data(
    checker: Path, counts: list[str], ranks: int, kinds: str
) -> None:
    holds(checker, counts, ranks, "none", "--any", kinds)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_leaves_after_its_last_call_spoils_nothing(checker: Path, counts: list[str], ranks: int) -> None:
    holds(checker, counts, ranks, "bye", "--any", ALL)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_leaves_too_early_is_named_by_all_in_one_sentence(
    checker: Path, counts: list[str], ranks: int
) -> None:
    holds(checker, counts, ranks, "leave", "--any", ALL)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_make_different_calls_all_raise_one_sentence(checker: Path, counts: list[str], ranks: int) -> None:
    holds(checker, counts, ranks, "disagree", "--any", ALL)


@pytest.mark.parametrize(("ranks", "kinds"), [(2, ALL), (3, "one_shot,in_place")])
@pytest.mark.parametrize("fault", ["death", "deaths"])
def test_after_a_death_survivors_return_right_data_or_raise_one_sentence_without_a_deadline(
    checker: Path, counts: list[str], ranks: int, kinds: str, fault: str
) -> None:
    holds(checker, counts, ranks, fault, "--any", kinds)


@pytest.mark.parametrize(("ranks", "kinds"), [(2, ALL), (3, "one_shot,in_place,broadcast_in_place")])
def test_a_late_rank_returns_right_data_or_raises_the_sentence_of_those_who_gave_up(
    checker: Path, counts: list[str], ranks: int, kinds: str
) -> None:
    holds(checker, counts, ranks, "late", "--any", kinds)


@pytest.mark.parametrize(("ranks", "kinds"), [(2, ALL), (3, "one_shot,in_place")])
@pytest.mark.parametrize("fault", ["stopped", "slow_report"])
def test_a_rank_that_stops_anywhere_even_while_it_reports_keeps_nobody_waiting(
    checker: Path, counts: list[str], ranks: int, kinds: str, fault: str
) -> None:
    holds(checker, counts, ranks, fault, "--any", kinds)


@pytest.mark.parametrize(("ranks", "kinds"), [(2, ALL), (3, "one_shot,in_place,broadcast_in_place")])
def test_a_rank_whose_group_is_destroyed_while_it_waits_leaves_its_peers_right_data_or_one_sentence(
    checker: Path, counts: list[str], ranks: int, kinds: str
) -> None:
    holds(checker, counts, ranks, "destroy", "--any", kinds)


@pytest.mark.parametrize(
    ("ranks", "calls"), [(2, ["--any", ALL]), (3, ["--calls", "in_place,one_shot,broadcast_in_place"])], ids=["2", "3"]
)
def test_all_faults_at_once_still_end_in_right_data_or_one_sentence(
    checker: Path, counts: list[str], ranks: int, calls: list[str]
) -> None:
    holds(checker, counts, ranks, "anything", *calls)


@pytest.mark.parametrize("fault", ["bye", "leave", "disagree"])
def test_four_ranks_end_in_right_data_or_one_sentence(checker: Path, counts: list[str], fault: str) -> None:
    holds(checker, counts, 4, fault, "--calls", "in_place,one_shot,broadcast_in_place")


def test_after_a_death_the_other_three_return_right_data_or_raise_one_sentence(
    checker: Path, counts: list[str]
) -> None:
    # Without a broadcast every rank does what its neighbour does, so it is enough that one of them dies.
    holds(checker, counts, 4, "death", "--victim", "0", "--calls", "in_place,one_shot,zero")


def test_of_four_ranks_a_late_one_returns_right_data_or_raises_the_sentence(checker: Path, counts: list[str]) -> None:
    holds(checker, counts, 4, "late", "--calls", "one_shot,in_place,zero")


# Mutant, ranks, calls, fault, what is violated.
MUTANTS = [
    ("one parity for all slots", 2, "one_shot,one_shot", "none", "overwrites slot.* input of call 1"),
    ("one header for both parities", 2, "one_shot,one_shot", "none", "overwrites fields.* call 1"),
    ("the header goes before its fields", 2, "one_shot", "none", "reads nothing yet in fields"),
    ("the header is stored without release", 2, "one_shot", "none", "reads nothing yet in fields"),
    ("the fields are read before the header is there", 2, "one_shot", "none", "reads nothing yet in fields"),
    ("a header of an older call counts", 2, "zero,zero,zero", "none", "reads call 1 in fields.* expected call 3"),
    ("the slot is filled after the header is sent", 2, "one_shot", "none", "reads nothing yet in slot"),
    ("the last peer's header is not awaited", 3, "one_shot", "none", "reads nothing yet"),
    ("the root of a broadcast awaits nobody", 2, "one_shot,broadcast,broadcast", "none", "overwrites fields"),
    ("a reader of a broadcast awaits the root alone", 3, "broadcast,broadcast,broadcast", "none", "overwrites fields"),
    ("only the root of a broadcast sends a header", 2, "one_shot,broadcast,one_shot", "none", "overwrites slot"),
    ("a call of 0 elements sends no header", 2, "one_shot,zero,one_shot", "none", "overwrites slot"),
    ("no done flag is awaited", 2, "two_shot", "none", "reads input of call 1 in slot.* expected result"),
    ("no done flag is awaited", 2, "broadcast_in_place,in_place", "none", "overwrites tensor of rank 1"),
    ("done is sent before the share is written", 3, "in_place", "none", "reads input of call 1 in tensor"),
    ("done is stored without release", 3, "in_place", "none", "reads input of call 1 in tensor"),
    ("the result is written to this rank alone", 2, "mixed", "none", "reads input of call 1 in"),
    ("done flags outrank the abort record", 2, "in_place", "late", "returns wrong data from call 1"),
    ("done flags outrank the abort record", 3, "in_place", "death", "returns wrong data from call 1"),
    ("the abort record is taken without compare-and-swap", 3, "zero", "late", "another sentence than"),
    ("the abort record is complete before its fields", 2, "zero,zero", "disagree", "another sentence than"),
    ("an incomplete abort record is read", 2, "zero,zero", "disagree", "another sentence than"),
    ("a reader without patience reads an incomplete record", 2, "zero", "slow_report", "another sentence than"),
    ("a rank raises its own sentence, not the record's", 3, "zero", "leave", "another sentence than"),
    ("a record may name nobody", 2, "zero", "late", "names nobody"),
    ("the abort record and bye are looked at before the data", 2, "zero", "bye", "raises, and nothing is wrong"),
    ("a late rank ignores the abort record", 2, "zero,zero", "late", "began after the group was broken"),
    ("a waiting rank ignores the abort record", 2, "one_shot", "death", "deadlock"),
    ("the slot is filled before the abort record is looked at", 2, "one_shot,zero,one_shot", "late", "overwrites slot"),
    ("a death is not noticed", 2, "one_shot", "death", "deadlock"),
    ("a rank that left is not noticed", 2, "one_shot", "leave", "deadlock"),
    ("the deadline is never looked at", 2, "one_shot", "stopped", "deadlock"),
    ("descriptors are not compared", 2, "zero,zero", "disagree", "."),
    ("a group that is destroyed in a call leaves no record", 2, "in_place", "destroy", "returns wrong data"),
]  # fmt: skip


@pytest.mark.parametrize("search", ["reduced", "full"])
@pytest.mark.parametrize(("mutant", "ranks", "calls", "fault", "violated"), MUTANTS)
def test_the_search_catches(
    checker: Path, counts: list[str], mutant: str, ranks: int, calls: str, fault: str, violated: str, search: str
) -> None:
    options = ["--full"] if search == "full" else []
    line = caught(checker, mutant, ranks, calls, fault, violated, *options)
    if search == "reduced":
        counts.append(line)


def test_every_mutant_is_tried(checker: Path) -> None:
    assert mutants(checker) == {mutant for mutant, *_ in MUTANTS}


def test_a_counterexample_is_as_short_as_can_be(checker: Path) -> None:
    # Both headers, one look of each rank at the other's, and the second call of the quicker rank.
    _, output = run(checker, "--ranks", 2, "--calls", "one_shot,one_shot", "--mutant", "one parity for all slots")
    steps = [line.strip() for line in output.splitlines() if re.match(r" *\d+  ", line)]
    assert [step.split("  ")[1].split(":")[0] for step in steps] == [
        *["rank 0, call 1"] * 3, *["rank 1, call 1"] * 3, *["rank 0, call 1"] * 2, "rank 0, call 2"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "fault", ["none", "bye", "leave", "disagree", "death", "late", "stopped", "slow_report", "anything"]
)
def test_the_reduced_search_and_the_full_one_agree(checker: Path, counts: list[str], fault: str) -> None:
    # Of what holds in the full search, the reduced one must find nothing wrong; mutants are compared above.
    calls = ["--any", ALL, "--length", "2"]
    holds(checker, [], 2, fault, *calls)
    status, output = run(checker, "--ranks", 2, "--fault", fault, "--full", *calls)
    assert status == 0, "\n" + output


def test_a_peer_may_still_write_a_tensor_whose_call_has_raised_a_known_limit(checker: Path) -> None:
    status, output = run(checker, "--ranks", 2, "--calls", "in_place", "--fault", "raised_too")
    assert status == 1
    assert "writes tensor of rank 0, share 1 after the call of rank 0 has raised" in output
