# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Prefill and decode of a batch of requests on this process's rank of a tensor-parallel model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sglang_symm.decode_graphs import DecodeGraphs, default_batch_sizes
from sglang_symm.distributed.dp_attention import DpPaddingMode, ForwardBatch
from sglang_symm.distributed.group import Group
from sglang_symm.distributed.parallel_state import ParallelState, initialize_model_parallel
from sglang_symm.distributed.settings import sync_token_ids_across_tp
from sglang_symm.layers.attention import TokenBatch
from sglang_symm.layers.linear import weights_are_static
from sglang_symm.models.config import LlamaConfig
from sglang_symm.models.llama import LlamaForCausalLM, MlpGroup
from sglang_symm.models.weights import load_weights
from sglang_symm.sampling import SamplingParams, first_without_choice, generator, sample


@dataclass(frozen=True)
class ServerArgs:
    """How a model is laid out over ranks and run; the same on every rank.

    tensor_parallel_size            ranks of the model (attention_data_parallel_size x attention-TP)
    attention_data_parallel_size    replicas of the attention, each with requests of its own
    enable_symm_mem                 outputs of row-parallel layers in symmetric memory
    mlp_group                       "tp" or "attn_tp" (models/llama.py draws them)
    max_batch                       requests at once in a DP rank; more are run in waves
    max_len                         tokens of one request, prompt and answer; sizes the key/value cache
    padding_mode                    of data-parallel attention; None chooses per forward
    sync_token_ids                  rank 0 of attention-TP samples and broadcasts, instead of every rank sampling alike
    device, dtype                   of weights, cache and communication; device "cpu" or "cuda"
    arena_bytes                     symmetric memory of a group; None for the group's default
    cuda_graphs                     on GPUs decode steps replay CUDA graphs, captured when the runner is made (with
                                    padding_mode None or MAX_LEN, and no group that Gloo serves); larger batches run
                                    eagerly
    cuda_graph_batch_sizes          of a DP rank; None for 1, 2, 4, ... max_batch

    Raises ValueError for a max_batch or max_len below 1."""

    tensor_parallel_size: int = 1
    attention_data_parallel_size: int = 1
    enable_symm_mem: bool = True
    mlp_group: MlpGroup = "tp"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    max_batch: int = 8
    max_len: int = 1024
    padding_mode: DpPaddingMode | None = None
    sync_token_ids: bool = field(default_factory=sync_token_ids_across_tp)
    arena_bytes: int | None = None
    cuda_graphs: bool = True
    cuda_graph_batch_sizes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} at least 1, got {getattr(self, name)}")


@dataclass
class Completion:
    """The answer to one prompt: its tokens (a stop token is not among them) and why it ended: "stop" or "length"."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Throughput:
    """Tokens and seconds of this DP rank's forwards since the runner was made (sampling included)."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


@dataclass
class _Request:
    """A prompt on its way: `length` tokens are cached, `next_token` is not yet."""

    index: int
    prompt: list[int]
    params: SamplingParams
    random: torch.Generator
    completion: Completion
    length: int = 0
    next_token: int = -1


class ModelRunner:
    """Runs one rank of a model: make one on every rank with equal arguments, call `generate` on every rank with equal
    prompts.

    model: a Hugging Face folder, or a model that was made for `parallel_state`.
    parallel_state: None makes it with `initialize_model_parallel`, which gets this runner's `enable_symm_mem`.
    Raises ValueError for layouts that the model's sizes do not allow, WeightError for a checkpoint that does not
    fit."""

    def __init__(
        self,
        model: str | Path | LlamaForCausalLM,
        server_args: ServerArgs | None = None,
        parallel_state: ParallelState | None = None,
        progress: bool = False,
    ) -> None:
        self.args = args = server_args or ServerArgs()
        self.state = parallel_state or initialize_model_parallel(
            args.tensor_parallel_size,
            args.attention_data_parallel_size,
            enable_symm_mem=args.enable_symm_mem,
            device=args.device,
            arena_bytes=args.arena_bytes,
        )
        self.device = self.state.device
        self.model = model if isinstance(model, LlamaForCausalLM) else self._load(model, progress)
        weights_are_static(self.model)
        self.max_len = min(args.max_len, self.model.config.max_position_embeddings)
        self.cache = self.model.make_cache(args.max_batch, self.max_len)
        self.throughput = Throughput()
        self.graphs = self._capture_graphs()

    def _capture_graphs(self) -> DecodeGraphs | None:
        # One DP rank's rows need no padding among others', whatever the mode.
        fits = self.args.padding_mode is not DpPaddingMode.SUM_LEN or not self.state.enable_dp_attention
        if self.device.type != "cuda" or not self.args.cuda_graphs or not fits:
            return None
        if not all(group.capturable for group in (self.state.tp, self.state.attn_tp)):
            return None
        sizes = self.args.cuda_graph_batch_sizes or default_batch_sizes(self.args.max_batch)
        return DecodeGraphs(self.model, self.cache, sizes)

    def _load(self, folder: str | Path, progress: bool) -> LlamaForCausalLM:
        config = LlamaConfig.from_folder(folder)
        model = LlamaForCausalLM(config, self.args.mlp_group, self.state, dtype=self.args.dtype, device=self.device)
        load_weights(model, folder, progress=progress and self.state.tp_rank == 0)
        return model.eval()

    @property
    def groups(self) -> list[Group]:
        """The groups that a forward uses, each once, without those of one rank."""
        groups = {id(group): group for group in (self.state.tp, self.state.attn_tp) if group.world_size > 1}
        return list(groups.values())

    def check(self) -> None:
        """Raise the error of a broken group (torch.distributed.DistBackendError)."""
        for group in self.groups:
            group.check()

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Continue each prompt (token ids); returns all completions, in the order of the prompts, on every rank.

        params: one for all prompts or one each. Prompt i belongs to DP rank i mod attention_data_parallel_size; a DP
        rank with nothing to do takes part with zero tokens until all have finished. on_token(prompt's index, token):
        called for prompts of this DP rank.
        Raises ValueError for an empty prompt, an unknown token, or more than `max_len` tokens, and, on all ranks, when
        the model's logits for a prompt are no numbers; DistBackendError when a
        peer died or did not come: no token that was computed after that is handed out."""
        requests = self._requests(prompts, params)
        dp_rank, dp_size, wave_size = self.state.attn_dp_rank, self.state.attn_dp_size, self.args.max_batch
        own = requests[dp_rank::dp_size]
        # Every DP rank runs as many waves as DP rank 0, which has the most requests.
        for first in range(0, len(requests[::dp_size]), wave_size):
            self._run_wave(own[first : first + wave_size], on_token)
        return self._gather([request.completion for request in own], len(requests))

    def _requests(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[_Request]:
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"expected one SamplingParams or {len(prompts)}, one a prompt, got {len(each)}")
        vocab = self.model.config.vocab_size
        for i, (prompt, p) in enumerate(zip(prompts, each)):
            if not prompt:
                raise ValueError(f"prompt {i} is empty: expected at least one token")
            if not all(0 <= token < vocab for token in prompt):
                raise ValueError(
                    f"prompt {i} holds tokens outside the vocabulary: expected 0 to {vocab - 1}, got {list(prompt)}"
                )
            if len(prompt) + p.max_new_tokens > self.max_len:
                raise ValueError(
                    f"prompt {i} of {len(prompt)} tokens and max_new_tokens={p.max_new_tokens} "
                    f"exceed max_len={self.max_len}"
                )
        return [
            _Request(i, list(prompt), p, generator(p), Completion()) for i, (prompt, p) in enumerate(zip(prompts, each))
        ]

    def _run_wave(self, running: list[_Request], on_token: Callable[[int, int], None] | None) -> None:
        """Prefill these requests together, then decode until those of all DP ranks have finished."""
        tokens = [token for request in running for token in request.prompt]
        starts, lengths = [0] * len(running), [len(request.prompt) for request in running]
        is_extend = True
        while True:
            began = time.perf_counter()
            logits = self._forward(tokens, starts, lengths, is_extend)
            if logits is None:
                return
            self._check_logits(running, logits)
            self._hand_out(running, logits, on_token)
            self._count(len(tokens), time.perf_counter() - began, is_extend)
            running = self._drop_finished(running)
            tokens = [request.next_token for request in running]
            starts, lengths = [request.length for request in running], [1] * len(running)
            is_extend = False

    def _forward(self, tokens: list[int], starts: list[int], lengths: list[int], is_extend: bool) -> Tensor | None:
        """Logits [sequences, V] of each sequence's last token; None when no DP rank has a token left."""
        counts = self._exchange_counts(len(tokens))
        if not any(counts):
            return None
        if self.graphs is not None and not is_extend and self.graphs.covers(counts):
            return self.graphs.run(tokens, starts, counts)
        batch = TokenBatch(range(len(starts)), starts, lengths, self.device)
        with self.state.forward(ForwardBatch(counts, is_extend, self.args.padding_mode)):
            token_ids = torch.tensor(tokens, dtype=torch.int64, device=self.device)
            hidden = self.model(token_ids, batch, self.cache)
            return self.model.logits(hidden[batch.last_rows])

    def _exchange_counts(self, count: int) -> list[int]:
        """The number of tokens of each DP rank. A negative one, -1 - i, says that prompt i cannot go on: all ranks
        raise ValueError."""
        counts = self.state.exchange_token_counts(count)
        failed = [-1 - count for count in counts if count < 0]
        if failed:
            raise ValueError(
                f"the model's logits for prompt {failed[0]} hold NaN or infinity: expected numbers. Its weights hold "
                f"such values, or {str(self.args.dtype).removeprefix('torch.')} is too narrow for it"
            )
        return counts

    def _check_logits(self, running: list[_Request], logits: Tensor) -> None:
        """Raise ValueError when there is no likeliest token. The other DP ranks, whose logits may be fine, are waiting
        in the exchange of the next step, and raise too."""
        row = first_without_choice(logits)
        if row is not None:
            self.check()  # a broken group computes anything
            self._exchange_counts(-1 - running[row].index)

    def _hand_out(self, running: list[_Request], logits: Tensor, on_token: Callable[[int, int], None] | None) -> None:
        """Sample a token for each request. The groups are checked first: what a broken group computed is never a
        token."""
        tokens = self._sample(running, logits)
        self.check()
        for request, token in zip(running, tokens):
            request.length += len(request.prompt) if request.length == 0 else 1
            request.next_token = token
            completion, p = request.completion, request.params
            own_stop = () if p.ignore_eos else self.model.config.eos_token_ids
            if token in own_stop or token in p.stop_token_ids:
                completion.finish_reason = "stop"
                continue
            completion.token_ids.append(token)
            if on_token is not None:
                on_token(request.index, token)
            if len(completion.token_ids) == p.max_new_tokens:
                completion.finish_reason = "length"

    def _sample(self, running: list[_Request], logits: Tensor) -> list[int]:
        """The same tokens on every rank of attention-TP: broadcast by rank 0, or sampled alike from equal logits and
        seeds."""
        group = self.state.attn_tp
        broadcast = self.args.sync_token_ids and group.world_size > 1
        if broadcast and group.rank_in_group != 0:
            tokens = torch.empty(len(running), dtype=torch.int64, device=self.device)
        else:
            ids = sample(logits, [request.params for request in running], [request.random for request in running])
            tokens = torch.tensor(ids, dtype=torch.int64, device=self.device)
        if broadcast:
            group.broadcast(tokens, src=0)
        return tokens.tolist()

    def _drop_finished(self, running: list[_Request]) -> list[_Request]:
        """The requests that go on, each in the cache slot of its place in the list: the last one moves into a gap."""
        running = list(running)
        for slot in reversed(range(len(running))):
            if running[slot].completion.finish_reason is not None:
                last = running.pop()
                if slot < len(running):
                    self.cache.move(len(running), slot)
                    running[slot] = last
        return running

    def _count(self, tokens: int, seconds: float, is_extend: bool) -> None:
        if is_extend:
            self.throughput.prefill_tokens += tokens
            self.throughput.prefill_seconds += seconds
        else:
            self.throughput.decode_tokens += tokens
            self.throughput.decode_seconds += seconds

    def _gather(self, own: list[Completion], count: int) -> list[Completion]:
        """All DP ranks' completions, prompt i from DP rank i mod attn_dp_size."""
        dp_size = self.state.attn_dp_size
        if dp_size == 1:
            return own
        parts = [
            self.state.attn_dp.broadcast_object(own if rank == self.state.attn_dp_rank else None, src=rank)
            for rank in range(dp_size)
        ]
        return [parts[i % dp_size][i // dp_size] for i in range(count)]
