# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""The command `python -m sglang_symm generate` from outside, on a tiny model, and the tokenizer that it uses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import llama_cases
import pytest
import safetensors.torch
import torch
from preloaded import Process

from sglang_symm import _library
from sglang_symm.__main__ import main
from sglang_symm.models.tokenizer import Tokenizer

WORDS = [f"w{i}" for i in range(125)]
TEMPLATE = (
    "{% for message in messages %}{{ bos_token }} {{ message['role'] }} {{ message['content'] }} {% endfor %}\n"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
needs_library = pytest.mark.skipif(_library.attempt() is not None, reason="the native library is not built")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of 128 words."""
    import tokenizers

    folder = llama_cases.make_folder(tmp_path_factory.mktemp("llama") / "model")
    vocab = {word: i for i, word in enumerate(["<s>", "user", "assistant", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["generate", *map(str, words)]
    process = Process(main, command, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment})
    out, err = process.communicate(timeout=120)
    assert process.returncode is not None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@needs_library
def test_answers_of_several_ranks_equal_transformers_and_come_with_what_the_memory_did(folder: Path) -> None:
    words = [folder, "--tp", 2, "--prompt", "w5 w6", "--prompt", "w7", "--max-new-tokens", 5, "--compare-transformers"]
    done = run(*words, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [answer["equals_transformers"] for answer in report["answers"]] == [True, True]
    assert [len(answer["token_ids"]) for answer in report["answers"]] == [5, 5]
    assert report["answers"][0]["prompt_tokens"] == 5  # <s> user w5 w6 assistant
    assert report["generated_tokens"] == 10
    assert report["tokens_per_second"] > 0
    group = report["groups"][0]
    assert group["outputs_inside"] > 0
    assert group["outputs_outside"] == 0
    assert group["memory"]["peak_bytes"] > 0
    assert sum(group["calls_by_algorithm"].values()) > 0


@needs_library
def test_text_for_people_tells_layout_speed_memory_and_calls(folder: Path) -> None:
    words = ["--tp", 2, "--attention-dp", 2, "--prompt", "w5", "--max-new-tokens", 3, "--raw", "--no-symm-mem"]
    done = run(folder, *words)
    assert done.returncode == 0, done.stderr
    assert ">>> w5" in done.stdout
    assert "2 ranks: attention-DP 2 x attention-TP 1, MLP over tp, float32 on cpu, symmetric memory off" in done.stdout
    for word in ("tokens/s", "peak", "outside", "calls"):
        assert word in done.stdout


@needs_library
def test_a_difference_from_transformers_is_exit_code_1(folder: Path, tmp_path: Path) -> None:
    """The reference is replaced by one that answers otherwise."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sglang_symm.generate as g\n"
        "g.transformers_greedy = lambda folder, prompts, params: [[0]] * len(prompts)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run(folder, "--prompt", "w5", "--max-new-tokens", 2, "--compare-transformers", PYTHONPATH=path)
    assert done.returncode == 1, done.stderr
    assert "DIFFERENT from" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tp", "3", "--attention-dp", "2"], "--tp 3 does not divide by --attention-dp 2"),
        (["--tp", "0"], "expected --tp at least 1, got 0"),
        (["--attention-dp", "-1"], "expected --attention-dp at least 1, got -1"),
        (["--temperature", "1", "--compare-transformers"], "expected --temperature 0 --dtype float32"),
        (["--device", "junk"], "expected device to be cpu, cuda or cuda:N, got 'junk'"),
        (["--device", "meta"], "expected device to be cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:99"], "device cuda:99: torch sees"),
        (["--max-batch", "0"], "expected --max-batch at least 1, got 0"),
        (["--max-batch", "-2"], "expected --max-batch at least 1, got -2"),
        (["--max-len", "0"], "expected --max-len at least 1, got 0"),
        (["--arena-mib", "0"], "expected --arena-mib at least 1, got 0"),
        (["--max-new-tokens", "0"], "expected max_new_tokens at least 1, got 0"),
        (["--seed", str(1 << 64)], "expected seed a number of 64 bits, got 18446744073709551616"),
        (["--temperature", "nan"], "expected temperature at least 0, got nan"),
        (["--top-p", "0"], "expected top_p in (0, 1], got 0.0"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line_and_exit_code_2(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder), "--prompt", "w1", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sglang_symm generate: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("name", "missing"), [("none", "config.json"), ("none.gguf", "GGUF file")])
def test_a_model_that_is_not_there_is_one_line_that_names_it(
    tmp_path: Path, name: str, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(tmp_path / name), "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert missing in error
    assert str(tmp_path / name) in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "--prompt", "w1", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "sglang_symm generate: sglang_symm: device cuda: torch sees 0 GPU(s) in this process; use device='cpu', or see "
        "nvidia-smi and torch.version.cuda\n"
    )


def test_ranks_are_started_with_the_words_that_main_was_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def run_ranks(nproc: int, argv: list[str], **_: object) -> int:
        started.append(argv)
        return 5

    monkeypatch.setattr("sglang_symm.generate.run_ranks", run_ranks)
    monkeypatch.setattr("sglang_symm.bench.run_ranks", run_ranks)
    monkeypatch.setattr(sys, "argv", ["something", "else", "--entirely"])
    words = ["generate", str(folder), "--prompt", "w1", "--tp", "2"]
    assert main(words) == 5
    assert main(["bench", "--peers", "none", "-n", "3"]) == 5
    assert started[0] == [sys.executable, "-m", "sglang_symm", *words]
    assert started[1][:-1] == [sys.executable, "-m", "sglang_symm", "bench", "--peers", "none", "-n", "3", "--raw"]


@needs_library
def test_sizes_that_the_ranks_do_not_divide_are_named_once(folder: Path) -> None:
    done = run(folder, "--tp", 3, "--prompt", "w1")
    assert done.returncode == 2
    assert "128 does not divide by the 3 ranks" in done.stderr
    assert done.stderr.count("\n") == 1


def broken(folder: Path, target: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(folder, target)
    change(target)
    return target


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def change_weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        weights["model.norm.weight"] = change(weights["model.norm.weight"])
        safetensors.torch.save_file(weights, folder / "model.safetensors")

    return rewrite


def change_config(**changes: object) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))

    return rewrite


# What is done to the model, and what is said of it. The first ones are found before a rank starts.
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "config": (lambda f: truncate(f / "config.json"), "/config.json is no JSON"),
    "text for a number": (change_config(hidden_size="64"), "expected hidden_size to be a positive whole number"),
    "rope": (change_config(rope_parameters={"rope_type": "llama3"}), "rope_type 'llama3' lacks factor"),
    "tokenizer": (lambda f: truncate(f / "tokenizer.json"), "/tokenizer.json is no tokenizer"),
    "weights": (lambda f: truncate(f / "model.safetensors"), "/model.safetensors is no whole safetensors file"),
    "ints": (change_weights(lambda w: w.to(torch.int32)), "norm.weight: expected a floating dtype, found I32"),
    "NaN": (change_weights(lambda w: w * torch.nan), "logits for prompt 0 hold NaN or infinity: expected numbers"),
}


@needs_library
@pytest.mark.parametrize("what", BROKEN)
def test_a_model_that_cannot_be_run_is_said_once_with_exit_code_2(folder: Path, tmp_path: Path, what: str) -> None:
    change, message = BROKEN[what]
    done = run(broken(folder, tmp_path / "broken", change), "--prompt", "w1", "--raw", "--max-new-tokens", 2)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("sglang_symm generate: ") == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "other ranks" not in done.stderr


@needs_library
def test_a_dp_rank_whose_logits_are_no_numbers_tells_all_others(folder: Path, tmp_path: Path) -> None:
    """Only the prompt of DP rank 1 meets the token whose embedding is NaN."""

    def spoil(target: Path) -> None:
        weights = safetensors.torch.load_file(target / "model.safetensors")
        weights["model.embed_tokens.weight"][9] = torch.nan
        safetensors.torch.save_file(weights, target / "model.safetensors")

    model = broken(folder, tmp_path / "broken", spoil)
    words = ["--prompt", "w1", "--prompt", "w6", "--raw", "--max-new-tokens", 4]
    done = run(model, *words, "--tp", 2, "--attention-dp", 2, "--mlp-group", "attn_tp")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("logits for prompt 1 hold NaN") == 1
    assert done.stderr.count("sglang_symm") == 1
    assert done.stdout == ""


def test_the_tokenizer_agrees_with_transformers(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    ours = Tokenizer(folder)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", chat_template=TEMPLATE
    )
    conversation = [{"role": "user", "content": "w5 w9"}]
    expected = theirs.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ours.chat("w5 w9") == expected == [0, 1, 8, 12, 2]
    assert ours.encode("w5 w9") == theirs("w5 w9")["input_ids"] == [8, 12]
    assert ours.decode([0, 8, 12]) == theirs.decode([0, 8, 12], skip_special_tokens=True) == "w5 w9"


def test_a_model_without_chat_template_says_so(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(tmp_path).chat("w1")


def test_a_chat_template_can_run_no_code(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(Exception, match="unsafe"):
        Tokenizer(tmp_path).chat("w1")
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system message') }}")
    with pytest.raises(ValueError, match="chat template: no system message"):
        Tokenizer(tmp_path).chat("w1")
