"""A rank: all-reduces; one rank sleeps past the deadline in the middle of it.

arguments: FOLDER LATE
"""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from launcher import report

from sglang_symm.distributed import Group

FOLDER, LATE = Path(sys.argv[1]), int(sys.argv[2])


def main() -> None:
    dist.init_process_group("gloo")
    group = Group(name="impatient", arena_bytes=16 << 20, timeout=1, first_timeout=30)
    x = torch.ones(50000)
    for call in range(1, 100):
        if call == 50 and dist.get_rank() == LATE:
            time.sleep(3)
        begin = time.monotonic()
        try:
            group.all_reduce(x)
        except dist.DistBackendError as error:
            report(FOLDER, error=str(error), seconds=time.monotonic() - begin, call=call)
            break
    group.destroy()
    again = Group(name="patient", arena_bytes=16 << 20, timeout=20, first_timeout=30)
    report(FOLDER, sum=again.all_reduce(torch.ones(3))[0].item())
    again.destroy()


main()
