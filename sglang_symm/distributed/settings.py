# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""How a group behaves: each setting from an argument, else its environment variable, else the default."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from sglang_symm.nccl import CHOICES as NCCL_CHOICES

if TYPE_CHECKING:
    from typing_extensions import Unpack

ALGORITHMS = ("auto", "one_shot", "two_shot", "two_shot_direct", "process_group", "nccl")
_DEFAULT_CPU_ARENA_BYTES = 64 << 20
_MAX_SECONDS = 1e9  # in nanoseconds it still is a number of 64 bits


class SettingsArguments(TypedDict, total=False):
    """GroupSettings as arguments of whatever makes groups; None is as if left out."""

    arena_bytes: int | None
    timeout: float | None
    first_timeout: float | None
    algo: str | None
    pinned: bool | None
    strict: bool | None
    tables: str | None
    nccl: str | int | None


@dataclass(frozen=True)
class GroupSettings:
    """How a group behaves; equal on all its members.

    Attributes:
        arena_bytes: size of the arena on each rank, 0 for the device's default.
        timeout: seconds that a call waits for its peers. first_timeout: seconds for the creation and the first call.
        algo: the all-reduce algorithm, ``auto`` to choose by size.
        pinned: choose independently of the number of tokens.
        strict: a full arena is torch.OutOfMemoryError instead of ordinary memory with a warning.
        tables: a tuning table, or a folder of them, asked before those kept with the package; ``built-in``: none.
        nccl: an NCCL communicator of the group's own, for other dtypes and reductions, and where a table says so:
            ``0`` none, ``1`` one, ``auto`` one if it can be had, ``window`` one that has the arena as its window.
    """

    arena_bytes: int
    timeout: float
    first_timeout: float
    algo: str
    pinned: bool
    strict: bool
    tables: str = ""
    nccl: str = "0"

    @staticmethod
    def resolve(device: torch.device, **given: Unpack[SettingsArguments]) -> GroupSettings:
        """An argument, else its environment variable (SGLANG_SYMM_ARENA_BYTES, ...), else the default.

        Raises ValueError, naming the argument or variable, for a value that makes no sense.
        """
        unknown = sorted(given.keys() - SettingsArguments.__annotations__.keys())
        if unknown:
            raise ValueError(
                f"sglang_symm: expected settings among {', '.join(SettingsArguments.__annotations__)}, "
                f"got {', '.join(unknown)}"
            )

        def setting(name: str, check: Callable[[str, Any], Any], default: Any) -> Any:
            value = given.get(name)
            if value is not None:
                return check(name, value)
            variable = f"SGLANG_SYMM_{name.upper()}"
            value = _from_text(os.environ.get(variable, ""), check)
            return default if value is None else check(variable, value)

        return GroupSettings(
            arena_bytes=setting("arena_bytes", _bytes, _DEFAULT_CPU_ARENA_BYTES if device.type == "cpu" else 0),
            timeout=setting("timeout", _seconds, 60.0),
            first_timeout=setting("first_timeout", _seconds, 600.0),
            algo=setting("algo", _algorithm, "auto"),
            pinned=setting("pinned", _flag, False),
            strict=setting("strict", _flag, False),
            tables=setting("tables", _path, ""),
            nccl=setting("nccl", _nccl, "0"),
        )

    def native(self) -> list[str]:
        """As the native library reads them."""
        return [
            f"timeout={self.timeout!r}",
            f"first_timeout={self.first_timeout!r}",
            f"algo={self.algo}",
            f"pinned={int(self.pinned)}",
            f"strict={int(self.strict)}",
        ]


def checked_device(device: torch.device | str | int) -> torch.device:
    """``cpu``, or ``cuda`` with or without an index. Raises ValueError for others, and for a GPU that is not there."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"sglang_symm: expected device to be cpu, cuda or cuda:N, got {str(device)!r}")
    if found.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if (found.index or 0) >= count:
        what = (
            f"expected a device below cuda:{count}"
            if count
            else "use device='cpu', or see nvidia-smi and torch.version.cuda"
        )
        raise ValueError(f"sglang_symm: device {found}: torch sees {count} GPU(s) in this process; {what}")
    return found


def sync_token_ids_across_tp() -> bool:
    """The environment variable SYNC_TOKEN_IDS_ACROSS_TP: rank 0 of attention-TP samples for all of it.

    Raises ValueError for a text that is neither yes nor no.
    """
    variable = "SYNC_TOKEN_IDS_ACROSS_TP"
    value = _from_text(os.environ.get(variable, ""), _flag)
    return False if value is None else _flag(variable, value)


_FLAGS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}


def _from_text(text: str, check: Callable[[str, Any], Any]) -> Any:
    """A variable's text as what ``check`` expects; as it is when it cannot be that, None when it is empty."""
    text = text.strip()
    try:
        if check is _bytes:
            return int(text)
        if check is _seconds:
            return float(text)
    except ValueError:
        pass
    if check is _flag:
        return _FLAGS.get(text.lower(), text) if text else None
    return text or None


def _bytes(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= int(value) < 1 << 63:
        raise ValueError(f"sglang_symm: expected {name} to be a whole number of bytes below 2**63, got {value!r}")
    return int(value)


def _seconds(name: str, value: Any) -> float:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 < value <= _MAX_SECONDS:
        raise ValueError(f"sglang_symm: expected {name} to be seconds, more than 0 and at most 1e9, got {value!r}")
    return float(value)


def _algorithm(name: str, value: Any) -> str:
    if value not in ALGORITHMS:
        raise ValueError(f"sglang_symm: expected {name} to be one of {', '.join(ALGORITHMS)}, got {value!r}")
    return str(value)


def _path(name: str, value: Any) -> str:
    if not isinstance(value, str | os.PathLike) or "\0" in os.fspath(value):
        raise ValueError(f"sglang_symm: expected {name} to be a path, got {value!r}")
    return os.fspath(value)


def _nccl(name: str, value: Any) -> str:
    text = str(int(value)) if isinstance(value, bool) else str(value)
    if text not in NCCL_CHOICES:
        raise ValueError(f"sglang_symm: expected {name} to be one of {', '.join(NCCL_CHOICES)}, got {value!r}")
    return text


def _flag(name: str, value: Any) -> bool:
    if value not in (True, False):  # 0 and 1 among them
        raise ValueError(f"sglang_symm: expected {name} to be 0 or 1, got {value!r}")
    return bool(value)
