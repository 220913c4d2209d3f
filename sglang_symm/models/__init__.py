# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Whole models of the layers, their configuration and their weights."""

from sglang_symm.models.config import LlamaConfig
from sglang_symm.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP, LlamaModel
from sglang_symm.models.weights import WeightError, load_weights

__all__ = [
    "LlamaAttention",
    "LlamaConfig",
    "LlamaDecoderLayer",
    "LlamaForCausalLM",
    "LlamaMLP",
    "LlamaModel",
    "WeightError",
    "load_weights",
]
