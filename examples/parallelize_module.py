"""PyTorch's own tensor parallelism, with our op: torchrun --nproc-per-node 2 examples/parallelize_module.py

`SymmRowwiseParallel` stands where `RowwiseParallel` stood. Weights are DTensors as before; GEMM and all-reduce are one
op. Two training steps, compared with the same in one process.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from sglang_symm import SymmRowwiseParallel


def make_model() -> nn.Module:
    torch.manual_seed(0)  # the same whole model on every rank
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


def train(model: nn.Module, steps: int = 2) -> torch.Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))  # the same on every rank, as is the loss
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - x).pow(2).mean()
        loss.backward()
        optimizer.step()
    return loss.detach()


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = parallelize_module(make_model(), mesh, {"0": ColwiseParallel(), "2": SymmRowwiseParallel()})
    loss, expected = train(model), train(make_model())
    print(
        f"rank {dist.get_rank()}: weight {list(model[2].weight.to_local().shape)} of {list(model[2].weight.shape)}, "
        f"loss {loss:.6f}, in one process {expected:.6f}"
    )
    model[2].group.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
