"""A rank: makes and destroys 200 groups, and counts what stays.

arguments: FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from belongings import belongings
from launcher import report

import sglang_symm.memory as memory
from sglang_symm.distributed import Group

FOLDER = Path(sys.argv[1])


def cycle(kept: bool) -> None:
    group = Group(name="brief", arena_bytes=4 << 20, timeout=20, first_timeout=30)
    x = memory.empty(100, group=group).fill_(1.0)
    y = group.all_reduce(x)
    assert y[0].item() == group.world_size
    if kept:
        group.destroy()
        x += y
    else:
        del x, y
        group.destroy()


def main() -> None:
    dist.init_process_group("gloo")
    for _ in range(3):
        cycle(False)
    before = belongings()
    for number in range(200):
        cycle(kept=number % 2 == 0)
    torch.ones(1)
    report(FOLDER, before=before, after=belongings())
    for _ in range(2):
        Group.of_ranks([0, 1], arena_bytes=4 << 20).destroy()
    before = belongings()
    for _ in range(20):
        Group.of_ranks([0, 1], arena_bytes=4 << 20).destroy()
    report(FOLDER, own_before=before, own_after=belongings())


main()
