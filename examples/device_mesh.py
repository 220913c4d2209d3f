"""Over groups that exist already: torchrun --nproc-per-node 4 examples/device_mesh.py

Another library has made a mesh of data-parallel replicas by tensor-parallel ranks. A Group works along one dimension of
it, through its process group; a ParallelState gives the layers what they need. Replicas do not wait for each other.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sglang_symm.distributed import Group, ParallelState
from sglang_symm.layers import RowParallelLinear


def main() -> None:
    dist.init_process_group("gloo")
    replicas = 2 if dist.get_world_size() % 2 == 0 else 1
    mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=("dp", "tp"))

    state = ParallelState.from_mesh(mesh, "tp", enable_symm_mem=True)  # or .from_process_group(pg)
    layer = RowParallelLinear(64, 8, bias=False, parallel_state=state)
    torch.nn.init.ones_(layer.weight)
    with torch.inference_mode():
        y, _ = layer(torch.ones(2, 64 // state.tp_size))

    replicas_group = Group.from_mesh(mesh, "dp")  # Group(pg) takes a ProcessGroup
    mean = replicas_group.all_reduce(torch.full((3,), float(dist.get_rank())), op="avg")
    print(
        f"rank {dist.get_rank()}: tp rank {state.tp_rank} of ranks {state.tp.ranks}, y[0, 0] = {y[0, 0]:.0f} "
        f"(expected 64), mean over replicas {replicas_group.ranks} = {mean[0]:.1f}"
    )
    replicas_group.destroy()
    state.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
