#!/usr/bin/env bash
# Everything that needs a card, each step with a time limit, results into $OUT (default bench/results) as they come.
#
#   bash bench/on_gpu.sh                     all steps, about two hours
#   STEPS="tests ops" bash bench/on_gpu.sh   some, in this order, of: build info tests sanitizer sanitizer-more compile
#                                            first model model-32 forward options hi small train posttrain photographs
#                                            ops ops-compile tune components profile
#   PYTHON=...       the interpreter (default python3)
#   LIMIT_ops=120    another limit in seconds for the steps whose name starts with "ops"
#   TUNE=lfq         the sweeps of bench/tune.py whose name contains this
#   PHOTOS=FOLDER    what the step "photographs" trains on (default: those inside scikit-image and scikit-learn)
#   MINUTES=8        how long it trains (default 10)
#   BUDGET=520       seconds for everything: later steps get what is left, and none starts in the last twenty
#   PACK=1           $OUT gets one archive, results.tar.gz, renewed after every step, instead of the files
#   FLOWMO_COMMIT=.. what rows name as their commit, where the files travel without the history
#   REHEARSE=1       without a card: every step that a CPU can take, at tiny sizes, in a few minutes; the others say
#                    that they need a card. Numbers go to a temporary folder.
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
# Every call also needs FLOWMO_COMMIT=(what git rev-parse --short HEAD says here), left out below. The goals are an
# H200's: where cards of several kinds are lent, ask for that one by name, and for the same one in every call.
#
#   1. PACK=1 BUDGET=530 STEPS="build info tests sanitizer" bash bench/on_gpu.sh                    call limit 570
#   2. PACK=1 BUDGET=530 STEPS="build first model" bash bench/on_gpu.sh                             call limit 570
#   3. PACK=1 BUDGET=430 STEPS="build ops model-32 components forward" bash bench/on_gpu.sh         call limit 470
#
# Together at most 27 minutes, the start of the machine not counted. The rest of the goals table, on a second loan:
#
#   4. PACK=1 BUDGET=530 STEPS="build forward options" bash bench/on_gpu.sh                         call limit 570
#   5. PACK=1 BUDGET=530 STEPS="build train posttrain" bash bench/on_gpu.sh                         call limit 570
#   6. PACK=1 BUDGET=430 MINUTES=5 STEPS="build photographs small" bash bench/on_gpu.sh             call limit 470
set -u -o pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
ALL="build info tests sanitizer sanitizer-more compile first model model-32 forward options hi small train posttrain photographs ops ops-compile tune components profile"
STEPS=${STEPS:-$ALL}
BUDGET=${BUDGET:-1000000}
PACK=${PACK:-0}
REHEARSE=${REHEARSE:-0}
MINUTES=${MINUTES:-10}
PHOTOS=${PHOTOS:-samples}
[[ $REHEARSE == 1 ]] && OUT=$(mktemp -d)
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
RESULTS=$OUT
[[ $PACK == 1 ]] && RESULTS=$(mktemp -d)
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
failed=()

for name in $STEPS; do
    if [[ " $ALL " != *" $name "* ]]; then
        echo "STEPS: there is no step $name; there are $ALL"
        exit 2
    fi
done

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
    if [[ $REHEARSE == 1 && $status -eq 2 ]] && grep -q "there is none\|there is no CUDA" "$RESULTS/$name.log"; then
        echo "== $name needs a card"
    elif [[ $status -ne 0 ]]; then
        failed+=("$name ($status)")
    fi
    pack
}

echo "step,status,seconds" > "$RESULTS/steps.csv"
if [[ -z ${FLOWMO_COMMIT:-} ]] && ! git rev-parse HEAD > /dev/null 2>&1; then
    echo "no history here and no FLOWMO_COMMIT: rows will name no commit"
fi
if [[ $REHEARSE != 1 ]] && ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "there is no CUDA card: nothing to run (REHEARSE=1 runs tiny sizes on the CPU)"
    exit 2
fi
if compgen -G ".whl/*.whl" > /dev/null; then
    SITE=$(mktemp -d)
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$SITE" .whl/*.whl &&
        export PYTHONPATH="$SITE:$PYTHONPATH"
fi

LO=lo HI=hi SMALL=small THIRTY_TWO=32
if [[ $REHEARSE == 1 ]]; then
    LO=tiny HI=tiny SMALL=tiny THIRTY_TWO=3
fi
BASELINES="published published+bf16"
OPTIONS="plan+graph+tail6 plan+graph+tail10 plan+graph+cache plan+graph+attention8"
FP8="plan+graph+fp8"
OPTIONS="$OPTIONS $FP8 plan+graph+fp8+attention8 plan+graph+fp8+tail6"
COMPILE=compile
[[ $REHEARSE == 1 ]] && COMPILE=""

# measure NAME LIMIT SECONDS ARGUMENTS...: rows of bench/model.py into NAME.csv, about so many seconds a row.
# Plans come first in every list: they compile in seconds, the published execution in a minute or two.
measure() {
    local name=$1 limit=$2 seconds=$3
    shift 3
    [[ $REHEARSE == 1 ]] && seconds=0.01 && set -- "${@//plan+graph/plan}"
    step "$name" "$limit" "$PYTHON" -m bench.model --seconds "$seconds" --out "$RESULTS/$name.csv" "$@"
}

# build_once: the extension for this card alone, which takes a fraction of the time of all architectures; one that was
# built here from the same sources stays, since files that travel may come with a new date.
build_once() {
    local arch sources mark=build/on_gpu.sources
    arch=$("$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"sm_{a}{b}" + "a" * (a == 9))')
    arch=${FLOWMO_CUDA_ARCHS:-$arch}
    sources="$arch $("$PYTHON" --version) $(cat setup.py csrc/* | sha256sum)"
    if [[ -f $mark && $(< "$mark") == "$sources" ]] && compgen -G "kernels/flowmo_kernels/_C*.so" > /dev/null; then
        echo "== build: there already"
        return
    fi
    step build 240 env FLOWMO_CUDA=1 FLOWMO_CUDA_ARCHS="$arch" "$PYTHON" setup.py -q build_ext --inplace
    grep -q "^build,0," "$RESULTS/steps.csv" && mkdir -p build && echo "$sources" > "$mark"
}

# sanitize TOOL SECONDS WHICH: the CUDA kernels alone on small shapes; the references of tests/cuda run on the CPU.
sanitize() {
    if ! command -v compute-sanitizer > /dev/null; then
        echo "compute-sanitizer is not installed: skipped"
        echo "sanitizer-$1,absent,0" >> "$RESULTS/steps.csv"
        return
    fi
    # Memory freed by the caching allocator would hide errors.
    step "sanitizer-$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all --report-api-errors no \
        "$PYTHON" -m pytest tests/cuda -m gpu -k "$3" -x -p no:xdist --timeout=200
}
SMALL_SHAPES="not long_codes and not launch_error"

GPU_TESTS="tests/ops tests/cuda tests/engine tests/model/test_kernels.py tests/generator/test_sampler.py tests/training/test_step.py"
GPU_TESTS+=" tests/data/test_loader.py tests/user/test_tiles.py"
# A test that breaks the card's context ends its process, and the next process goes on (tests/conftest.py).
PROCESSES="--continue-on-collection-errors --max-worker-restart=20 --dist worksteal --durations=10 --timeout=120"
[[ $REHEARSE == 1 ]] && PROCESSES="--collect-only -qq"

# photographs: `small` at 256 x 256: loss, images/s and utilisation in metrics.jsonl, grids of reconstructions, one page.
# As the quickstart, which also has minutes: high noise, a large rate, a short average, few sampling steps.
photographs() {
    local run sizes training
    run=$(mktemp -d)/run
    sizes="data.batch=32 data.scales=[256,320,384,512] data.workers=8"
    [[ $REHEARSE == 1 ]] && sizes="data.batch=8 data.scales=[32,64] data.workers=0" MINUTES=0.05
    training="$SMALL data.path=$PHOTOS $sizes data.flip=true noise.mean=2.0 loss.perceptual=none optim.lr=1e-3
        optim.schedule=cosine optim.warmup=200 optim.ema_decay=0.995 sampler.steps=4 trainer.steps=1000000
        trainer.sample_every=200 trainer.save_every=1000000 trainer.log_every=20"
    # shellcheck disable=SC2086
    step photographs $((60 * ${MINUTES%.*} + 120)) "$PYTHON" -m flowmo.train $training trainer.minutes="$MINUTES" run="$run"
    step photographs-page 60 "$PYTHON" -m flowmo.training.report "$run" --out "$RESULTS/photographs.html"
    cp "$run"/metrics.jsonl "$run"/config.yaml "$RESULTS"/ && cp "$(ls "$run"/samples/*.png | tail -1)" "$RESULTS/photographs.png"
    rm -rf "$run"
    pack
}

# shellcheck disable=SC2086
run_step() {
    case $1 in
    build)
        [[ $REHEARSE == 1 ]] || build_once
        ;;
    info)
        step info 60 "$PYTHON" -c 'import json, bench.timing as t, flowmo_kernels as k; print(json.dumps(t.environment())); print(k.describe())'
        [[ $REHEARSE == 1 ]] || step info-card 20 bash -c 'nvidia-smi -q && "$0" -m pip list' "$PYTHON"
        ;;
    tests)
        step tests 200 "$PYTHON" -m pytest $GPU_TESTS -m gpu -n 4 $PROCESSES
        # On a card the unmarked kernel tests run compiled rather than interpreted; compiling takes most of the time.
        step tests-ops 170 "$PYTHON" -m pytest tests/ops tests/engine/test_kernels.py -m "not gpu" -n 12 $PROCESSES
        ;;
    sanitizer)
        [[ $REHEARSE == 1 ]] && return
        sanitize memcheck 120 "$SMALL_SHAPES"
        # Hazards are of shared memory: the kernels that use it, in one number type.
        sanitize racecheck 120 "$SMALL_SHAPES and (bfloat16 or adam or hold)"
        ;;
    sanitizer-more)
        [[ $REHEARSE == 1 ]] && return
        sanitize synccheck 120 "$SMALL_SHAPES"
        sanitize initcheck 200 "$SMALL_SHAPES"
        ;;
    compile)
        [[ $REHEARSE == 1 ]] && return
        step compile 300 "$PYTHON" bench/compile_kernels.py
        step compile-cuda 300 "$PYTHON" bench/compile_kernels.py --cuda
        ;;
    first)
        step first 140 "$PYTHON" -m bench.first --out "$RESULTS/first.csv"
        ;;
    model)
        measure model 420 1 --model $LO --tasks decode --batch 8 1 \
            --providers plan+graph published plan+graph+overlap plan published+bf16
        ;;
    model-32)
        measure model-32 200 1 --model $LO --tasks decode --batch $THIRTY_TWO --providers plan+graph published
        ;;
    forward)
        measure model-forward 300 1 --model $LO --tasks forward encode --batch 8 1 $THIRTY_TWO \
            --providers plan+graph $FP8 plan+graph+overlap plan+graph+attention-triton triton $BASELINES eager
        ;;
    options)
        measure model-options 240 0.5 --model $LO --tasks decode --batch 8 1 --providers plan+graph $OPTIONS
        measure model-32-options 150 0.5 --model $LO --tasks decode --batch $THIRTY_TWO \
            --providers plan+graph $FP8 plan+graph+tail6
        ;;
    hi)
        measure model-hi 900 1 --model $HI --tasks forward decode encode --batch 8 1 $THIRTY_TWO \
            --providers plan+graph $BASELINES
        ;;
    small)
        measure model-small 900 1 --model $SMALL --tasks forward decode encode --batch 8 1 $THIRTY_TWO \
            --providers plan+graph $BASELINES
        ;;
    train)
        measure model-train 400 2 --model $LO --tasks train --batch 8 --providers triton published cuda eager $COMPILE
        ;;
    posttrain)
        # What ten tensors a block, sixteen blocks and nine velocities leave room for.
        CHAIN_BATCH=$("$PYTHON" -c 'import torch; print(4 if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 1e11 else 2)')
        measure model-posttrain 400 2 --model $LO --tasks posttrain --batch "$CHAIN_BATCH" --providers triton published eager
        ;;
    photographs)
        photographs
        ;;
    ops)
        step ops 150 "$PYTHON" bench/ops.py --skip compile --out "$RESULTS/ops.csv"
        ;;
    ops-compile)
        step ops-compile 500 "$PYTHON" bench/ops.py --out "$RESULTS/ops-compile.csv"
        ;;
    components)
        step components 100 "$PYTHON" -m bench.components --model $LO --providers plan published --out "$RESULTS/components.csv"
        ;;
    tune)
        step tune 120 "$PYTHON" bench/tune.py --repeats 10 --only "${TUNE:-}" --out "$RESULTS/tune.csv"
        ;;
    profile)
        step profile 120 "$PYTHON" bench/kernel_profile.py --skip compile --out "$RESULTS/profile.csv"
        ;;
    esac
}

for name in $STEPS; do
    run_step "$name"
done

if [[ ${#failed[@]} -gt 0 ]]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all steps done, results in $OUT"
