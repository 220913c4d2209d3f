#!/usr/bin/env python3
# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Tokens a second of a Llama over several ranks (CPU, one thread a rank) beside Hugging Face transformers in one
process with as many threads as ranks, taking turns in one run; greedy tokens must be equal.

    python benchmarks/generate_cpu.py MODEL [--tp 3] [--attention-dp 1] [--tokens 64] [--profile] [--json FILE]

One prompt for each DP rank; transformers gets all of them as one batch. The model is a folder or a .gguf file.
--profile prints where the time of rank 0 goes (torch.profiler, self CPU time) instead of comparing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sglang_symm.bench import commit, machine
from sglang_symm.bench.ranks import World
from sglang_symm.distributed.launch import run_ranks, under_launcher
from sglang_symm.distributed.parallel_state import destroy_model_parallel
from sglang_symm.model_runner import ModelRunner, ServerArgs
from sglang_symm.models.gguf import converted
from sglang_symm.sampling import SamplingParams


class Transformers:
    """model.generate of transformers, greedy, all prompts in one batch, with its own key/value cache."""

    def __init__(self, folder: Path, threads: int) -> None:
        from transformers import AutoModelForCausalLM

        self.threads = threads
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def __call__(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        torch.set_num_threads(self.threads)
        ids = torch.tensor(prompts)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        torch.set_num_threads(1)
        answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return answers


def run_rank(args: argparse.Namespace, folder: Path) -> int:
    """All ranks; rank 0 runs transformers while the others sleep in a barrier."""
    world = World("cpu")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 10000, (args.attention_dp, args.prompt_tokens), generator=generator).tolist()
    runner = ModelRunner(
        folder,
        ServerArgs(
            tensor_parallel_size=args.tp,
            attention_data_parallel_size=args.attention_dp,
            max_batch=1,
            max_len=args.prompt_tokens + args.tokens,
        ),
    )
    params = SamplingParams(args.tokens, 0.0, 0, 1.0, 0, ignore_eos=True)
    runner.generate(prompts, params)
    if args.profile:
        with torch.profiler.profile() as profile:
            runner.generate(prompts, params)
        if world.rank == 0:
            print(
                profile.key_averages().table(
                    sort_by="self_cpu_time_total", row_limit=args.rows, top_level_events_only=False
                )
            )
    else:
        compare(args, world, runner, prompts, params, folder)
    destroy_model_parallel()
    world.close()
    return 0


def compare(
    args: argparse.Namespace,
    world: World,
    runner: ModelRunner,
    prompts: list[list[int]],
    params: SamplingParams,
    folder: Path,
) -> None:
    """Rounds in turns, then the table."""
    peer = Transformers(folder, args.tp) if world.rank == 0 else None
    if peer:
        peer(prompts, 4)
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for r in range(args.rounds):
        dist.barrier()
        start = time.perf_counter()
        answers = [c.token_ids for c in runner.generate(prompts, params)]
        seconds["ours"].append(time.perf_counter() - start)
        if peer:
            start = time.perf_counter()
            expected = peer(prompts, args.tokens)
            seconds["transformers"].append(time.perf_counter() - start)
            if answers != expected:
                raise RuntimeError(f"tokens differ: {answers}, transformers {expected}")
            print(
                f"round {r + 1}/{args.rounds}: {seconds['ours'][-1]:.2f} s, transformers "
                f"{seconds['transformers'][-1]:.2f} s",
                file=sys.stderr,
                flush=True,
            )
    if not peer:
        return
    total = args.tokens * len(prompts)
    speed = {who: [total / s for s in many] for who, many in seconds.items()}
    environment: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(world),
        "torch": torch.__version__,
        "layout": f"{args.tp} ranks, attention-DP {args.attention_dp}",
        "tokens": args.tokens,
        "command": " ".join(["python benchmarks/generate_cpu.py", *(Path(a).name for a in sys.argv[1:])]),
    }
    print("# " + "  ".join(f"{k} {v}" for k, v in environment.items()))
    for who, many in speed.items():
        print(f"{who:13} {statistics.median(many):7.1f} tokens/s  ({min(many):.1f} to {max(many):.1f})")
    print(f"ratio         {statistics.median(speed['ours']) / statistics.median(speed['transformers']):7.2f}")
    if args.json:
        Path(args.json).write_text(
            json.dumps({"environment": environment, "tokens_per_second": speed}, indent=1) + "\n"
        )


def main() -> int:
    """Exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--tp", type=int, default=3)
    parser.add_argument("--attention-dp", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64, help="to generate for each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--rows", type=int, default=25, help="of the profile")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if min(args.rounds, args.tokens, args.prompt_tokens, args.tp, args.attention_dp) < 1:
        parser.error("expected --rounds, --tokens, --prompt-tokens, --tp and --attention-dp of at least 1")
    folder = Path(converted(args.model)) if args.model.endswith(".gguf") else Path(args.model)
    if under_launcher():
        return run_rank(args, folder)
    return run_ranks(args.tp, [sys.executable, __file__, *sys.argv[1:]], env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    sys.exit(main())
