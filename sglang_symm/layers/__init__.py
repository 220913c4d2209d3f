# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel layers: each file reads like its equation.

Every layer takes `parallel_state` (default: the state that `initialize_model_parallel` made) and asks it for one group,
which both shards the layer's weight and reduces its output. A group of one rank means no communication at all.
"""

from sglang_symm.layers.attention import Attention, KVCache, TokenBatch
from sglang_symm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from sglang_symm.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    weights_are_static,
)
from sglang_symm.layers.norm import RMSNorm
from sglang_symm.layers.rotary import RopeScaling, RotaryEmbedding

__all__ = [
    "Attention",
    "ColumnParallelLinear",
    "KVCache",
    "MergedColumnParallelLinear",
    "ParallelLMHead",
    "QKVParallelLinear",
    "RMSNorm",
    "RopeScaling",
    "RotaryEmbedding",
    "RowParallelLinear",
    "TokenBatch",
    "VocabParallelEmbedding",
    "weights_are_static",
]
