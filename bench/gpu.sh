#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds for the GPU at hand, runs the tests on it, the
# sanitizers on small cases, and every benchmark beside its baselines.
#
#   bench/gpu.sh RECORDS [PYTHON]
#
# RECORDS is the folder for records and logs; PYTHON (default: python3) must have torch with CUDA, and
# the packages of `pip install .[test]`. Nothing is installed. Each stage has its own time limit, so that
# one that hangs leaves the others their turn; the summary at the end says which failed.
set -uo pipefail
cd "$(dirname "$0")/.."
records=${1:?usage: bench/gpu.sh RECORDS [PYTHON]}
python=${2:-python3}
mkdir -p "$records"
failed=()

stage() {  # name, seconds, command...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    local start=$SECONDS
    if timeout "$limit" "$@" >"$records/$name.log" 2>&1; then
        echo "   passed in $((SECONDS - start)) s"
    else
        echo "   FAILED (exit code $?) after $((SECONDS - start)) s; the end of its log:"
        tail -25 "$records/$name.log"
        failed+=("$name")
    fi
}

sanitizer() {  # tool: the kernels at the small sizes of the tests, one process
    compute-sanitizer --tool "$1" --error-exitcode 9 --kernel-name regex:fastagg --target-processes all \
        "$python" -m pytest -q -x -p no:cacheprovider python_tests/cuda -m sanitize
}

export -f sanitizer
export python

if command -v nvidia-smi >/dev/null; then nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; fi
"$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
export FASTAGG_CUDA=1 OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1
stage build 300 "$python" setup.py build_ext --inplace
"$python" -m fastagg info
stage tests 420 "$python" -m pytest -q -p no:cacheprovider python_tests/cuda
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck; do
        stage "$tool" 240 bash -c "sanitizer $tool"
    done
else
    echo "== compute-sanitizer is not installed: left out"
fi
stage bench 480 "$python" -m bench.gpu.run --record "$records"
cat "$records/bench.log"
echo "records in $records"
if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
