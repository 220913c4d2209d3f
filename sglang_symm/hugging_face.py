# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism for an unmodified Hugging Face Llama."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sglang_symm.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang_symm.layers.sharding import divide, load_shard, resolve_group, resolve_state

if TYPE_CHECKING:
    from sglang_symm.distributed.parallel_state import ParallelState

# Their attention and MLP are Llama's: q, k, v, o and gate, up, down projections, whole heads a rank, silu.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def tensor_parallelize(model: nn.Module, parallel_state: ParallelState | None = None) -> nn.Module:
    """Shard a transformers model over attention-TP, in place; returns it. `generate` and all else work as before.

    q, k, v, gate and up keep this rank's rows, o and down this rank's columns and become the row-parallel op: two
    collectives a layer. Embedding, norms and lm_head stay whole, so that every rank has the same logits, bit for bit.
    Local: no communication here; afterwards every rank calls the model alike. When tokens are drawn rather than chosen
    greedily, every rank needs the same seed. `save_pretrained` would save this rank's part.

    Args:
        model: a loaded Llama (or Mistral, Qwen2, Qwen3), with or without its head; every rank has the same whole
            weights. Of the dtype and on the device that it shall run in.
        parallel_state: default: the process's. With data-parallel attention each DP rank holds a whole model.

    Raises ValueError, before anything is changed: another kind of model, projections that are no plain nn.Linear
    (quantised, or parallel already), or heads and sizes that the ranks do not divide.
    """
    config: Any = model.config
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"tensor_parallelize: expected a model of {', '.join(MODEL_TYPES)}, got {config.model_type!r}")
    state = resolve_state(parallel_state)
    group = resolve_group(state, use_dp_attention_reduce=True)
    attentions = {name: module for name, module in model.named_modules() if hasattr(module, "q_proj")}
    mlps = {name: module for name, module in model.named_modules() if hasattr(module, "gate_proj")}
    if not attentions or not mlps:
        raise ValueError("tensor_parallelize: expected a model with q_proj and gate_proj modules, found none")
    for modules, projections in ((attentions, _ATTENTION), (mlps, _MLP)):
        for name, module in modules.items():
            for projection in projections:
                found = type(getattr(module, projection, None))
                if found is not nn.Linear:
                    raise ValueError(
                        f"tensor_parallelize: expected {name}.{projection} to be an nn.Linear, got {found.__name__}"
                    )
    head_dim = next(iter(attentions.values())).head_dim
    heads = QKVParallelLinear(
        config.hidden_size,
        head_dim,
        config.num_attention_heads,
        config.num_key_value_heads,
        use_dp_attention_reduce=True,
        parallel_state=state,
        device="meta",
    )
    divide("intermediate_size", config.intermediate_size, group.world_size)
    if group.world_size == 1:
        return model
    for module in attentions.values():
        for part in "qkv":
            _replace(module, f"{part}_proj", _Rows, rows=heads.rows()[part], parallel_state=state)
        _replace(module, "o_proj", _Columns, parallel_state=state)
        module.num_key_value_groups = heads.heads // heads.kv_heads
    for module in mlps.values():
        _replace(module, "gate_proj", ColumnParallelLinear, parallel_state=state)
        _replace(module, "up_proj", ColumnParallelLinear, parallel_state=state)
        _replace(module, "down_proj", _Columns, parallel_state=state)
    return model


class _Rows(ColumnParallelLinear):
    """A column-parallel layer whose rows are given: key/value heads may be held by several ranks."""

    def __init__(self, *args: Any, rows: tuple[int, int], **kwargs: Any) -> None:
        self.given_rows = rows
        super().__init__(*args, **kwargs)

    def rows(self) -> dict[int | str | None, tuple[int, int]]:
        return {None: self.given_rows}


class _Columns(RowParallelLinear):
    """A row-parallel layer that returns its output alone, as nn.Linear does."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


def _replace(module: nn.Module, name: str, kind: Any, **kwargs: Any) -> None:
    """Put a parallel layer of the same weights in the place of `module.name`."""
    old: nn.Linear = getattr(module, name)
    new = kind(
        old.in_features,
        old.out_features,
        bias=old.bias is not None,
        use_dp_attention_reduce=True,
        dtype=old.weight.dtype,
        device=old.weight.device,
        **kwargs,
    )
    for parameter, source in ((new.weight, old.weight), (new.bias, old.bias)):
        if parameter is not None:
            load_shard(parameter, source.data, name=name)
            parameter.requires_grad_(source.requires_grad)
    setattr(module, name, new.train(old.training))
