"""The rules of the house: floors, imports, no markers left behind. They run in `make lint`."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest

import sglang_symm
from sglang_symm import _library

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FLOORS = ("base", "memory", "rendezvous", "signal", "collective", "fused", "group", "ops")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
TORCH_HEADER = re.compile(r"(torch|ATen|c10|caffe2)/")


def cxx_sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))


def broken_floor_rules(csrc: Path) -> list[str]:
    """Includes that point up, lead nowhere, or bring torch below ops/."""
    broken = []
    for source in cxx_sources(csrc):
        name = source.relative_to(csrc).as_posix()
        floor = name.split("/")[0]
        if floor not in FLOORS:
            broken.append(f"{name}: lies on no floor; expected one of {', '.join(FLOORS)}")
            continue
        for bracket, header in INCLUDE.findall(source.read_text()):
            if TORCH_HEADER.match(header) and floor != "ops":
                broken.append(f"{name}: includes {header}; only ops/ may include torch")
            if bracket == "<":
                continue
            near, rooted = source.parent / header, csrc / header
            target = near if near.is_file() else rooted
            if not target.is_file():
                broken.append(f'{name}: "{header}" is no file of csrc/; foreign headers are included with <>')
                continue
            target_floor = target.resolve().relative_to(csrc.resolve()).parts[0]
            if FLOORS.index(target_floor) > FLOORS.index(floor):
                broken.append(f"{name}: includes {header}, which is on a higher floor")
    return broken


def test_includes_point_to_the_same_floor_or_down() -> None:
    assert broken_floor_rules(CSRC) == []


def test_the_floor_rules_notice_a_breach(tmp_path: Path) -> None:
    files = {
        "base/a.h": '#include "group/g.h"\n#include <vector>\n',
        "group/g.h": "#include <ATen/ATen.h>\n",
        "memory/m.cpp": '#include "missing.h"\n',
        "attic/x.h": "",
        "ops/library.cpp": '#include <torch/library.h>\n#include "base/a.h"\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    broken = "\n".join(broken_floor_rules(tmp_path))
    assert "base/a.h: includes group/g.h, which is on a higher floor" in broken
    assert "group/g.h: includes ATen/ATen.h; only ops/ may include torch" in broken
    assert 'memory/m.cpp: "missing.h" is no file' in broken
    assert "attic/x.h: lies on no floor" in broken
    assert "ops/library.cpp" not in broken


MODULES = [m.name for m in pkgutil.walk_packages(sglang_symm.__path__, "sglang_symm.") if m.name != "sglang_symm._C"]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module: str) -> None:
    if module == "sglang_symm._fake" and _library.attempt() is not None:
        pytest.skip("fake kernels belong to a loaded library")
    importlib.import_module(module)


def test_every_exported_name_exists() -> None:
    for name in sglang_symm.__all__:
        assert getattr(sglang_symm, name) is not None


def test_every_module_begins_with_its_license() -> None:
    """What is installed apart from the repository says under which terms; LICENSE covers the rest."""
    line = "# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0\n"
    modules = sorted((ROOT / "sglang_symm").rglob("*.py"))
    assert len(modules) > 30
    assert [str(path.relative_to(ROOT)) for path in modules if not path.read_text().startswith(line)] == []


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_no_conflict_or_review_markers() -> None:
    conflict = "|".join(re.escape(sign * 7) for sign in "<>|")
    # Written so that this file does not match itself.
    words = "|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK", "NOCOM" + "MIT", "REV" + "IEW"])
    marker = re.compile(rf"^(?:{conflict})(?: |$)|^={{7}}$|\b(?:{words})\b")
    left = []
    for path in tracked_files():
        if not path.is_file() or path.name == "LICENSE":
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if marker.search(line):
                left.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert left == []
