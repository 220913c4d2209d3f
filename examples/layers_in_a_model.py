"""An MLP of a model, sharded over the ranks: torchrun --nproc-per-node 2 examples/layers_in_a_model.py

Column-parallel, then row-parallel: each rank computes its part of the hidden units, and only the row-parallel layer
communicates (GEMM and all-reduce in one op). `load_shard` gives each rank its part of a whole weight.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from sglang_symm.distributed import destroy_model_parallel, initialize_model_parallel
from sglang_symm.layers import ColumnParallelLinear, RowParallelLinear
from sglang_symm.layers.sharding import load_shard


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(hidden, inner)
        self.down = RowParallelLinear(inner, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))[0]


def main() -> None:
    dist.init_process_group("gloo")
    initialize_model_parallel(dist.get_world_size(), enable_symm_mem=True)

    torch.manual_seed(0)  # the same whole model and input on every rank
    whole = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    x = torch.randn(4, 64)

    mlp = MLP(64, 256)
    for ours, theirs in ((mlp.up, whole[0]), (mlp.down, whole[2])):
        load_shard(ours.weight, theirs.weight.data)
        load_shard(ours.bias, theirs.bias.data)
    with torch.inference_mode():
        error = (mlp(x) - whole(x)).abs().max()
    print(
        f"rank {dist.get_rank()}: up {list(mlp.up.weight.shape)}, down {list(mlp.down.weight.shape)}, error {error:.1e}"
    )
    destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
