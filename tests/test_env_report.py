"""`python -m sglang_symm env` tells what the machine has."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from sglang_symm import __main__, __version__, env_report, nccl


def test_the_report_has_every_part_and_is_json() -> None:
    report = json.loads(json.dumps(env_report.collect()))
    for part in ("python", "machine", "capabilities", "torch", "cuda", "nccl", "library", "settings"):
        assert report[part], part
        assert "error" not in report[part] or part == "library", report[part]
    assert report["torch"]["version"] == torch.__version__
    assert report["machine"]["cores_usable"] >= 1
    assert report["machine"]["memory_gib"] > 0
    assert report["capabilities"]["memfd"] is True


def test_the_text_shows_every_part() -> None:
    text = env_report.render(env_report.collect())
    for word in (__version__, torch.__version__, "memfd", "SGLANG_SYMM_ARENA_BYTES", "library"):
        assert word in text
    for name, row in env_report.settings().items():
        assert f"{name} " in text
        assert f" {row['value']} " in text or not row["value"]


def test_the_text_has_a_line_for_each_gpu() -> None:
    gpu = {"name": "H100", "memory_gib": 79.6, "capability": "9.0", "peers": [1], "nvlink": []}
    report = {"sglang_symm": __version__, "cuda": {"gpus": [gpu, gpu]}, "settings": {}}
    text = env_report.render(report)
    assert "0: name H100, memory_gib 79.6, capability 9.0, peers 1, nvlink none\n" in text
    assert "1: name H100" in text


def test_a_part_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no such machine")

    monkeypatch.setattr(env_report, "machine", fail)
    report = env_report.collect()
    assert report["machine"] == {"error": "RuntimeError: no such machine"}
    assert report["torch"]["version"] == torch.__version__
    assert "no such machine" in env_report.render(report)


def test_settings_show_what_is_set_and_what_is_misspelt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_SYMM_TIMEOUT", "5")
    monkeypatch.setenv("SGLANG_SYMM_TIMOUT", "7")
    rows = env_report.settings()
    assert rows["SGLANG_SYMM_TIMEOUT"]["value"] == "5"
    assert rows["SGLANG_SYMM_TIMEOUT"]["set"]
    assert not rows["SGLANG_SYMM_STRICT"]["set"]
    assert rows["SGLANG_SYMM_TIMOUT"]["meaning"] == "not read when the package runs"


@pytest.mark.parametrize(
    ("code", "version", "used"),
    [
        (22608, (2, 26, 8), False),
        (22700, (2, 27, 0), True),
        (22808, (2, 28, 8), True),
        (22809, (2, 28, 9), False),
        (23006, (2, 30, 6), False),
        (23007, (2, 30, 7), True),
    ],
)
def test_nccl_windows_are_used_outside_the_unsafe_versions(
    code: int, version: tuple[int, int, int], used: bool
) -> None:
    assert nccl.version_of(code) == version
    assert nccl.windows(version).startswith("used") is used


def test_the_command_line_tells_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([]) == 0
    text = capsys.readouterr().out
    for command in __main__.COMMANDS:
        assert command in text
    assert __main__.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    assert __main__.main(["nonsense"]) == 2
    assert "unknown command 'nonsense'" in capsys.readouterr().err


def test_env_prints_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["env"]) == 0
    assert "capabilities" in capsys.readouterr().out
    assert __main__.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sglang_symm"] == __version__


def test_the_module_follows_the_protocol_of_commands() -> None:
    parser = argparse.ArgumentParser()
    env_report.add_arguments(parser)
    assert parser.parse_args(["--json"]).json is True
