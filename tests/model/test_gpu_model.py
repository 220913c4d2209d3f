"""Every order in which 2, 3 and 4 GPUs can make the accesses of a few calls; broken protocols that are caught.

What is modelled, the properties and the limits: README.md. `pytest -s` shows the counterexamples of the mutants.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from explore import caught, holds, mutants

SMALL = "one_shot,two_shot,direct,copy,zero"
ALL = SMALL + ",fused,fused_two_shot"


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, f"--any {ALL} --length 2"),
        (2, f"--any {SMALL} --length 3"),
        (2, "--any one_shot,copy,zero --length 4"),
        (2, "--calls fused_two_shot,fused,fused_two_shot"),
        (3, "--calls one_shot,zero,one_shot"),
        (3, "--calls direct"),
        (3, "--calls direct,copy,direct --in-order"),
        (3, f"--any {SMALL} --length 3 --in-order"),
        (3, f"--any {ALL} --length 2 --in-order"),
        (3, "--calls fused_two_shot,zero,fused_two_shot --in-order"),
        (3, "--calls fused_two_shot,fused_two_shot,fused_two_shot --in-order --two-tiles"),
        (4, "--calls one_shot,direct,copy --in-order"),
        (4, "--calls two_shot,fused --in-order"),
        (2, f"--any {ALL},prefill,exchange --length 2 --in-order"),
        (2, "--any prefill,one_shot,direct,zero --length 3 --in-order"),
        (2, "--calls prefill,prefill,prefill"),
        (2, "--any exchange,prefill,one_shot,fused,zero --length 3 --in-order"),
        (2, "--calls exchange,exchange,exchange"),
        (3, "--any prefill,direct,fused --length 2 --in-order"),
        (4, "--calls prefill,prefill --in-order"),
        (2, f"--any {SMALL},direct_read --length 2"),
        (2, "--any direct,direct_read,prefill,zero --length 3 --in-order"),
        (3, "--any direct,direct_read,prefill --length 2 --in-order"),
        (2, "--calls direct,direct,direct"),
    ],
)
def test_in_every_order_each_kernel_finds_its_own_data(
    gpu_checker: Path, counts: list[str], ranks: int, options: str
) -> None:
    holds(gpu_checker, counts, ranks, "none", *options.split())


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, f"--any {SMALL} --length 3"),
        (2, "--any fused,zero,one_shot --length 2"),
        (2, "--calls fused,fused --in-order"),
        (2, "--calls fused_two_shot,two_shot --in-order"),
        (3, "--any one_shot,direct,zero --length 2 --in-order"),
        (3, "--calls fused_two_shot,zero --in-order"),
        (4, "--calls one_shot,zero --in-order"),
        (2, "--any prefill,direct,one_shot --length 2"),
        (2, "--any direct,direct_read,one_shot --length 2"),
        (2, "--any exchange,one_shot,zero --length 2"),
        (3, "--calls prefill,zero --in-order"),
    ],
)
def test_a_late_rank_returns_right_data_or_there_is_a_status(
    gpu_checker: Path, counts: list[str], ranks: int, options: str
) -> None:
    holds(gpu_checker, counts, ranks, "late", *options.split())


@pytest.mark.parametrize("fault", ["death", "stopped"])
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, f"--any {SMALL} --length 2 --in-order"),
        (3, "--calls one_shot,direct,zero --in-order"),
        (2, "--calls fused,fused --in-order"),
        (3, "--calls fused_two_shot,zero --in-order"),
        (2, "--calls prefill,prefill --in-order"),
        (2, "--any exchange,one_shot,zero --length 2 --in-order"),
        (3, "--calls prefill,zero --in-order"),
    ],
)
def test_a_rank_that_stops_anywhere_keeps_no_kernel_waiting(
    gpu_checker: Path, counts: list[str], ranks: int, options: str, fault: str
) -> None:
    holds(gpu_checker, counts, ranks, fault, *options.split())


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(2, f"--any {ALL},prefill,exchange --length 2"), (3, f"--any {SMALL} --length 2 --in-order")],
)
def test_nobody_returns_from_a_call_in_which_ranks_disagree(
    gpu_checker: Path, counts: list[str], ranks: int, options: str
) -> None:
    holds(gpu_checker, counts, ranks, "disagree", *options.split())


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, "--any two_shot,fused_two_shot,zero --length 2"),
        (2, "--calls fused_two_shot,fused_two_shot,fused_two_shot"),
        (3, "--calls two_shot,two_shot,two_shot --in-order"),
    ],
)
def test_one_buffer_would_do_for_the_results_of_both_parities(
    gpu_checker: Path, counts: list[str], ranks: int, options: str
) -> None:
    # A peer sends the next call's result only when it holds this rank's next partial, which the next kernel sends.
    variant = "(holds) one buffer for the results of both parities"
    holds(gpu_checker, counts, ranks, "none", "--mutant", variant, *options.split())


# Mutant, ranks, calls and options, fault, what is violated.
MUTANTS = [
    ("one parity for all slots", 2, "one_shot,one_shot", "none", "overwrites slot.*data of call 1"),
    ("one parity for all slots", 2, "fused,fused", "none", "overwrites slot.*data of call 1"),
    ("one parity for all slots", 2, "exchange,one_shot", "none", "overwrites slot.*data of call 1"),
    ("one header for both parities", 2, "zero,zero", "none", "overwrites header.* of call 1"),
    ("slots are not re-armed", 2, "one_shot,zero,one_shot", "none", "data of call 1"),
    ("slots are not re-armed", 2, "fused,zero,one_shot", "none", "data of call 1"),
    ("the other parity is re-armed", 2, "one_shot,one_shot,one_shot", "none", "erases data of call 2|data of call 1"),
    ("slots of results are not re-armed", 2, "two_shot,zero,two_shot", "none", "data of call 1"),
    ("slots of results are not re-armed", 3, "fused_two_shot,zero,fused_two_shot", "none", "data of call 1"),
    ("the last tile is not re-armed", 2, "fused,zero,fused", "none", "data of call 1"),
    ("headers are not awaited", 2, "one_shot,zero,one_shot", "none", "overwrites slot.*data of call 1"),
    ("headers are not awaited", 2, "exchange,zero,exchange", "none", "overwrites slot.*data of call 1"),
    ("headers are not awaited", 2, "copy,copy,copy", "none", "overwrites copy.* of call 1"),
    ("the last peer's header is not awaited", 3, "zero,zero,zero", "none", "overwrites header.* of call 1"),
    ("a header of an older call counts", 2, "zero,zero,zero", "none", "header.* of call 1 for one of call 3"),
    ("headers are sent before the previous kernel has ended", 2, "one_shot,zero,one_shot", "none", "of call 1"),
    ("the root of a broadcast awaits nobody", 2, "copy,copy,copy", "none", "overwrites .* of call 1"),
    ("a call of 0 elements sends no header", 2, "one_shot,zero,one_shot", "none", "of call 1"),
    ("a kernel advances the epochs of its own CTAs alone", 2, "zero,one_shot", "none", "deadlock"),
    ("data that equal the sentinel are sent as they are", 2, "one_shot", "none", "deadlock"),
    ("an older copy counts", 2, "copy,copy,copy", "none", "takes copy.* of call 1 for one of call 3"),
    ("one parity for all copies", 2, "copy,copy", "none", "overwrites copy.* of call 1"),
    ("done flags are sent without a fence", 2, "direct", "none", "without the result"),
    ("no done flag is awaited", 2, "direct,direct", "none", "without the result"),
    ("done flags are sent without a fence", 2, "direct_read", "none", "without the result"),
    ("no done flag is awaited", 2, "direct_read,direct_read", "none", "without the result"),
    ("no arrived flag is awaited", 2, "direct", "none", "reads partial"),
    ("the flag of a partial is raised before it has arrived", 2, "direct", "none", "reads partial"),
    ("done flags are sent without a fence", 2, "prefill", "none", "without the result"),
    ("no done flag is awaited", 2, "prefill,prefill", "none", "without the result"),
    ("slots are not re-armed", 2, "prefill,zero,prefill", "none", "data of call 1"),
    ("slots are not re-armed", 2, "exchange,zero,exchange", "none", "data of call 1"),
    ("the flag of a partial is raised before it has arrived", 2, "prefill", "none", "reads partial"),
    ("results of a tile are awaited before its sum is pushed", 2, "fused_two_shot", "none", "deadlock"),
    ("results of a tile are awaited before its sum is pushed", 3, "fused_two_shot --two-tiles", "none", "deadlock"),
    ("slots of results are not re-armed", 3, "fused_two_shot,zero,fused_two_shot --two-tiles", "none",
     "data of call 1"),
    ("the last tile is not re-armed", 3, "fused_two_shot,zero,fused_two_shot --two-tiles", "none", "data of call 1"),
    ("a kernel that gives up writes no status", 2, "one_shot", "late", "nobody is told"),
    ("a broken group goes on", 2, "one_shot,zero,one_shot", "late", "takes data of call 3"),
    ("the deadline is never looked at", 2, "one_shot", "stopped", "deadlock"),
    ("a death is not told to the devices", 2, "one_shot", "death", "deadlock"),
    ("descriptors are not compared", 2, "one_shot,one_shot", "disagree", "in which ranks disagree"),
]  # fmt: skip


@pytest.mark.parametrize(("mutant", "ranks", "calls", "fault", "violated"), MUTANTS)
def test_the_search_catches(
    gpu_checker: Path, counts: list[str], mutant: str, ranks: int, calls: str, fault: str, violated: str
) -> None:
    calls, *options = calls.split()
    order = ["--in-order"] if ranks > 2 else []
    counts.append(caught(gpu_checker, mutant, ranks, calls, fault, violated, *order, *options) + " (GPU)")


def test_every_mutant_is_tried(gpu_checker: Path) -> None:
    assert mutants(gpu_checker) == {mutant for mutant, *_ in MUTANTS}
