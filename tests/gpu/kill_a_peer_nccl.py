"""Two ranks on two GPUs; one is killed while NCCL's kernels of a group's calls are under way: the other one raises.

python tests/gpu/kill_a_peer_nccl.py        prints PASS and how long the survivor took
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kill_a_peer import require_two_gpus


def rank_program(rank: int, path: str) -> None:
    import torch
    import torch.distributed as dist

    from sglang_symm.distributed.group import Group

    torch.cuda.set_device(rank)
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    group = Group(device="cuda", timeout=60.0, nccl="1")
    x = torch.ones(64 << 20, device="cuda", dtype=torch.int64)
    group.all_reduce_(x)
    torch.cuda.synchronize()
    dist.barrier()
    for _ in range(60):  # some 3 ms each
        group.all_reduce_(x)
    if rank == 1:
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    torch.cuda.synchronize()
    print("ended", time.monotonic())
    try:
        group.check()
        print("FAIL: nothing was raised")
        os._exit(1)
    except dist.DistBackendError as error:
        print(str(error).split("\n")[0])
    assert (x == -1).all()  # what cannot be had
    assert (torch.ones(5, device="cuda") + 1 == 2).all()  # the context lives
    group.destroy()
    print("PASS", flush=True)
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", nargs=2, metavar=("RANK", "STORE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank_program(int(args.rank[0]), args.rank[1])
    require_two_gpus("kill_a_peer_nccl")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rank"]
        ranks = [subprocess.Popen([*command, str(r), f"{folder}/store"], stdout=subprocess.PIPE) for r in (0, 1)]
        ranks[1].wait(120)
        died = time.monotonic()
        output = ranks[0].communicate(timeout=60)[0].decode()
    print(output)
    ended = [float(line.split()[1]) for line in output.splitlines() if line.startswith("ended ")]
    late = ended[0] - died if ended else None
    when = "told no time" if late is None else f"ended {late:.3f} s after the death was seen by its parent"
    print(f"the survivor's kernels {when}")
    return 0 if "PASS" in output and "died" in output and late is not None and late < 1.0 else 1


if __name__ == "__main__":
    sys.exit(main())
