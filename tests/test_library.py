"""A library that does not fit gives one error that says what was built, what was found, what mends it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_symm import _library

PACKAGE = Path(_library.__file__).parent
FITS = {"torch": torch.__version__, "cuda": None, "arch": None, "compiler": "c++ 12"}


def python(folder: Path, code: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, *args] if args else [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without its library; the tests give it broken ones."""
    shutil.copytree(PACKAGE, tmp_path / "sglang_symm", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    return tmp_path


def break_library(folder: Path, content: bytes | None, built: dict[str, object] | None) -> None:
    if content is not None:
        (folder / "sglang_symm" / "_C.abi3.so").write_bytes(content)
    if built is not None:
        (folder / "sglang_symm" / "_C.json").write_text(json.dumps(built))


USE = """
import sglang_symm, torch
print("imported")
for _ in range(2):
    try:
        torch.ops.sglang_symm.all_reduce(torch.ones(1), "g")
    except sglang_symm.LibraryError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("content", "built", "reason"),
    [
        (None, None, "it was not built"),
        (b"not a library", {**FITS, "torch": "2.7.1"}, "it was built for another torch"),
        (b"not a library", FITS, "_C.abi3.so"),
        (b"not a library", None, "_C.abi3.so"),
    ],
    ids=["not built", "another torch", "damaged", "damaged, nothing known"],
)
def test_import_works_and_the_first_use_of_an_op_raises(
    package: Path, content: bytes | None, built: dict[str, object] | None, reason: str
) -> None:
    break_library(package, content, built)
    done = python(package, USE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("imported")
    assert done.stdout.count("cannot load its native library") == 2, "each use raises the same error"
    assert reason in done.stdout
    assert f"found:     torch {torch.__version__}" in done.stdout
    assert f"built for: {'torch ' + str(built['torch']) if built else 'nothing'}" in done.stdout
    assert "mend it:" in done.stdout
    assert " -m pip install " in done.stdout


def test_a_missing_symbol_is_named(package: Path, tmp_path: Path) -> None:
    source = tmp_path / "missing.cpp"
    source.write_text("int symbol_of_another_torch(); int use = symbol_of_another_torch();\n")
    library = package / "sglang_symm" / "_C.abi3.so"
    compiler = shutil.which("g++") or pytest.skip("needs g++")
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    break_library(package, None, FITS)
    done = python(package, USE)
    assert "undefined symbol" in done.stdout
    assert "symbol_of_another_torch" in done.stdout


def test_env_works_beside_a_broken_library(package: Path) -> None:
    break_library(package, b"not a library", {**FITS, "torch": "2.7.1"})
    done = python(package, "", "-m", "sglang_symm", "env", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["library"]["loaded"] is None
    assert report["library"]["built_for"]["torch"] == "2.7.1"
    assert "it was built for another torch" in report["library"]["error"]
    assert report["torch"]["version"] == torch.__version__


def test_env_works_without_torch(package: Path) -> None:
    # A torch that fails as one with missing CUDA libraries does.
    (package / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    done = python(package, "", "-m", "sglang_symm", "env")
    assert done.returncode == 0, done.stderr
    assert "libcudart.so.13: cannot open shared object file" in done.stdout


@pytest.mark.parametrize(
    ("built", "have", "reason"),
    [
        ({"torch": "2.11.0+cu130", "cuda": None}, {"torch": "2.11.1", "cuda": "13.0"}, None),
        ({"torch": "2.11.0+cu130", "cuda": "13.0"}, {"torch": "2.11.0+cu132", "cuda": "13.2"}, None),
        ({"torch": "2.11.0", "cuda": None}, {"torch": "2.12.0", "cuda": None}, "another torch"),
        ({"torch": "2.1.0", "cuda": None}, {"torch": "2.11.0", "cuda": None}, "another torch"),
        ({"torch": "2.11.0", "cuda": "13.0"}, {"torch": "2.11.0", "cuda": None}, "without CUDA"),
        ({"torch": "2.11.0", "cuda": "13.0"}, {"torch": "2.11.0", "cuda": "12.8"}, "another CUDA"),
        ({}, {"torch": "2.11.0", "cuda": None}, None),
        ({"torch": "2.11.0", "cuda": None}, {"torch": None, "cuda": None}, "cannot be imported"),
    ],
)
def test_what_fits_and_what_does_not(built: dict[str, str], have: dict[str, str], reason: str | None) -> None:
    got = _library.mismatch(built, have)
    assert got is None if reason is None else got is not None and reason in got


def test_the_command_names_the_checkout_or_the_torch_that_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    have = {"torch": "2.15.0", "cuda": None}
    monkeypatch.setattr(_library, "FOLDER", tmp_path / "sglang_symm")
    assert 'install "torch==2.11.*"' in _library.mend({"torch": "2.11.0+cu130"}, have)
    assert "--force-reinstall" in _library.mend({"torch": "2.15.1"}, have)
    (tmp_path / "setup.py").touch()
    assert f"-e {tmp_path}" in _library.mend({"torch": "2.11.0+cu130"}, have)
    assert 'install "torch==2.11.*"' in _library.mend({"torch": "2.11.0"}, {"torch": None})
