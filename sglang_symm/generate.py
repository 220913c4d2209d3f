# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""`python -m sglang_symm generate`: answer prompts with a Llama over several ranks, and tell what the symmetric memory
did."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sglang_symm.distributed.launch import run_ranks, under_launcher
from sglang_symm.distributed.parallel_state import destroy_model_parallel
from sglang_symm.distributed.settings import checked_device
from sglang_symm.model_runner import Completion, ModelRunner, ServerArgs
from sglang_symm.models.config import LlamaConfig
from sglang_symm.models.gguf import converted
from sglang_symm.models.tokenizer import Tokenizer
from sglang_symm.sampling import SamplingParams

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `generate`."""
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder of a Llama, or a .gguf file (converted once, cached)"
    )
    parser.add_argument("--prompt", action="append", required=True, help="give it again for a batch of prompts")
    parser.add_argument("--tp", type=int, default=1, help="ranks of the model; started here unless torchrun did")
    parser.add_argument(
        "--attention-dp",
        type=int,
        default=1,
        help="replicas of the attention (divides --tp), each with its own prompts",
    )
    parser.add_argument(
        "--mlp-group", choices=("tp", "attn_tp"), default="tp", help="the ranks that share one MLP (default: tp)"
    )
    parser.add_argument("--no-symm-mem", action="store_true", help="outputs in ordinary memory")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the model's stop token")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--chat", action="store_true", help="prompts are what a user says (default if the model has a chat template)"
    )
    form.add_argument("--raw", action="store_true", help="prompts are text to be continued")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: a GPU for each rank")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="decode eagerly on GPUs too")
    parser.add_argument("--max-batch", type=int, default=8, help="prompts at once in a DP rank")
    parser.add_argument("--max-len", type=int, default=1024, help="tokens of a prompt and its answer")
    parser.add_argument("--arena-mib", type=int, help="symmetric memory of a group on each rank")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--compare-transformers",
        action="store_true",
        help="also run Hugging Face transformers in one process; exit code 1 if its greedy tokens differ",
    )


def main(args: argparse.Namespace) -> int:
    """Exit code 0; 1 if --compare-transformers found a difference; 2 for wrong arguments or a model that cannot be
    run; 3 if a rank died or did not come, or memory was full."""
    try:
        _check(args)
        # Before the ranks start, so that they do not wait for the conversion of a file inside their deadlines.
        folder = converted(args.model) if args.model.endswith(".gguf") else Path(args.model)
        LlamaConfig.from_folder(folder)
        if under_launcher():
            return _run_rank(args, folder)
        return run_ranks(args.tp, [sys.executable, "-m", "sglang_symm", "generate", *args.words], quiet=(2,))
    except (ValueError, OSError, ImportError) as error:
        # One voice for what all ranks see alike.
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"sglang_symm generate: {error}", file=sys.stderr)
        return 2
    except (dist.DistError, torch.OutOfMemoryError) as error:
        print(f"sglang_symm generate: {error}", file=sys.stderr)
        return 3


def _check(args: argparse.Namespace) -> None:
    for option in ("tp", "attention_dp", "max_batch", "max_len", "arena_mib"):
        value = getattr(args, option)
        if value is not None and not 1 <= value < 1 << 40:
            raise ValueError(f"expected --{option.replace('_', '-')} at least 1, got {value}")
    if args.tp % args.attention_dp:
        raise ValueError(f"--tp {args.tp} does not divide by --attention-dp {args.attention_dp}")
    checked_device(args.device)
    _params(args)
    if args.compare_transformers and (args.temperature > 0 or args.dtype != "float32"):
        raise ValueError(
            "--compare-transformers compares greedy tokens in fp32: expected --temperature 0 --dtype float32"
        )


def _params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, ignore_eos=args.ignore_eos
    )


def _run_rank(args: argparse.Namespace, folder: Path) -> int:
    """What one rank does; rank 0 prints."""
    params = _params(args)
    tokenizer = Tokenizer(folder)
    encode = tokenizer.chat if args.chat or (tokenizer.chat_template and not args.raw) else tokenizer.encode
    prompts = [encode(prompt) for prompt in args.prompt]
    runner = ModelRunner(folder, _server_args(args, prompts), progress=True)
    try:
        began = time.perf_counter()
        completions = runner.generate(prompts, params)
        seconds = time.perf_counter() - began
        report = _report(args, runner, tokenizer, prompts, completions, seconds)
        rank = dist.get_rank()
        del runner  # its weights and cache, before the comparison loads the model again
    finally:
        destroy_model_parallel()
        dist.destroy_process_group()
    if rank != 0:
        return 0
    if args.compare_transformers:
        expected = transformers_greedy(folder, prompts, params)
        for answer, tokens in zip(report["answers"], expected, strict=True):
            answer["equals_transformers"] = answer["token_ids"] == tokens
            answer["transformers_token_ids"] = tokens
    print(json.dumps(report) if args.json else text_of(report), flush=True)
    return int(not all(answer.get("equals_transformers", True) for answer in report["answers"]))


def _server_args(args: argparse.Namespace, prompts: Sequence[Sequence[int]]) -> ServerArgs:
    # The cache is made for what these prompts need, within the limits given.
    batch, length = -(-len(prompts) // args.attention_dp), max(map(len, prompts)) + args.max_new_tokens
    return ServerArgs(
        tensor_parallel_size=args.tp,
        attention_data_parallel_size=args.attention_dp,
        enable_symm_mem=not args.no_symm_mem,
        mlp_group=args.mlp_group,
        dtype=_DTYPES[args.dtype],
        device=args.device,
        max_batch=min(args.max_batch, batch),
        max_len=min(args.max_len, length),
        arena_bytes=None if args.arena_mib is None else args.arena_mib << 20,
        cuda_graphs=not args.no_cuda_graphs,
    )


def _report(
    args: argparse.Namespace,
    runner: ModelRunner,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    seconds: float,
) -> dict[str, Any]:
    """All that the command tells, as plain data."""
    generated = sum(len(completion.token_ids) for completion in completions)
    return {
        "model": args.model,
        "layout": {
            "tp": args.tp,
            "attention_dp": args.attention_dp,
            "attention_tp": args.tp // args.attention_dp,
            "mlp_group": args.mlp_group,
            "enable_symm_mem": not args.no_symm_mem,
            "dtype": args.dtype,
            "device": args.device,
            "cuda_graphs": runner.graphs is not None,
        },
        "answers": [
            {
                "prompt": text,
                "prompt_tokens": len(prompt),
                "text": tokenizer.decode(completion.token_ids),
                "token_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
            }
            for text, prompt, completion in zip(args.prompt, prompts, completions, strict=True)
        ],
        "generated_tokens": generated,
        "seconds": seconds,
        "tokens_per_second": generated / seconds,
        "throughput_of_dp_rank_0": asdict(runner.throughput),
        "groups": [group.info() for group in runner.groups],
    }


def text_of(report: dict[str, Any]) -> str:
    """The report as text for people."""
    layout, lines = report["layout"], []
    for answer in report["answers"]:
        lines += ["", f">>> {answer['prompt']}", answer["text"]]
        if "equals_transformers" in answer:
            count = len(answer["token_ids"])
            verdict = "equal to" if answer["equals_transformers"] else "DIFFERENT from"
            lines.append(f"    [{count} greedy tokens, {verdict} Hugging Face transformers' in one process]")
    memory = "on" if layout["enable_symm_mem"] else "off"
    lines += [
        "",
        f"layout    {layout['tp']} ranks: attention-DP {layout['attention_dp']} x "
        f"attention-TP {layout['attention_tp']}, MLP over {layout['mlp_group']}, "
        f"{layout['dtype']} on {layout['device']}, symmetric memory {memory}"
        + (", decode steps in CUDA graphs" if layout.get("cuda_graphs") else ""),
        f"speed     {report['generated_tokens']} tokens in {report['seconds']:.1f} s: "
        f"{report['tokens_per_second']:.1f} tokens/s",
    ]
    for info in report["groups"]:
        stats, calls = info.get("memory"), info["calls_by_algorithm"]
        lines.append(
            f"group     {info['name']}, {info['world_size']} ranks, {info['communicator']} (as rank 0 sees it)"
        )
        if stats:
            used, peak, arena = (stats[key] / 2**20 for key in ("allocated_bytes", "peak_bytes", "arena_bytes"))
            lines.append(f"  memory  {used:.2f} MiB in use, peak {peak:.2f} MiB, arena {arena:.0f} MiB")
        lines.append(f"  outputs {info['outputs_inside']} inside symmetric memory, {info['outputs_outside']} outside")
        lines.append("  calls   " + (", ".join(f"{name} {count}" for name, count in sorted(calls.items())) or "none"))
    return "\n".join(lines[1:])


def transformers_greedy(
    folder: str | Path, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[list[int]]:
    """The tokens (without the stop token) that transformers' greedy search in fp32 gives each prompt, alone and in this
    process.

    Raises ImportError without transformers."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError("--compare-transformers needs transformers: pip install 'sglang-symm[models]'") from error
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # a rank has fewer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own_stop = () if params.ignore_eos else LlamaConfig.from_folder(folder).eos_token_ids
    stop = {*own_stop, *params.stop_token_ids}
    answers = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=params.max_new_tokens,
            eos_token_id=sorted(stop) or -1,  # None would mean the model's own
            pad_token_id=0,
        )
        tokens = output[0, len(prompt) :].tolist()
        ends = [i for i, token in enumerate(tokens) if token in stop]
        answers.append(tokens[: ends[0]] if ends else tokens)
    torch.set_num_threads(threads)
    return answers
