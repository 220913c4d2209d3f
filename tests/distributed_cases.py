"""What tests over ranks share: inputs that every rank can compute for every rank, references, comparison of bits."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from sglang_symm.distributed.rendezvous import Meeting, default_store

NATIVE = [torch.float32, torch.bfloat16, torch.float16]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def inputs(size: int, shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """The tensor of each rank. Magnitudes differ, so that the order of additions shows in the result."""
    tensors = []
    for rank in range(size):
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        if dtype.is_floating_point:
            x = torch.randn(tuple(shape), generator=generator) * 3.0 ** (rank % 5)
            tensors.append(x.to(dtype))
        elif dtype is torch.bool:
            tensors.append(torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.uint8).bool())
        else:
            tensors.append(torch.randint(0, 10, tuple(shape), generator=generator, dtype=dtype))
    return tensors


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
    bits = _BITS[x.element_size()]
    return torch.equal(x.contiguous().view(bits), y.contiguous().view(bits))


def gather_objects(value: Any) -> list[Any]:
    """The value of each rank of the world; through the store, which no failed test can break. Also a barrier."""
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
