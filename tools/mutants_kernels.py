"""Break the CUDA kernels on purpose, one line at a time, and require that their tests on the emulator notice.

    python tools/mutants_kernels.py [--list] [--only NAME] [--limit SECONDS] [--jobs N]

What tools/mutants.py does to the protocol of CPU groups; tools/mutants_cuda.py has most of these mistakes too, for
machines with GPUs. Only the sources that a mutant names are compiled again, so a header's mistake is in them alone. The
tests draw their schedules from seeds: a mistake that needs a rare one shows in every run or in none.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutants import Mutant, build_program, command_line, copy_tree, mutate, report, run_tests, with_name  # noqa: E402

ONE_SHOT, TWO_SHOT = "collective/one_shot_cuda.cu", "collective/two_shot_cuda.cu"
DIRECT, SMALL, NORM = "collective/direct_cuda.cu", "collective/small_cuda.cu", "collective/norm_cuda.cu"
PAD, LAUNCH = "signal/pad_cuda.cuh", "collective/launch_cuda.cuh"
DECODE, PREFILL = "fused/decode_sm90.cu", "fused/prefill_sm90.cu"
# A function that is not inlined is linked from the first object that has it.
EVERY = ("collective/bracket_cuda.cu", DIRECT, NORM, ONE_SHOT, SMALL, TWO_SHOT, DECODE, PREFILL)
REDUCER, TILE = "fused/reducer_sm90.cuh", "fused/prefill_tile_sm90.cuh"
HANDOVER, EPILOGUE = "fused/prefill_handover_sm90.cuh", "fused/prefill_epilogue_sm90.cuh"
EXCHANGE, OWNERS = "fused/prefill_exchange_sm90.cuh", "fused/prefill_owners_sm90.cuh"

MIXED = "CollectivesCuda.Calls*"
CONTRIBUTIONS = "CollectivesCuda.EveryCta*"
COPIES = "CollectivesCuda.ReduceScatter*"
GAVE_UP = "CollectivesCuda.WhatA*"
MISSING = "CollectivesCuda.AMissingRank*"
DISAGREE = "CollectivesCuda.RanksThat*"
WINDOWS = "CollectivesCuda.AWindow*"
FUSED_IN_A_ROW = "FusedCuda.AReplayIs*:FusedCuda.WhatThe*"
FUSED_DECODE = FUSED_IN_A_ROW + ":FusedCuda.Decode*"
FUSED_PREFILL = FUSED_IN_A_ROW + ":FusedCuda.Prefill*"
TWO_RANKS = FUSED_IN_A_ROW + ":FusedCuda.PrefillOfTwo*"
MORE_RANKS = FUSED_IN_A_ROW + ":FusedCuda.PrefillOfMore*"
FUSED_MISSING = "FusedCuda.AMissingRank*"
FUSED_STOPS = "FusedCuda.ARankThatStops*"


@dataclass(frozen=True)
class KernelMutant(Mutant):
    """`file`, `old`, `new` and `tests` as in tools/mutants.py."""

    units: tuple[str, ...] = ()  # sources of csrc/ that are compiled again; the file itself when there is none
    seeds: int | None = None  # more than the tests take, for what few schedules show


MUTANTS = [
    KernelMutant(
        "what a window shows is not looked at",
        "collective/collectives_cuda.cpp",
        "if (found[static_cast<size_t>(s)] == number(s, r)) continue;",
        "continue;",
        WINDOWS,
    ),
    KernelMutant(
        "what proves a window does not say whose it is",
        "collective/collectives_cuda.cpp",
        "static_cast<uint32_t>(writer * 256 + owner)",
        "static_cast<uint32_t>(writer * 256 + 0 * owner)",
        WINDOWS,
    ),
    KernelMutant("one_shot: slots are not re-armed", ONE_SHOT, "re_arm<Max>(s, from, a.part);", "(void)0;", MIXED),
    KernelMutant(
        "one_shot: one parity for all slots",
        ONE_SHOT,
        "s.parity() * a.slot_bytes",
        "0 * a.slot_bytes",
        MIXED,
    ),
    KernelMutant(
        "one_shot: a slot is used again one call early",
        ONE_SHOT,
        "s.parity() * a.slot_bytes",
        "(s.epoch >> 1 & 1) * a.slot_bytes",
        MIXED,
    ),
    KernelMutant("one_shot: no header is sent", LAUNCH, "if (speaks) send_headers(s);", "", DISAGREE, (ONE_SHOT,)),
    KernelMutant(
        "one_shot: the peers' headers are not awaited",
        LAUNCH,
        "if (speaks) await_headers(s);",
        "",
        MIXED + ":" + DISAGREE,
        (ONE_SHOT,),
    ),
    KernelMutant(
        "one_shot: descriptors are not compared",
        PAD,
        "same &= got.x == descriptor_word",
        "same |= got.x == descriptor_word",
        DISAGREE,
        (ONE_SHOT,),
    ),
    KernelMutant(
        "one_shot: a kernel that gives up writes no status",
        PAD,
        "if (atomicCAS(&pad->claimed, 0u, 1u) == 0) {",
        "if (atomicCAS(&pad->claimed, 0u, 1u) > 1u) {",
        MISSING,
        EVERY,
    ),
    KernelMutant(
        "one_shot: what did not come is left as it was",
        ONE_SHOT,
        "store_chunk<Type, Plain>(a.out, chunk, a.count, is_aligned(a.out), all_bits_set());",
        "(void)0;",
        MISSING,
    ),
    KernelMutant(
        "one_shot: a broken group goes on",
        PAD,
        "return {call, last + 1, broken == 0};",
        "return {call, last + 1, broken < 2};",
        "CollectivesCuda.AReplayAfter*",
        (ONE_SHOT,),
    ),
    KernelMutant(
        "a broken group shuts one gate alone",
        PAD,
        "for (int i = 0; i < kGates; i++) store_sys",
        "for (int i = 0; i < 1; i++) store_sys",
        MISSING,
        EVERY,
    ),
    KernelMutant(
        "two_shot: slots of partials are not re-armed", TWO_SHOT, "re_arm<Max>(s, partials, i);", "(void)0;", MIXED
    ),
    KernelMutant(
        "two_shot: slots of results are not re-armed", TWO_SHOT, "store_sys(slot, all_bits_set());", "(void)0;", MIXED
    ),
    KernelMutant(
        "two_shot: one parity for all slots",
        TWO_SHOT,
        "const size_t begin = a.slots + s.parity() * a.slot_bytes;",
        "const size_t begin = a.slots;",
        MIXED,
        seeds=60,
    ),
    KernelMutant("reduce_scatter: slots are not re-armed", TWO_SHOT, "re_arm<Max>(s, slots, i);", "(void)0;", COPIES),
    KernelMutant(
        "direct: contributions are summed before they have come",
        DIRECT,
        "await_flag(s, lane, &PadCuda::arrived)",
        "true",
        CONTRIBUTIONS,
    ),
    KernelMutant(
        "direct: arrived flags are sent before the contributions",
        DIRECT,
        "  if (!pushes) fence_before_header();\n",
        "  if (!pushes) fence_before_header();\n"
        "  if (!works && pushes && s.alive) {\n"
        "    const int r = static_cast<int>(threadIdx.x & (kWarp - 1));\n"
        "    if (r < world && r != me) raise_flag(s, r, &PadCuda::arrived);\n"
        "  }\n",
        CONTRIBUTIONS,
    ),
    KernelMutant(
        "direct: epochs advance before the whole CTA has read its own",
        DIRECT,
        "bool fine = __syncthreads_and(s.alive) != 0;  // one answer for the CTA: `broken` may rise in between\n",
        "bool fine = s.alive;\n",
        CONTRIBUTIONS,
    ),
    KernelMutant(
        "direct: a CTA that gives up fills what is of others",
        DIRECT,
        "if (works && !fine) shares.fill();",
        "if (works && !fine) fill<Type>(a.out, a.count);",
        GAVE_UP,
    ),
    KernelMutant(
        "direct: a copy that gives up leaves what others would have filled",
        DIRECT,
        "for (size_t i = threadIdx.x; i < bytes; i += blockDim.x - kWarp) to[i]",
        "for (size_t i = workers().first; i < bytes; i += workers().stride) to[i]",
        GAVE_UP,
    ),
    KernelMutant(
        "direct: no done flag is awaited",
        DIRECT,
        "if (fine) fine = finish(s);\n  const std::byte* result",
        "const std::byte* result",
        MIXED,
    ),
    KernelMutant(
        "direct: done flags are sent before the share is written",
        PAD,
        "__syncthreads();  // the release below covers what the whole CTA wrote and read before this\n",
        "",
        MIXED,
        (DIRECT,),
    ),
    KernelMutant(
        "small copies: an older copy counts",
        SMALL,
        "return got.y == s.epoch && got.w == s.epoch;",
        "return got.y != 0 && got.w != 0;",
        COPIES,
    ),
    KernelMutant(
        "small copies: a half counts for the whole",
        SMALL,
        "return got.y == s.epoch && got.w == s.epoch;",
        "return got.y == s.epoch;",
        COPIES,
        seeds=60,
    ),
    KernelMutant(
        "norm: slots are not re-armed",
        NORM,
        "re_arm<Max>(s, slots, slot + chunk);",
        "(void)0;",
        "CollectivesCuda.AllReduceNorm*",
    ),
    KernelMutant(
        "norm: the mean is of one warp's squares",
        NORM,
        "warp < workers / kWarp; warp++",
        "warp < 1; warp++",
        "CollectivesCuda.AllReduceNorm*",
    ),
    KernelMutant(
        "decode: slots are not re-armed",
        REDUCER,
        "store_slot(slot(tile, r, c, place), all_bits_set());",
        "(void)place;",
        FUSED_DECODE,
        (DECODE,),
    ),
    KernelMutant(
        "decode: the last tile is not re-armed",
        REDUCER,
        "store_slot(slot(tile, r, c, place), all_bits_set());",
        "if (tile != a.tiles - 1) store_slot(slot(tile, r, c, place), all_bits_set());",
        FUSED_DECODE,
        (DECODE,),
    ),
    KernelMutant(
        "decode: one parity for all slots",
        "fused/tile_sm90.cuh",
        "s.parity() * a.slot_bytes",
        "0 * a.slot_bytes",
        FUSED_DECODE,
        (DECODE,),
    ),
    KernelMutant(
        "decode: headers are not awaited",
        "fused/decode_sm90.cuh",
        "if (signals) await_headers(s);",
        "(void)signals;",
        "FusedCuda.RanksThat*",
        (DECODE,),
    ),
    KernelMutant(
        "decode, two-shot: slots of results are not re-armed",
        REDUCER,
        "store_slot(result(tile, c), all_bits_set());",
        "(void)0;",
        FUSED_DECODE,
        (DECODE,),
    ),
    KernelMutant(
        "decode, two-shot: results of the last tile are not collected",
        "fused/decode_sm90.cuh",
        "if (reducers.two_shot() && before >= 0) reducers.collect(before);\n  }\n",
        "}\n",
        FUSED_DECODE,
        (DECODE,),
    ),
    KernelMutant(
        "decode: a weight that the kernel before writes is fetched early",
        "fused/decode_sm90.cuh",
        "if (warp == T::kProducer && a.static_weight && elect_one()) producer.fill_weights();",
        "if (warp == T::kProducer && elect_one()) producer.fill_weights();",
        "FusedCuda.WhatThe*",
        (DECODE,),
    ),
    KernelMutant(
        "decode: a stage is released before it has been read",
        "fused/decode_sm90.cuh",
        "      wgmma_wait_all();\n      release(at->stage);\n",
        "      release(at->stage);\n      wgmma_wait_all();\n",
        FUSED_DECODE,
        (DECODE,),
    ),
    KernelMutant(
        "decode: the other half of k is added before it has come",
        "fused/decode_sm90.cuh",
        "barrier_wait_cluster(came, (i >> 1) & 1);",
        "",
        FUSED_DECODE,
        (DECODE,),
    ),
    KernelMutant(
        "decode: the other half of a pair's third tile is added before it has come",
        "fused/decode_sm90.cuh",
        "barrier_wait_cluster(came, (i >> 1) & 1);",
        "barrier_wait_cluster(came, 0);",
        FUSED_DECODE,
        (DECODE,),
    ),
    KernelMutant(
        "decode: a pair's CTAs do not take turns",
        "fused/decode_sm90.cuh",
        "return i & (parts - 1);",
        "return 0 * i;",
        FUSED_DECODE,
        (DECODE,),
    ),
    KernelMutant(
        "decode: the other CTA's barriers are used before they are initialized",
        "fused/decode_sm90.cuh",
        "if (a.parts > 1) cluster_wait();",
        "",
        FUSED_DECODE,
        (DECODE,),
    ),
    KernelMutant(
        "decode: both CTAs of a pair push",
        "fused/decode_sm90.cuh",
        "if (!work.leads(i)) continue;",
        "",
        FUSED_DECODE,
        (DECODE,),
    ),
    KernelMutant(
        "decode: the second CTA of a pair multiplies the first one's columns",
        "fused/decode_sm90.cuh",
        "first = part * half;",
        "first = 0;",
        FUSED_DECODE,
        (DECODE,),
    ),
    KernelMutant(
        "decode: the next tile's first columns are those behind the last tile's",
        "fused/decode_sm90.cuh",
        "    column = work.first * T::kStageColumns;\n    left",
        "    left",
        FUSED_DECODE,
        (DECODE,),
    ),
    KernelMutant(
        "decode: a stage is released while its MMAs run beside the next one's",
        "fused/decode_sm90.cuh",
        "      wgmma_wait_previous();\n      if (before >= 0) release(before);\n",
        "      wgmma_wait_previous();\n      release(at->stage);\n",
        FUSED_DECODE,
        (DECODE,),
    ),
    KernelMutant(
        "decode: half of what a warp waits for counts for all",
        "collective/vector_cuda.cuh",
        "return v.x != kSentinel && v.y != kSentinel && v.z != kSentinel && v.w != kSentinel;",
        "return v.x != kSentinel && v.y != kSentinel;",
        FUSED_DECODE,
        (DECODE,),
    ),
    KernelMutant(
        "prefill: a stage is released while its products may run",
        TILE,
        "    if (before >= 0) release(before);\n    before = at->stage;\n",
        "    release(at->stage);\n",
        FUSED_PREFILL,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill: a CTA leaves while the other one of its cluster arrives at its barriers",
        "fused/prefill_sm90.cuh",
        "  cluster_sync();  // no CTA leaves while the other one still arrives at its barriers\n",
        "",
        FUSED_PREFILL,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill: a copy for the other CTA may come before its barriers are there",
        "fused/prefill_sm90.cuh",
        "  cluster_wait();  // the other CTA's barriers count what is fetched for it\n",
        "",
        FUSED_PREFILL,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill: headers are not awaited",
        "fused/prefill_sm90.cuh",
        "if (s.alive) fine = await_headers(s);",
        "",
        "FusedCuda.RanksThat*",
        (PREFILL,),
    ),
    KernelMutant(
        "prefill: a sum's NaN stays as the instruction made it",
        EPILOGUE,
        "Type::has_nan(v.w)) v = canonical(v);",
        "Type::has_nan(v.w)) (void)v;",
        FUSED_PREFILL,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill: copies are not fenced from stores",
        HANDOVER,
        "  fence_for_copies();\n",
        "",
        FUSED_PREFILL,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill: a warp's part is told before all lanes have stored it",
        HANDOVER,
        "  fence_for_copies();\n  __syncwarp();\n",
        "  fence_for_copies();\n",
        FUSED_PREFILL,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, two ranks: slots are not re-armed",
        EXCHANGE,
        "store_slot(from + end.within(c), all_bits_set());",
        "(void)0;",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, two ranks: a tile's halves lie at one place in the slots",
        EXCHANGE,
        "(2 * static_cast<size_t>(at.index) + half)",
        "(2 * static_cast<size_t>(at.index) + 0 * half)",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, two ranks: both CTAs of a cluster send to one place",
        EXCHANGE,
        "T::kCluster + cta;",
        "T::kCluster + 0 * cta;",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, two ranks: a product of the library's may be the sentinel",
        EPILOGUE,
        "own[c] = sendable<typename T::Type>(product(at, c));",
        "own[c] = product(at, c);",
        TWO_RANKS,
        (PREFILL,),
        seeds=20,
    ),
    KernelMutant(
        "prefill, two ranks: what another call sent is summed",
        EXCHANGE,
        "  return __all_sync(kAllLanes, raised(&h->heard) == Handover::kAgreed) != 0;\n",
        "  return true;\n",
        "FusedCuda.WhatARankSentInAnotherCallIsNotSummed",
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, two ranks: a tile is sent before it is in staging",
        EXCHANGE,
        "      await_math<T>(h, lane, visit + 1);\n",
        "",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, two ranks: a tile goes to staging while the one before is read there",
        EXCHANGE,
        "  wait_raised(&h->freed, visit);\n  stamp(Stamp::may_store, visit);\n",
        "",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, two ranks: staging is given back before storers have summed it",
        EXCHANGE,
        "attend(visit + 1, visit + 1, fine)",
        "attend(visit + 1, 0, fine)",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, two ranks: storers do not wait for what they sum",
        EXCHANGE,
        "        wait_raised(&h->pushed[warp], visit + 1);\n",
        "",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, two ranks: storers sum every other part",
        EXCHANGE,
        "i < halves * kParts; i++",
        "i < halves * kParts; i += 2",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, two ranks: storers sum half of a tile",
        EXCHANGE,
        "is_last ? halves_of_storers(a) : 2;",
        "is_last ? halves_of_storers(a) : 1;",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, two ranks: columns outside of y are stored",
        EXCHANGE,
        "if (row < a.m && column < a.n) *",
        "if (row < a.m) *",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, two ranks: what did not come is summed",
        EXCHANGE,
        "v = fine ? end.rows(v) : all_bits_set();",
        "v = end.rows(v);",
        FUSED_MISSING,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, two ranks: those who wait for the other rank are not told to give up",
        EXCHANGE,
        "    if (lane == 0) raise(&h->abandoned, 1);\n",
        "",
        FUSED_STOPS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, two ranks: nobody keeps the time of the last tile's sums",
        EXCHANGE,
        "    fine = attend(last + 3, last + 1, fine);\n",
        "",
        FUSED_STOPS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, two ranks: the time of storers' last sums alone is kept",
        EXCHANGE,
        "attend(last + 3, last + 1, fine)",
        "attend(last + 2, last + 1, fine)",
        FUSED_STOPS,
        (PREFILL,),
        seeds=12,
    ),
    KernelMutant(
        "prefill, last tile: a first half without steps of its own is summed by nobody",
        EXCHANGE,
        "for (int half = halves_of_storers(a); half < 2; half++)",
        "for (int half = 1; half < 2; half++)",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, last tile: a half goes to staging while the tile before is read there",
        EXCHANGE,
        "    if (half == 0) wait_raised(&h->freed, visit);\n",
        "",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, last tile: a half is sent before it is in staging",
        EXCHANGE,
        "      await_math<T>(h, lane, last + 1 + half);\n",
        "",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, last tile: the halves' stages are filled while a whole tile's are read",
        TILE,
        "        barrier_wait(&ring.empty[before.stage], before.parity);\n        before.next(ring.stages);\n",
        "",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, last tile: the first ring's stages are thought to be read in the order of memory",
        TILE,
        "const bool in_order = before.stage == 0;",
        "const bool in_order = true;",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, last tile: a half's stage is filled when half of its memory is free",
        TILE,
        "(over + T::kStageBytes - 1) / T::kStageBytes",
        "over / T::kStageBytes",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, last tile: both CTAs of a cluster fetch the weight's even steps",
        TILE,
        "if (i % T::kCluster == schedule.cta) {",
        "if (i % T::kCluster == 0) {",
        TWO_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, more ranks: a partial is sent before it is in staging",
        OWNERS,
        "      await_math<T>(h, lane, visit + 1);\n",
        "",
        MORE_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, more ranks: a partial goes to staging while the tile before is read there",
        OWNERS,
        "    wait_raised(&h->freed, visit);\n",
        "",
        MORE_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, more ranks: staging is given back before copies have read it",
        OWNERS,
        "      copies_read();\n",
        "",
        MORE_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, more ranks: staging is given back before storers have read it",
        OWNERS,
        "      if (own && lane < T::kStorers) wait_raised_alone(&h->stored[lane], visit + 1);\n",
        "",
        MORE_RANKS,
        (PREFILL,),
        seeds=60,
    ),
    KernelMutant(
        "prefill, more ranks: flags of partials are not re-armed",
        OWNERS,
        "if (waits) store_sys(flag, kSentinel);",
        "(void)0;",
        MORE_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, more ranks: a flag is raised before its partial has arrived",
        OWNERS,
        "        copies_arrived();\n        __threadfence_system();\n",
        "",
        MORE_RANKS,
        (PREFILL,),
        seeds=8,
    ),
    KernelMutant(
        "prefill, more ranks: partials are summed before they have come",
        OWNERS,
        "    barrier_wait(&h->arrived, own & 1);\n",
        "",
        MORE_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, more ranks: storers do not wait for the sums",
        OWNERS,
        "      wait_raised(&h->pushed[warp], visit + 1);\n",
        "",
        MORE_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, more ranks: sums go to the peers, and not to this rank's y",
        OWNERS,
        "      store(static_cast<std::byte*>(a.y));\n",
        "",
        MORE_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, more ranks: a peer gets no sums",
        OWNERS,
        "      for (int i = 0; i < peers; i++) {\n        const int piece",
        "      for (int i = 1; i < peers; i++) {\n        const int piece",
        MORE_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, more ranks: no closing barrier",
        OWNERS,
        "return fine && close();",
        "return fine;",
        MORE_RANKS,
        (PREFILL,),
    ),
    KernelMutant(
        "prefill, more ranks: a sum of what has not come is sent",
        OWNERS,
        "      if (__any_sync(kAllLanes, raised(&h->abandoned) != 0)) continue;\n",
        "",
        FUSED_STOPS,
        (PREFILL,),
        seeds=16,
    ),
    KernelMutant(
        "prefill, more ranks: tiles that did not come are left as they were",
        "fused/prefill_sm90.cuh",
        "if (__syncthreads_and(fine) == 0) fill_tiles(a, schedule);",
        "(void)fine;",
        FUSED_MISSING,
        (PREFILL,),
    ),
    KernelMutant(
        "fused: lanes of a warp disagree on whether the group is broken",
        "fused/ring_sm90.cuh",
        "return {s.call, s.epoch, __all_sync(kAllLanes, s.alive) != 0};",
        "return s;",
        "FusedCuda.RanksThat*",
        (DECODE, PREFILL),
    ),
    KernelMutant(
        "reduce_scatter: what lies behind the first rounds of the grid is not sent",
        "collective/two_shot_cuda.cu",
        "    if (sent < most) push(sent);\n",
        "",
        "CollectivesCuda.ReduceScatter*",
        (),
    ),
]


def try_mutant(work: Path, mutant: KernelMutant, limit: float) -> tuple[bool, str]:
    """Build and run. True when the tests noticed, and how. The copy is then as it was."""
    objects = work / "build/cpp/plain"
    units = [objects / "emulated" / f"{unit}.o" for unit in mutant.units or (mutant.file,)]
    target = mutate(work / "csrc", mutant)
    try:
        kept = [path for path in objects.rglob("*.o") if path not in units]
        old = [argument for path in kept for argument in ("-o", f"../../{path.relative_to(work)}")]
        quiet = f"CXX={os.environ.get('CXX', 'g++')} -w"  # a mistake may leave a parameter unused
        build_program(work, mutant, quiet, *old, "../../build/cpp/plain/kernel_tests")
        # Many seeds take long without waiting: two of these programs run at a time.
        return run_tests(objects / "kernel_tests", mutant.tests, max(limit, 10.0 * (mutant.seeds or 0)), mutant.seeds)
    finally:
        shutil.copy2(ROOT / "csrc" / mutant.file, target)
        for unit in units:
            shutil.copy2(ROOT / unit.relative_to(work), unit)


def main() -> int:
    parser = command_line(__doc__, limit=60.0)
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (default 2)")
    args = parser.parse_args()
    chosen = with_name(MUTANTS, args.only)
    if args.list:
        for mutant in chosen:
            print(f"{mutant.name}  (csrc/{mutant.file}; {mutant.tests})")
        return 0
    if not (ROOT / "build/cpp/plain/kernel_tests").is_file():
        raise SystemExit("mutants_kernels: build the tests first: make -C tests/cpp kernels")

    def attempt_every(first: int) -> list[str]:
        survivors = []
        with tempfile.TemporaryDirectory(prefix="sglang_symm-mutants-") as folder:
            copy_tree(Path(folder))
            for number in range(first, len(chosen), args.jobs):
                start = time.monotonic()
                result = try_mutant(Path(folder), chosen[number], args.limit)
                report(number + 1, len(chosen), chosen[number], result, time.monotonic() - start)
                if not result[0]:
                    survivors.append(chosen[number].name)
        return survivors

    with ThreadPoolExecutor(args.jobs) as pool:
        survivors = [name for part in pool.map(attempt_every, range(args.jobs)) for name in part]
    print(f"{len(chosen) - len(survivors)} passed, {len(survivors)} failed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
