#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds for the GPU at hand, runs the tests on it, the
# sanitizers on small cases, and every benchmark beside its baselines.
#
#   bench/gpu.sh RECORDS [PYTHON [STAGE...]]
#
# RECORDS is the folder for records and logs; PYTHON (default: python3) must have torch with CUDA, and
# the packages of `pip install .[test]` (the linters apart). Nothing is installed, nothing downloaded.
# A STAGE is one of build, tests, sanitize and bench, or a part of one as its line names it (tests-svd,
# sanitize-racecheck, bench-exact); all of them by default. Each part is a process of its own with a limit
# of its own: one that hangs, or breaks the GPU's context, leaves the others their turn. The summary at
# the end says which failed.
set -uo pipefail
cd "$(dirname "$0")/.."
usage="usage: bench/gpu.sh RECORDS [PYTHON [STAGE...]]"
records=${1:?$usage}
python=${2:-python3}
stages=("${@:3}")
mkdir -p "$records"
records=$(cd "$records" && pwd)
failed=()
run=0

wanted() {  # part: whether it, or the stage that it belongs to, was asked for
    ((${#stages[@]} == 0)) && return 0
    local stage
    for stage in "${stages[@]}"; do
        [[ $1 == "$stage" || ${1%%-*} == "$stage" ]] && return 0
    done
    return 1
}

part() {  # name, seconds, command...
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    wanted "$name" || return 0
    run=$((run + 1))
    echo "== $name"
    timeout --kill-after=10 "$limit" "$@" >"$records/$name.log" 2>&1
    status=$?
    if ((status == 0)); then
        echo "   passed in $((SECONDS - start)) s"
        case $name in
            tests-*) tail -n 1 "$records/$name.log" ;;
            bench-* | build-info) cat "$records/$name.log" ;;
        esac
    else
        echo "   FAILED (exit code $status) after $((SECONDS - start)) s; the end of its log:"
        tail -n 25 "$records/$name.log"
        failed+=("$name")
    fi
}

export FASTAGG_CUDA=1 OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1
# Each test's place, should one hang.
pytest=("$python" -m pytest -q -p no:cacheprovider -o faulthandler_timeout=100)

if command -v nvidia-smi >/dev/null; then nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; fi
"$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' || exit 1

part build 400 "$python" setup.py build_ext --inplace
part build-info 60 "$python" -m fastagg info

part tests-build 200 "${pytest[@]}" python_tests/test_{cuda_build,extension,info}.py
for file in python_tests/cuda/test_cuda_*.py; do
    name=${file##*/test_cuda_}
    part "tests-${name%.py}" 300 "${pytest[@]}" --durations=5 "$file"
done

sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer)
if [[ -n $sanitizer ]]; then
    filter=(--kernel-regex kns=fastagg)  # not torch's own kernels, where this version can leave them out
    "$sanitizer" "${filter[@]}" --require-cuda-init no true >/dev/null 2>&1 || filter=()
    for tool in memcheck racecheck synccheck; do
        # Without torch's pool of memory every tensor has bounds of its own.
        part "sanitize-$tool" 400 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            "$sanitizer" --tool "$tool" "${filter[@]}" --error-exitcode 9 --target-processes all \
            "${pytest[@]}" -x -o faulthandler_timeout=0 python_tests/cuda -m sanitize
    done
else
    wanted sanitize && echo "== compute-sanitizer is not installed: left out"
fi

# A record and its plots for each, in a folder of its own: one that fails leaves the others'.
for op in stack reconstruct merge svd redistribute round update_gram end-to-end; do
    part "bench-$op" 400 "$python" -m fastagg bench --device cuda --op "$op" --out "$records/bench-$op" \
        --case llama7b-all-10 --case llama7b-all-100 --case square-4096 --case tinyllama-qv-10
done
part bench-growth 500 "$python" -m fastagg bench --device cuda --quick --out "$records/bench-growth" \
    --op stack --op reconstruct --op svd --case 'square-*' --case 'ranks-*' --case 'clients-*'

echo "$run parts run; records and logs in $records"
if ((run == 0)); then
    echo "no such stage: ${stages[*]}; $usage" >&2
    exit 2
fi
if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
