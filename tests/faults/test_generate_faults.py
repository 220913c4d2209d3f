# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""A rank dies or stops in the middle of `generate`: every survivor raises inside its deadline and hands out no wrong
token.

The launcher is this file's own: its parent hosts the store, which therefore survives every rank.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cases
import pytest
from llama_cases import SEQUENCES, Reference

from sglang_symm.distributed.launch import host_store, rank_environment, start_rank

NEW_TOKENS = 24
FATAL_TOKEN = 5  # the victim's fault comes when it is handed this token
TIMEOUT = 3.0  # seconds that a call waits for its peers
NOTICED = 2.0  # seconds in which a dead peer is noticed, more ranks than cores included

RANK_PROGRAM = """
import json, os, signal, sys, time
import torch
from sglang_symm.distributed import initialize_model_parallel
from sglang_symm.model_runner import ModelRunner, ServerArgs
from sglang_symm.sampling import SamplingParams

case = json.loads(sys.argv[1])
torch.set_num_threads(1)
tp, attn_dp, rank = case["tp"], case["attn_dp"], int(os.environ["RANK"])
state = initialize_model_parallel(tp, attn_dp, enable_symm_mem=True, arena_bytes=8 << 20)
runner = ModelRunner(case["folder"], ServerArgs(max_len=64, mlp_group=case["mlp_group"]), state)
handed_out = {}

def fail():
    print(json.dumps({"fault_at": time.time()}), flush=True)
    if case["fault"] == "exit":
        os._exit(7)
    if case["fault"] == "late":
        time.sleep(case["sleep"])
    else:
        os.kill(os.getpid(), getattr(signal, case["fault"]))

def on_token(prompt, token):
    tokens = handed_out.setdefault(prompt, [])
    tokens.append(token)
    if rank == case["victim"] and prompt == case["prompt"] and len(tokens) == case["fatal_token"]:
        fail()

try:
    runner.generate(case["prompts"], SamplingParams(case["new_tokens"]), on_token=on_token)
    error = None
except Exception as caught:
    error = [type(caught).__name__, str(caught)]
print(json.dumps({"error": error, "raised_at": time.time(), "handed_out": handed_out}), flush=True)
try:
    runner.generate(case["prompts"], SamplingParams(1))
    again = None
except Exception as caught:
    again = type(caught).__name__
print(json.dumps({"again": again}), flush=True)
state.destroy()
"""


@dataclass
class Outcome:
    """What one rank printed and how it ended."""

    code: int
    said: dict[str, Any] = field(default_factory=dict)
    stderr: str = ""


def run_case(case: dict[str, Any], limit: float = 60.0) -> list[Outcome]:
    """Run the program on `case["tp"]` ranks; fail if one has not ended after `limit` seconds."""
    store = host_store()
    settings = {"SGLANG_SYMM_TIMEOUT": str(TIMEOUT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", RANK_PROGRAM, json.dumps(case)]
    ranks = [
        start_rank(
            argv,
            rank_environment(rank, case["tp"], store.port, {**os.environ, **settings}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(case["tp"])
    ]
    end = time.monotonic() + limit
    outcomes = []
    try:
        for child in ranks:
            out, err = child.communicate(timeout=max(0.1, end - time.monotonic()))
            said: dict[str, Any] = {}
            for line in out.decode().splitlines():
                said |= json.loads(line)
            outcomes.append(Outcome(child.returncode, said, err.decode()))
    finally:
        for child in ranks:
            if child.poll() is None:
                child.kill()
                child.wait()
    return outcomes


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    folder = llama_cases.make_folder(tmp_path_factory.mktemp("llama") / "model")
    return folder, llama_cases.transformers_reference(folder, NEW_TOKENS)


def make_case(folder: Path, fault: str, attn_dp: int, attn_tp: int, victim: int, mlp_group: str) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "prompts": [list(sequence) for sequence in SEQUENCES],
        "prompt": victim // attn_tp,  # the first of the victim's DP rank
        "fault": fault,
        "tp": attn_dp * attn_tp,
        "attn_dp": attn_dp,
        "victim": victim,
        "mlp_group": mlp_group,
        "fatal_token": FATAL_TOKEN,
        "new_tokens": NEW_TOKENS,
        "sleep": 2 * TIMEOUT,
    }


def check_survivors(outcomes: list[Outcome], victim: int, reference: Reference, deadline: float) -> None:
    fault_at = outcomes[victim].said["fault_at"]
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            continue
        assert outcome.code == 0, outcome.stderr
        assert outcome.said["error"] is not None, f"rank {rank} finished"
        kind, sentence = outcome.said["error"]
        assert kind == "DistBackendError", sentence
        assert f"rank {victim}" in sentence or f"rank(s) {victim}" in sentence, sentence
        assert outcome.said["raised_at"] - fault_at <= deadline, sentence
        for prompt, tokens in outcome.said["handed_out"].items():
            assert tokens == reference.greedy[int(prompt)][: len(tokens)]
            assert len(tokens) <= FATAL_TOKEN + 1  # the victim was in step until then, and no call ends without it
        assert outcome.said["again"] == "DistBackendError"


@pytest.mark.parametrize(
    ("fault", "code", "attn_dp", "attn_tp", "victim"),
    [
        pytest.param("SIGKILL", -signal.SIGKILL, 1, 2, 1, id="KILL, TP2"),
        pytest.param("SIGKILL", -signal.SIGKILL, 2, 2, 3, id="KILL, 2x2"),
        pytest.param("SIGSEGV", -signal.SIGSEGV, 2, 2, 0, id="SEGV, 2x2"),
        pytest.param("exit", 7, 2, 2, 1, id="exit, 2x2"),
    ],
)
def test_when_a_rank_dies_all_others_raise_soon(
    fault: str, code: int, attn_dp: int, attn_tp: int, victim: int, llama: tuple[Path, Reference]
) -> None:
    outcomes = run_case(make_case(llama[0], fault, attn_dp, attn_tp, victim, "tp"))
    assert outcomes[victim].code == code
    check_survivors(outcomes, victim, llama[1], deadline=NOTICED)


def test_when_a_rank_dies_in_another_dp_rank_those_that_exchange_nothing_with_it_raise_too(
    llama: tuple[Path, Reference],
) -> None:
    """With the MLP over attention-TP only the exchange of token counts ties DP ranks together."""
    outcomes = run_case(make_case(llama[0], "SIGKILL", 2, 2, 3, "attn_tp"))
    assert outcomes[3].code == -signal.SIGKILL
    check_survivors(outcomes, 3, llama[1], deadline=NOTICED)


@pytest.mark.parametrize(("attn_dp", "attn_tp", "victim"), [(1, 2, 0), (2, 2, 2)], ids=["TP2", "2x2"])
def test_when_a_rank_is_late_the_others_raise_at_their_deadline_and_it_raises_when_it_comes(
    attn_dp: int, attn_tp: int, victim: int, llama: tuple[Path, Reference]
) -> None:
    outcomes = run_case(make_case(llama[0], "late", attn_dp, attn_tp, victim, "tp"))
    check_survivors(outcomes, victim, llama[1], deadline=TIMEOUT + NOTICED)
    late = outcomes[victim]
    assert late.code == 0, late.stderr
    assert late.said["error"] is not None
    assert late.said["error"][0] == "DistBackendError"
    for prompt, tokens in late.said["handed_out"].items():
        assert tokens == llama[1].greedy[int(prompt)][: len(tokens)]
