# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""The NCCL communicator that a group may own: whether its members can have one, and when its windows are used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import _library

if TYPE_CHECKING:  # `env` uses this module, and works without torch
    import torch

# What the setting `nccl` may be: none; one; one if it can be had; one whose window is the arena.
CHOICES = ("0", "1", "auto", "window")
WINDOWS_SINCE = (2, 27, 0)
# NCCL's symmetric kernels of these versions miss a sync with programmatic launches: silent corruption was reported.
WINDOWS_UNSAFE = ((2, 28, 9), (2, 30, 6))


def version_of(code: int) -> tuple[int, int, int]:
    """NCCL's version from its number: 22809 is 2.28.9."""
    return code // 10000, code // 100 % 100, code % 100


def windows(version: tuple[int, int, int]) -> str:
    """When the windows of an NCCL are used, and why not otherwise.

    In every version that has been read (2.28.9, 2.30.7) the symmetric kernels that a window brings look at no abort
    flag, so one that waits for a dead peer ends with its process only."""
    if version < WINDOWS_SINCE:
        return "not used: NCCL has them since 2.27"
    low, high = WINDOWS_UNSAFE
    if low <= version <= high:
        return (
            "not used unless asked for (nccl='window'): the symmetric kernels of NCCL 2.28.9 to 2.30.6 miss a sync "
            "with programmatic launches, silent corruption was reported; nor can they be aborted"
        )
    return "used when asked for (nccl='window'): NCCL's symmetric kernels cannot be aborted"


def found(device: torch.device) -> dict[str, Any]:
    """What this rank brings to a communicator: NCCL's version and its GPU, or an error."""
    if device.type != "cuda":
        return {"error": f"an NCCL communicator is for groups on GPUs, this one is on {device.type}"}
    import torch

    try:
        _library.load()
        info = json.loads(torch.ops.sglang_symm._nccl_info())
    except (ValueError, ImportError) as error:
        return {"error": str(error).split("\n\n")[0]}
    return {"version": info["version"], "gpu": str(torch.cuda.get_device_properties(device).uuid)}


def decide(configs: Sequence[Mapping[str, Any]]) -> str:
    """What becomes of the setting ``nccl``, equal on all members: ``0``, ``1`` or ``window``.

    ``configs``: each member's, with ``nccl``, ``algo`` and (unless it is 0) ``nccl_found``. Raises ValueError when a
    communicator was asked for and cannot be; ``auto`` does without then.
    """
    wish, algo = configs[0]["nccl"], configs[0]["algo"]
    if wish == "0" and algo == "nccl":
        raise ValueError(
            "sglang_symm: algo='nccl' needs a communicator: expected nccl='1' (SGLANG_SYMM_NCCL=1), got '0'"
        )
    if wish == "0" or len(configs) == 1:
        return "0"
    problem = _problem([config["nccl_found"] for config in configs])
    if not problem:
        return "window" if wish == "window" else "1"
    if wish == "auto" and algo != "nccl":
        return "0"
    raise ValueError(f"sglang_symm: nccl={wish!r}: {problem}")


def _problem(members: Sequence[Mapping[str, Any]]) -> str:
    for rank, member in enumerate(members):
        if "error" in member:
            return f"{member['error']} (on rank {rank} of the group)"
        if member["version"] != members[0]["version"]:
            here, there = (".".join(map(str, version_of(m["version"]))) for m in (members[0], member))
            return f"expected one NCCL on all ranks, got {here} on rank 0 and {there} on rank {rank}"
        first = next(r for r, other in enumerate(members) if other["gpu"] == member["gpu"])
        if first != rank:
            return f"ranks {first} and {rank} share a GPU, which NCCL does not do"
    return ""
