#!/usr/bin/env bash
# A machine of several GPUs, tuned, measured and tested in one call of less than 9 minutes:
#
#     OUT=results benchmarks/many_gpus.sh [P]           P: ranks, a GPU each; default: all GPUs
#
#   tune      the tuning table of P ranks, which the steps after it choose by
#   bench     all_reduce, reduce_scatter, all_gather from 2 KB to 256 MB beside NCCL, its window, torch's symmetric memory
#   linear    row_parallel_linear at Llama-3-70B shapes, 1 to 2048 tokens
#   tests     the GPU tests over P ranks; a Llama at TP=3 and, from 6 GPUs on, at attention-DP x attention-TP 2x3
#   layers    a decode step and a prefill of all of Llama-3-70B's layers (P = 2, 3: of Llama-3-8B's)
#   smollm2   SmolLM2's tokens against transformers, when SMOLLM2 names its .gguf file
#
# $OUT receives summary.log (what every step printed, and how it ended), figures as plots, and many_gpus.tar.gz with the
# rest: JSON, CSV, the tuning table, logs. A step that fails, or takes longer than its share, ends alone.
#
#   STEPS="tests bench"   only these        QUICK=1   small settings, to try the script        BUDGET=530   seconds in all
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
OUT=$(realpath -m "${OUT:-many_gpus}")
STEPS=${STEPS:-tune bench linear tests layers smollm2}
QUICK=${QUICK:-0}
BUDGET=${BUDGET:-530}
venv=$PWD/.venv/bin/python
[[ -x $venv ]] || venv=python3
PYTHON=${PYTHON:-$venv}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export NCCL_NVLS_ENABLE=0 # no NVLink multicast: peers without it, as this library is
if ! GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null); then
    echo "many_gpus.sh: $PYTHON cannot import torch: expected one that can (make venv, or PYTHON=...)" >&2
    exit 2
fi
if ((GPUS < 2)); then
    echo "many_gpus.sh: expected at least 2 GPUs, torch sees $GPUS; ranks that share one: tools/mps_rig.py" >&2
    exit 2
fi
P=${1:-$GPUS}
if ((P < 2 || P > GPUS)); then
    echo "many_gpus.sh: expected 2 to $GPUS ranks, a GPU each, got $P" >&2
    exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$OUT"
log=$OUT/summary.log
: >"$log"
failed=0

# run NAME SECONDS COMMAND...: a part of a step; no longer than SECONDS, nor than what is left of the budget.
run() {
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    ((limit = limit < BUDGET - SECONDS ? limit : BUDGET - SECONDS))
    echo "=== $name: $*" >>"$log"
    if ((limit < 5)); then
        echo "--- $name: left out, no time is left" | tee -a "$log"
        failed=1
        return
    fi
    timeout -k 5 "$limit" "$@" >"$work/$name.log" 2>&1 || status=$?
    grep -v -e '^\[rank[0-9]*\]:\[W' -e '^bench: ' -e '^tune: [a-z_]* ' "$work/$name.log" | tail -n 300 >>"$log"
    echo "--- $name: status $status after $((SECONDS - start)) s" | tee -a "$log"
    ((status == 0)) || failed=1
}
# run_ranks NAME SECONDS RANKS PROGRAM...
run_ranks() { run "$1" "$2" "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$3" "${@:4}"; }
wanted() { [[ " $STEPS " == *" $1 "* ]]; }
"$PYTHON" -m sglang_symm env >>"$log" 2>&1
echo "ranks: $P" >>"$log"

if wanted tune; then
    range=(-b 1K -e 64M --rounds 7)
    ((QUICK)) && range=(-b 2K -e 512K --rounds 3)
    run tune 60 "$PYTHON" -m sglang_symm tune --device cuda -n "$P" "${range[@]}" -o "$work/tables"
    # What follows takes it, as a user's groups would: a folder for which every rank has the same file.
    mkdir -p "$work/tables" && export SGLANG_SYMM_TABLES=$work/tables
fi
if wanted bench; then
    ops=(--op all_reduce --op reduce_scatter --op all_gather)
    small=(-b 2K -e 32M -f 4 --rounds 7) large=(-b 64M -e 256M -f 2 --rounds 5 --mode graph --calls 5)
    ((QUICK)) && small=(-b 2K -e 2M -f 32 --rounds 3) large=(-b 8M -e 8M -f 2 --rounds 3 --mode graph --calls 5)
    bench() {
        run "bench_$1" 100 "$PYTHON" -m sglang_symm bench --device cuda -n "$P" "${ops[@]}" "${@:2}" \
            --json "$work/bench_$1.json" --csv "$work/bench_$1.csv" --plot "$OUT/bench_$1.png"
    }
    bench small "${small[@]}"
    bench large "${large[@]}"
fi
if wanted linear; then
    tokens=(1 16 64 256 2048) repeats=15
    ((QUICK)) && tokens=(1 256) repeats=4
    run_ranks linear 70 "$P" benchmarks/row_parallel_linear.py --shapes "8192x$((8192 / P))" "8192x$((28672 / P))" \
        --tokens "${tokens[@]}" --repeats $repeats \
        --json "$work/row_parallel_linear.json" --plot "$OUT/row_parallel_linear.png"
fi
if wanted tests; then
    tests=(tests/gpu) llama=tests/gpu/test_llama.py
    ((QUICK)) && tests=(tests/gpu/test_collectives.py -k "all_reduce")
    run_ranks tests 150 "$P" -m pytest -q "${tests[@]}"
    ((P >= 3 && !QUICK)) && run_ranks tests_llama_3 45 3 -m pytest -q "$llama"
    ((P >= 6 && !QUICK)) && run_ranks tests_llama_2x3 45 6 -m pytest -q "$llama"
fi
if wanted layers; then
    # 0.43 GB of weights a layer at P = 4; all 80 fit from there on, with the caches of 64 sequences.
    shape=70b layers=80
    ((P >= 4)) || shape=8b layers=32
    size=(--batches 1 16 64 --prefill 2048 --repeats 9 --calls 3)
    ((QUICK)) && layers=2 size=(--batches 1 --prefill 256 --repeats 3 --calls 2)
    run_ranks layers 100 "$P" benchmarks/llama_decode.py --shape $shape --layers $layers "${size[@]}" \
        --json "$work/llama_$shape.json"
fi
if wanted smollm2 && [[ -n "${SMOLLM2:-}" ]]; then
    ask=(--device cuda --prompt "What is gravity?" --max-new-tokens 32 --compare-transformers)
    ((P >= 3)) && run smollm2_tp3 90 "$PYTHON" -m sglang_symm generate "$SMOLLM2" --tp 3 "${ask[@]}"
    ((P >= 6)) && run smollm2_2x3 60 "$PYTHON" -m sglang_symm generate "$SMOLLM2" --tp 6 --attention-dp 2 "${ask[@]}"
fi
tar -C "$work" -czf "$OUT/many_gpus.tar.gz" .
echo "--- all: $SECONDS s, results in $OUT" | tee -a "$log"
exit $failed
