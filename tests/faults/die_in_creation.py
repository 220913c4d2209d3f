"""A rank: makes groups of the survivors, and in each creation one rank dies at some step, until it is its turn.

arguments: FOLDER STEP:RANK ...
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist
from launcher import report

from sglang_symm.distributed import Group, new_process_group
from sglang_symm.distributed.rendezvous import Meeting

FOLDER, DEATHS = Path(sys.argv[1]), [death.split(":") for death in sys.argv[2:]]
honest_exchange = Meeting.exchange


def dies_at(step: str):
    def exchange(self: Meeting, round_name: str, value: str) -> list[str]:
        if step == f"before {round_name}":
            os.kill(os.getpid(), signal.SIGKILL)
        values = honest_exchange(self, round_name, value)
        if step == f"after {round_name}":
            os.kill(os.getpid(), signal.SIGKILL)
        return values

    return exchange


def main() -> None:
    dist.init_process_group("gloo")
    alive = list(range(dist.get_world_size()))
    told = []
    for step, who in DEATHS:
        process_group = new_process_group(alive, timeout=20, first_timeout=30)
        if dist.get_rank() == alive[int(who)]:
            Meeting.exchange = dies_at(step)
        begin = time.monotonic()
        try:
            Group(process_group, name="stillborn", arena_bytes=8 << 20, timeout=4, first_timeout=4).barrier()
            told.append({"error": "none"})
        except dist.DistBackendError as error:
            told.append({"error": str(error), "seconds": time.monotonic() - begin})
        report(FOLDER, told=told)
        alive.remove(alive[int(who)])


main()
