# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Decode steps of a Llama as CUDA graphs, one for each batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_symm.distributed.dp_attention import DpPaddingMode, ForwardBatch
from sglang_symm.distributed.parallel_state import graph_capture
from sglang_symm.layers.attention import KVCache, TokenBatch
from sglang_symm.models.llama import LlamaForCausalLM


def default_batch_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, ... and `max_batch`: a batch is padded to at most twice its size."""
    return sorted({min(1 << i, max_batch) for i in range(max_batch.bit_length() + 1)})


@dataclass
class _Step:
    """One batch size: its inputs (in static memory), and, once captured, the graph and its output."""

    batch: TokenBatch
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor | None = None


class DecodeGraphs:
    """Decode steps that are captured once and replayed for any tokens and lengths.

    A graph's addresses are fixed, so token ids and positions are copied into static memory, keys and values lie in
    `cache`, and attention reads the whole of it under a mask that the graph computes from the positions. Sequence i is
    in the cache's slot i. A batch is padded to the next captured size: padding rows write position 0 of the slots
    behind the batch, which are free. All DP ranks run the size that the longest of them needs (MAX_LEN), one without
    tokens too.

    Making it is collective over the model's groups. On a CPU nothing is captured and the same padded steps run
    eagerly.

    batch_sizes: distinct, from 1 to the cache's slots; ValueError otherwise."""

    def __init__(self, model: LlamaForCausalLM, cache: KVCache, batch_sizes: Sequence[int]) -> None:
        self.model, self.cache, self.state = model, cache, model.state
        self.batch_sizes = sizes = sorted(batch_sizes)
        if not sizes or len(set(sizes)) < len(sizes) or sizes[0] < 1 or sizes[-1] > cache.slots:
            raise ValueError(
                f"expected distinct batch sizes from 1 to the cache's {cache.slots} slots, got {list(batch_sizes)}"
            )
        device = cache.keys.device
        # Row 0: token ids; row 1: positions.
        self._inputs = torch.zeros(2, self.batch_sizes[-1], dtype=torch.int64, device=device)
        self._places = torch.arange(cache.max_len, device=device)
        self._steps = {size: _Step(self._batch(size)) for size in self.batch_sizes}
        if device.type == "cuda":
            self._capture()

    def covers(self, token_counts: Sequence[int]) -> bool:
        """Whether a step of these token counts, one a DP rank, fits a captured size: alike on all ranks."""
        return max(token_counts) <= self.batch_sizes[-1]

    @torch.inference_mode()
    def run(self, tokens: Sequence[int], positions: Sequence[int], token_counts: Sequence[int]) -> Tensor:
        """Logits [n, V] of this DP rank's n sequences, each with one new token at its position.

        They are static memory, overwritten by the next step. Collective over the model's groups."""
        size = next(size for size in self.batch_sizes if size >= max(token_counts))
        self.fill(tokens, positions, size)
        return self.replay(size)[: len(tokens)]

    def fill(self, tokens: Sequence[int], positions: Sequence[int], size: int) -> None:
        """Copy the inputs of the next step of `size` rows to static memory; padding rows are token 0 at position 0."""
        padding = [0] * (size - len(tokens))
        self._inputs[:, :size].copy_(torch.tensor([[*tokens, *padding], [*positions, *padding]], dtype=torch.int64))

    def replay(self, size: int) -> Tensor:
        """Run the captured step of `size` rows on what `fill` left: logits [size, V]."""
        step = self._steps[size]
        if step.graph is None or step.logits is None:
            return self.step(size)
        step.graph.replay()
        return step.logits

    @torch.inference_mode()
    def step(self, size: int) -> Tensor:
        """What a replay does, eagerly: the same kernels on the same memory, hence the same bits."""
        batch, state = self._steps[size].batch, self.state
        batch.mask = (self._places <= batch.positions[:, None])[:, None, None]
        counts = [size] * state.attn_dp_size
        with state.forward(ForwardBatch(counts, is_extend=False, padding_mode=DpPaddingMode.MAX_LEN)):
            return self.model.logits(self.model(self._inputs[0, :size], batch, self.cache))

    def _batch(self, size: int) -> TokenBatch:
        # Starts at the last place, so that attention reads the whole cache.
        last = self.cache.max_len - 1
        batch = TokenBatch(range(size), [last] * size, [1] * size, self.cache.keys.device)
        batch.positions = self._inputs[1, :size]
        return batch

    def _capture(self) -> None:
        pool = torch.cuda.graph_pool_handle()
        with graph_capture(self.state) as stream:
            for size in reversed(self.batch_sizes):  # the largest first: the others fit into its memory
                self.step(size)  # libraries set themselves up outside of the capture
                step = self._steps[size]
                step.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(step.graph, pool=pool, stream=stream):
                    step.logits = self.step(size)
        torch.cuda.synchronize(self.cache.keys.device)
