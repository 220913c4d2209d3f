"""Two ranks on two GPUs; one is killed while the other waits in a kernel.

python tests/gpu/kill_a_peer.py [mode ...]          prints PASS and how long the survivor took to raise
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

ROOT = Path(__file__).resolve().parents[2]
# Tokens, and rows and columns of the weight: a CTA a tile, pairs of CTAs, the kernel of many tokens.
FUSED = {"fused": (16, 4096, 64), "pairs": (64, 4096, 2048), "prefill": (512, 8192, 64)}
MODES = tuple(kind + how for kind in ("all_reduce", *FUSED) for how in ("", " replay"))


def survivor(mode: str, rank: int, path: str) -> None:
    import torch
    import torch.distributed as dist

    from sglang_symm.distributed.group import Group

    torch.cuda.set_device(rank)
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    group = Group(device="cuda", timeout=60.0)
    x = torch.ones(100_000, device="cuda", dtype=torch.bfloat16)
    fused = FUSED.get(mode.removesuffix(" replay"))
    m, n, k = fused or (1, 1, 1)
    tokens, weight = (torch.ones(rows, k, device="cuda", dtype=torch.bfloat16) for rows in (m, n))

    def call() -> torch.Tensor:
        if fused is None:
            return group.all_reduce(x)
        return torch.ops.sglang_symm.row_parallel_linear(tokens, weight, None, group.unique_name)

    assert (call() == 2 * k).all()
    assert (group.info()["fused_calls"] > 0) == (fused is not None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    if rank == 1:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    graph.replay() if mode.endswith("replay") else call()
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
    print("PASS", mode, flush=True)
    os._exit(0)


def require_two_gpus(program: str) -> None:
    import torch

    gpus = torch.cuda.device_count()
    if gpus < 2:
        raise SystemExit(
            f"{program}: expected two GPUs, torch sees {gpus}: a rank that is killed on a GPU which ranks share takes "
            "the others along"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", metavar="mode", help=f"of {', '.join(map(repr, MODES))} (default: all)")
    parser.add_argument("--rank", nargs=2, metavar=("RANK", "STORE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.modes) - set(MODES):
        parser.error(f"expected modes of {', '.join(map(repr, MODES))}, got {', '.join(map(repr, sorted(unknown)))}")
    if args.rank:
        survivor(args.modes[0], int(args.rank[0]), args.rank[1])
    require_two_gpus("kill_a_peer")
    status = 0
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    for mode in args.modes or MODES:
        with tempfile.TemporaryDirectory() as folder:
            ranks = [
                subprocess.Popen(
                    [sys.executable, __file__, mode, "--rank", str(r), f"{folder}/store"],
                    stdout=subprocess.PIPE,
                    env=env,
                )
                for r in (0, 1)
            ]
            ranks[1].wait(120)
            died = time.monotonic()
            output = ranks[0].communicate(timeout=90)[0].decode()
            print(output)
            raised = [float(line.split()[1]) for line in output.splitlines() if line.startswith("raised ")]
            late = raised[0] - died if raised else None
            when = "told no time" if late is None else f"ended {late:.3f} s after the death was seen by its parent"
            print(f"{mode}: the survivor's kernel {when}")
            if "PASS" not in output or late is None or late > 1.0:
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
