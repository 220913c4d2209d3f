"""Two groups of the same ranks, in two streams at a time: each keeps its own words, slots and epochs."""

from __future__ import annotations

import pytest
import torch

from tests.distributed_cases import inputs, ordered_sum
from tests.gpu.test_fused import FUSED_WORLDS, Case

# Small shapes alone: nothing puts a replay of one group behind a replay of the other, and a kernel that waits keeps its
# SMs. If each of two filled more than half of them, one rank could run the first and another the second, for ever. All
# calls that may be under way here together, also those that programmatic launch brings in early, fit the 16 SMs that
# each of 8 ranks on one GPU has: the fused linear, whose CTAs have an SM each, has 3 of them there, and 5 of 64 between
# two ranks.
COUNTS = (1, 1000, 4096)  # of bfloat16: 4 CTAs at most
ROUNDS = 200


class Half:
    """One of the two groups: its inputs, what it calls with them, and how many bits were wrong."""

    def __init__(self, group, rank, size, seed):
        self.group, self.rank = group, rank
        xs = [inputs(size, [count], torch.bfloat16, seed=seed + count) for count in COUNTS]
        rows = inputs(size, [5 * size, 8], torch.bfloat16, seed=seed)
        self.xs, self.rows = [x[rank].cuda() for x in xs], rows[rank].cuda()
        wants = [ordered_sum(x) for x in xs]
        wants += [torch.cat(xs[1]), ordered_sum(rows)[rank * 5 : (rank + 1) * 5]]
        self.linear = Case(size, 4, 264, 72, torch.bfloat16, seed) if size in FUSED_WORLDS else None
        if self.linear is not None:
            wants.append(self.linear.expected())
        self.wants = [want.cuda().view(torch.int16) for want in wants]
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def calls(self):
        outs = [self.group.all_reduce(x) for x in self.xs]
        outs += [self.group.all_gather(self.xs[1]), self.group.reduce_scatter(self.rows)]
        if self.linear is not None:
            outs.append(self.linear.call(self.group, self.rank))
        return outs

    def compare(self, outs):
        for out, want in zip(outs, self.wants, strict=True):
            self.wrong += (out.view(torch.int16) != want).sum()

    def captured(self):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = self.calls()
        return graph, outs


def no_bit_differed(halves):
    torch.cuda.synchronize()
    for half in halves:
        assert half.wrong.item() == 0
        half.group.check()


def streams_and_graphs(halves):
    """One of each for each of the groups."""
    streams, graphs = [torch.cuda.Stream() for _ in halves], [half.captured() for half in halves]
    torch.cuda.synchronize()
    return streams, graphs


@pytest.fixture
def halves(make, rank, size):
    halves = [Half(make(), rank, size, seed) for seed in (100, 200)]
    for half in halves:
        half.compare(half.calls())
    torch.cuda.synchronize()
    return halves


def take_turns(streams):
    """What either stream gets from here on comes behind all that both have had."""
    for stream, other in (streams, streams[::-1]):
        stream.wait_stream(other)


def test_eager_calls_of_two_groups_mix_in_two_streams(halves):
    streams = [torch.cuda.Stream() for _ in halves]
    results = []
    for i in range(ROUNDS):
        half = halves[i % 2]
        with torch.cuda.stream(streams[i // 2 % 2]):
            # Compared at the end: both streams would add to one count.
            results.append((half, half.calls()))
    torch.cuda.synchronize()
    for half, outs in results:
        half.compare(outs)
    no_bit_differed(halves)


def test_replays_of_two_groups_overlap_in_two_streams(halves):
    streams, graphs = streams_and_graphs(halves)
    for i in range(ROUNDS):
        if i % 20 == 0:  # a group's own calls are in one order; after that each has the other stream
            take_turns(streams)
        for j, (half, (graph, outs)) in enumerate(zip(halves, graphs, strict=True)):
            with torch.cuda.stream(streams[(j + i // 20) % 2]):
                for _ in range(1 + i % 3 if i % 2 == j else 1):  # now one group is ahead, now the other
                    graph.replay()
                half.compare(outs)
    no_bit_differed(halves)


def test_eager_calls_of_either_group_come_between_replays_of_both(halves):
    streams, graphs = streams_and_graphs(halves)
    for i in range(ROUNDS):
        for half, (graph, outs), stream in zip(halves, graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                half.compare(outs)
                if i % 3 == 0:
                    half.compare(half.calls())
    no_bit_differed(halves)


def test_graphs_that_hold_calls_of_both_groups_are_replayed_one_after_the_other(halves):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [half.calls() for half in (*halves, *halves)]
    for _ in range(ROUNDS // 4):
        graph.replay()
        for half, results in zip((*halves, *halves), outs, strict=True):
            half.compare(results)
    no_bit_differed(halves)
