"""Peers' memory for a kernel of your own: torchrun --nproc-per-node 2 examples/peer_views.py

`rendezvous` gives every rank the views of its peers' tensors. Here the "kernel" is plain PyTorch: each rank reads what
its peers wrote, no collective is called between the two barriers.
"""

import torch
import torch.distributed as dist

from sglang_symm.distributed import Group
from sglang_symm.memory import empty


def main() -> None:
    dist.init_process_group("gloo")
    group = Group()
    rank, world_size = group.rank_in_group, group.world_size

    mine = empty(8, group=group, dtype=torch.float32)  # in this rank's arena
    handle = group.rendezvous(mine)  # collective: peers' offsets, which may differ from ours
    mine.fill_(10 + rank)
    handle.barrier()  # everyone has written
    total = sum(handle.get_buffer(peer, mine.shape, mine.dtype) for peer in range(world_size))
    handle.barrier()  # everyone has read: `mine` may change again

    expected = sum(10 + peer for peer in range(world_size))
    print(f"rank {rank}: offsets {handle.offsets}, sum {total[0]:.0f}, expected {expected}")
    group.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
