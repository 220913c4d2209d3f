# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""ParallelState: which groups this process is in.

Ranks of one TP group of 6 with attention_data_parallel_size=2, so attention-TP 3; tp_rank = dp_rank * attn_tp_size +
attn_tp_rank:

                 attn_tp_rank   0   1   2
    dp_rank 0                   0   1   2     <- a row is an attention-TP group
    dp_rank 1                   3   4   5
                                ^ a column is an attention-DP group

A world may hold several TP groups, side by side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from sglang_symm.distributed.dp_attention import DpPaddingMode, ForwardBatch
from sglang_symm.distributed.group import PROCESS_GROUP, SYMM, Group, device_over, mesh_process_group
from sglang_symm.distributed.rendezvous import (
    Meeting,
    check_agreement,
    checked_backend,
    default_store,
    members_text,
    problem_of,
    process_group_timeout,
)
from sglang_symm.distributed.settings import GroupSettings, checked_device, sync_token_ids_across_tp

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack

    from sglang_symm.distributed.settings import SettingsArguments


@dataclasses.dataclass(frozen=True)
class Layout:
    """Global ranks of the groups of one process, in rank order: pure arithmetic."""

    world: tuple[int, ...]
    tp: tuple[int, ...]
    attn_tp: tuple[int, ...]
    attn_dp: tuple[int, ...]

    @staticmethod
    def of(rank: int, world_size: int, tp_size: int, attn_dp_size: int) -> Layout:
        """The groups of ``rank``. Raises ValueError, naming the numbers, for sizes that do not divide."""
        if tp_size < 1 or world_size % tp_size:
            raise ValueError(
                f"sglang_symm: tensor_model_parallel_size {tp_size} does not divide the world size {world_size}"
            )
        if attn_dp_size < 1 or tp_size % attn_dp_size:
            raise ValueError(
                f"sglang_symm: attention_data_parallel_size {attn_dp_size} does not divide "
                f"tensor_model_parallel_size {tp_size}"
            )
        attn_tp_size = tp_size // attn_dp_size
        base = rank // tp_size * tp_size
        dp_rank, attn_tp_rank = divmod(rank - base, attn_tp_size)
        row = base + dp_rank * attn_tp_size
        return Layout(
            world=tuple(range(world_size)),
            tp=tuple(range(base, base + tp_size)),
            attn_tp=tuple(range(row, row + attn_tp_size)),
            attn_dp=tuple(range(base + attn_tp_rank, base + tp_size, attn_tp_size)),
        )


def communicators(enable_symm_mem: bool) -> dict[str, str]:
    """The communicator of each role: TP always symmetric; attention-TP if token ids are synchronised over it or
    symmetric memory is on.
    """
    sync_token_ids = sync_token_ids_across_tp()
    return {
        "world": PROCESS_GROUP,
        "tp": SYMM,
        "attn_tp": SYMM if sync_token_ids or enable_symm_mem else PROCESS_GROUP,
        "attn_dp": PROCESS_GROUP,
    }


class ParallelState:
    """The groups of this process, and the state of the forward it is in.

    Args:
        world, tp, attn_tp, attn_dp: groups; those with equal members are one object.
        enable_symm_mem: whether layers use symmetric memory.

    Raises ValueError when the ranks do not fit: tp_rank = attn_dp_rank * attn_tp_size + attn_tp_rank.
    """

    def __init__(self, world: Group, tp: Group, attn_tp: Group, attn_dp: Group, enable_symm_mem: bool = False) -> None:
        self.world = world
        self.tp = tp
        self.attn_tp = attn_tp
        self.attn_dp = attn_dp
        self.enable_symm_mem = enable_symm_mem
        self.forward_batch: ForwardBatch | None = None
        expected = attn_dp.rank_in_group * attn_tp.world_size + attn_tp.rank_in_group
        if tp.world_size != attn_tp.world_size * attn_dp.world_size or tp.rank_in_group != expected:
            sizes = (tp.world_size, attn_tp.world_size, attn_dp.world_size)
            ranks = (tp.rank_in_group, attn_tp.rank_in_group, attn_dp.rank_in_group)
            raise ValueError(
                "sglang_symm: expected tp size = attn_tp size * attn_dp size and "
                "tp rank = attn_dp rank * attn_tp size + attn_tp rank; "
                f"got sizes {sizes} and ranks {ranks} of tp, attn_tp, attn_dp"
            )

    @classmethod
    def from_process_group(
        cls,
        process_group: dist.ProcessGroup,
        attention_data_parallel_size: int = 1,
        enable_symm_mem: bool = False,
        **settings: Any,
    ) -> ParallelState:
        """The state over a tensor-parallel process group that exists already. Collective among its members only.

        ``tp`` works through that process group, and ``world`` is the same object: what else the process belongs to is
        not known here. Attention groups divide it as in initialize_model_parallel. Not set as the process default:
        pass it to the layers as ``parallel_state``.

        Args:
            process_group: its ranks, in order, are the TP ranks.
            settings: device, arena_bytes, timeout, first_timeout, algo, pinned, strict, tables, nccl of every group:
                see Group.

        Raises ValueError for a size that does not divide, else as Group.
        """
        members = dist.get_process_group_ranks(process_group)
        size = len(members)
        layout = Layout.of(process_group.rank(), size, size, attention_data_parallel_size)

        def make(ranks: tuple[int, ...], **kwargs: Any) -> Group:
            if len(ranks) == size:
                return Group(process_group, **kwargs, **settings)
            return Group.of_ranks([members[rank] for rank in ranks], **kwargs, **settings)

        # One object for equal members, so `world` is `tp`, and symmetric.
        return _make_state(layout, make, enable_symm_mem)

    @classmethod
    def from_mesh(
        cls,
        mesh: DeviceMesh,
        dim: str | int | None = None,
        attention_data_parallel_size: int = 1,
        enable_symm_mem: bool = False,
        **settings: Any,
    ) -> ParallelState:
        """``from_process_group`` of the group along ``dim`` of a DeviceMesh (left out: of a one-dimensional one).

        On the mesh's type of device unless ``device`` is given."""
        process_group = mesh_process_group(mesh, dim)
        settings["device"] = device_over(mesh, settings.get("device"))
        return cls.from_process_group(process_group, attention_data_parallel_size, enable_symm_mem, **settings)

    @property
    def enable_dp_attention(self) -> bool:
        return self.attn_dp_size > 1

    @property
    def device(self) -> torch.device:
        return self.tp.device

    @property
    def tp_rank(self) -> int:
        return self.tp.rank_in_group

    @property
    def tp_size(self) -> int:
        return self.tp.world_size

    @property
    def attn_tp_rank(self) -> int:
        return self.attn_tp.rank_in_group

    @property
    def attn_tp_size(self) -> int:
        return self.attn_tp.world_size

    @property
    def attn_dp_rank(self) -> int:
        return self.attn_dp.rank_in_group

    @property
    def attn_dp_size(self) -> int:
        return self.attn_dp.world_size

    @property
    def groups(self) -> list[Group]:
        """The distinct groups, in the order of their creation."""
        return list(dict.fromkeys([self.world, self.tp, self.attn_tp, self.attn_dp]))

    @contextlib.contextmanager
    def forward(self, batch: ForwardBatch) -> Iterator[ForwardBatch]:
        """The padding mode is state of one forward: inside, ``forward_batch`` is ``batch``.

        Raises RuntimeError when nested, ValueError when the batch has another number of DP ranks.
        """
        if self.forward_batch is not None:
            raise RuntimeError("sglang_symm: a forward is under way already: ParallelState.forward does not nest")
        if len(batch.token_counts) != self.attn_dp_size:
            raise ValueError(
                f"sglang_symm: expected token counts of {self.attn_dp_size} DP rank(s), got {list(batch.token_counts)}"
            )
        self.forward_batch = batch
        try:
            yield batch
        finally:
            self.forward_batch = None

    def current_batch(self) -> ForwardBatch:
        """The batch of the forward under way. Raises RuntimeError outside of one."""
        if self.forward_batch is None:
            raise RuntimeError("sglang_symm: needs a forward: wrap the model's call in `with state.forward(batch):`")
        return self.forward_batch

    def is_dp_max_padding(self) -> bool:
        """Whether every DP rank of the forward under way is padded to the longest; False outside of a forward."""
        return self.forward_batch is not None and self.forward_batch.mode is DpPaddingMode.MAX_LEN

    def is_allocation_symmetric(self) -> bool:
        """Whether all TP ranks allocate equal sizes: not when DP ranks hold different numbers of tokens."""
        return not self.enable_dp_attention or self.is_dp_max_padding()

    def exchange_token_counts(self, count: int) -> list[int]:
        """The number of tokens of each DP rank. Collective over TP; the ranks of one DP rank pass equal counts.

        Raises ValueError, the same on all ranks, when they do not.
        """
        counts = self.tp.all_gather(torch.tensor([count], dtype=torch.int64, device=self.device)).tolist()
        if self.device.type != "cpu":
            self.tp.check()  # a kernel that gave up returns, and these would be no counts
        size = self.attn_tp_size
        rows = [counts[first : first + size] for first in range(0, len(counts), size)]
        for dp_rank, row in enumerate(rows):
            if len(set(row)) != 1:
                raise ValueError(
                    f"sglang_symm: the attention-TP ranks of DP rank {dp_rank} hold different numbers of tokens: {row}"
                )
        return [int(row[0]) for row in rows]

    def use_symmetric_memory(self, group: Group, disabled: bool = False) -> contextlib.AbstractContextManager[None]:
        """``sglang_symm.memory.use_symmetric_memory``, and nothing at all unless ``enable_symm_mem``."""
        return _memory_context(group, disabled or not self.enable_symm_mem)

    def destroy(self) -> None:
        """Destroy the groups, those made last first. Local; again does nothing."""
        for group in reversed(self.groups):
            group.destroy()

    def __repr__(self) -> str:
        return (
            f"ParallelState(tp {self.tp_rank} of {self.tp_size}, attn_tp {self.attn_tp_rank} of {self.attn_tp_size}, "
            f"attn_dp {self.attn_dp_rank} of {self.attn_dp_size}, enable_symm_mem={self.enable_symm_mem})"
        )


def _memory_context(group: Group, disabled: bool) -> contextlib.AbstractContextManager[None]:
    from sglang_symm.memory import use_symmetric_memory  # memory.py imports this module

    return use_symmetric_memory(group, disabled)


# The process default, for users of the functions below; everything in this package also takes a ParallelState
# explicitly.
_default: ParallelState | None = None


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    attention_data_parallel_size: int = 1,
    enable_symm_mem: bool = False,
    *,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    **settings: Unpack[SettingsArguments],
) -> ParallelState:
    """Make the groups of this process and set them as the process default. Collective over the world.

    Calls torch.distributed.init_process_group (environment as torchrun sets it) if that has not been done. The TP
    group is always symmetric; the attention-TP group is when ``enable_symm_mem`` or the environment variable
    SYNC_TOKEN_IDS_ACROSS_TP is 1.

    Args:
        tensor_model_parallel_size: divides the world size; consecutive ranks form a TP group.
        attention_data_parallel_size: divides it; attention-TP is the quotient.
        device: ``cpu``, or ``cuda`` for the GPU of LOCAL_RANK. backend: of the process groups; default ``gloo`` on
            CPU and where tools/mps_rig.py lets ranks share a GPU (NCCL refuses them), both else.
        settings: arena_bytes, timeout, first_timeout, algo, pinned, strict, tables, nccl of every group; see
            Group.

    Raises:
        RuntimeError: there is a default already. ValueError: sizes that do not divide; a wrong argument or environment
        variable of any rank, or ranks that disagree about the arguments, on all ranks.
        torch.distributed.DistBackendError: a rank did not come within ``first_timeout``.
    """
    global _default
    if _default is not None:
        raise RuntimeError("sglang_symm: model parallel groups exist already; call destroy_model_parallel() first")
    problem: Exception | None = None
    seconds, config = (60.0, 600.0), dict[str, Any]()
    try:
        device = _local_device(device)
        resolved = GroupSettings.resolve(device, **settings)
        seconds = (resolved.timeout, resolved.first_timeout)
        backend = checked_backend(backend) or _default_backend(device)
        config = {
            "tensor_model_parallel_size": _whole("tensor_model_parallel_size", tensor_model_parallel_size),
            "attention_data_parallel_size": _whole("attention_data_parallel_size", attention_data_parallel_size),
            "enable_symm_mem": bool(enable_symm_mem),
            "device": device.type,
            "backend": backend,
            "SYNC_TOKEN_IDS_ACROSS_TP": sync_token_ids_across_tp(),
        }
    except Exception as error:  # the other ranks must hear of it, whatever it is
        problem, config = error, problem_of(error)
    if not dist.is_initialized():
        dist.init_process_group("gloo" if problem else backend, timeout=timedelta(seconds=seconds[0]))
    rank, size = dist.get_rank(), dist.get_world_size()
    meeting = Meeting(
        default_store(), f"initialize_model_parallel[{members_text(range(size))}]", rank, size, seconds[1]
    )
    try:
        meeting.agree(config, lambda configs: check_agreement(configs, "the ranks of initialize_model_parallel"))
    except dist.DistBackendError as error:
        raise problem or error from None
    layout = Layout.of(rank, size, tensor_model_parallel_size, attention_data_parallel_size)

    def make(ranks: tuple[int, ...], **kwargs: Any) -> Group:
        return _make_group(ranks, cast(str, backend), device=device, **kwargs, **dataclasses.asdict(resolved))

    _default = _make_state(layout, make, enable_symm_mem)
    return _default


def _make_state(layout: Layout, make: Callable[..., Group], enable_symm_mem: bool) -> ParallelState:
    """The state of a layout, whose groups ``make(ranks, name=..., communicator=..., ...)`` makes: one for each set of
    ranks, symmetric if one of its roles is. When one fails, those made before it are destroyed.
    """
    wanted = communicators(enable_symm_mem)
    roles = {role: tuple(getattr(layout, role)) for role in ("world", "tp", "attn_tp", "attn_dp")}
    made: dict[tuple[int, ...], Group] = {}
    try:
        for role, ranks in roles.items():
            if ranks in made:
                continue
            symmetric = any(wanted[other] == SYMM for other, members in roles.items() if members == ranks)
            made[ranks] = make(
                ranks,
                name=role,
                communicator=SYMM if symmetric else PROCESS_GROUP,
                symmetric_memory_enabled=enable_symm_mem,
            )
    except BaseException:
        for group in reversed(made.values()):
            group.destroy()
        raise
    return ParallelState(**{role: made[ranks] for role, ranks in roles.items()}, enable_symm_mem=enable_symm_mem)


def _make_group(ranks: Sequence[int], backend: str, **kwargs: Any) -> Group:
    """A Group whose process group has the group's deadline: the world's own if it fits, else a new one."""
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    device = torch.device(kwargs["device"].type)
    covers_world = len(ranks) == dist.get_world_size() and device in world._device_types
    if covers_world and process_group_timeout(world, device) == kwargs["timeout"]:
        return Group(world, **kwargs)
    return Group.of_ranks(ranks, backend=backend, **kwargs)


def _local_device(device: torch.device | str) -> torch.device:
    device = checked_device(device)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def _default_backend(device: torch.device) -> str:
    # tools/mps_rig.py sets both. A launcher may show each rank its own GPU alone, so their number does not tell.
    shares = (
        "SGLANG_SYMM_SMS" in os.environ and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count()
    )
    return "gloo" if device.type == "cpu" or shares else "cpu:gloo,cuda:nccl"


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"sglang_symm: expected {name} to be a whole number, got {value!r}")
    return value


def destroy_model_parallel() -> None:
    """Destroy the groups of the process default, if there is one. Local. torch.distributed stays initialised."""
    global _default
    state, _default = _default, None
    if state is not None:
        state.destroy()


def get_parallel_state() -> ParallelState:
    """The process default. Raises RuntimeError when there is none."""
    if _default is None:
        raise RuntimeError(
            "sglang_symm: no model parallel groups: call sglang_symm.distributed.initialize_model_parallel first"
        )
    return _default


def model_parallel_is_initialized() -> bool:
    """Whether there is a process default."""
    return _default is not None


def get_tp_group() -> Group:
    """The tensor-parallel group of the process default."""
    return get_parallel_state().tp


def get_attention_tp_group() -> Group:
    """The attention tensor-parallel group of the process default."""
    return get_parallel_state().attn_tp


def is_allocation_symmetric() -> bool:
    """``ParallelState.is_allocation_symmetric`` of the process default."""
    return get_parallel_state().is_allocation_symmetric()


def use_symmetric_memory(group: Group, disabled: bool = False) -> contextlib.AbstractContextManager[None]:
    """``ParallelState.use_symmetric_memory`` of the process default."""
    return get_parallel_state().use_symmetric_memory(group, disabled)


@contextlib.contextmanager
def graph_capture(state: ParallelState | None = None) -> Iterator[torch.cuda.Stream | None]:
    """A context for capturing CUDA graphs: a side stream that waits for the current one. On CPU it does nothing and
    gives None.
    """
    device = (state or get_parallel_state()).device
    if device.type == "cpu":
        yield None
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream(device).wait_stream(stream)
