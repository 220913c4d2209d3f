"""What tests over ranks share: inputs that every rank can compute for every rank, references, comparison of bits."""

from __future__ import annotations

import base64
import os
import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from sglang_symm.distributed.rendezvous import Meeting, default_store

# Where the tests of tests/distributed keep their tensors: cpu or cuda.
DEVICE = os.environ.get("SGLANG_SYMM_TEST_DEVICE", "cpu")
# Seconds that the groups of tests/gpu wait.
TIMEOUT = float(os.environ.get("SGLANG_SYMM_TEST_TIMEOUT", "20"))
NATIVE = [torch.float32, torch.bfloat16, torch.float16]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def inputs(size: int, shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """The tensor of each rank, alike on every device. Magnitudes differ, so that the order of additions shows."""
    tensors = []
    for rank in range(size):
        options = {"generator": torch.Generator().manual_seed(1000 * seed + rank), "device": "cpu"}
        if dtype.is_floating_point:
            tensors.append((torch.randn(tuple(shape), **options) * 3.0 ** (rank % 5)).to(dtype))
        elif dtype is torch.bool:
            tensors.append(torch.randint(0, 2, tuple(shape), dtype=torch.uint8, **options).bool())
        else:
            tensors.append(torch.randint(0, 10, tuple(shape), dtype=dtype, **options))
    return [x.to(torch.get_default_device()) for x in tensors]


def seeded(seed: int) -> torch.Generator:
    """A generator for tensors of the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def ordered_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp32 sum in rank order, rounded once: what the native all-reduce promises to the bit."""
    total = tensors[0].float()
    for x in tensors[1:]:
        total = total + x.float()
    return total.to(tensors[0].dtype)


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Equal dtype, shape and bits."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if x.device != y.device:  # what another rank sent
        x, y = x.cpu(), y.cpu()
    bits = _BITS[x.element_size()]
    return torch.equal(x.contiguous().view(bits), y.contiguous().view(bits))


def gather_objects(value: Any) -> list[Any]:
    """The value of each rank of the world; through the store, which no failed test can break. Also a barrier."""
    if isinstance(value, torch.Tensor):
        value = value.cpu()
    meeting = Meeting(default_store(), "test gather", dist.get_rank(), dist.get_world_size(), 60)
    meeting.agree({})
    texts = meeting.exchange("value", base64.b64encode(pickle.dumps(value)).decode())
    return [pickle.loads(base64.b64decode(text)) for text in texts]


def raised(call: Any, *args: Any, **kwargs: Any) -> BaseException | None:
    """What the call raised."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return error
    return None


def failure(group: Any, call: Any, *args: Any) -> BaseException | None:
    """What the call raised. On GPUs it returns before its kernel has run: then what the group says when it has."""
    error = raised(call, *args)
    if error is None and group.device.type == "cuda":
        torch.cuda.synchronize()
        error = raised(group.check)
    return error
