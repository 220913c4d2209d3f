# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""A decode step and a prefill of a Llama-3-shaped model with random weights, tensor-parallel, in CUDA graphs.

    torchrun --nproc-per-node 2 benchmarks/llama_decode.py [--shape 8b] [--layers 32] [--json FILE]

Variants, replayed in turn in one run, on the same weights and cache:

    symm      row-parallel layers with their outputs in symmetric memory
    ordinary  the same ops, outputs in ordinary memory (enable_symm_mem=False)
    nccl      torch.nn.functional.linear and torch.distributed.all_reduce in the layer, all collectives by NCCL
    alone     no communication at all: what the rest of the step costs (its results are wrong)

Milliseconds of a step: median over repeats of the slowest rank, and quartiles. `communication`: the share
of a step that goes when communication goes, 1 - alone / variant. A decode step reads the tokens' embeddings, runs all
layers with attention over `--context` places, and gathers the logits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sglang_symm.decode_graphs import DecodeGraphs
from sglang_symm.distributed import ForwardBatch, destroy_model_parallel, initialize_model_parallel
from sglang_symm.layers.attention import TokenBatch
from sglang_symm.layers.linear import RowParallelLinear, weights_are_static
from sglang_symm.layers.norm import RMSNorm
from sglang_symm.models import LlamaConfig, LlamaForCausalLM

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}
SHAPES = {
    "8b": LLAMA_3_8B,
    "70b": LLAMA_3_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
}


class NcclGroup:
    """What the embedding and the head ask of a group, by torch.distributed."""

    def __init__(self, group: Any) -> None:
        self.rank_in_group, self.world_size = group.rank_in_group, group.world_size

    def all_reduce(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        parts = x.new_empty(self.world_size, *x.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), x)
        return torch.cat(parts.unbind(), dim)


class NoGroup(NcclGroup):
    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return x


class Separate(RowParallelLinear):
    """Norms in kernels of PyTorch's, as its users have them."""

    def forward_add_norm(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        return norm(self(x)[0], residual)


class NcclLinear(Separate):
    def forward(self, x: Tensor, skip_all_reduce: bool = False) -> tuple[Tensor, None]:
        y = F.linear(x, self.weight)
        dist.all_reduce(y)
        return y, None


class LinearAlone(Separate):
    def forward(self, x: Tensor, skip_all_reduce: bool = False) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


def use(model: LlamaForCausalLM, variant: str) -> None:
    """Make the model communicate in this way from here on."""
    group = model.state.tp
    model.state.enable_symm_mem = variant != "ordinary"
    kind = {"nccl": NcclLinear, "alone": LinearAlone}.get(variant, RowParallelLinear)
    for module in model.modules():
        if isinstance(module, RowParallelLinear):
            module.__class__ = kind
    other = {"nccl": NcclGroup, "alone": NoGroup}.get(variant)
    for module in (model.model.embed_tokens, model.lm_head):
        module.group = other(group) if other else group


def random_model(shape: str, layers: int, state: Any) -> LlamaForCausalLM:
    config = LlamaConfig.from_dict({**SHAPES[shape], "num_hidden_layers": layers})
    model = LlamaForCausalLM(config, "tp", state, dtype=torch.bfloat16, device=state.device).eval()
    generator = torch.Generator(state.device)
    for i, (name, weight) in enumerate(model.named_parameters()):
        generator.manual_seed(1000 * i + (0 if "norm" in name else state.tp_rank))
        with torch.no_grad():
            weight.fill_(1) if "norm" in name else weight.normal_(std=0.02, generator=generator)
    return model


def decode_graph(model: LlamaForCausalLM, batch: int, context: int) -> Any:
    """replay() of one decode step, of sequences that fill three quarters of the context."""
    graphs = DecodeGraphs(model, model.make_cache(batch, context), [batch])
    graphs.fill([(7 * i) % 1000 for i in range(batch)], [context * 3 // 4 + i % 8 for i in range(batch)], batch)
    return lambda: graphs.replay(batch)


@torch.inference_mode()
def prefill_graph(model: LlamaForCausalLM, tokens: int) -> Any:
    """replay() of one prompt's prefill, with the logits of its last token."""
    state, device = model.state, model.state.device
    cache, batch = model.make_cache(1, tokens), TokenBatch([0], [0], [tokens], device)
    ids = torch.arange(tokens, device=device) % 1000

    def run() -> Tensor:
        with state.forward(ForwardBatch([tokens], is_extend=True)):
            return model.logits(model(ids, batch, cache)[batch.last_rows])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        with torch.cuda.graph(graph, stream=stream):
            logits = run()
    torch.cuda.synchronize()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def measure(replays: dict[str, Any], repeats: int, calls: int, state: Any) -> dict[str, list[float]]:
    """Milliseconds of one step of each variant, the slowest rank's, for each repeat."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    for repeat in range(repeats + 2):
        for name, replay in replays.items():
            torch.cuda.synchronize()
            state.tp.barrier()  # the ranks start together
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(calls):
                replay()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 2:
                times[name].append(begin.elapsed_time(end) / calls)
    for name in replays:
        slowest = torch.tensor(times[name])
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        times[name] = slowest.tolist()
    return times


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    alone = statistics.median(times["alone"])
    rows = {}
    for name, each in times.items():
        low, median, high = statistics.quantiles(each, n=4)
        rows[name] = {"median_ms": round(median, 4), "q1": round(low, 4), "q3": round(high, 4)}
        rows[name]["communication"] = round(1 - alone / median, 4)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=1024, help="places of a sequence in the cache; all are read")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens; 0: none")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--calls", type=int, default=5, help="steps in a repeat")
    parser.add_argument("--json")
    args = parser.parse_args()
    state = initialize_model_parallel(int(os.environ["WORLD_SIZE"]), enable_symm_mem=True, device="cuda")
    rank = state.tp_rank
    model = random_model(args.shape, args.layers, state)
    weights_are_static(model)
    cases = [("decode", batch) for batch in args.batches] + [("prefill", n) for n in [args.prefill] if n]
    results: list[dict[str, Any]] = []
    for case, n in cases:
        replays, logits = {}, {}
        for variant in ("symm", "ordinary", "nccl", "alone"):
            use(model, variant)
            replays[variant] = decode_graph(model, n, args.context) if case == "decode" else prefill_graph(model, n)
            logits[variant] = replays[variant]().float().clone()
        # bf16 sums of two ranks have one rounding in any order.
        worst = float((logits["nccl"] - logits["symm"]).abs().max() / logits["symm"].abs().max())
        same = torch.equal(logits["symm"], logits["ordinary"])
        rows = summary(measure(replays, args.repeats, args.calls if case == "decode" else 2, state))
        results.append(
            {"case": case, "tokens": n, **rows, "nccl_logits_differ_by": worst, "symm_equals_ordinary": same}
        )
        if rank == 0:
            cells = [f"{k} {v['median_ms']:.3f} ({v['q1']:.3f}-{v['q3']:.3f})" for k, v in rows.items()]
            shares = ", ".join(f"{k} {v['communication']:.1%}" for k, v in rows.items() if k != "alone")
            print(f"{case} {n}: {'  '.join(cells)} ms; communication {shares}; nccl differs {worst:.2g}", flush=True)
        state.tp.check()
        del replays, logits
    if rank == 0 and args.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        report = {
            "what": f"a step of a Llama-3-{args.shape} with random weights, bf16, in CUDA graphs, milliseconds",
            "date": time.strftime("%Y-%m-%d"),
            "commit": os.environ.get("SGLANG_SYMM_COMMIT", "") or commit,
            "device": torch.cuda.get_device_name(),
            "ranks": state.tp_size,
            "layers": args.layers,
            "context": args.context,
            "torch": torch.__version__,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "command": " ".join(sys.argv),
            "results": results,
            "group": state.tp.info(),
        }
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)
    dist.barrier()
    destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
