"""A rank: all-reduces until somebody dies, tells what it saw, and goes on with the survivors until it is its turn.

arguments: FOLDER SEED HOW:RANK ...
"""

import ctypes
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from launcher import report

from sglang_symm.distributed import Group

FOLDER, SEED, DEATHS = Path(sys.argv[1]), int(sys.argv[2]), [death.split(":") for death in sys.argv[3:]]
COUNTS = [1, 100, 5000, 70000, 600000]


def die(how: str, turn: int) -> None:
    """Leave the time of death behind, and die."""
    (FOLDER / f"death{turn}").write_text(repr(time.time()))
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "segv":
        ctypes.string_at(0)
    elif how == "_exit":
        os._exit(3)
    elif how == "exit":
        sys.exit(4)
    else:
        raise RuntimeError("the victim gives up")


def reduce_until_somebody_dies(group: Group, how: str, victim: int, turn: int) -> dict[str, object]:
    """What this rank, a survivor, was told."""
    chosen = random.Random(SEED + turn)
    fatal_call, delay = chosen.randrange(20, 120), chosen.uniform(0.1, 0.4)
    if dist.get_rank() == victim and how == "kill":
        # From another thread, so that death comes in the middle of a call.
        threading.Thread(target=lambda: (time.sleep(delay), die(how, turn)), daemon=True).start()
    x, call = torch.ones(max(COUNTS)), 0
    try:
        while True:
            call += 1
            if dist.get_rank() == victim and how != "kill" and call == fatal_call:
                die(how, turn)
            count = COUNTS[call % len(COUNTS)]
            y = group.all_reduce(x[:count])
            if not torch.equal(y, torch.full((count,), float(group.world_size))):
                return {"error": f"wrong sum in call {call}"}
    except dist.DistBackendError as error:
        told: dict[str, object] = {"error": str(error), "time": time.time()}
    begin = time.monotonic()
    for again in (lambda: group.all_reduce(x), group.barrier, group.check):
        try:
            again()
            told["again"] = "no error"
        except dist.DistBackendError as error:
            told["again"] = str(error)
    told["again seconds"] = time.monotonic() - begin
    return told


def main() -> None:
    dist.init_process_group("gloo")
    alive = list(range(dist.get_world_size()))
    told = []
    for turn, (how, who) in enumerate(DEATHS):
        group = Group.of_ranks(alive, name="doomed", arena_bytes=16 << 20, timeout=20, first_timeout=30)
        told.append(reduce_until_somebody_dies(group, how, group.ranks[int(who)], turn))
        report(FOLDER, told=told)
        group.destroy()
        alive.remove(alive[int(who)])
    last = Group.of_ranks(alive, name="survivors", arena_bytes=16 << 20, timeout=20, first_timeout=30)
    report(FOLDER, sum=last.all_reduce(torch.ones(3))[0].item())
    last.destroy()


main()
