# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Rotary embedding against transformers': the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_symm.layers import RotaryEmbedding
from sglang_symm.models import LlamaConfig

SIZES = {
    "vocab_size": 8,
    "hidden_size": 256,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 131072,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CASES = {
    "default": {"rope_theta": 10000.0},
    "theta": {"rope_theta": 500000.0},
    "llama3, old config": {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "llama3, new config": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    "llama3, another factor": {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3, "factor": 32.0}
    },
    "linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_embedding_has_the_bits_of_transformers(case: dict[str, Any], dtype: torch.dtype) -> None:
    from transformers import LlamaConfig as HfConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    positions = torch.tensor([0, 1, 5, 100, 4095, 8191, 8192, 100000])
    q, k = torch.randn(8, 4, 64, dtype=dtype), torch.randn(8, 2, 64, dtype=dtype)
    cos, sin = LlamaRotaryEmbedding(HfConfig(**SIZES, **case))(q, positions[None])
    their_q, their_k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)

    config = LlamaConfig.from_dict(SIZES | case)
    rotary = RotaryEmbedding(config.head_dim, config.rope_theta, config.rope_scaling)
    cos, sin = rotary.cos_sin(positions, dtype)
    assert torch.equal(rotary.rotate(q, cos, sin), their_q[0].transpose(0, 1))
    assert torch.equal(rotary.rotate(k, cos, sin), their_k[0].transpose(0, 1))


def test_position_zero_rotates_nothing() -> None:
    rotary, x = RotaryEmbedding(64), torch.randn(1, 2, 64)
    assert torch.equal(rotary.rotate(x, *rotary.cos_sin(torch.tensor([0]), x.dtype)), x)
