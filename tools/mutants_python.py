"""Undo each behaviour of symmetric memory with data-parallel attention, one line at a time, and require that the tests
over ranks notice. tools/mutants.py does the same to the protocol in C++.

    1  attention-TP has a symmetric communicator if token ids are synchronised over it or symmetric memory is on
    2  RowParallelLinear's output is symmetric over attention-TP ungated, over TP only if allocation is symmetric
    3  allocation is symmetric without data-parallel attention, or when all DP ranks are padded to the longest
    4  the decoder layer passes use_dp_attention_reduce on, and the MLP to its linears
    5  the model runner passes its own enable_symm_mem to initialize_model_parallel

    python tools/mutants_python.py [--list] [--only NAME]

The mutants run in a copy of the tree with 4 ranks (attention-TP 2 of TP 4; elsewhere the behaviours cannot be told from
their absence). The tree without a mutant comes first and must pass.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutants import Mutant, with_name  # noqa: E402

RANKS = 4
TESTS = ("tests/distributed/test_parallel_state.py", "tests/distributed/test_models.py")
CHOSEN = "behaviour or symmetric or memory"  # pytest -k
STATE, LINEAR = "distributed/parallel_state.py", "layers/linear.py"
LLAMA, RUNNER = "models/llama.py", "model_runner.py"


# As in tools/mutants.py, of files of sglang_symm/.
MUTANTS = [
    Mutant(
        "1: attention-TP is symmetric only if token ids are synchronised",
        STATE,
        '"attn_tp": SYMM if sync_token_ids or enable_symm_mem else PROCESS_GROUP,',
        '"attn_tp": SYMM if sync_token_ids else PROCESS_GROUP,',
    ),
    Mutant(
        "1: attention-TP is symmetric only if symmetric memory is on",
        STATE,
        '"attn_tp": SYMM if sync_token_ids or enable_symm_mem else PROCESS_GROUP,',
        '"attn_tp": SYMM if enable_symm_mem else PROCESS_GROUP,',
    ),
    Mutant(
        "2: outputs over attention-TP are gated",
        LINEAR,
        "gate = self.use_dp_attention_reduce or self.state.is_allocation_symmetric()",
        "gate = self.state.is_allocation_symmetric()",
    ),
    Mutant(
        "2: outputs over TP are not gated",
        LINEAR,
        "gate = self.use_dp_attention_reduce or self.state.is_allocation_symmetric()",
        "gate = True",
    ),
    Mutant(
        "3: padding to the longest does not count",
        STATE,
        "return not self.enable_dp_attention or self.is_dp_max_padding()",
        "return not self.enable_dp_attention",
    ),
    Mutant(
        "3: allocation is always symmetric",
        STATE,
        "return not self.enable_dp_attention or self.is_dp_max_padding()",
        "return True",
    ),
    Mutant(
        "3: without data-parallel attention allocation is not symmetric",
        STATE,
        "return not self.enable_dp_attention or self.is_dp_max_padding()",
        "return self.is_dp_max_padding()",
    ),
    Mutant(
        "4: the decoder layer forgets use_dp_attention_reduce",
        LLAMA,
        "use_dp_attention_reduce=over_attn_tp,",
        "use_dp_attention_reduce=False,",
    ),
    Mutant(
        "4: the MLP forgets use_dp_attention_reduce",
        LLAMA,
        '"use_dp_attention_reduce": use_dp_attention_reduce,',
        '"use_dp_attention_reduce": False,',
    ),
    Mutant(
        "4: the decoder layer forgets all of the MLP's group",
        LLAMA,
        'over_attn_tp = mlp_group == "attn_tp"',
        "over_attn_tp = False",
    ),
    Mutant(
        "5: the runner leaves symmetric memory off",
        RUNNER,
        "enable_symm_mem=args.enable_symm_mem,",
        "enable_symm_mem=False,",
    ),
    Mutant(
        "5: the runner turns symmetric memory on",
        RUNNER,
        "enable_symm_mem=args.enable_symm_mem,",
        "enable_symm_mem=True,",
    ),
]


def run_tests(work: Path, limit: float) -> tuple[bool, str]:
    """True when all passed on all ranks; and the first test that failed, or how many passed."""
    results = work / "results"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir()
    # Before an installed sglang_symm.
    env = {**os.environ, "PYTHONPATH": str(work), "SGLANG_SYMM_TEST_RESULTS": str(results), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", CHOSEN, *TESTS]
    try:
        done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return False, f"still waiting after {limit:.0f} s"
    outcomes = [json.loads(path.read_text()) for path in sorted(results.glob("rank*.json"))]
    failed = [test for outcome in outcomes for test, result in outcome.items() if result == "failed"]
    if failed:
        return False, failed[0].removeprefix("tests/distributed/")
    if done.returncode != 0 or len(outcomes) != RANKS:
        raise SystemExit(f"the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return True, f"{sum(result == 'passed' for result in outcomes[0].values())} tests passed on every rank"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    parser.add_argument("--only", metavar="NAME", help="those whose name contains NAME")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for the tests of a mutant (default 300)")
    args = parser.parse_args()
    chosen = with_name(MUTANTS, args.only)
    if args.list:
        for mutant in chosen:
            print(f"{mutant.name}  (sglang_symm/{mutant.file})")
        return 0
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    print(f"{datetime.date.today()}, commit {commit.stdout.strip() or 'unknown'}, {RANKS} ranks", flush=True)
    survivors = []
    with tempfile.TemporaryDirectory(prefix="sglang_symm-mutants-") as folder:
        work = Path(folder)
        for part in ("sglang_symm", "tests"):
            shutil.copytree(ROOT / part, work / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", work)
        passed, how = run_tests(work, args.limit)
        if not passed:
            raise SystemExit(f"without a mutant a test fails: {how}")
        print(f" 0/{len(chosen)}          without a mutant: {how}", flush=True)
        for number, mutant in enumerate(chosen, 1):
            begin = time.monotonic()
            path = work / "sglang_symm" / mutant.file
            text = path.read_text()
            if text.count(mutant.old) != 1:
                raise SystemExit(f"mutant '{mutant.name}': its line occurs {text.count(mutant.old)} times, expected 1")
            path.write_text(text.replace(mutant.old, mutant.new))
            passed, how = run_tests(work, args.limit)
            path.write_text(text)
            seconds = time.monotonic() - begin
            mark = "SURVIVED" if passed else "caught  "
            print(f"{number:2}/{len(chosen)} {mark} {mutant.name}: {how} ({seconds:.0f} s)", flush=True)
            if passed:
                survivors.append(mutant.name)
    print(f"{len(chosen) - len(survivors)} caught, {len(survivors)} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
