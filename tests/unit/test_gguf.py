# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""A GGUF file is converted once, by one of several ranks, and a failure leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sglang_symm.models import gguf


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    path.write_bytes(b"GGUF, but not really")
    return path


def test_several_ranks_convert_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        runs.append(command)
        time.sleep(0.2)
        Path(command[-1]).mkdir()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gguf.subprocess, "run", run)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(gguf.converted(file, tmp_path / "cache"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1
    assert len(set(folders)) == 1
    assert folders[0].name.startswith("small-")
    file.write_bytes(b"GGUF, another one")
    assert gguf.converted(file, tmp_path / "cache") != folders[0]


def test_a_failed_conversion_is_an_error_and_leaves_no_folder(file: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"conversion of {file} failed with exit code 1"):
        gguf.converted(file, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_without_the_packages_the_error_says_how_to_get_them(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install"):
        gguf.convert(file, file.with_suffix(""))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none\\.gguf"):
        gguf.converted(tmp_path / "none.gguf", tmp_path)
