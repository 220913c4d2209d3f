# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""A real chat model over real ranks: SmolLM2-135M-Instruct's greedy tokens equal transformers'."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SETTINGS
from llama_cases import SMOLLM2, SMOLLM2_PROMPTS, smollm2_file
from test_models import made_by_rank_0

from sglang_symm.distributed import initialize_model_parallel
from sglang_symm.generate import transformers_greedy
from sglang_symm.model_runner import ModelRunner, ServerArgs
from sglang_symm.models.gguf import converted
from sglang_symm.models.tokenizer import Tokenizer
from sglang_symm.sampling import SamplingParams

ROOT = Path(__file__).resolve().parents[2]
PARAMS = SamplingParams(max_new_tokens=16)


FILE = smollm2_file()
pytestmark = pytest.mark.cpu_only("`make demo` asks the same of this model on GPUs")


def greedy_of_transformers(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Kept beside the model: the three layouts run in three processes, and the answer is the same."""
    # Another torch may round otherwise, and the likeliest of two close tokens change.
    versions = [importlib.metadata.version("transformers"), torch.__version__]
    key = hashlib.sha256(json.dumps([versions, prompts, PARAMS.max_new_tokens]).encode()).hexdigest()[:16]
    path = folder.with_name(f"{folder.name}-greedy-{key}.json")
    if not path.is_file():
        tokens = transformers_greedy(folder, prompts, PARAMS)
        path.with_suffix(".part").write_text(json.dumps(tokens))
        os.replace(path.with_suffix(".part"), path)
    answer: list[list[int]] = json.loads(path.read_text())
    return answer


@pytest.fixture(scope="module")
def smollm2(world: None) -> tuple[Path, list[list[int]], list[list[int]]]:
    """(folder, prompts, transformers' greedy tokens)"""

    def make() -> Any:
        assert FILE is not None
        folder = converted(FILE, os.environ.get("SGLANG_SYMM_CACHE") or ROOT / ".cache")
        tokenizer = Tokenizer(folder)
        prompts = [tokenizer.chat(prompt) for prompt in SMOLLM2_PROMPTS]
        return str(folder), prompts, greedy_of_transformers(folder, prompts)

    folder, prompts, tokens = made_by_rank_0("smollm2", make)
    return Path(folder), prompts, tokens


@pytest.mark.skipif(
    FILE is None, reason=f"the package {SMOLLM2} with the model is not installed (make test installs it)"
)
@pytest.mark.parametrize("mlp_group", ["tp", "attn_tp"])
@pytest.mark.parametrize(
    ("attn_dp", "attn_tp"),
    [
        pytest.param(1, 3, id="TP3", marks=pytest.mark.world_size(3)),
        pytest.param(2, 1, id="2x1", marks=pytest.mark.world_size(2)),
        pytest.param(2, 3, id="2x3", marks=pytest.mark.world_size(6)),
    ],
)
def test_smollm2_s_greedy_tokens_equal_transformers(
    attn_dp: int, attn_tp: int, mlp_group: Any, smollm2: tuple[Path, list[list[int]], list[list[int]]]
) -> None:
    if attn_dp == 1 and mlp_group == "attn_tp":
        pytest.skip("without data-parallel attention both MLP groups are the same ranks")
    folder, prompts, expected = smollm2
    state = initialize_model_parallel(dist.get_world_size(), attn_dp, enable_symm_mem=True, **SETTINGS)
    runner = ModelRunner(folder, ServerArgs(max_len=128, mlp_group=mlp_group), state)
    completions = runner.generate(prompts, PARAMS)
    assert [completion.token_ids for completion in completions] == expected
    assert state.tp.info()["broken"] is None
