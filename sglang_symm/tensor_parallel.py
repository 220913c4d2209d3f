# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""torch.distributed.tensor.parallel with this package's row-parallel op: a ParallelStyle for parallelize_module."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from sglang_symm.distributed.group import Group, existing_group


class SymmRowwiseParallel(ParallelStyle):
    """RowwiseParallel of an nn.Linear in one op: `y = sum over ranks r of x_r @ W_r^T (+ b)`.

    Weight and bias become DTensors, sharded by columns and replicated, as RowwiseParallel makes them: checkpoints,
    optimizers and gradient clipping see no difference. Gradients: y and the loss are replicated, the loss counts once.

    Args:
        input_layouts: of a plain tensor that comes in; default Shard(-1), the output of ColwiseParallel. A DTensor
            knows its own.
        output_layouts: default Replicate(); Shard(d) gives this rank's part of y.
        use_local_output: a plain tensor (default), or a DTensor.
        group: what sums. Default: the symmetric Group over the mesh's process group that exists already, else a new
            one, which all layers of the mesh share (``module.group``; it ends with the process, or by ``destroy()``).

    parallelize_module raises ValueError for a module that is no plain nn.Linear, for a Partial output layout and for a
    group of other ranks than the mesh's. Collective over the mesh, as is everything in parallelize_module.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
        group: Group | None = None,
    ) -> None:
        super().__init__()
        self.input_layouts: Placement = input_layouts or Shard(-1)
        self.output_layouts: Placement = output_layouts or Replicate()
        self.use_local_output = use_local_output
        self.group = group

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) is not nn.Linear:
            raise ValueError(f"sglang_symm: SymmRowwiseParallel: expected an nn.Linear, got {type(module).__name__}")
        if self.output_layouts.is_partial():
            raise ValueError("sglang_symm: SymmRowwiseParallel: expected output_layouts Replicate() or Shard(dim)")
        group = self.group or _group_over(device_mesh)
        members = device_mesh.mesh.flatten().tolist()
        if sorted(group.ranks) != sorted(members):
            raise ValueError(
                f"sglang_symm: SymmRowwiseParallel: expected a group of the mesh's ranks {members}, got {group.ranks}"
            )
        source = getattr(self, "src_data_rank", 0)
        for name, placement in (("weight", Shard(1)), ("bias", Replicate())):
            parameter = getattr(module, name)
            if parameter is not None:
                spread = distribute_tensor(parameter, device_mesh, [placement], src_data_rank=source)
                module.register_parameter(name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
        # The module stays the object that its parents and its optimizer's hooks know; only what it computes changes.
        module.__class__ = SymmRowwiseLinear
        assert isinstance(module, SymmRowwiseLinear)
        module.group, module.device_mesh = group, device_mesh
        module.input_layouts, module.output_layouts = self.input_layouts, self.output_layouts
        module.use_local_output = self.use_local_output
        return module

    def __repr__(self) -> str:
        return (
            f"SymmRowwiseParallel(input_layouts={self.input_layouts}, output_layouts={self.output_layouts}, "
            f"use_local_output={self.use_local_output})"
        )


class SymmRowwiseLinear(nn.Linear):
    """What SymmRowwiseParallel makes of an nn.Linear: weight [N, K] sharded by columns, bias [N] replicated.

    forward: x [..., K], a DTensor or this rank's part by `input_layouts` -> y [..., N] by `output_layouts`."""

    group: Group
    device_mesh: DeviceMesh
    input_layouts: Placement
    output_layouts: Placement
    use_local_output: bool

    def forward(self, x: Tensor) -> Tensor:
        last = x.dim() - 1
        if not isinstance(x, DTensor) and self.input_layouts not in (Shard(-1), Shard(last)):
            x = DTensor.from_local(x, self.device_mesh, [self.input_layouts], run_check=False)
        if isinstance(x, DTensor):
            x = x.redistribute(placements=[Shard(last)]).to_local()
        weight, bias = (None if p is None else cast(DTensor, p).to_local() for p in (self.weight, self.bias))
        y = torch.ops.sglang_symm.row_parallel_linear(x, weight, bias, self.group.unique_name)
        if self.use_local_output and self.output_layouts.is_replicate():
            return y
        whole = DTensor.from_local(y, self.device_mesh, [Replicate()], run_check=False)
        out = whole.redistribute(placements=[self.output_layouts])
        return out.to_local() if self.use_local_output else out


def _group_over(mesh: DeviceMesh) -> Group:
    return existing_group(mesh.get_group(), mesh.device_type) or Group.from_mesh(mesh)
