"""The fused row-parallel linear for long: replays with churn, calls of random shapes, all compared bit by bit.

SGLANG_SYMM_TEST_FUSED_CALLS=1000000 torchrun --nproc-per-node 2 -m pytest -s tests/gpu/test_fused_proof.py
"""

from __future__ import annotations

import os
import random
import time

import pytest
import torch

from sglang_symm import memory
from tests.gpu.test_fused import FUSED_WORLDS, Case, sms_of, tile_rows

REPLAYS = int(os.environ.get("SGLANG_SYMM_TEST_REPLAYS", "10000"))
CALLS = int(os.environ.get("SGLANG_SYMM_TEST_FUSED_CALLS", "20000"))
SECONDS = float(os.environ.get("SGLANG_SYMM_TEST_FUSED_SECONDS", "60"))


@pytest.fixture(autouse=True)
def fused_world(size):
    if size not in FUSED_WORLDS:
        pytest.skip("the fused kernel is for 2, 4 and 8 ranks")


def long_n(group, waves):
    """Rows of a weight that are so many waves of tiles over the SMs of a rank, and a part of a tile."""
    return int(waves * sms_of(group)) * tile_rows(group.world_size) + 8


# Slots for 64 tokens of 1.5 waves of tiles between 8 ranks of 132 SMs each, and room for what graphs keep.
LONG_ARENA = 512 << 20


def test_replays_with_allocations_and_eager_calls_between_differ_in_no_bit(make, rank, size):
    group = make(arena_bytes=LONG_ARENA)
    cases = [Case(size, m, 2184, 264, torch.bfloat16, seed=m, bias=m % 2 == 0) for m in (1, 7, 16, 33, 64)]
    # CTAs that have a second tile, or a third: rings and slots go on where the tile before has left them.
    cases += [Case(size, m, long_n(group, waves), 72, torch.bfloat16, seed=m) for m, waves in ((5, 2.25), (40, 1.5))]
    # Pairs of CTAs: one tile each, and between two ranks two, three and five in turn.
    pairs = [(24, 0.3, 2056), (3, 1, 4104), (64, 1.25, 2056), (9, 2.2, 2056)]
    cases += [
        Case(size, m, 64 * int(sms_of(group) // 2 * 2 * tiles), k, torch.bfloat16, seed=m) for m, tiles, k in pairs
    ]
    wants = [case.expected().view(torch.int16) for case in cases]
    noise = torch.ones(5000, device="cuda")
    for case in cases:
        case.call(group, rank)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [case.call(group, rank, static_weight=i % 2 == 0) for i, case in enumerate(cases)]
        total = group.all_reduce(noise)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    live = []
    for i in range(REPLAYS):
        graph.replay()
        if i % 10 == 0:
            for out, want in zip(outs, wants, strict=True):
                wrong += (out.view(torch.int16) != want).sum()
            wrong += (total != size).sum()
            # Ranks hold different blocks.
            live.append(memory.empty(100 * (1 + (i * 7 + rank * 3) % 50), group=group, dtype=torch.float32).fill_(-1.0))
            live = live[-(1 + (i // 10 + rank) % 5) :]
        if i % 50 == 0:
            eager = i // 50 % len(cases)
            wrong += (cases[eager].call(group, rank).view(torch.int16) != wants[eager]).sum()
    assert wrong.item() == 0
    group.check()


def test_calls_of_random_shapes_differ_in_no_bit(make, rank, size):
    """The same calls on all ranks, in graphs of 100 so that the host does not hold them up. Of ten shapes two have more
    tiles than SMs, two are for pairs of CTAs, and one between two ranks is for the kernel of many tokens."""
    group = make(arena_bytes=LONG_ARENA)
    shapes = random.Random(7)
    pool = []
    for seed in range(60):
        m, k = shapes.randint(1, 64), 8 * shapes.randint(1, 100)
        n = 8 * shapes.randint(1, 400)
        if seed % 5 == 0:  # more tiles than SMs
            n, k = long_n(group, shapes.uniform(1.1, 1.5)), 8 * shapes.randint(1, 12)
        elif seed % 5 == 1:
            n, k = 8 * shapes.randint(1, 8 * (sms_of(group) // 2)), 8 * shapes.randint(256, 300)
        elif seed % 10 == 7 and size == 2:  # a wide tile for each cluster
            m, n = shapes.randint(240, 256), 256 * (sms_of(group) // 2) - 8 * shapes.randint(0, 8)
        case = Case(size, m, n, k, shapes.choice([torch.bfloat16, torch.float16]), seed, shapes.random() < 0.5)
        pool.append((case, case.expected().view(torch.int16)))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    before = group.info()["fused_calls"]
    graphs = []
    for _ in range(20):
        chosen = [shapes.choice(pool) for _ in range(100)]
        pool[0][0].call(group, rank)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i, (case, want) in enumerate(chosen):
                # Many tokens into ordinary memory: a graph's results would fill the arena.
                few = case.xs[0].size(0) <= 64
                y = case.call(group, rank, static_weight=i % 3 == 0, symmetric=few)
                wrong += (y.view(torch.int16) != want).sum()
        graphs.append(graph)
    assert group.info()["fused_calls"] - before == 20 * 101
    start, calls = time.monotonic(), 0
    stop = torch.zeros(1, device="cuda")
    while calls < CALLS and stop.item() == 0:
        for _ in range(10):
            graphs[shapes.randrange(len(graphs))].replay()
        calls += 1000
        # Ranks stop together: whoever has run out of time says so.
        stop = group.all_reduce(torch.full((1,), float(time.monotonic() - start > SECONDS), device="cuda"))
    done = f"{calls} calls of {len(pool)} shapes in {time.monotonic() - start:.0f} s, {wrong.item()} wrong elements"
    if rank == 0:
        print(done)
    assert wrong.item() == 0
    assert calls >= CALLS, f"{done}: expected {CALLS} calls in {SECONDS:g} s"
    group.check()
