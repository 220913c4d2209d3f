# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""How the members of a group find each other, through the store of ``torch.distributed``.

Only the members take part, every wait has a deadline, a time-out names who is missing, and a failed attempt leaves
nothing behind that the next attempt could mistake for its own.

    agree      member r:  join/<r> = (token, config)  ------>  member 0 waits for every join, compares them,
               member r:  waits for answer/<token>    <------  draws the generation, answers every token
    exchange   every member writes <generation>/<round>/<r> and reads all others; the last reader deletes the round

A member that gave up and came back has a new token, so an answer to its former attempt cannot reach it, and the
generation is new for every attempt that member 0 answers, so an exchange never reads a value of an earlier one.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from sglang_symm.distributed.settings import GroupSettings

ERROR_PREFIX = "error: "
WRONG_PREFIX = "wrong: "  # an argument that only the native library could judge
_PREFIX = "sglang_symm"
_LAST_WORD_SECONDS = 1.0
_GONE = "gone"  # value of a join whose member gave up


def default_store() -> dist.Store:
    """The store of the default process group. Raises RuntimeError when there is none."""
    if not dist.is_initialized():
        raise RuntimeError(
            "sglang_symm: a group needs torch.distributed: call torch.distributed.init_process_group or "
            "sglang_symm.distributed.initialize_model_parallel first"
        )
    return distributed_c10d._get_default_store()


class Deadline:
    """A point in time, ``seconds`` from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self._end

    @property
    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - time.monotonic())


def _wait_for(store: dist.Store, keys: Sequence[str], deadline: Deadline) -> bool:
    """Poll until all keys exist; False at the deadline.

    Polling rather than Store.wait: a wait inside the store holds the connection that other threads of this process
    share, and does not see Ctrl-C.
    """
    pause = 0.0005
    while not store.check(list(keys)):
        if deadline.passed:
            return False
        time.sleep(min(pause, deadline.left))
        pause = min(2 * pause, 0.02)
    return True


def _missing(who: Sequence[int], deadline: Deadline, what: str) -> dist.DistBackendError:
    names = ", ".join(str(rank) for rank in who)
    return dist.DistBackendError(
        f"sglang_symm: {what}: rank(s) {names} of the group did not arrive within {deadline.seconds:g} s"
    )


class Meeting:
    """The rendezvous of one group's creation.

    Args:
        label: name and members of the group; two different groups must differ in it.
        rank, world_size: of this process in the group.
        timeout: seconds for the whole creation.
    """

    def __init__(self, store: dist.Store, label: str, rank: int, world_size: int, timeout: float) -> None:
        self.label = label
        self.rank = rank
        self.world_size = world_size
        self.generation = 0
        self.deadline = Deadline(timeout)
        self._store = dist.PrefixStore(f"{_PREFIX}/{label}", store)

    def agree(
        self, config: Mapping[str, Any], decide: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """Bring the members together; returns what ``decide`` (run by member 0 over all configurations) made of them.

        Sets ``generation``, a number that no earlier group of this label has. Raises the same ValueError on all
        members when ``decide`` raises one, and DistBackendError naming the members that did not come.
        """
        if self.rank == 0:
            return self._lead(dict(config), decide)
        return self._follow(dict(config))

    def _lead(
        self, config: dict[str, Any], decide: Callable[[list[dict[str, Any]]], dict[str, Any]] | None
    ) -> dict[str, Any]:
        store, others = self._store, list(range(1, self.world_size))
        store.set("join/0", "leader")
        try:
            joins = self._collect_joins(others)
        except dist.DistBackendError as error:
            self._dismiss(others, str(error))
            raise
        finally:
            store.delete_key("join/0")
        for rank in others:
            store.delete_key(f"join/{rank}")
        answer: dict[str, Any] = {"generation": store.add("generation", 1)}
        try:
            if decide is not None:
                answer["decision"] = decide([config, *(join["config"] for join in joins)])
        except Exception as error:  # whatever it is, the others wait for an answer
            answer["error"] = str(error)
        for join in joins:
            store.set(f"answer/{join['token']}", json.dumps(answer))
        return self._take(answer)

    def _collect_joins(self, others: list[int]) -> list[dict[str, Any]]:
        while True:
            self._await_all(self._store, {rank: f"join/{rank}" for rank in others}, "creation")
            texts = [self._store.get(f"join/{rank}").decode() for rank in others]
            gone = [rank for rank, text in zip(others, texts, strict=True) if text == _GONE]
            if not gone:
                return [json.loads(text) for text in texts]
            if self.deadline.passed:
                raise _missing(gone, self.deadline, f"creation of {self.label}")
            time.sleep(0.01)

    def _dismiss(self, others: list[int], sentence: str) -> None:
        """Tell those that did come whom they wait for in vain."""
        for key in (f"join/{rank}" for rank in others):
            if self._store.check([key]) and (text := self._store.get(key).decode()) != _GONE:
                self._store.set(f"answer/{json.loads(text)['token']}", json.dumps({"missing": sentence}))
                self._store.delete_key(key)

    def _follow(self, config: dict[str, Any]) -> dict[str, Any]:
        store, token = self._store, uuid.uuid4().hex
        store.set(f"join/{self.rank}", json.dumps({"token": token, "config": config}))
        try:
            arrived = _wait_for(store, [f"answer/{token}"], self.deadline)
            if not arrived and store.check(["join/0"]):
                # Member 0 gives up about now, and its sentence is the one that all members raise.
                arrived = _wait_for(store, [f"answer/{token}"], Deadline(_LAST_WORD_SECONDS))
        except BaseException:
            store.set(f"join/{self.rank}", _GONE)
            raise
        if not arrived:
            # Not deleted: member 0 may be about to read it, and a read of a key that is not there would block.
            store.set(f"join/{self.rank}", _GONE)
            missing = [rank for rank in range(self.world_size) if not store.check([f"join/{rank}"])]
            # All others may have come and gone within the last poll; then member 0, who answers, is the one to name.
            raise _missing(missing or [0], self.deadline, f"creation of {self.label}")
        answer = json.loads(store.get(f"answer/{token}"))
        store.delete_key(f"answer/{token}")
        if "missing" in answer:
            raise dist.DistBackendError(answer["missing"])
        return self._take(answer)

    def _take(self, answer: dict[str, Any]) -> dict[str, Any]:
        self.generation = answer["generation"]
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer.get("decision", {})

    def _await_all(self, store: dist.Store, keys: Mapping[int, str], what: str) -> None:
        if keys and not _wait_for(store, list(keys.values()), self.deadline):
            missing = [rank for rank, key in keys.items() if not store.check([key])]
            if missing:
                raise _missing(missing, self.deadline, f"{what} of {self.label}")

    def exchange(self, round_name: str, value: str) -> list[str]:
        """All members' values in rank order.

        A value that begins with ``error: `` or ``wrong: `` stands for a failure of its rank: DistBackendError, or
        ValueError if there are only wrong arguments; the same sentence on all members.
        """
        if self.world_size == 1:
            values = [value]
        else:
            store = dist.PrefixStore(f"{self.generation}/{round_name}", self._store)
            keys = {rank: str(rank) for rank in range(self.world_size)}
            store.set(keys[self.rank], value)
            self._await_all(store, keys, f"creation ({round_name})")
            values = [store.get(key).decode() for key in keys.values()]
            if store.add("read", 1) == self.world_size:
                for key in [*keys.values(), "read"]:
                    store.delete_key(key)
        failed = {
            rank: text.partition(": ")[2]
            for rank, text in enumerate(values)
            if text.startswith((ERROR_PREFIX, WRONG_PREFIX))
        }
        if failed:
            wrong = all(values[rank].startswith(WRONG_PREFIX) for rank in failed)
            what = "; ".join(f"rank {rank}: {text}" for rank, text in failed.items())
            kind = ValueError if wrong else dist.DistBackendError
            raise kind(f"sglang_symm: creation of {self.label} failed: {what}")
        return values


def problem_of(error: Exception) -> dict[str, Any]:
    """The configuration of a member that cannot take part, for ``check_agreement`` to tell everyone."""
    sentence = str(error).split("\n\n")[0]
    return {"error": sentence if isinstance(error, ValueError) else f"sglang_symm: {type(error).__name__}: {sentence}"}


def check_agreement(configs: Sequence[Mapping[str, Any]], who: str, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """What a meeting decides: every member can, and all configurations are equal but for the keys of ``ignore``.

    Returns nothing in particular ({}). Raises ValueError with a member's own problem, or with the keys in which one
    differs from member 0.
    """
    for rank, config in enumerate(configs):
        if "error" in config:
            raise ValueError(f"{config['error']} (on rank {rank} of the group)")
    reference = configs[0]
    for rank, config in enumerate(configs):
        keys = [key for key in reference if key not in ignore and config[key] != reference[key]]
        if keys:
            here, there = (", ".join(f"{key}={c[key]!r}" for key in keys) for c in (reference, config))
            raise ValueError(
                f"sglang_symm: {who} disagree about {', '.join(keys)}: rank 0 has {here}, rank {rank} has {there}"
            )
    return {}


def checked_backend(backend: str | None) -> str | None:
    """A backend of torch.distributed, or one for each device. Raises ValueError for an unknown one."""
    names = [part.split(":")[-1].lower() for part in str(backend).split(",")]
    if backend is not None and not set(names) <= set(dist.Backend.backend_list):
        known = ", ".join(name for name in dist.Backend.backend_list if name != "undefined")
        raise ValueError(f"sglang_symm: expected backend to be among {known}, or cpu:gloo,cuda:nccl; got {backend!r}")
    return backend


def host_identity() -> str:
    """Equal for processes that can meet on a Unix socket: same boot, same network namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return os.uname().nodename


def members_text(ranks: Sequence[int]) -> str:
    """Global ranks as a short text: ``0-3`` for a run, else ``0,2,4``."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(str(rank) for rank in ranks)


def new_process_group(
    ranks: Sequence[int],
    *,
    backend: str | None = None,
    timeout: float | None = None,
    first_timeout: float | None = None,
) -> dist.ProcessGroup:
    """A process group made by its members only; collective among ``ranks`` (global, ascending).

    ``torch.distributed.new_group(use_local_synchronization=True)`` does not do: its name hashes how many groups the
    process has, which differs between members that belong to different groups, and a re-created group finds the
    addresses of its predecessor in the store (both seen with torch 2.11: hangs). Here the members agree on a name
    that was never used.

    ``timeout`` and ``first_timeout`` as of GroupSettings.

    Raises DistBackendError when a member does not come within ``first_timeout`` seconds, ValueError on all members for
    a wrong argument of one.
    """
    ranks = list(ranks)
    rank = dist.get_rank()
    if ranks != sorted(set(ranks)) or not ranks or ranks[0] < 0 or ranks[-1] >= dist.get_world_size():
        raise ValueError(f"sglang_symm: expected distinct ascending ranks below {dist.get_world_size()}, got {ranks}")
    if rank not in ranks:
        raise ValueError(f"sglang_symm: rank {rank} is not a member of the process group of ranks {ranks}")
    store = default_store()
    seconds, problem, config = (60.0, 600.0), None, {}
    try:
        settings = GroupSettings.resolve(torch.device("cpu"), timeout=timeout, first_timeout=first_timeout)
        seconds = (settings.timeout, settings.first_timeout)
        config = {"backend": checked_backend(backend)}
    except Exception as error:
        problem, config = error, problem_of(error)
    meeting = Meeting(store, f"process_group[{members_text(ranks)}]", ranks.index(rank), len(ranks), seconds[1])
    try:
        meeting.agree(config, lambda configs: check_agreement(configs, "the members of a process group"))
    except dist.DistBackendError as error:
        raise problem or error from None
    pg, _ = distributed_c10d._new_process_group_helper(
        len(ranks),
        ranks.index(rank),
        ranks,
        dist.Backend(backend or dist.get_backend()) if "," not in (backend or "") else backend,
        store,
        group_name=cast(Any, f"{_PREFIX}/{meeting.label}#{meeting.generation}"),
        timeout=timedelta(seconds=seconds[0]),
        group_desc=_PREFIX,
    )
    distributed_c10d._world.pg_group_ranks[pg] = {global_rank: i for i, global_rank in enumerate(ranks)}
    return pg


def process_group_timeout(process_group: dist.ProcessGroup, device: torch.device) -> float | None:
    """Seconds after which an operation of this process group gives up; None if its backend does not tell."""
    options = getattr(process_group._get_backend(device), "options", None)
    timeout = getattr(options, "_timeout", None)
    return timeout.total_seconds() if timeout is not None else None
