# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Group: an ordered set of ranks that communicate."""

from __future__ import annotations

import atexit
import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from sglang_symm import _library, nccl, tuning
from sglang_symm.distributed.rendezvous import (
    ERROR_PREFIX,
    WRONG_PREFIX,
    Deadline,
    Meeting,
    check_agreement,
    default_store,
    host_identity,
    members_text,
    new_process_group,
    problem_of,
)
from sglang_symm.distributed.settings import ALGORITHMS, GroupSettings, checked_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack

    from sglang_symm.distributed.settings import SettingsArguments

__all__ = ["ALGORITHMS", "PROCESS_GROUP", "SYMM", "Group", "GroupSettings", "Rendezvous"]

SYMM = "symm"
PROCESS_GROUP = "process_group"
MAX_SYMM_WORLD = 16
_GRACE = 5.0  # seconds


def _decide(configs: list[dict[str, Any]]) -> dict[str, Any]:
    """What member 0 makes of all members' configurations. Raises ValueError naming ranks that differ."""
    check_agreement(configs, "the members of a group", ignore=("host", "nccl_found"))
    communicator, note = configs[0]["communicator"], ""
    if communicator == SYMM and len(configs) > MAX_SYMM_WORLD:
        communicator = PROCESS_GROUP
        note = f"its {len(configs)} ranks are more than the {MAX_SYMM_WORLD} that share memory"
    elif communicator == SYMM and len({config["host"] for config in configs}) > 1:
        communicator, note = PROCESS_GROUP, "its ranks are on several hosts"
    return {
        "communicator": communicator,
        "note": note,
        "nccl": nccl.decide(configs) if communicator == SYMM else "0",
    }


# Groups by unique name, from creation to destroy(): an op finds its group by name, so a Group lives on when its
# object is forgotten.
_alive: dict[str, Group] = {}


class Group:
    """An ordered set of ranks that communicate: name, arena, deadlines, health.

    Creating one is collective among its members (others take no part); destroying one is local. Collectives raise
    torch.distributed.DistBackendError when a member died, does not come within the deadline, or calls something else;
    then ``destroy()`` and creating the group again works in the same process. Ranks in arguments are ranks in the
    group.

    Args:
        process_group: the members, and what serves other dtypes and reductions; default: the whole world. A
            one-dimensional DeviceMesh stands for its process group. One that was made elsewhere keeps its own deadline.
        name: begins ``unique_name``; default ``world`` or ``group``.
        device: where its tensors live; default: the mesh's; ``cpu`` if the process group serves it, else the current
            CUDA device.
        communicator: ``symm`` or ``process_group`` (no arena; every op goes through the process group).
        arena_bytes, timeout, first_timeout, algo, pinned, strict, tables, nccl: see GroupSettings; None: environment,
            else default.

    Attributes:
        rank_in_group, world_size, ranks (global ranks), unique_name (what ops take), device, communicator, settings.
        nccl: ``0``; ``1`` or ``window`` when the group owns an NCCL communicator.
        tuning: the table that calls choose their algorithm by (see sglang_symm.tuning).
        symmetric_memory_enabled: whether ``use_symmetric_memory`` of this group does anything.
        device_group, cpu_group: torch ProcessGroups of the same members.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: wrong arguments, members that disagree about them, or a process that is no member.
        torch.distributed.DistBackendError: a member did not come within ``first_timeout`` or failed; the same on all
        members.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        name: str | None = None,
        device: torch.device | str | None = None,
        communicator: str = SYMM,
        symmetric_memory_enabled: bool = True,
        **settings: Unpack[SettingsArguments],
    ) -> None:
        store = default_store()
        # A wrong argument is told to the other members rather than raised here: they would wait for this rank in vain.
        problem: Exception | None = None
        meeting_timeout, config = 600.0, dict[str, Any]()
        pg = cast(dist.ProcessGroup, dist.group.WORLD)
        try:
            pg = _as_process_group(process_group)
        except ValueError as error:
            if cast(Any, process_group) is dist.GroupMember.NON_GROUP_MEMBER:
                raise
            # Nobody knows which members: if the whole world makes the group, it is told; if not, nobody comes.
            problem, meeting_timeout = error, _GRACE
        default_name = "world" if pg is dist.group.WORLD else "group"
        self.ranks: list[int] = dist.get_process_group_ranks(pg)
        self.rank_in_group: int = pg.rank()
        self.world_size: int = pg.size()
        self.device_group: dist.ProcessGroup = pg
        self.cpu_group: dist.ProcessGroup = pg
        self.symmetric_memory_enabled: bool = symmetric_memory_enabled
        self._owned_process_groups: list[dist.ProcessGroup] = []
        self._owner_pid = os.getpid()
        self._destroyed = False
        try:
            if not isinstance(name, str | None):
                raise ValueError(f"sglang_symm: expected name to be a str, got {name!r}")
            self.device: torch.device = _as_device(device_over(process_group, device), pg)
            if communicator not in (SYMM, PROCESS_GROUP):
                raise ValueError(
                    f"sglang_symm: expected communicator {SYMM!r} or {PROCESS_GROUP!r}, got {communicator!r}"
                )
            self.settings = GroupSettings.resolve(self.device, **settings)
            meeting_timeout = self.settings.first_timeout if problem is None else _GRACE
            config = {"device": self.device.type, "communicator": communicator, **asdict(self.settings)}
            self.tuning = _tuning_of(self.device, self.world_size, communicator, self.settings.tables)
            config |= {"tuning": self.tuning.label, "host": host_identity()}
            if communicator == SYMM and self.settings.nccl != "0" and self.world_size > 1:
                config["nccl_found"] = nccl.found(self.device)
        except Exception as error:
            problem = problem or error
        if problem is not None:
            config = problem_of(problem)

        label = f"{name if isinstance(name, str) else default_name}[{members_text(self.ranks)}]"
        meeting = Meeting(store, label, self.rank_in_group, self.world_size, meeting_timeout)
        try:
            decision = meeting.agree(config, _decide)
        except dist.DistBackendError as error:
            raise problem or error from None
        self.communicator: str = decision["communicator"]
        self.nccl: str = decision["nccl"]
        self.unique_name: str = f"{label}#{meeting.generation}"
        if decision["note"] and self.rank_in_group == 0:
            warnings.warn(
                f"sglang_symm: group {self.unique_name} works through its process group: {decision['note']}",
                stacklevel=2,
            )
        if self.nccl == "window" and self.rank_in_group == 0:
            how = nccl.windows(nccl.version_of(config["nccl_found"]["version"]))
            if how.startswith("not"):
                warnings.warn(f"sglang_symm: group {self.unique_name}: NCCL's windows are {how}", stacklevel=2)
        self._create(meeting)
        try:
            if torch.device("cpu") not in pg._device_types:
                self.cpu_group = new_process_group(
                    self.ranks, backend="gloo", timeout=self.settings.timeout, first_timeout=self.settings.first_timeout
                )
                self._owned_process_groups.append(self.cpu_group)
            self._token = torch.zeros(1, device=self.device)
        except BaseException:
            self.destroy()
            raise

    def _create(self, meeting: Meeting) -> None:
        """Make the native group. A failure on one rank is raised on all of them."""
        failure: Exception | None = None
        made = False

        def attempt(step: Any) -> str:
            nonlocal failure
            try:
                return step() or "ok"
            except Exception as error:
                failure = error
                prefix = WRONG_PREFIX if isinstance(error, ValueError) else ERROR_PREFIX
                return prefix + (" ".join(str(error).split("\n\n")[0].split()) or type(error).__name__)

        def listen() -> str:
            nonlocal made
            _library.load()
            native = torch.ops.sglang_symm
            common = (self.unique_name, str(self.device), self.rank_in_group, self.world_size)
            pg_name = self.device_group.group_name
            settings = [*self.settings.native(), f"process_group_on_host={int(self._process_group_on_host())}"]
            if self.communicator == PROCESS_GROUP:
                native._group_create_process_group(*common, pg_name, settings)
                address = "ok"
            else:
                chosen = [*settings, *self.tuning.native(), f"nccl={self.nccl}"]
                address = native._group_listen(*common, self.settings.arena_bytes, pg_name, chosen)
            made = True
            return address

        try:
            addresses = meeting.exchange("address", attempt(listen))
            if self.communicator == SYMM:
                # Connecting has a deadline of its own, after which there is still something to tell.
                meeting.deadline = Deadline(self.settings.first_timeout + _GRACE)
                nccl_id = ""
                if self.nccl != "0":
                    draws = self.rank_in_group == 0
                    nccl_id = meeting.exchange(
                        "nccl", attempt(lambda: torch.ops.sglang_symm._nccl_unique_id() if draws else "")
                    )[0]
                connect = torch.ops.sglang_symm._group_connect
                meeting.exchange("ready", attempt(lambda: connect(self.unique_name, addresses, nccl_id)))
        except BaseException as error:
            if made:
                torch.ops.sglang_symm._group_destroy(self.unique_name)
            if isinstance(error, Exception) and failure is not None:
                raise error from failure
            raise
        _alive[self.unique_name] = self

    @classmethod
    def of_ranks(cls, ranks: Sequence[int], *, backend: str | None = None, **kwargs: Any) -> Group:
        """A group of these global ranks (ascending) with a process group of its own, whose deadline is the group's.

        Collective among ``ranks`` only. ``backend`` as in torch.distributed.new_group, other arguments as in Group.
        """
        pg = new_process_group(
            ranks, backend=backend, timeout=kwargs.get("timeout"), first_timeout=kwargs.get("first_timeout")
        )
        try:
            group = cls(pg, **kwargs)
        except BaseException:
            dist.destroy_process_group(pg)
            raise
        group._owned_process_groups.append(pg)
        return group

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh, dim: str | int | None = None, **kwargs: Any) -> Group:
        """A group along ``dim`` (name or index) of a DeviceMesh: the ranks whose coordinates differ only there.

        Collective among them; ``dim`` may be left out of a one-dimensional mesh. Works through the mesh's process
        group, on the mesh's type of device, and is named after the dimension unless ``device`` and ``name`` are given.
        Other arguments and errors as in Group.
        """
        process_group = mesh_process_group(mesh, dim)
        kwargs["device"] = device_over(mesh, kwargs.get("device"))
        if mesh.mesh_dim_names:
            kwargs.setdefault("name", dim if isinstance(dim, str) else mesh.mesh_dim_names[dim or 0])
        return cls(process_group, **kwargs)

    # Collectives

    def all_reduce(self, x: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """y = x_0 (op) x_1 (op) ... over the ranks; ``x`` any shape, y a new tensor like it.

        Sums of fp32, bf16 and fp16 are accumulated in fp32 in rank order and rounded once: the same bits on all ranks.
        Other dtypes, and ``op`` product, min, max or avg, go through the group's NCCL communicator if it has one
        (``nccl``), else through the process group. Wrong arguments are a
        ValueError before anything is sent.
        """
        self._check_tensor(x, "all_reduce")
        return torch.ops.sglang_symm.all_reduce(x, self.unique_name, op)

    def all_reduce_(self, x: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """``all_reduce`` into ``x``, which is returned."""
        self._check_tensor(x, "all_reduce_")
        torch.ops.sglang_symm.all_reduce_(x, self.unique_name, op)
        return x

    def all_gather(self, x: torch.Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """y = concat(x_0, x_1, ...) along ``dim``. ``sizes[r]`` is rank r's length there; without it all are equal."""
        self._check_tensor(x, "all_gather")
        return torch.ops.sglang_symm.all_gather(x, self.unique_name, dim, sizes)

    def all_gather_into_tensor(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """out = concat(x_0, x_1, ...) as flat memory: ``out`` contiguous, world_size times the elements of ``x``."""
        self._check_flat(whole=out, part=x, out=out, call="all_gather_into_tensor")
        out.view(-1).copy_(self.all_gather(x.reshape(-1)))

    def reduce_scatter(self, x: torch.Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """y = this rank's part along ``dim`` of the sum of x over the ranks.

        ``sizes[r]`` is rank r's length along ``dim``; without it all are equal. The sum is that of ``all_reduce``.
        """
        self._check_tensor(x, "reduce_scatter")
        return torch.ops.sglang_symm.reduce_scatter(x, self.unique_name, dim, sizes)

    def reduce_scatter_tensor(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """out = this rank's part of the sum of x as flat memory: ``x`` has world_size times the elements of ``out``."""
        self._check_flat(whole=x, part=out, out=out, call="reduce_scatter_tensor")
        out.view(-1).copy_(self.reduce_scatter(x.reshape(-1)))

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """x = x of rank ``src`` of the group, in place; returned."""
        self._check_tensor(x, "broadcast")
        self._check_rank(src, "broadcast")
        torch.ops.sglang_symm.broadcast_(x, src, self.unique_name)
        return x

    def broadcast_object(self, obj: Any = None, src: int = 0) -> Any:
        """The picklable object of rank ``src`` of the group, on every rank."""
        self._check_usable("broadcast_object")
        self._check_rank(src, "broadcast_object")
        if self.world_size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=self.ranks[src], group=self.cpu_group, device=torch.device("cpu"))
        return box[0]

    def barrier(self) -> None:
        """Return when every rank has called it; on GPUs the current stream waits instead, not the host."""
        self._check_usable("barrier")
        torch.ops.sglang_symm.barrier(self._token, self.unique_name)

    def rendezvous(self, tensor: torch.Tensor) -> Rendezvous:
        """Peers' views of ``tensor``, which lies in the group's arena on every rank. Collective.

        Raises ValueError on all ranks, naming those whose tensor is outside.
        """
        self._check_tensor(tensor, "rendezvous")
        self._check_symm("rendezvous")
        return Rendezvous(self, tensor, torch.ops.sglang_symm._rendezvous(tensor, self.unique_name))

    # State

    def contains(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory lies in this group's arena."""
        self._check_usable("contains")
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{self._where('contains')}: expected a torch.Tensor, got {tensor!r}")
        return self.communicator == SYMM and torch.ops.sglang_symm._in_arena(tensor, self.unique_name)

    def check(self) -> None:
        """Raise what broke the group, if anything did."""
        self._check_usable("check")
        torch.ops.sglang_symm._group_check(self.unique_name)

    def info(self) -> dict[str, Any]:
        """Name, device, settings, health, memory, and what was called: ``calls_by_algorithm``; of these ``fused_calls``
        with a GEMM in the kernel, ``normed_calls`` with a norm; ``outputs_inside``, ``outputs_outside`` of the arena.
        """
        self._check_usable("info")
        return json.loads(torch.ops.sglang_symm._group_info(self.unique_name))

    def memory_stats(self) -> dict[str, int]:
        """Bytes of the arena: whole, heap, allocated, peak, free, largest free; and live blocks. Empty without one."""
        return self.info().get("memory") or {}

    @property
    def destroyed(self) -> bool:
        return self._destroyed

    @property
    def capturable(self) -> bool:
        """Whether CUDA graphs can hold its native calls, or NCCL's: not Gloo's, whose collectives run on the host."""
        if self.world_size == 1 or self.communicator == SYMM:
            return True
        return self.device.type == "cuda" and not self._process_group_on_host()

    def _process_group_on_host(self) -> bool:
        """Whether GPU tensors go through Gloo, which copies them to the host."""
        served = torch.device(self.device.type) in self.device_group._device_types
        return self.device.type != "cpu" and served and self.device_group._get_backend(self.device).name() == "gloo"

    def destroy(self) -> None:
        """Leave the group; peers that still wait for this rank raise.

        Local; tensors of its arena stay valid; a second call does nothing. On GPUs it waits for the device first, so it
        raises RuntimeError while the current stream is being captured into a CUDA graph.
        """
        if self._destroyed:
            return
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self._where('destroy()')}: the current stream is being captured into a CUDA graph, and destroy() "
                "waits for the device. End the capture first"
            )
        self._destroyed = True
        _alive.pop(self.unique_name, None)
        if self._owner_pid != os.getpid():
            return  # a forked child shares the sockets: a goodbye from here would be taken for the parent's
        torch.ops.sglang_symm._group_destroy(self.unique_name)
        for pg in self._owned_process_groups:
            if pg in dist.distributed_c10d._world.pg_map:
                dist.destroy_process_group(pg)
        self._owned_process_groups.clear()

    def __repr__(self) -> str:
        state = ", destroyed" if self._destroyed else ""
        place = f"rank {self.rank_in_group} of {self.world_size}"
        return f"Group({self.unique_name!r}, {place}, {self.device}, {self.communicator}{state})"

    def _where(self, call: str) -> str:
        return f"sglang_symm: {call} on group {self.unique_name}"

    def _check_usable(self, call: str) -> None:
        if self._destroyed:
            raise RuntimeError(f"{self._where(call)}, which was destroyed on this rank: create it again")

    def _check_symm(self, call: str) -> None:
        if self.communicator != SYMM:
            raise ValueError(
                f"{self._where(call)}: expected communicator {SYMM!r}, which has an arena; got {self.communicator!r}"
            )

    def _check_tensor(self, x: torch.Tensor, call: str) -> None:
        self._check_usable(call)
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{self._where(call)}: expected a torch.Tensor, got {x!r}")
        if x.device != self.device:
            raise ValueError(f"{self._where(call)}: expected a tensor on {self.device}, got one on {x.device}")

    def _check_rank(self, rank: int, call: str) -> None:
        if not isinstance(rank, int) or not 0 <= rank < self.world_size:
            raise ValueError(f"{self._where(call)}: expected a rank from 0 to {self.world_size - 1}, got {rank!r}")

    def _check_flat(self, whole: torch.Tensor, part: torch.Tensor, out: torch.Tensor, call: str) -> None:
        self._check_tensor(whole, call)
        self._check_tensor(part, call)
        elements = self.world_size * part.numel()
        if whole.numel() != elements:
            raise ValueError(f"{self._where(call)}: expected {elements} elements, got {whole.numel()}")
        if whole.dtype != part.dtype:
            raise ValueError(f"{self._where(call)}: expected tensors of one dtype, got {whole.dtype} and {part.dtype}")
        if not out.is_contiguous():
            raise ValueError(f"{self._where(call)}: expected a contiguous output, got strides {out.stride()}")


class Rendezvous:
    """Peers' views of one tensor, for kernels of one's own.

    Keeps this rank's tensor alive; a peer's tensor lives as long as the peer keeps it.

    Attributes: group, tensor, offsets (of each rank's tensor in its arena, bytes).
    """

    def __init__(self, group: Group, tensor: torch.Tensor, offsets: Sequence[int]) -> None:
        self.group = group
        self.tensor = tensor
        self.offsets = list(offsets)

    def get_buffer(
        self, peer: int, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The memory of rank ``peer``'s tensor as [*shape] of ``dtype``; default: as this rank's tensor.

        A barrier comes between a rank's writing and another's reading. Raises ValueError for more bytes than the
        tensor has (all ranks' have equally many).
        """
        self.group._check_usable("get_buffer")
        self.group._check_rank(peer, "get_buffer")
        size = list(self.tensor.shape if shape is None else shape)
        dtype = dtype or self.tensor.dtype
        asked = math.prod(size) * dtype.itemsize
        if asked > self.tensor.nbytes:
            raise ValueError(
                f"{self.group._where('get_buffer')}: a view {size} of {dtype} takes {asked} bytes, "
                f"the tensor of rank {peer} has {self.tensor.nbytes}"
            )
        view = torch.ops.sglang_symm._peer_view(self.group.unique_name, peer, self.offsets[peer], size, dtype)
        return cast(torch.Tensor, view)

    def barrier(self) -> None:
        """The group's barrier: what was written to the buffers before it is seen by all ranks after it."""
        self.group.barrier()


def _as_process_group(process_group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    if process_group is None:
        return cast(dist.ProcessGroup, dist.group.WORLD)
    if hasattr(process_group, "get_group"):
        return mesh_process_group(cast("DeviceMesh", process_group))
    if not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(f"sglang_symm: expected a ProcessGroup that this process belongs to, got {process_group!r}")
    return process_group


def mesh_process_group(mesh: DeviceMesh, dim: str | int | None = None) -> dist.ProcessGroup:
    """The process group along ``dim`` (name or index) of a mesh; left out: of a one-dimensional one.

    Raises ValueError that names the mesh's dimensions.
    """
    try:
        return mesh.get_group(dim)
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        dims = list(mesh.mesh_dim_names or range(mesh.ndim))
        raise ValueError(f"sglang_symm: expected one of the mesh's dimensions {dims}, got {dim!r}") from error


def device_over(
    members: dist.ProcessGroup | DeviceMesh | None, device: torch.device | str | None
) -> torch.device | str | None:
    """``device``, or where it is left out that of a mesh."""
    return getattr(members, "device_type", None) if device is None else device


def _as_device(device: torch.device | str | None, process_group: dist.ProcessGroup) -> torch.device:
    if device is None:
        device = "cpu" if torch.device("cpu") in process_group._device_types else "cuda"
    device = checked_device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _tuning_of(device: torch.device, world_size: int, communicator: str, tables: str) -> tuning.Tuning:
    if communicator != SYMM:
        return tuning.BUILT_IN
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return tuning.find(name, world_size, tables)


def existing_group(process_group: dist.ProcessGroup, device_type: str) -> Group | None:
    """The first group with symmetric memory over this process group, on such a device, that was not destroyed."""
    alike = (g for g in _alive.values() if g.device_group is process_group and g.communicator == SYMM)
    return next((g for g in alike if g.device.type == device_type), None)


def group_name(group: Group | str) -> str:
    """The name by which ops know the group."""
    return group if isinstance(group, str) else group.unique_name


@atexit.register
def _destroy_all() -> None:
    """Say goodbye at interpreter exit: a clean exit is no death."""
    for group in reversed(list(_alive.values())):
        try:
            group.destroy()
        except Exception as error:  # the interpreter is ending; nobody is left to handle it
            warnings.warn(f"sglang_symm: destroying {group.unique_name} at exit: {error}", stacklevel=1)
