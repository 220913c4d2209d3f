# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Weights from a Hugging Face folder of safetensors files: each rank reads only the bytes of its shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sglang_symm.layers.sharding import WeightError, load_shard
from sglang_symm.models.config import read_json

__all__ = ["Checkpoint", "WeightError", "load_weights"]

# In old checkpoints, computed and not learned.
_COMPUTED = ("rotary_emb.inv_freq",)


class _Slice:
    """A tensor in a safetensors file; indexing reads that rectangle alone."""

    def __init__(self, lazy: Any) -> None:
        self._lazy = lazy
        self.shape = tuple(lazy.get_shape())
        self.dtype: str = lazy.get_dtype()  # as safetensors calls them: F32, BF16, I64, ...

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        return self._lazy[index]


class Checkpoint:
    """The tensors of a folder: one `*.safetensors`, or several with `model.safetensors.index.json`.

    Raises FileNotFoundError when the folder, its weights or a file named by its index are missing, WeightError that
    names a file which cannot be read, ImportError without safetensors."""

    def __init__(self, folder: str | Path) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ImportError("reading weights needs safetensors: pip install 'sglang-symm[models]'") from error
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise WeightError(f"expected {index} to hold a weight_map of file names")
            files = sorted(set(weight_map.values()))
        else:
            files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"expected weights in *.safetensors files, found none in {self.folder}")
        absent = [name for name in files if not (self.folder / name).is_file()]
        if absent:
            raise FileNotFoundError(
                f"{index.name} in {self.folder} names files that are not there: {', '.join(absent)}"
            )
        # Mapped, not read: an open file costs address space only.
        self._files = []
        for name in files:
            try:
                self._files.append(safe_open(self.folder / name, framework="pt"))
            except SafetensorError as error:
                raise WeightError(f"{self.folder / name} is no whole safetensors file: {error}") from error
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118  (it is no dict)

    def names(self) -> set[str]:
        return set(self._file_of)

    def __getitem__(self, name: str) -> _Slice:
        return _Slice(self._file_of[name].get_slice(name))


def checkpoint_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, Any]]:
    """{name in a checkpoint: (parameter, part)} for all that `model` needs.

    `model.packed` tells which parameters hold several of the checkpoint's tensors. A parameter with two owners counts
    once."""

    def sources(name: str) -> Iterator[tuple[str, Any]]:
        for ours, parts in getattr(model, "packed", {}).items():
            if f".{ours}." in f".{name}":
                yield from ((name.replace(ours, theirs), part) for theirs, part in parts.items())
                return
        yield name, None

    return {source: (parameter, part) for name, parameter in model.named_parameters() for source, part in sources(name)}


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path, progress: bool = False) -> None:
    """Fill every parameter of `model` with this rank's shard of the checkpoint in `folder`, converted to its dtype and
    device.

    progress: show a bar on stderr (give it on one rank). Local: no communication.
    Raises WeightError that names missing, unknown and wrongly shaped weights, with expected and found shapes, or of no
    floating dtype, before
    anything is loaded; FileNotFoundError when there are no weights."""
    checkpoint = Checkpoint(folder)
    needed = checkpoint_parameters(model)
    problems = []
    for name in sorted(needed.keys() - checkpoint.names()):
        parameter, part = needed[name]
        problems.append(f"{name}: expected shape {list(parameter.shards[part].shape)}, found no such weight")  # type: ignore[attr-defined]
    # A second owner of a tied parameter (lm_head of tied embeddings) may be in the checkpoint too, as a copy.
    owners = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in sorted(checkpoint.names() - needed.keys() - owners):
        if not name.endswith(_COMPUTED):
            problems.append(f"{name}: expected no such weight, found shape {list(checkpoint[name].shape)}")
    for name in sorted(needed.keys() & checkpoint.names()):
        parameter, part = needed[name]
        expected, found = parameter.shards[part].shape, checkpoint[name].shape  # type: ignore[attr-defined]
        if expected != found:
            problems.append(f"{name}: expected shape {list(expected)}, found {list(found)}")
        if not checkpoint[name].dtype.startswith(("F", "BF")):
            problems.append(f"{name}: expected a floating dtype, found {checkpoint[name].dtype}")
    if problems:
        shown = "\n  ".join(problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise WeightError(f"{len(problems)} weight(s) in {folder} do not fit the model:\n  {shown}{more}")
    for name, (parameter, part) in _with_bar(needed.items(), progress):
        load_shard(parameter, checkpoint[name], part, name)


def _with_bar(items: Any, progress: bool) -> Any:
    if not progress:
        return items
    try:
        from tqdm import tqdm
    except ImportError:  # an extra: loading goes on without a bar
        return items
    return tqdm(items, desc="loading weights", unit="tensor", mininterval=0.2)
