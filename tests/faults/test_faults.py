"""Ranks die, stop or come late: every survivor says who, within its deadline, and nothing is left behind."""

import os
import re
import signal

from launcher import run

SURVIVORS_DEADLINE = 4.0  # seconds; the watcher needs far less, a loaded machine may not


def shared_objects():
    return {name for name in os.listdir("/dev/shm") if "sglang" in name.lower() or "symm" in name.lower()}


CODES = {"kill": -signal.SIGKILL, "segv": -signal.SIGSEGV, "_exit": 3, "exit": 4, "raise": 1}


def check_deaths(tmp_path, nproc, *deaths):
    """Run `nproc` ranks of which one after the other dies; a death is (how, rank among those that are left)."""
    outcomes = run("die_in_all_reduce.py", nproc, tmp_path, str(nproc), *(f"{how}:{who}" for how, who in deaths))
    alive = list(range(nproc))
    for turn, (how, who) in enumerate(deaths):
        victim = alive.pop(who)
        assert outcomes[victim].code == CODES[how], outcomes[victim]
        died = float((tmp_path / f"death{turn}").read_text())
        # An orderly exit says goodbye: the rank left, it did not die. Ranks are those of the group, made of the
        # survivors.
        sentence = rf"rank\(s\) {who} left" if how in ("exit", "raise") else f"rank {who} died"
        for survivor in alive:
            outcome, told = outcomes[survivor], outcomes[survivor].report["told"][turn]
            assert re.search(sentence, told["error"]), outcome
            assert re.search(sentence, told["again"]), outcome
            assert told["time"] - died < SURVIVORS_DEADLINE, outcome
            assert told["again seconds"] < 1, outcome
    for survivor in alive:
        assert outcomes[survivor].code == 0, outcomes[survivor]
        assert outcomes[survivor].report["sum"] == len(alive), outcomes[survivor]


def test_each_rank_that_dies_in_all_reduce_is_named_by_every_survivor_in_time_and_they_go_on(tmp_path):
    objects = shared_objects()
    check_deaths(tmp_path, 6, ("kill", 2), ("segv", 0), ("_exit", 3), ("exit", 1), ("raise", 0))
    assert shared_objects() == objects


def test_deaths_in_a_group_of_three_and_of_two(tmp_path):
    check_deaths(tmp_path, 3, ("kill", 0), ("kill", 1))


def test_a_late_rank_is_named_by_every_other_at_the_deadline_and_all_can_go_on(tmp_path):
    outcomes = run("come_late.py", 3, tmp_path, "1")
    for outcome in outcomes:
        assert outcome.code == 0, outcome
        assert outcome.report["sum"] == 3, outcome
        assert outcome.report["call"] == 50, outcome
        assert re.search(r"rank\(s\) 1 did not arrive within 1 s", outcome.report["error"]), outcome
    for outcome in (outcomes[0], outcomes[2]):
        assert 0.9 < outcome.report["seconds"] < 2.5, outcome


def test_a_rank_that_dies_while_a_group_is_made_is_an_error_on_all_others(tmp_path):
    deaths = [("before address", 0), ("after address", 3), ("before ready", 1), ("after ready", 0)]
    outcomes = run("die_in_creation.py", 5, tmp_path, *(f"{step}:{who}" for step, who in deaths))
    alive = list(range(5))
    for turn, (_, who) in enumerate(deaths):
        victim = alive.pop(who)
        assert outcomes[victim].code == -signal.SIGKILL, outcomes[victim]
        for survivor in alive:
            told = outcomes[survivor].report["told"][turn]
            assert re.search(rf"rank(\(s\))? {who}\b", told["error"]), outcomes[survivor]
            assert told["seconds"] < 20, outcomes[survivor]


def test_two_hundred_groups_leave_no_descriptor_no_thread_no_mapping_and_no_named_object(tmp_path):
    objects = shared_objects()
    for outcome in run("make_many_groups.py", 2, tmp_path, limit=120):
        assert outcome.code == 0, outcome
        assert outcome.report["after"] == outcome.report["before"], outcome
        assert outcome.report["own_after"]["descriptors"] <= outcome.report["own_before"]["descriptors"] + 2, outcome
    assert shared_objects() == objects
