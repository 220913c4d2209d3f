# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Llama (https://arxiv.org/abs/2302.13971) over tensor-parallel groups, with data-parallel attention.

Embedding, attention, o_proj and lm_head are sharded over attention-TP. The MLP is sharded over `mlp_group`:

    "attn_tp"   each DP rank computes the MLP of its own tokens and holds all of its weights
    "tp"        the tokens of all DP ranks are gathered, the MLP is sharded over all ranks, the results scattered back

    "attn_tp"       DP rank 0            DP rank 1        "tp"            DP rank 0            DP rank 1
    attention    rank 0   rank 1      rank 2   rank 3     attention    rank 0   rank 1      rank 2   rank 3
    MLP          rank 0   rank 1      rank 2   rank 3     dp_gather         \\______ all tokens ______/
                                                          MLP          rank 0   rank 1   rank 2   rank 3
                                                          dp_scatter        /______ own tokens _____\\
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang_symm.distributed.dp_attention import dp_gather, dp_scatter
from sglang_symm.layers.attention import Attention, KVCache, TokenBatch
from sglang_symm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from sglang_symm.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang_symm.layers.norm import RMSNorm
from sglang_symm.layers.rotary import RotaryEmbedding
from sglang_symm.layers.sharding import resolve_state
from sglang_symm.models.config import LlamaConfig

if TYPE_CHECKING:
    from sglang_symm.distributed.parallel_state import ParallelState

MlpGroup = Literal["attn_tp", "tp"]


class LlamaMLP(nn.Module):
    """`y = (silu(x @ G^T) * (x @ U^T)) @ D^T`, [n, H] -> [n, H]; sharded and reduced over one group.

    tp_rank, tp_size, use_dp_attention_reduce: of that group, passed to both linears (see RowParallelLinear)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        tp_rank: int | None = None,
        tp_size: int | None = None,
        use_dp_attention_reduce: bool = False,
        parallel_state: ParallelState | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        common: dict[str, Any] = {
            "bias": bias,
            "tp_rank": tp_rank,
            "tp_size": tp_size,
            "use_dp_attention_reduce": use_dp_attention_reduce,
            "parallel_state": parallel_state,
            "dtype": dtype,
            "device": device,
        }
        self.gate_up_proj = MergedColumnParallelLinear(hidden_size, [intermediate_size] * 2, **common)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, **common)

    def activation(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(x))[0]

    def forward_add_norm(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """`norm(y, residual)` of `y = self(x)`: see RowParallelLinear.forward_add_norm."""
        return self.down_proj.forward_add_norm(self.activation(x), residual, norm)


class LlamaAttention(nn.Module):
    """`y = concat over heads of attention(rotate(x Q^T), rotate(x K^T), x V^T) @ O^T`, over attention-TP; returns
    `norm(y, residual)`. All of them [n, H]."""

    def __init__(
        self,
        config: LlamaConfig,
        layer: int,
        parallel_state: ParallelState | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        common: dict[str, Any] = {
            "bias": config.attention_bias,
            "use_dp_attention_reduce": True,
            "parallel_state": parallel_state,
            "dtype": dtype,
            "device": device,
        }
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.qkv_proj = QKVParallelLinear(config.hidden_size, head_dim, heads, kv_heads, **common)
        self.o_proj = RowParallelLinear(heads * head_dim, config.hidden_size, **common)
        self.attention = Attention(layer)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: TokenBatch,
        cache: KVCache,
        residual: Tensor,
        norm: RMSNorm,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv_proj.split(self.qkv_proj(x))
        q, k = RotaryEmbedding.rotate(q, cos, sin), RotaryEmbedding.rotate(k, cos, sin)
        heads = self.attention(q, k, v, batch, cache).flatten(-2)
        return self.o_proj.forward_add_norm(heads, residual, norm)


class LlamaDecoderLayer(nn.Module):
    """`x = x + attention(norm(x)); x = x + mlp(norm(x))`, with the residual stream kept beside x."""

    def __init__(
        self,
        config: LlamaConfig,
        layer: int,
        mlp_group: MlpGroup = "tp",
        parallel_state: ParallelState | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.state = resolve_state(parallel_state)
        self.exchanges_tokens = mlp_group == "tp" and self.state.enable_dp_attention
        common: dict[str, Any] = {"dtype": dtype, "device": device}
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **common)
        self.self_attn = LlamaAttention(config, layer, self.state, **common)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **common)
        over_attn_tp = mlp_group == "attn_tp"
        self.mlp = LlamaMLP(
            config.hidden_size,
            config.intermediate_size,
            config.mlp_bias,
            tp_rank=self.state.attn_tp_rank if over_attn_tp else self.state.tp_rank,
            tp_size=self.state.attn_tp_size if over_attn_tp else self.state.tp_size,
            use_dp_attention_reduce=over_attn_tp,
            parallel_state=self.state,
            **common,
        )

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, batch: TokenBatch, cache: KVCache
    ) -> tuple[Tensor, Tensor]:
        """x and residual [n, H]: the last block's output and the sum of all before it -> the same after this layer."""
        x, residual = self.input_layernorm(x, residual)
        x, residual = self.self_attn(x, cos, sin, batch, cache, residual, self.post_attention_layernorm)
        return self.mlp_of_all(x), residual

    def forward_add_norm(
        self, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, batch: TokenBatch, cache: KVCache, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """As forward, between norms: x has this layer's input norm behind it, and comes back with `norm` behind it,
        that of the next layer. So each norm can be done where its input is reduced."""
        x, residual = self.self_attn(x, cos, sin, batch, cache, residual, self.post_attention_layernorm)
        if self.exchanges_tokens:
            return norm(self.mlp_of_all(x), residual)
        return self.mlp.forward_add_norm(x, residual, norm)

    def mlp_of_all(self, x: Tensor) -> Tensor:
        """The MLP of this DP rank's tokens, by way of all DP ranks' where the MLP is sharded over them."""
        if self.exchanges_tokens:
            return dp_scatter(self.mlp(dp_gather(x, self.state)), self.state)
        return self.mlp(x)


class LlamaModel(nn.Module):
    """Token ids [n] of a batch -> hidden states [n, H]."""

    def __init__(
        self,
        config: LlamaConfig,
        mlp_group: MlpGroup = "tp",
        parallel_state: ParallelState | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        state = resolve_state(parallel_state)
        common: dict[str, Any] = {"dtype": dtype, "device": device}
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, state, **common)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config, layer, mlp_group, state, **common) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **common)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, config.rope_scaling, device)

    def forward(self, token_ids: Tensor, batch: TokenBatch, cache: KVCache) -> Tensor:
        residual = self.embed_tokens(token_ids)
        cos, sin = self.rotary.cos_sin(batch.positions, residual.dtype)
        layers = cast(list[LlamaDecoderLayer], list(self.layers))
        norms = [*(layer.input_layernorm for layer in layers), self.norm]
        x, residual = norms[0](residual)
        for layer, norm in zip(layers, norms[1:], strict=True):
            x, residual = layer.forward_add_norm(x, residual, cos, sin, batch, cache, norm)
        return x


class LlamaForCausalLM(nn.Module):
    """A Llama with its head. Uninitialised until `load_weights(model, folder)`.

    Arguments: config; mlp_group "tp" or "attn_tp" (without data-parallel attention they are the same ranks);
    parallel_state (default: the process's); dtype and device of the weights. Raises ValueError for sizes that the
    groups do not divide."""

    # A parameter of ours holds several of the checkpoint's: {ours: {theirs: part}}.
    packed = {
        "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
        "gate_up_proj": {"gate_proj": 0, "up_proj": 1},
    }

    def __init__(
        self,
        config: LlamaConfig,
        mlp_group: MlpGroup = "tp",
        parallel_state: ParallelState | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if mlp_group not in ("tp", "attn_tp"):
            raise ValueError(f"expected mlp_group 'tp' or 'attn_tp', got {mlp_group!r}")
        self.config, self.mlp_group, self.state = config, mlp_group, resolve_state(parallel_state)
        common: dict[str, Any] = {"dtype": dtype, "device": device}
        self.model = LlamaModel(config, mlp_group, self.state, **common)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, self.state, **common)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, token_ids: Tensor, batch: TokenBatch, cache: KVCache) -> Tensor:
        """token_ids [n] int64 of this DP rank (n may be 0) -> hidden states [n, H]; stores keys and values in the
        cache.

        With data-parallel attention it runs inside `with parallel_state.forward(forward_batch)`, on all DP ranks."""
        return self.model(token_ids, batch, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, H] -> logits [n, V], alike on every rank of attention-TP. A collective of attention-TP."""
        return self.lm_head(hidden)

    def make_cache(self, slots: int, max_len: int) -> KVCache:
        """A cache for `slots` sequences of up to `max_len` tokens, of this rank's key/value heads."""
        weight = self.model.norm.weight
        kv_heads: int = self.model.layers[0].self_attn.qkv_proj.kv_heads  # type: ignore[union-attr, assignment]
        return KVCache(
            self.config.num_hidden_layers, slots, kv_heads, max_len, self.config.head_dim, weight.dtype, weight.device
        )
