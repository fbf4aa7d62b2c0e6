#!/usr/bin/env bash
# Everything that needs a card, each step with a time limit, results into $OUT (default bench/results).
#
#   bash bench/on_gpu.sh                     all steps
#   STEPS="tests ops" bash bench/on_gpu.sh   some of: info tests sanitizer compile ops tune profile
#   PYTHON=... picks the interpreter; LIMIT_ops=120 changes the limit of a step in seconds
#
# A step that fails or runs out of time does not stop the others; the last line and the exit status say what failed.
set -u -o pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python}
STEPS=${STEPS:-info tests sanitizer compile ops tune profile}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
failed=()

wanted() { [[ " $STEPS " == *" $1 "* ]]; }

# step NAME SECONDS COMMAND...: run with a limit, keep the log, note the outcome.
step() {
    local name=$1 limit=$2 status began
    shift 2
    local changed="LIMIT_${name%%-*}"
    limit=${!changed:-$limit}
    began=$SECONDS
    echo "== $name (at most $limit s): $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    status=${PIPESTATUS[0]}
    echo "$name,$status,$((SECONDS - began))" >> "$OUT/steps.csv"
    if [[ $status -ne 0 ]]; then
        failed+=("$name ($status)")
    fi
}

echo "step,status,seconds" > "$OUT/steps.csv"
if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "there is no CUDA card: nothing to run"
    exit 2
fi

if wanted info; then
    step info 60 "$PYTHON" -c 'import json, bench.timing as t, flowmo_kernels as k; print(json.dumps(t.environment())); print(k.describe())'
    step info-card 30 nvidia-smi -q
fi
if wanted tests; then
    step tests 600 "$PYTHON" -m pytest tests/ops tests/cuda -m gpu --maxfail=20 --timeout=300
    # On a card the unmarked kernel tests run compiled rather than interpreted.
    step tests-ops 600 "$PYTHON" -m pytest tests/ops -m "not gpu" --timeout=300
fi
if wanted sanitizer; then
    if command -v compute-sanitizer > /dev/null; then
        for tool in memcheck racecheck initcheck synccheck; do
            # The CUDA kernels on small shapes. Memory freed by the caching allocator would hide errors.
            step "sanitizer-$tool" 600 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
                "$PYTHON" -m pytest tests/ops -k "cuda and against" -x --timeout=600
        done
    else
        echo "compute-sanitizer is not installed: skipped"
        echo "sanitizer,absent,0" >> "$OUT/steps.csv"
    fi
fi
if wanted compile; then
    step compile 300 "$PYTHON" bench/compile_kernels.py
    step compile-cuda 300 "$PYTHON" bench/compile_kernels.py --cuda
fi
if wanted ops; then
    step ops 600 "$PYTHON" bench/ops.py --out "$OUT/ops.csv"
    step ops-pytest 300 "$PYTHON" -m pytest bench --benchmark-json "$OUT/pytest-benchmark.json"
fi
if wanted tune; then
    step tune 600 "$PYTHON" bench/tune.py --out "$OUT/tune.csv"
fi
if wanted profile; then
    step profile 300 "$PYTHON" bench/kernel_profile.py --out "$OUT/profile.csv" --trace "$OUT/traces"
fi

if [[ ${#failed[@]} -gt 0 ]]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all steps done, results in $OUT"
