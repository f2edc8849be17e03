#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command: tests, resources, benchmarks, tables.
#
#     benchmarks/gpu.sh                 on a machine with one GPU; appends to benchmarks/results
#     OUT=folder benchmarks/gpu.sh      results go to OUT/results instead
#     benchmarks/gpu.sh --toy           every stage at toy sizes, without a GPU; records nothing
#     BUDGET=1800 benchmarks/gpu.sh     more seconds than the default, which stays below 9 minutes;
#                                       rows are kept as they come, so what the time cuts off is
#                                       only the rest of a suite
#
# Needs torch, triton, transformers and peft, and nothing from a network. What an image lacks beside
# them can be carried in .gpu-site (ignored by git), made where there is a network:
#
#     pip install --target .gpu-site --no-deps pytest pytest-benchmark pluggy iniconfig packaging \
#         pygments py-cpuinfo hypothesis sortedcontainers torchmetrics lightning-utilities \
#         typer click shellingham rich markdown-it-py mdurl jinja2 markupsafe
#     pip install --target .gpu-site --no-deps scikit-learn joblib threadpoolctl scipy pyarrow
#
# The "predict" suite uses the folder "shared" beside the repository, or TFB_SHARED, and is skipped
# without it. TFB_COMMIT names the commit in the rows where a copy of the sources has no .git.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-525}
TOY=""
[ "${1:-}" = "--toy" ] && TOY=1
export HF_HUB_OFFLINE=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# PYTHONPATH comes before the image: carry only what it lacks.
[ -d .gpu-site ] && export PYTHONPATH="$PYTHONPATH:$PWD/.gpu-site"
unset TRITON_INTERPRET TFB_BENCH_RECORD TFB_BENCH_RESULTS
failed=()

stage() { # seconds, name, command...
  local limit=$1 name=$2 started=$SECONDS left=$((BUDGET - SECONDS)) status
  shift 2
  if [ "$left" -lt 5 ]; then
    echo "--- $name: NOT RUN, the $BUDGET s are spent"
    failed+=("$name (not run)")
    return
  fi
  echo "=== $name"
  timeout --kill-after=10 $((limit < left ? limit : left)) "$@"
  status=$?
  if [ $status -eq 0 ]; then
    echo "--- $name: passed, $((SECONDS - started)) s"
  elif [ $status -eq 124 ] || [ $status -eq 137 ]; then
    echo "--- $name: OUT OF TIME, $((SECONDS - started)) s; finished points are kept"
    failed+=("$name (out of time)")
  else
    echo "--- $name: FAILED with status $status, $((SECONDS - started)) s"
    failed+=("$name")
  fi
}

if ! gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")'); then
  echo "$PYTHON cannot import torch; PYTHON=... chooses another interpreter" >&2
  exit 2
fi
if [ -z "$gpu" ] && [ -z "$TOY" ]; then
  echo "no GPU that torch can see; run this on a machine with one, or try: benchmarks/gpu.sh --toy" >&2
  exit 2
fi
"$PYTHON" -c 'from benchmarks.environment import environment; import json; print(json.dumps(environment(), indent=1))'

bench=(-m pytest -W default -q -p no:cacheprovider --benchmark-only --benchmark-quiet --record)
tables=(-m benchmarks.report)
if [ -n "$TOY" ]; then
  bench+=(--toy --threads 1)
  arch=sm_90
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  export TFB_BENCH_RESULTS="$scratch"
  tables+=(--toy)
else
  arch=$("$PYTHON" -c 'from tfb_kernels.launch import architecture; print(architecture())')
  [ -n "${OUT:-}" ] && export TFB_BENCH_RESULTS="$OUT/results"
fi
# A card that the resource gate does not know gets the oldest one's check.
case $arch in sm_80 | sm_90 | gfx942) compiled=$arch ;; *) compiled=sm_80 ;; esac

# Wrong numbers are worse than none: the tests decide whether anything is timed.
stage 180 "kernel tests" "$PYTHON" -m pytest -x -q -W default -p no:cacheprovider tests/kernels \
  --ignore tests/kernels/test_aot.py
if [ ${#failed[@]} -gt 0 ] && [ -z "$TOY" ]; then
  echo "tests failed; nothing is timed" >&2
  exit 1
fi
if [ -n "$gpu" ] && command -v compute-sanitizer > /dev/null; then
  stage 60 "memcheck" compute-sanitizer --tool memcheck --error-exitcode 3 \
    "$PYTHON" -m pytest -q -W default -p no:cacheprovider tests/kernels/test_gpu.py -k bitwise
fi
stage 60 "resources" "$PYTHON" -m tfb_kernels.aot --check --quick --dtype bf16 --arch "$compiled"
# In order of what a short run must not miss; "passes" and "score_large", at 8B parameters, are the
# longest by far: BUDGET=1000 has time for both.
for suite in linear predictive predict passes score_large; do
  [ -f "benchmarks/test_$suite.py" ] && stage 300 "$suite" "$PYTHON" "${bench[@]}" "benchmarks/test_$suite.py"
done
# Made of what is there, also when the time is spent.
BUDGET=$((SECONDS + 60))
stage 60 "tables" "$PYTHON" "${tables[@]}" ${TFB_BENCH_RESULTS:+--results "$TFB_BENCH_RESULTS"}

if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "all stages passed in $SECONDS s"
