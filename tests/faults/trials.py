"""What the harness draws: a trial is a group, a fault, a victim and a moment, all from the seed and the trial's number.

Every rank draws the same calls from the trial, so nothing is exchanged to keep them in step.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

NATIVE = ("float32", "bfloat16", "float16")
MAX_COUNT = 60000  # elements; several rounds of a slot in an arena of 2 MiB
ARENA_BYTES = 2 << 20

# Faults by what survivors are told.
DIED = ("SIGKILL", "SIGSEGV", "_exit(0)", "_exit(1)", "stopped, killed early")
LEFT = ("sys.exit", "full arena, left")
MISSING = ("stopped, continued", "stopped, killed late", "late")
DISAGREEMENTS = ("dtype", "count", "op", "dim", "sizes", "src", "bias", "reduction", "fallback", "order")
DISAGREE = tuple(f"disagree: {what}" for what in DISAGREEMENTS)
CLOSED = ("closed socket",)
CREATION = ("killed in creation",)
HARMLESS = ("full arena, freed",)
FAULTS = (*DIED, *LEFT, *MISSING, *DISAGREE, *CLOSED, *CREATION, *HARMLESS)
# Of each kind about as many; a creation without one of its ranks waits seconds for it.
_WEIGHTS = {**dict.fromkeys(FAULTS, 1.0), **dict.fromkeys(DISAGREE, 0.4), "killed in creation": 0.25}


class Call(NamedTuple):
    """One collective. What an op has no use for is ignored: dim of all_gather, src of broadcast, bias of the linear."""

    op: str
    dtype: str = "float32"
    count: int = 1
    dim: int = 0
    src: int = 0
    bias: bool = False


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        number: seed and number draw everything else. world: ranks of the process group. members: those of the group.
        victim: rank in the group that suffers the fault. at_call: a fault from inside comes before this call (from 1).
        delay: seconds until a fault that comes from outside, or from another thread. threaded: from another thread.
        timeout: the group's deadline. fallback: every third call goes through the process group. replaced: whether the
        next group has a new process for a dead one, or only the survivors.
    """

    seed: int
    number: int
    world: int
    members: tuple[int, ...]
    victim: int
    fault: str
    at_call: int
    delay: float
    threaded: bool
    timeout: float
    first_timeout: float
    fallback: bool
    replaced: bool

    @property
    def strict(self) -> bool:
        return self.fault.startswith("full arena")

    @property
    def process_group_timeout(self) -> float:
        """Seconds after which gloo gives up; a rank that waits there for a survivor learns of a death only then."""
        return 3.0 if self.fallback else 20.0

    def random(self, purpose: str) -> random.Random:
        return random.Random(f"{self.seed}/{self.number}/{purpose}")


def draw_trial(seed: int, number: int, worlds: tuple[int, int], faults: tuple[str, ...]) -> Trial:
    chosen = random.Random(f"{seed}/{number}")
    world = chosen.randint(*worlds)
    fault = chosen.choices(faults, [_WEIGHTS[fault] for fault in faults])[0]
    whole = world == 2 or fault in CREATION or chosen.random() < 0.7
    size = world if whole else chosen.randint(2, world - 1)
    # Only what waits for the deadline has a short one: on a loaded machine a healthy rank is late now and then.
    timeout = round(chosen.uniform(0.6, 1.2), 2) if fault in MISSING else 8.0
    return Trial(
        seed=seed,
        number=number,
        world=world,
        members=tuple(sorted(chosen.sample(range(world), size))),
        victim=chosen.randrange(size),
        fault=fault,
        at_call=chosen.randint(2 if fault in MISSING else 1, 30),
        delay=chosen.uniform(0, 0.03),
        threaded=chosen.random() < 0.7,
        timeout=timeout,
        first_timeout=2.0 if fault in CREATION else 15.0,
        fallback=fault in DIED and chosen.random() < 0.15,
        replaced=chosen.random() < 0.5,
    )


def draw_count(chosen: random.Random) -> int:
    if chosen.random() < 0.03:
        return 0
    return int(math.exp(chosen.uniform(0, math.log(MAX_COUNT))))


def draw_call(chosen: random.Random, size: int) -> Call:
    ops = ("all_reduce", "all_reduce_", "all_gather", "all_gather", "reduce_scatter", "broadcast", "barrier", "linear")
    op = chosen.choice(ops)
    dtype = "float32" if op == "linear" else chosen.choice(NATIVE)
    return Call(op, dtype, draw_count(chosen), chosen.randrange(2), chosen.randrange(size), chosen.random() < 0.5)


def draw_disagreement(chosen: random.Random, size: int, what: str) -> tuple[list[Call], list[Call]]:
    """What all others call, and what the victim calls."""
    count = draw_count(chosen) + 1
    if what == "dtype":
        one, other = chosen.sample(NATIVE, 2)
        return [Call("all_reduce", one, count)], [Call("all_reduce", other, count)]
    if what == "count":
        return [Call("all_reduce", count=count)], [Call("all_reduce", count=count + chosen.randint(1, 5))]
    if what == "op":
        one, other = chosen.sample(("all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier", "linear"), 2)
        return [Call(one, count=count)], [Call(other, count=count)]
    if what == "dim":
        return [Call("all_gather", count=count, dim=0)], [Call("all_gather", count=count, dim=1)]
    if what == "sizes":
        even = 64 + count // 2 * 2
        return [Call("all_gather", count=even)], [Call("all_gather, cut otherwise", count=even)]
    if what == "src":
        one, other = chosen.sample(range(size), 2)
        return [Call("broadcast", count=count, src=one)], [Call("broadcast", count=count, src=other)]
    if what == "bias":
        return [Call("linear", count=count)], [Call("linear", count=count, bias=True)]
    if what == "reduction":
        return [Call("all_reduce", count=count)], [Call("max", count=count)]
    if what == "fallback":
        return [Call("all_reduce", count=count)], [Call("all_reduce", "int64", count)]
    assert what == "order", what
    one, other = (Call(op, count=count) for op in chosen.sample(("all_reduce", "broadcast", "barrier"), 2))
    return [one, other], [other, one]
