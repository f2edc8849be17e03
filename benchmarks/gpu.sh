#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command: tests, resources, benchmarks, tables.
#
#     benchmarks/gpu.sh                 on a machine with one GPU; appends to benchmarks/results
#     OUT=folder benchmarks/gpu.sh      results go to that folder instead
#     benchmarks/gpu.sh --toy           every stage at toy sizes, without a GPU; records nothing
#
# Needs torch, triton, transformers and peft, and nothing from a network. What an image lacks beside
# them can be carried in .gpu-site (ignored by git), made where there is a network:
#
#     pip install --target .gpu-site --no-deps pytest pytest-benchmark pluggy iniconfig packaging \
#         pygments py-cpuinfo hypothesis sortedcontainers torchmetrics lightning-utilities \
#         typer click shellingham rich markdown-it-py mdurl jinja2 markupsafe
#     pip install --target .gpu-site --no-deps scikit-learn joblib threadpoolctl scipy pyarrow
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
TOY=""
[ "${1:-}" = "--toy" ] && TOY=1
export HF_HUB_OFFLINE=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
[ -d .gpu-site ] && export PYTHONPATH="$PYTHONPATH:$PWD/.gpu-site"
unset TRITON_INTERPRET
failed=()

stage() { # seconds, name, command...
  local limit=$1 name=$2 started=$SECONDS
  shift 2
  echo "=== $name"
  if timeout "$limit" "$@"; then
    echo "--- $name: passed, $((SECONDS - started)) s"
  else
    echo "--- $name: FAILED with status $?, $((SECONDS - started)) s"
    failed+=("$name")
  fi
}

gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
if [ -z "$gpu" ] && [ -z "$TOY" ]; then
  echo "no GPU that torch can see; run this on a machine with one, or try: benchmarks/gpu.sh --toy" >&2
  exit 2
fi
"$PYTHON" -c 'from benchmarks.environment import environment; import json; print(json.dumps(environment(), indent=1))'

bench=(-m pytest -W default -q -p no:cacheprovider --benchmark-columns=median,iqr,rounds)
if [ -n "$TOY" ]; then
  bench+=(--toy)
  arch=sm_90
else
  bench+=(--record)
  arch=$("$PYTHON" -c 'from tfb_kernels.launch import architecture; print(architecture())')
  [ -n "${OUT:-}" ] && export TFB_BENCH_RESULTS="$OUT/results"
fi
case $arch in sm_80 | sm_90 | gfx942) compiled=$arch ;; *) compiled=sm_80 ;; esac

# Wrong numbers are worse than none: the tests decide whether anything is timed.
stage 180 "kernel tests" "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels --ignore tests/kernels/test_aot.py
if [ ${#failed[@]} -gt 0 ] && [ -z "$TOY" ]; then
  echo "tests failed; nothing is timed" >&2
  exit 1
fi
if [ -n "$gpu" ] && command -v compute-sanitizer > /dev/null; then
  stage 90 "memcheck" compute-sanitizer --tool memcheck --error-exitcode 3 \
    "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels/test_gpu.py -k bitwise
fi
stage 120 "resources" "$PYTHON" -m tfb_kernels.aot --check --quick --dtype bf16 --arch "$compiled"
for suite in predictive passes linear; do
  [ -f "benchmarks/test_$suite.py" ] && stage 300 "$suite" "$PYTHON" "${bench[@]}" "benchmarks/test_$suite.py"
done
stage 60 "tables" "$PYTHON" -m benchmarks.report ${TFB_BENCH_RESULTS:+--results "$TFB_BENCH_RESULTS"}

if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "all stages passed in $SECONDS s"
