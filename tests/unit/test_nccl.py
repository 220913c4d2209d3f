"""The setting `nccl`: what members of a group make of it. Nothing here needs NCCL or a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from sglang_symm import nccl
from sglang_symm.distributed.settings import GroupSettings

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


def members(wish: str, *found: dict[str, Any], algo: str = "auto") -> list[dict[str, Any]]:
    return [{"nccl": wish, "algo": algo, "nccl_found": f} for f in found]


def has(gpu: int, version: int = 22809) -> dict[str, Any]:
    return {"version": version, "gpu": f"GPU-{gpu}"}


NONE = {"error": "NCCL was not found"}
PROBLEMS = [
    ((has(0), NONE), "NCCL was not found (on rank 1 of the group)"),
    ((has(0), has(1), has(1)), "ranks 1 and 2 share a GPU"),
    ((has(0), has(1, 23007)), "expected one NCCL on all ranks, got 2.28.9 on rank 0 and 2.30.7 on rank 1"),
]


@pytest.mark.parametrize(
    ("given", "value"), [(None, "0"), (0, "0"), (True, "1"), ("auto", "auto"), ("window", "window")]
)
def test_the_setting_is_read(given: Any, value: str) -> None:
    assert GroupSettings.resolve(CUDA, nccl=given).nccl == value


def test_the_setting_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_SYMM_NCCL", "auto")
    assert GroupSettings.resolve(CUDA).nccl == "auto"
    assert GroupSettings.resolve(CUDA, nccl="0").nccl == "0"
    monkeypatch.setenv("SGLANG_SYMM_NCCL", "perhaps")
    with pytest.raises(ValueError, match="expected SGLANG_SYMM_NCCL to be one of 0, 1, auto, window, got 'perhaps'"):
        GroupSettings.resolve(CUDA)


def test_members_that_can_have_one_do() -> None:
    fine = has(0), has(1)
    assert [nccl.decide(members(wish, *fine)) for wish in nccl.CHOICES] == ["0", "1", "1", "window"]
    assert nccl.decide(members("1", has(0))) == "0"  # alone there is nobody to talk to


@pytest.mark.parametrize(("found", "sentence"), PROBLEMS)
def test_what_cannot_be_is_an_error_or_done_without(found: Any, sentence: str) -> None:
    assert nccl.decide(members("auto", *found)) == "0"
    for wish, algo in (("1", "auto"), ("window", "auto"), ("auto", "nccl")):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            nccl.decide(members(wish, *found, algo=algo))


def test_the_algorithm_needs_the_communicator() -> None:
    with pytest.raises(ValueError, match="algo='nccl' needs a communicator: expected nccl='1'"):
        nccl.decide([{"nccl": "0", "algo": "nccl"}] * 2)
    assert nccl.decide(members("1", has(0), has(1), algo="nccl")) == "1"


def test_a_group_on_the_cpu_has_none() -> None:
    assert "groups on GPUs, this one is on cpu" in nccl.found(CPU)["error"]


def test_a_library_that_is_not_there_is_a_sentence() -> None:
    code = (
        "import json, torch\n"
        "from sglang_symm import _library, nccl\n"
        "_library.load()\n"
        "try:\n    torch.ops.sglang_symm._nccl_info()\n"
        "except ValueError as error:\n    print(json.dumps(str(error)))\n"
    )
    env = {**os.environ, "SGLANG_SYMM_NCCL_LIBRARY": "/nowhere/libnccl.so.2"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    said = json.loads(run.stdout)
    assert "NCCL was not found: /nowhere/libnccl.so.2" in said or "built without CUDA" in said
    assert "nccl='0'" in said
