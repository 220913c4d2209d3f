"""One rank of the harness: a process that lives through many trials, unless it is the victim of one.

It is forked from a process that has imported torch and has no threads, and does what its director sends:

    ("trial", trial, rank, store prefix, generation)   -> "creating", "ready", then what it was told of the fault
    ("next", ranks, replacing, ...)                    -> whether the next group works
    ("leave",)                                         -> what it still holds
    ("quit",)
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import random
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from belongings import belongings
from trials import ARENA_BYTES, MAX_COUNT, Call, Trial, draw_call, draw_disagreement

import sglang_symm.memory as memory
from sglang_symm.distributed import Group

CALLS_LIMIT = 25.0  # seconds in which the fault must have been noticed
INSIDE = ("_exit(0)", "_exit(1)", "closed socket")  # a process does these to itself, in any of its threads


def sentence_of(error: BaseException) -> tuple[str, str]:
    return type(error).__name__, " ".join(str(error).split("\n\n")[0].split("\nException raised")[0].split())


class Calls:
    """Collectives of small whole numbers, whose results are exact in every dtype and known to every rank."""

    def __init__(self, group: Group, chosen: random.Random) -> None:
        self.group, self.rank, self.size = group, group.rank_in_group, group.world_size
        self.chosen = chosen  # of this rank alone: where its tensors lie
        self.base = torch.arange(MAX_COUNT + 64) % 13

    def x(self, shape: tuple[int, ...], dtype: torch.dtype, rank: int | None = None) -> torch.Tensor:
        """The tensor of a rank."""
        count = 1
        for n in shape:
            count *= n
        value = (self.base[:count] + (self.rank if rank is None else rank)).to(dtype).view(shape)
        if rank is None and self.chosen.random() < 0.5:
            # Full where the trial is about that, or after many rounds.
            with contextlib.suppress(torch.OutOfMemoryError):
                return memory.empty(shape, group=self.group, dtype=dtype).copy_(value)
        return value

    def xs(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
        return [self.x(shape, dtype, rank) for rank in range(self.size)]

    def run(self, call: Call) -> bool:
        """Whether the result is right."""
        group, dtype = self.group, getattr(torch, call.dtype)
        if call.op == "barrier":
            group.barrier()
            return True
        if call.op in ("all_reduce", "all_reduce_"):
            y = getattr(group, call.op)(self.x((call.count,), dtype))
            return torch.equal(y, torch.stack(self.xs((call.count,), dtype)).sum(0))
        if call.op == "max":
            return torch.equal(group.all_reduce(self.x((call.count,), dtype), "max"), self.xs((call.count,), dtype)[-1])
        if call.op == "broadcast":
            x = group.broadcast(self.x((call.count,), dtype), call.src)
            return torch.equal(x, self.x((call.count,), dtype, call.src))
        if call.op == "reduce_scatter":
            each = call.count // self.size
            y = group.reduce_scatter(self.x((each * self.size,), dtype))
            mine = slice(self.rank * each, (self.rank + 1) * each)
            return torch.equal(y, torch.stack(self.xs((each * self.size,), dtype)).sum(0)[mine])
        if call.op == "linear":
            rows, columns = 1 + call.count % 7, 8 + call.count % 50
            weight, bias = self.x((columns, 16), dtype, 1), self.x((columns,), dtype, 2) if call.bias else None
            x = self.x((rows, 16), dtype)
            y = torch.ops.sglang_symm.row_parallel_linear(x, weight, bias, group.unique_name)
            return torch.equal(
                y, torch.nn.functional.linear(torch.stack(self.xs((rows, 16), dtype)).sum(0), weight, bias)
            )
        if call.op == "all_gather" and call.dim == 1:
            shape = (4, call.count // 4 // self.size)
            return torch.equal(group.all_gather(self.x(shape, dtype), 1), torch.cat(self.xs(shape, dtype), 1))
        # Cut unevenly; "cut otherwise" has the same elements in all, and another rank's length.
        sizes = [4 * (call.count // 4 // self.size)] * self.size
        if call.op == "all_gather, cut otherwise":
            sizes[self.rank] += 4
            sizes[self.rank - 1] -= 4
        elif call.dim == 0 and call.count % 2:
            sizes = [n + rank for rank, n in enumerate(sizes)]
        parts = [self.x((n,), dtype, rank) for rank, n in enumerate(sizes)]
        return torch.equal(group.all_gather(self.x((sizes[self.rank],), dtype), 0, sizes), torch.cat(parts))


class Rank:
    def __init__(self, director: Connection, port: int) -> None:
        self.director = director
        self.store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
        self.alive = True

    def serve(self) -> None:
        while True:
            what, *arguments = self.director.recv()
            if what == "quit":
                return
            self.director.send(getattr(self, what)(*arguments))

    # What the director asks for

    def trial(self, trial: Trial, rank: int, prefix: str) -> dict[str, Any]:
        self.enter_world(prefix, rank, trial.world, trial.process_group_timeout)
        if rank not in trial.members:
            self.director.send("creating")
            self.director.send("ready")
            return {"member": False}
        self.director.send("creating")
        try:
            group = self.make(trial.members, trial.world, trial.timeout, trial.first_timeout, trial.strict)
        except Exception as error:
            return {"member": True, "error": sentence_of(error), "time": time.monotonic(), "where": "creation"}
        try:
            return {"member": True, "group": group.unique_name, **self.suffer(group, trial)}
        finally:
            group.destroy()

    def next(self, members: list[int], prefix: str | None, rank: int, world: int, seed: str) -> dict[str, Any]:
        """A group of these ranks, in a new world if there is a new process among them."""
        if prefix is not None:
            self.enter_world(prefix, rank, world)
        group = self.make(members, world, 20.0, 20.0, False)
        calls = Calls(group, random.Random(f"{seed}/{rank}"))
        chosen = random.Random(seed)
        right = all(calls.run(draw_call(chosen, group.world_size)) for _ in range(6))
        group.destroy()
        return {"right": right}

    def leave(self) -> dict[str, int]:
        self.leave_world()
        return belongings()

    # How it does it

    def enter_world(self, prefix: str, rank: int, world: int, timeout: float = 20.0) -> None:
        self.leave_world()
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(prefix, self.store),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )

    def leave_world(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def make(self, members: Any, world: int, timeout: float, first_timeout: float, strict: bool) -> Group:
        settings: dict[str, Any] = {
            "name": "trial",
            "arena_bytes": ARENA_BYTES,
            "timeout": timeout,
            "first_timeout": first_timeout,
            "strict": strict,
        }
        if len(members) == world:
            return Group(**settings)
        return Group.of_ranks(list(members), **settings)

    def suffer(self, group: Group, trial: Trial) -> dict[str, Any]:
        """Call after call until the fault is noticed; what this rank was told."""
        mine = group.rank_in_group == trial.victim
        calls = Calls(group, trial.random(f"places of {group.rank_in_group}"))
        told: dict[str, Any] = {"notes": []}
        number, end = 0, time.monotonic() + CALLS_LIMIT
        try:
            group.barrier()
            self.director.send("ready")
            if mine and trial.threaded and trial.fault in INSIDE:
                threading.Thread(target=self.act_later, args=(trial,), daemon=True).start()
            for number, call in enumerate(self.calls_of(trial, group, mine), 1):
                if mine and number == trial.at_call:
                    self.act(group, calls, trial, told["notes"])
                if group.destroyed:
                    return told
                if not calls.run(call):
                    told["notes"].append(f"wrong result of call {number}, {call}")
                if trial.fault == "full arena, freed" and number == trial.at_call + 5:
                    return told
                if time.monotonic() > end:
                    told["notes"].append(f"no error within {CALLS_LIMIT} s, {number} calls")
                    return told
        except Exception as error:
            told |= {"error": sentence_of(error), "time": time.monotonic(), "call": number}
        if trial.fallback:
            time.sleep(0.1)  # the process group's failure may be heard before the watcher has seen the death
        told["again"] = self.try_again(group)
        return told

    def try_again(self, group: Group) -> dict[str, Any]:
        """A broken group says the same, at once, whatever is called."""
        begin = time.monotonic()
        sentences = []
        for attempt in (lambda: group.all_reduce(torch.ones(3)), group.barrier, group.check):
            try:
                attempt()
                sentences.append("no error")
            except Exception as error:
                sentences.append(sentence_of(error)[1])
        return {"sentences": sentences, "broken": group.info()["broken"], "seconds": time.monotonic() - begin}

    def calls_of(self, trial: Trial, group: Group, mine: bool) -> Iterator[Call]:
        chosen = trial.random("calls")
        number = 0
        while True:
            number += 1
            if number == trial.at_call and trial.fault.startswith("disagree: "):
                what = trial.fault.removeprefix("disagree: ")
                honest, deviant = draw_disagreement(chosen, group.world_size, what)
                yield from deviant if mine else honest
            elif trial.fallback and number % 3 == 0:
                yield Call("all_reduce", "int64", 100)
            else:
                yield draw_call(chosen, group.world_size)

    # The faults that come from inside

    def act_later(self, trial: Trial) -> None:
        time.sleep(trial.delay)
        self.director.send(("fault", time.monotonic()))
        self.fail(trial)

    def act(self, group: Group, calls: Calls, trial: Trial, notes: list[str]) -> None:
        if trial.fault == "late":
            self.director.send(("fault", time.monotonic()))
            time.sleep(trial.timeout + 0.3 + 10 * trial.delay)
        elif trial.strict:
            self.fill(group, calls, notes)
            if trial.fault == "full arena, left":
                self.director.send(("fault", time.monotonic()))
                group.destroy()
        elif trial.fault == "sys.exit" or (trial.fault in INSIDE and not trial.threaded):
            self.director.send(("fault", time.monotonic()))
            self.fail(trial)

    def fail(self, trial: Trial) -> None:
        if trial.fault == "_exit(0)":
            os._exit(0)
        elif trial.fault == "_exit(1)":
            os._exit(1)
        elif trial.fault == "sys.exit":
            leave_like_an_interpreter(5)
        elif trial.fault == "closed socket":
            close_a_peer_socket(trial.random("socket"))

    def fill(self, group: Group, calls: Calls, notes: list[str]) -> None:
        """Fill the arena: the next call is an error on this rank, before anything is sent."""
        held, block = [], ARENA_BYTES // 4
        while block >= 64:
            try:
                held.append(memory.empty(block, group=group, dtype=torch.uint8))
            except torch.OutOfMemoryError as error:
                sentence, block = sentence_of(error)[1], block // 2
        before = group.info()["calls"]
        try:
            group.all_reduce(torch.ones(1000))
            notes.append("a call in a full strict arena raised nothing")
        except torch.OutOfMemoryError as error:
            said = sentence_of(error)[1]
            if f"the arena of group '{group.unique_name}' on rank {group.rank_in_group} is full" not in said:
                notes.append(f"full arena: {said}, before it {sentence}")
        if group.info()["calls"] != before:
            notes.append("a call in a full strict arena was sent")
        held.clear()


def leave_like_an_interpreter(code: int) -> None:
    """What `sys.exit` comes to: exit functions run, the process ends. The frames of the director that this process
    was forked from are not unwound.
    """
    atexit._run_exitfuncs()
    os._exit(code)


def close_a_peer_socket(chosen: random.Random) -> None:
    """Shut down the connection to some other process: closing the descriptor alone would not end it while the
    watcher's poll holds it.
    """
    director = os.getppid()
    candidates = []
    for name in sorted(os.listdir("/proc/self/fd"), key=int):
        if not Path(f"/proc/self/fd/{name}").is_socket():
            continue
        with socket.socket(fileno=os.dup(int(name))) as mine:
            if mine.family != socket.AF_UNIX:
                continue
            pid = int.from_bytes(mine.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder)
            if pid not in (0, director):
                candidates.append(int(name))
    with socket.socket(fileno=os.dup(chosen.choice(candidates))) as victim:
        victim.shutdown(socket.SHUT_RDWR)


def rank_main(director: Connection, port: int) -> None:
    """The life of a rank, in a freshly forked process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the harness ends its ranks
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    code = 1
    try:
        Rank(director, port).serve()
        code = 0
    except (EOFError, BrokenPipeError):
        pass  # the director has gone
    except BaseException as error:
        with contextlib.suppress(OSError):
            director.send({"crash": f"{type(error).__name__}: {error}"})
        raise
    finally:
        if code:
            os._exit(code)
    leave_like_an_interpreter(0)
