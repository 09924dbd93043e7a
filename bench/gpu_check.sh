#!/usr/bin/env bash
# Everything that can only be known on a GPU, in one go: environment, build, tests, compute-sanitizer, benchmarks.
#
#   bench/gpu_check.sh                        # all parts, under nine minutes
#   bench/gpu_check.sh tests sanitizer        # some of: tests sanitizer bench
#   bench/gpu_check.sh results/h200 bench     # where the log and the raw JSON go; default $OUT, or bench/results/local
#   bench/gpu_check.sh --dry-run              # the same steps on tiny inputs, interpreted and emulated, without a GPU
#
# Both backends for GPUs are built, tested and measured: CUDA, where there is nvcc, and Triton. Each step has its own time
# limit and the next one runs whatever became of it; figures are written as they come, a summary comes last, and the exit
# status says whether all steps passed. Nothing is installed but the wheels in .whl/, if there are any, into a folder of
# their own; no setting of the GPU is changed. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

usage() {
    echo "usage: bench/gpu_check.sh [--dry-run] [FOLDER/] [tests] [sanitizer] [bench]" >&2
    exit 2
}

parts=()
dry=0
out=${OUT:-bench/results/local}
for argument in "$@"; do
    case "$argument" in
    tests | sanitizer | bench) parts+=("$argument") ;;
    --dry-run) dry=1 ;;
    */*) out=$argument ;;
    *) usage ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(tests sanitizer bench)
wanted() { [[ " ${parts[*]} " == *" $1 "* ]]; }

python=${PYTHON:-python3}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
log=$out/log.txt
: >"$log"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
if compgen -G ".whl/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" .whl/*.whl \
        >>"$log" 2>&1 && export PYTHONPATH="$PYTHONPATH:$scratch/site"
fi
if [ "$dry" = 1 ]; then
    export TRITON_INTERPRET=1 FASTMERGE_CUDA_EMULATED=1
fi

# -- steps -------------------------------------------------------------------------------------------------------------

summary=()
failed=0
began=$SECONDS

# step NAME LIMIT COMMAND...: run a command for at most LIMIT seconds, its output also into the log.
step() {
    local name=$1 limit=$2 status start=$SECONDS verdict
    shift 2
    printf '\n== %s (at most %s s): %s\n' "$name" "$limit" "$*" | tee -a "$log"
    # An interrupt lets pytest tell what it has found so far.
    timeout --signal=INT --kill-after=10 "$limit" bash -c 'set -o pipefail; "$@"' _ "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    case $status in
    0) verdict=passed ;;
    124 | 137) verdict="stopped at its limit" ;;
    *) verdict="failed ($status)" ;;
    esac
    [ "$status" = 0 ] || failed=1
    summary+=("$(printf '%-12s %-21s %4s s' "$name" "$verdict" $((SECONDS - start)))")
}

skip() {
    summary+=("$(printf '%-12s skipped: %s' "$1" "$2")")
}

# The repository's pytest settings name plugins that may be missing here, and forbid what they do not know.
pytest=("$python" -m pytest -o "addopts=--import-mode=importlib" -p no:cacheprovider -W ignore::pytest.PytestConfigWarning
    --continue-on-collection-errors -q -ra --tb=short)
has() { "$python" -c "import $1" 2>/dev/null; }
workers=()
if has xdist; then
    workers=(-n 8 --dist worksteal)
fi

# Not every shell that nvcc was installed for knows where.
if ! command -v nvcc >/dev/null; then
    for folder in "${CUDA_HOME:-/usr/local/cuda}/bin" /usr/local/cuda/bin; do
        if [ -x "$folder/nvcc" ]; then
            export PATH="$PATH:$folder"
            break
        fi
    done
fi

environment() {
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit --format=csv
    else
        echo "nvidia-smi: not here"
    fi
    nvcc --version | tail -n 2 || echo "nvcc: not here"
    # All in one process: to import torch from a cold disk takes long.
    "$python" - <<'PYTHON'
import importlib.metadata, platform, runpy, sys
print("python", platform.python_version(), sys.executable, flush=True)
needed = {
    "the build": ("setuptools", "pybind11"),
    "merges": ("torch", "triton", "numpy", "safetensors", "pydantic", "blake3", "pyyaml", "huggingface_hub"),
    "the command line": ("typer", "rich"),
    "the tests": ("pytest", "hypothesis"),
    "drawn tests in time": ("pytest-xdist",),
}
missing = []
for purpose, names in needed.items():
    for name in names:
        try:
            version = importlib.metadata.version(name)
            print(name, version)
            if name == "setuptools" and int(version.split(".")[0]) < 77:
                missing.append("setuptools 77 or newer for the build")
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{name} for {purpose}")
print("MISSING:", ", ".join(missing) or "nothing", flush=True)
import torch
print("cuda", torch.version.cuda, "available", torch.cuda.is_available(), flush=True)
sys.argv = ["fastmerge", "env"]
runpy.run_module("fastmerge", run_name="__main__")
PYTHON
}

gpu_tests() {
    local files
    mapfile -t files < <(grep -rlE "pytest\.mark\.gpu" tests --include='*.py' | grep -v conftest.py | sed 's,tests/gpu/.*,tests/gpu,' | sort -u)
    printf '%s\n' "${files[@]}"
}

# compute-sanitizer sees each tensor's bounds only where torch does not cut tensors from larger blocks.
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
sanitized() {
    local tool=$1
    shift
    if [ "$dry" = 1 ]; then
        "$@"
    else
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 "$@"
    fi
}

# kept FILE COMMAND...: what the command prints, into a file, too.
kept() {
    local file=$1
    shift
    "$@" | tee "$file"
}

export -f environment sanitized kept
export python dry sanitizer

step environment 45 environment
if [ "$dry" = 1 ]; then
    step build-cpu 30 env FASTMERGE_CUDA=0 "$python" setup.py --version
    step build-cuda 30 env FASTMERGE_CPU=0 "$python" setup.py --version
else
    # For this GPU alone: another would take the longer list of setup.py.
    capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null || echo 90)
    [ "$capability" != 90 ] || capability=90a
    # Each by itself, so that one that fails leaves the other.
    build=("$python" setup.py -q build_ext --inplace)
    step build-cpu 35 env FASTMERGE_CPU=1 FASTMERGE_CUDA=0 "${build[@]}"
    step build-cuda 45 env FASTMERGE_CPU=0 FASTMERGE_CUDA=1 FASTMERGE_CUDA_ARCHITECTURES="$capability" "${build[@]}"
fi

once=test_every_registered_op_gives_the_references_bits
if [ "$dry" = 1 ]; then
    export FASTMERGE_GPU_EXAMPLES=1
    variant="by_cuda and interpreter"
else
    export FASTMERGE_GPU_EXAMPLES=${FASTMERGE_GPU_EXAMPLES:-40}
    variant="by_cuda and not interpreter"
fi

if wanted tests; then
    if [ "$dry" = 1 ]; then
        step tests 300 "${pytest[@]}" -k "interpreter and (huge or graph)" --junitxml="$out/tests.xml" tests/gpu
        step drawn 300 "${pytest[@]}" -k "interpreter and test_equal_bits and histogram" --junitxml="$out/drawn.xml" tests/gpu
    else
        # Drawn calls meet hundreds of kernels, whose compilation takes a second each: that wants all cores.
        mapfile -t places < <(gpu_tests)
        step tests 85 "${pytest[@]}" -m gpu -k "not test_equal_bits" --junitxml="$out/tests.xml" "${places[@]}"
        step drawn 60 "${pytest[@]}" -m gpu -k test_equal_bits "${workers[@]}" --junitxml="$out/drawn.xml" "${places[@]}"
    fi
fi

# Of CUDA's kernels alone: Triton's are compiled under its eyes, which takes all the time. racecheck may name two of them
# that read, with `peek` of device.h, what others change by atomic operations meanwhile; any value from before will do
# there: count_window_kernel (whether a place of the cache is taken) and pcb_extremes_kernel (the edges so far).
if wanted sanitizer; then
    if [ "$dry" = 1 ] || [ -x "$sanitizer" ]; then
        for tool in memcheck racecheck; do
            step "$tool" 60 sanitized "$tool" "${pytest[@]}" -k "$once and $variant" tests/gpu
        done
    else
        skip memcheck "no compute-sanitizer here"
        skip racecheck "no compute-sanitizer here"
    fi
fi

if wanted bench; then
    if [ "$dry" = 1 ]; then
        tiny=(--device cpu --elements 2048 --repeat 1 --models 2 3 --only consensus histogram)
        for backend in cuda triton; do
            step "$backend" 300 "$python" bench/gpu.py "${tiny[@]}" --backend "$backend" --json "$out/$backend.json"
        done
        step report 60 "$python" bench/report.py "$out/cuda.json" "$out/triton.json"
        step fastmerge 120 kept "$out/ops.json" "$python" -m fastmerge bench --op count_nonfinite --size 1000 --json
    else
        for backend in cuda triton; do
            step "$backend" 65 "$python" bench/gpu.py --backend "$backend" --seconds 48 --json "$out/$backend.json"
        done
        step report 5 "$python" bench/report.py "$out/cuda.json" "$out/triton.json"
        step fastmerge 15 kept "$out/ops.json" "$python" -m fastmerge bench --device cuda --json
    fi
fi

# -- summary -----------------------------------------------------------------------------------------------------------

{
    printf '\n== summary (%s s in all), raw figures in %s\n' $((SECONDS - began)) "$out"
    printf '%s\n' "${summary[@]}"
    grep -hE "^(FAILED|ERROR) " "$log" | sort -u | cut -c 1-160 | head -20
    grep -hE "(passed|failed|skipped).* in [0-9.]+s|RED: |MISSED|(ERROR|RACECHECK) SUMMARY|^MISSING: |^CUDA.s speed|GB/s  .*GB/s| below a bar" "$log" |
        cut -c 1-200 | head -60
} | tee -a "$log" >"$scratch/summary"
cat "$scratch/summary"
exit "$failed"
