#!/usr/bin/env bash
# Everything that needs a card, each step with a time limit, results into $OUT (default bench/results).
#
#   bash bench/on_gpu.sh                     the usual steps
#   STEPS="tests ops" bash bench/on_gpu.sh   some of: build info tests sanitizer sanitizer-more compile first model
#                                            model-32 model-train ops ops-compile tune components profile
#   PYTHON=...       the interpreter (default python3)
#   LIMIT_ops=120    another limit in seconds for the steps whose name starts with "ops"
#   TUNE=lfq         the sweeps of bench/tune.py whose name contains this
#   BUDGET=520       seconds for everything: later steps get what is left, and none starts in the last twenty
#   PACK=1           $OUT gets one archive, results.tar.gz, renewed after every step, instead of the files
#
# A step that fails or runs out of time does not stop the others; the last line and the exit status say what failed.
# Wheels in .whl/ are installed into a temporary folder first; that is for machines without a network.
#
# On a machine that is lent for half an hour, without a network, at most ten minutes and eight files a call: three calls,
# in order of value, each within half a minute of the one before, so that the machine and its build stay. Wheels, once,
# where there is a network, into .whl/ (kept out of git by .git/info/exclude), to be carried along with every call:
#
#   pip wheel --no-deps -w .whl antlr4-python3-runtime==4.9.3
#   pip download --no-deps --only-binary=:all: --python-version 3.12 -d .whl omegaconf==2.3.0 setuptools
#
#   1. PACK=1 BUDGET=530 STEPS="build info tests sanitizer" bash bench/on_gpu.sh            call limit 570
#   2. PACK=1 BUDGET=530 STEPS="build first model" bash bench/on_gpu.sh                     call limit 570
#   3. PACK=1 BUDGET=430 TUNE=qk_norm_rope STEPS="build ops model-32 components tune" bash bench/on_gpu.sh
#                                                                                           call limit 470
#
# Together at most 27 minutes, the start of the machine not counted.
set -u -o pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-build info tests sanitizer sanitizer-more compile first model model-32 model-train ops ops-compile tune components profile}
BUDGET=${BUDGET:-1000000}
PACK=${PACK:-0}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
RESULTS=$OUT
[[ $PACK == 1 ]] && RESULTS=$(mktemp -d)
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
failed=()

wanted() { [[ " $STEPS " == *" $1 "* ]]; }

pack() {
    [[ $PACK == 1 ]] && tar -czf "$OUT/results.tar.gz.new" -C "$RESULTS" . && mv "$OUT/results.tar.gz.new" "$OUT/results.tar.gz"
    return 0
}

# step NAME SECONDS COMMAND...: run with a limit, keep the log, note the outcome.
step() {
    local name=$1 limit=$2 status began left=$((BUDGET - SECONDS - 10))
    shift 2
    local changed="LIMIT_${name%%-*}"
    limit=${!changed:-$limit}
    if [[ $left -lt 10 ]]; then
        echo "== $name: no time left"
        echo "$name,skipped,0" >> "$RESULTS/steps.csv"
        failed+=("$name (no time)")
        pack
        return
    fi
    limit=$((limit < left ? limit : left))
    began=$SECONDS
    echo "== $name (at most $limit s): $*"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$RESULTS/$name.log"
    status=${PIPESTATUS[0]}
    echo "== $name: status $status after $((SECONDS - began)) s"
    echo "$name,$status,$((SECONDS - began))" >> "$RESULTS/steps.csv"
    if [[ $status -ne 0 ]]; then
        failed+=("$name ($status)")
    fi
    pack
}

echo "step,status,seconds" > "$RESULTS/steps.csv"
if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "there is no CUDA card: nothing to run"
    exit 2
fi
if compgen -G ".whl/*.whl" > /dev/null; then
    SITE=$(mktemp -d)
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$SITE" .whl/*.whl &&
        export PYTHONPATH="$SITE:$PYTHONPATH"
fi

if wanted build; then
    # For this card alone, which takes a fraction of the time of all architectures.
    ARCH=$("$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"sm_{a}{b}" + "a" * (a == 9))')
    step build 240 env FLOWMO_CUDA=1 FLOWMO_CUDA_ARCHS="${FLOWMO_CUDA_ARCHS:-$ARCH}" "$PYTHON" setup.py -q build_ext --inplace
fi
if wanted info; then
    step info 60 "$PYTHON" -c 'import json, bench.timing as t, flowmo_kernels as k; print(json.dumps(t.environment())); print(k.describe())'
    step info-card 20 bash -c 'nvidia-smi -q && "$0" -m pip list' "$PYTHON"
fi
if wanted tests; then
    GPU_TESTS="tests/ops tests/cuda tests/engine tests/model/test_kernels.py tests/generator/test_sampler.py"
    # A test that breaks the card's context ends its process, and the next process goes on (tests/conftest.py).
    PROCESSES="--continue-on-collection-errors --max-worker-restart=20 --dist worksteal --durations=10 --timeout=120"
    # shellcheck disable=SC2086
    step tests 200 "$PYTHON" -m pytest $GPU_TESTS -m gpu -n 4 $PROCESSES
    # On a card the unmarked kernel tests run compiled rather than interpreted; compiling takes most of the time.
    # shellcheck disable=SC2086
    step tests-ops 170 "$PYTHON" -m pytest tests/ops tests/engine/test_kernels.py -m "not gpu" -n 12 $PROCESSES
fi

# sanitize TOOL SECONDS WHICH: the CUDA kernels alone on small shapes; the references of tests/cuda run on the CPU.
sanitize() {
    # Memory freed by the caching allocator would hide errors.
    step "sanitizer-$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all --report-api-errors no \
        "$PYTHON" -m pytest tests/cuda -m gpu -k "$3" -x -p no:xdist --timeout=200
}
if wanted sanitizer || wanted sanitizer-more; then
    if command -v compute-sanitizer > /dev/null; then
        SMALL="not long_codes and not launch_error"
        if wanted sanitizer; then
            sanitize memcheck 120 "$SMALL"
            # Hazards are of shared memory: the kernels that use it, in one number type.
            sanitize racecheck 120 "$SMALL and (bfloat16 or adam or hold)"
        fi
        if wanted sanitizer-more; then
            sanitize synccheck 120 "$SMALL"
            sanitize initcheck 200 "$SMALL"
        fi
    else
        echo "compute-sanitizer is not installed: skipped"
        echo "sanitizer,absent,0" >> "$RESULTS/steps.csv"
    fi
fi
if wanted compile; then
    step compile 300 "$PYTHON" bench/compile_kernels.py
    step compile-cuda 300 "$PYTHON" bench/compile_kernels.py --cuda
fi
if wanted first; then
    step first 120 "$PYTHON" -m bench.first --out "$RESULTS/first.csv"
fi
PLANS="plan+graph+fp8 plan+graph+tail6 plan"
if wanted model; then
    # Plans first: they compile in seconds, the published execution in a minute or two.
    # shellcheck disable=SC2086
    step model 420 "$PYTHON" -m bench.model --tasks decode --batch 8 1 --seconds 1 \
        --providers plan+graph published published+bf16 $PLANS --out "$RESULTS/model.csv"
    step model-forward 120 "$PYTHON" -m bench.model --tasks forward encode --batch 8 1 --seconds 1 \
        --providers plan+graph triton eager --out "$RESULTS/model-forward.csv"
fi
if wanted model-32; then
    step model-32 150 "$PYTHON" -m bench.model --tasks decode --batch 32 --seconds 1 \
        --providers plan+graph published --out "$RESULTS/model-32.csv"
fi
if wanted model-train; then
    step model-train 300 "$PYTHON" -m bench.model --tasks train --batch 8 --seconds 2 \
        --providers triton cuda eager published compile --out "$RESULTS/model-train.csv"
fi
if wanted ops; then
    step ops 150 "$PYTHON" bench/ops.py --skip compile --out "$RESULTS/ops.csv"
fi
if wanted ops-compile; then
    step ops-compile 500 "$PYTHON" bench/ops.py --out "$RESULTS/ops-compile.csv"
fi
if wanted components; then
    step components 60 "$PYTHON" -m bench.components --providers plan --out "$RESULTS/components.csv"
fi
if wanted tune; then
    step tune 120 "$PYTHON" bench/tune.py --repeats 10 --only "${TUNE:-}" --out "$RESULTS/tune.csv"
fi
if wanted profile; then
    step profile 120 "$PYTHON" bench/kernel_profile.py --skip compile --out "$RESULTS/profile.csv"
fi

if [[ ${#failed[@]} -gt 0 ]]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all steps done, results in $OUT"
