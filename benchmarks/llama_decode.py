# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""A decode step and a prefill of a Llama-3-shaped model with random weights, tensor-parallel, in CUDA graphs.

    torchrun --nproc-per-node 2 benchmarks/llama_decode.py [--shape 8b] [--layers 32] [--json FILE]
        [--variants symm nccl alone alone_our_norm]

Variants, replayed in turn in one run, on the same weights and cache:

    symm            row-parallel layers with their outputs in symmetric memory
    ordinary        the same ops, outputs in ordinary memory (enable_symm_mem=False)
    unfused         torch.mm into symmetric memory, then this library's all_reduce_add_rms_norm
    nccl            torch.nn.functional.linear and torch.distributed.all_reduce in the layer, all collectives by NCCL
    torch_two_shot  torch.mm into torch's symmetric memory, then its two-shot all-reduce; embedding and head by NCCL
    alone           no communication at all, norms by PyTorch: what the rest of a step by NCCL or torch costs
    alone_our_norm  no communication at all, norms by this library (all_reduce_add_rms_norm in a group of one rank)

Milliseconds of a step: median over repeats of the slowest rank, and quartiles. `communication`: the share of a step
that goes when communication goes, 1 - alone / variant, where `alone` (its results are wrong) has the same norms as the
variant. It is below 0 where the fused kernel is faster than the library's GEMM. A decode step reads the tokens'
embeddings, runs all layers with attention over `--context` places, and gathers the logits.

A variant that fails on any rank is left out on all, its traceback is printed, and the run ends with status 1. Every
rank says on stderr what it is at. One that stays there for `--stage-seconds`, or is ended by a signal, prints the
stacks of all its threads first.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import gc
import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
import torch.nn.functional as F
from torch import Tensor

from sglang_symm.bench import commit, launched
from sglang_symm.decode_graphs import DecodeGraphs
from sglang_symm.distributed import ForwardBatch, Group, destroy_model_parallel, initialize_model_parallel
from sglang_symm.distributed.launch import require_gpu_ranks
from sglang_symm.layers.attention import KVCache, TokenBatch
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


# Variant -> the one without communication that has the same norms.
ALONE = {
    "symm": "alone_our_norm",
    "ordinary": "alone_our_norm",
    "unfused": "alone_our_norm",
    "nccl": "alone",
    "torch_two_shot": "alone",
}
VARIANTS = (*ALONE, "alone", "alone_our_norm")


class Progress:
    """What this rank is at: an end without a traceback has a name, and a wait without end has an end."""

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds
        self.failed: list[str] = []

    def say(self, text: str) -> None:
        print(f"llama_decode: rank {self.rank}: {text}", file=sys.stderr, flush=True)

    def renew(self) -> None:
        """From here on the stage has its seconds again."""
        faulthandler.dump_traceback_later(self.seconds, exit=True)

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        self.say(what)
        self.renew()
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def attempt(self, what: str, make: Callable[[], Any]) -> Any:
        """make(), or None on all ranks when it raised on one of them; that one says how."""
        result, failed = None, torch.zeros(dist.get_world_size())
        with self.stage(what):
            try:
                result = make()
            except Exception as error:
                failed[self.rank] = 1
                self.say(f"{what} failed:\n{traceback.format_exc()}")
                self.leave_if_lost()
                traceback.clear_frames(error.__traceback__)  # or they keep graphs alive
            dist.all_reduce(failed)  # of CPU tensors: by Gloo
        if not failed.any():
            return result
        self.failed.append(f"{what}: on rank(s) {', '.join(map(str, failed.nonzero().flatten().tolist()))}")
        return None

    def leave_if_lost(self) -> None:
        """After an error that the CUDA context does not survive: every destructor that meets it again may end the
        process by SIGABRT, without a word of the first one.
        """
        if not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            self.leave(f"the CUDA context is lost, nothing more can be measured: {str(error).splitlines()[0]}")

    def leave(self, why: str) -> None:
        self.say(why)
        sys.stdout.flush()
        os._exit(1)


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


class TorchTwoShotLinear(Separate):
    # One for all layers: its op ends when no rank reads it any more, and the norm reads it before the next layer.
    buffer: Tensor | None = None

    def forward(self, x: Tensor, skip_all_reduce: bool = False) -> tuple[Tensor, None]:
        assert self.buffer is not None
        rows, columns = x.shape[0], self.weight.shape[0]
        y = self.buffer[: rows * columns].view(rows, columns)
        torch.mm(x, self.weight.t(), out=y)
        torch.ops.symm_mem.two_shot_all_reduce_(y, "sum", self.group.device_group.group_name)
        return y, None


class UnfusedLinear(RowParallelLinear):
    def forward_add_norm(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        name = self.group.unique_name
        y = torch.ops.sglang_symm.empty(list(residual.shape), name, dtype=x.dtype, device=x.device)
        torch.mm(x, self.weight.t(), out=y)
        return torch.ops.sglang_symm.all_reduce_add_rms_norm(y, residual, norm.weight, norm.eps, name)


class LinearAlone(Separate):
    def forward(self, x: Tensor, skip_all_reduce: bool = False) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


class LinearAloneOurNorm(RowParallelLinear):
    # Of this rank alone, for all layers.
    one_rank: Group | None = None

    def forward_add_norm(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        assert self.one_rank is not None
        y, name = F.linear(x, self.weight), self.one_rank.unique_name
        return torch.ops.sglang_symm.all_reduce_add_rms_norm(y, residual, norm.weight, norm.eps, name)


def use(model: LlamaForCausalLM, variant: str) -> None:
    """Make the model communicate in this way from here on."""
    group = model.state.tp
    model.state.enable_symm_mem = variant != "ordinary"
    kinds = {
        "unfused": UnfusedLinear,
        "nccl": NcclLinear,
        "torch_two_shot": TorchTwoShotLinear,
        "alone": LinearAlone,
        "alone_our_norm": LinearAloneOurNorm,
    }
    kind = kinds.get(variant, RowParallelLinear)
    for module in model.modules():
        if isinstance(module, RowParallelLinear):
            module.__class__ = kind
    other = NoGroup if variant in ALONE.values() else NcclGroup if ALONE[variant] == "alone" else None
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


def decode_graph(model: LlamaForCausalLM, batch: int, cache: KVCache) -> Any:
    """replay() of one decode step, of sequences that fill three quarters of the cache."""
    graphs = DecodeGraphs(model, cache, [batch])
    first = cache.max_len * 3 // 4
    graphs.fill([(7 * i) % 1000 for i in range(batch)], [first + i % 8 for i in range(batch)], batch)
    return lambda: graphs.replay(batch)


@torch.inference_mode()
def prefill_graph(model: LlamaForCausalLM, tokens: int, cache: KVCache) -> Any:
    """replay() of one prompt's prefill, with the logits of its last token."""
    state, device = model.state, model.state.device
    batch = TokenBatch([0], [0], [tokens], device)
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
    return functools.partial(replay_and_give, graph, logits, (ids, batch))


def replay_and_give(graph: torch.cuda.CUDAGraph, logits: Tensor, reads: Any) -> Tensor:
    """`reads`: what the graph reads lives as long as it may be replayed, or it would read what came there since."""
    graph.replay()
    return logits


def measure(
    replays: dict[str, Any], repeats: int, calls: int, state: Any, progress: Progress
) -> dict[str, list[float]]:
    """Milliseconds of one step of each variant on this rank, for each repeat."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    for repeat in range(repeats + 2):
        for name, replay in replays.items():
            progress.renew()
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
    state.tp.check()
    return times


def of_the_slowest(times: dict[str, list[float]]) -> dict[str, list[float]]:
    found = {}
    for name, mine in times.items():
        slowest = torch.tensor(mine)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        found[name] = slowest.tolist()
    return found


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    rows = {}
    for name, each in times.items():
        low, median, high = statistics.quantiles(each, n=4)
        rows[name] = {"median_ms": round(median, 4), "q1": round(low, 4), "q3": round(high, 4)}
        alone = times.get(ALONE.get(name, ""))
        if alone is not None:
            rows[name]["communication"] = round(1 - statistics.median(alone) / median, 4)
    return rows


def run_case(case: str, n: int, model: LlamaForCausalLM, args: argparse.Namespace, progress: Progress) -> Any:
    """One row of the results: the variants that worked, side by side. None when nothing could be measured."""
    state, label = model.state, f"{case} {n}"
    slots, places = (n, args.context) if case == "decode" else (1, n)
    # All variants write the same places of it before they read them.
    cache = progress.attempt(f"{label}: cache", lambda: model.make_cache(slots, places))
    if cache is None:
        return None
    replays: dict[str, Any] = {}
    logits: dict[str, Tensor] = {}
    for variant in args.variants:
        use(model, variant)

        def make() -> Any:
            replay = decode_graph(model, n, cache) if case == "decode" else prefill_graph(model, n, cache)
            found = replay().float().clone()
            torch.cuda.synchronize()
            state.tp.check()
            return replay, found

        made = progress.attempt(f"{label}: {variant}", make)
        if made is not None:
            replays[variant], logits[variant] = made
        del made
    calls = args.calls if case == "decode" else 2
    times = progress.attempt(f"{label}: measure", lambda: measure(replays, args.repeats, calls, state, progress))
    if not times:
        return None
    row: dict[str, Any] = {"case": case, "tokens": n, **summary(of_the_slowest(times))}
    # bf16 sums of two ranks have one rounding in any order.
    ours = logits.get("symm")
    for variant, other in logits.items():
        if ours is None or variant == "symm" or variant in ALONE.values():
            continue
        row[f"{variant}_logits_differ_by"] = float((other - ours).abs().max() / ours.abs().max())
    if ours is not None and "ordinary" in logits:
        row["symm_equals_ordinary"] = torch.equal(ours, logits["ordinary"])
    return row


def line(row: dict[str, Any]) -> str:
    rows = {name: row[name] for name in VARIANTS if name in row}
    cells = [f"{k} {v['median_ms']:.3f} ({v['q1']:.3f}-{v['q3']:.3f})" for k, v in rows.items()]
    shares = [f"{k} {v['communication']:.1%}" for k, v in rows.items() if "communication" in v]
    differ = [f"{k.split('_logits')[0]} {v:.2g}" for k, v in row.items() if k.endswith("_logits_differ_by")]
    parts = ["  ".join(cells) + " ms"]
    parts += [f"communication {', '.join(shares)}"] if shares else []
    parts += [f"logits differ: {', '.join(differ)}"] if differ else []
    return f"{row['case']} {row['tokens']}: {'; '.join(parts)}"


def report(args: argparse.Namespace, state: Any, results: list[Any], progress: Progress) -> dict[str, Any]:
    return {
        "what": f"a step of a Llama-3-{args.shape} with random weights, bf16, in CUDA graphs, milliseconds",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": torch.cuda.get_device_name(),
        "ranks": state.tp_size,
        "layers": args.layers,
        "context": args.context,
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "command": launched(*sys.argv),
        "results": results,
        "failed": progress.failed,
        "group": state.tp.info(),
    }


def tear_down(progress: Progress) -> None:
    """Graphs are gone by now: NCCL's communicator waits for those that hold its kernels, and a graph, or a block of
    torch's symmetric memory, that is destroyed at the interpreter's end may end the process by SIGABRT.
    """
    with progress.stage("the end"):
        TorchTwoShotLinear.buffer = None
        if LinearAloneOurNorm.one_rank is not None:
            LinearAloneOurNorm.one_rank.destroy()
        gc.collect()
        torch.cuda.synchronize()
        dist.all_reduce(torch.zeros(1))  # by Gloo: nobody leaves while another still measures
        destroy_model_parallel()
        dist.destroy_process_group()


def run(args: argparse.Namespace, progress: Progress) -> None:
    with progress.stage("groups and weights"):
        state = initialize_model_parallel(int(os.environ["WORLD_SIZE"]), enable_symm_mem=True, device="cuda")
        model = random_model(args.shape, args.layers, state)
        weights_are_static(model)
        if "alone_our_norm" in args.variants:
            one_rank, _ = dist.new_subgroups(1)
            LinearAloneOurNorm.one_rank = Group(one_rank, name="alone", device=state.device)
    cases = [("decode", batch) for batch in args.batches] + [("prefill", n) for n in [args.prefill] if n]
    if "torch_two_shot" in args.variants:

        def make_buffer() -> bool:
            rows, columns = max(n for _, n in cases), model.config.hidden_size
            buffer = symm_mem.empty(rows * columns, dtype=torch.bfloat16, device=state.device)
            symm_mem.rendezvous(buffer, state.tp.device_group.group_name)
            TorchTwoShotLinear.buffer = buffer
            return True

        if progress.attempt("torch_two_shot: its symmetric memory", make_buffer) is None:
            args.variants.remove("torch_two_shot")
    results = []
    for case, n in cases:
        row = run_case(case, n, model, args, progress)
        gc.collect()  # graphs, before the next ones take their memory
        if row is None:
            continue
        results.append(row)
        if progress.rank == 0:
            print(line(row), flush=True)
    if progress.rank == 0 and args.json:
        with open(args.json, "w") as file:
            json.dump(report(args, state, results, progress), file, indent=1)
    tear_down(progress)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=1024, help="places of a sequence in the cache; all are read")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens; 0: none")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--calls", type=int, default=5, help="steps in a repeat")
    # Less than the 60 s after which NCCL's watchdog ends the process by SIGABRT, without a word of where it was.
    parser.add_argument("--stage-seconds", type=float, default=50.0, help="a stage that takes longer is a failure")
    parser.add_argument("--json")
    args = parser.parse_args()
    faulthandler.enable()  # SIGABRT and SIGSEGV print the stacks of all threads
    faulthandler.register(signal.SIGTERM, chain=True)
    require_gpu_ranks("llama_decode")
    progress = Progress(int(os.environ["RANK"]), args.stage_seconds)
    try:
        run(args, progress)
    except Exception:
        # Not by an exception: the destructors on its way would wait for ranks that do not come, or hide it.
        progress.leave(f"failed:\n{traceback.format_exc()}")
    for failure in progress.failed if progress.rank == 0 else []:
        progress.say(f"failed: {failure}")
    return 1 if progress.failed else 0


if __name__ == "__main__":
    sys.exit(main())
