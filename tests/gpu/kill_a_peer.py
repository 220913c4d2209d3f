"""Two ranks on two GPUs; one is killed while the other waits in a kernel, in eager code and in a replay.

python tests/gpu/kill_a_peer.py            prints PASS and how long the survivor took to raise
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time


def survivor(graph_mode: bool, rank: int, path: str) -> None:
    import torch
    import torch.distributed as dist

    from sglang_symm.distributed.group import Group

    torch.cuda.set_device(rank)
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    group = Group(device="cuda", timeout=60.0)
    x = torch.ones(100_000, device="cuda", dtype=torch.bfloat16)
    assert (group.all_reduce(x) == 2).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        group.all_reduce(x)
    graph.replay()
    torch.cuda.synchronize()
    if rank == 1:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    graph.replay() if graph_mode else group.all_reduce(x)
    torch.cuda.synchronize()
    seconds = time.monotonic()
    try:
        group.check()
        print("FAIL: nothing was raised")
        os._exit(1)
    except dist.DistBackendError as error:
        print(str(error).split("\n")[0])
        print("raised", seconds)
    assert (x + 1 == 2).all()  # the context lives
    group.destroy()
    print("PASS", "replay" if graph_mode else "eager", flush=True)
    os._exit(0)


def main() -> int:
    if len(sys.argv) == 4:
        survivor(sys.argv[1] == "replay", int(sys.argv[2]), sys.argv[3])
    status = 0
    for mode in ("eager", "replay"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, mode]
            ranks = [subprocess.Popen([*command, str(r), f"{folder}/store"], stdout=subprocess.PIPE) for r in (0, 1)]
            ranks[1].wait(120)
            died = time.monotonic()
            output = ranks[0].communicate(timeout=90)[0].decode()
            print(output)
            raised = [float(line.split()[1]) for line in output.splitlines() if line.startswith("raised ")]
            late = raised[0] - died if raised else 99.0
            print(f"{mode}: the survivor's kernel ended {late:.3f} s after the death was seen by its parent")
            if "PASS" not in output or late > 1.0:
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
