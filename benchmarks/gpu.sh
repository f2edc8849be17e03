#!/usr/bin/env bash
# What only a GPU can tell: stages that stand alone, the most valuable first, each with a limit.
#
#     benchmarks/gpu.sh --plan               the stages in order, with their limits
#     benchmarks/gpu.sh --stage smoke        one of them; --stage may be given several times
#     benchmarks/gpu.sh                      all of them, one after another, whatever fails
#     benchmarks/gpu.sh --toy [--stage S]    a dry run at toy sizes, which needs no GPU
#
# Rows are appended to the folder OUT (default: benchmarks/results) as they come, so what a limit
# cuts off is only the rest; beside them a stage's whole output, STAGE.log, and after the sweep a
# copy of launch.json. A dry run's folder is temporary unless OUT names one.
#
# Needs torch, triton, transformers, peft, pytest, pytest-benchmark, hypothesis and what tfb needs,
# nvidia-ml-py for energy, and no network. Packages that an image lacks can come from a folder on
# PYTHONPATH, made elsewhere by pip install --target. PYTHON names the interpreter. A copy of the
# sources without .git needs TFB_COMMIT, the commit that rows name. Real models and data ("predict")
# come from TFB_SHARED, from a copy in the folder "shared" of the repository, or from the one beside
# it; else they are skipped.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

plan() { # name, seconds, what it does
  cat << 'END'
smoke     120  every path against float64; one layer at 12 points, with 2 to 100 draws; kernels
sweep     300  tile configurations and the threshold between paths, into launch.json
model     240  8B parameters: full, tail, last layer, naive loop, and their kernels
decode    240  the same model writes: ten draws in CUDA graphs, and their kernels
score     150  hours and energy of a million prompts
predict   120  predictive_reduction against torch; real models, small ones, against PEFT loops
tests     150  tests/kernels, in parallel where pytest-xdist is there
memcheck  90   compute-sanitizer's memcheck of the kernels at ragged sizes
racecheck 90   its racecheck
END
}

usage() {
  echo "$1; try: benchmarks/gpu.sh [--plan] [--toy] [--stage NAME]..." >&2
  exit 2
}

toy="" only=""
while [ $# -gt 0 ]; do
  case $1 in
    --plan)
      plan
      exit
      ;;
    --toy) toy=1 ;;
    --stage)
      [ $# -gt 1 ] || usage "--stage needs a name"
      shift
      only="$only $1 "
      plan | grep -q "^$1 " || usage "no stage '$1': $(plan | cut -d' ' -f1 | xargs)"
      ;;
    *) usage "unknown argument '$1'" ;;
  esac
  shift
done

PYTHON=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PATH=$PATH:/usr/local/cuda/bin # compute-sanitizer, where an image leaves it out
unset TRITON_INTERPRET
if ! gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.is_available())'); then
  echo "$PYTHON cannot import torch; PYTHON=... chooses another interpreter" >&2
  exit 2
fi
if [ -z "$toy" ]; then
  [ "$gpu" = True ] || usage "no GPU that torch can see"
  if ! git rev-parse HEAD > /dev/null 2>&1 && [ -z "${TFB_COMMIT:-}" ]; then
    echo "no .git here: TFB_COMMIT must name the commit of these sources, for the rows" >&2
    exit 2
  fi
fi
if [ -n "$toy" ] && [ -z "${OUT:-}" ]; then
  OUT=$(mktemp -d)
  trap 'rm -rf "$OUT"' EXIT
fi
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
export TFB_BENCH_RESULTS=$OUT

NOT_RUN=77
pytest=("$PYTHON" -m pytest -W default -q -p no:cacheprovider)
bench=("${pytest[@]}" --benchmark-only --benchmark-quiet --record ${toy:+--toy --threads 1})
sanitized() {
  local check=("${pytest[@]}" tests/kernels/test_triton.py tests/kernels/test_triton_merge.py
    -k "ragged and bfloat16 and (131 or test_triton_merge)")
  # Allocations of their own, since a sanitizer sees nothing inside a segment of torch's.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # this is a subshell
  if [ -n "$toy" ]; then
    "${run[@]}" "${check[@]}"
  elif command -v compute-sanitizer > /dev/null; then
    "${run[@]}" compute-sanitizer --tool "$1" --error-exitcode 3 "${check[@]}"
  else
    echo "compute-sanitizer is not on the PATH"
    return $NOT_RUN
  fi
}

stage() { # name
  case $1 in
    smoke)
      # The profile comes last: what follows a profiler in its process is slowed.
      "${run[@]}" "${bench[@]}" benchmarks/kernels/test_linear.py \
        benchmarks/kernels/test_profile.py
      ;;
    sweep)
      [ "$gpu" = True ] || export TRITON_INTERPRET=1 # a dry run, in a subshell
      "${run[@]}" "$PYTHON" -m benchmarks.kernels.sweep ${toy:+--toy}
      ;;
    model) "${run[@]}" "${bench[@]}" benchmarks/inference/test_model.py ;;
    decode) "${run[@]}" "${bench[@]}" benchmarks/generation/test_decoding.py ;;
    predict)
      "${run[@]}" "${bench[@]}" benchmarks/kernels/test_predictive.py \
        benchmarks/inference/test_predict.py
      ;;
    score) "${run[@]}" "${bench[@]}" benchmarks/scoring/test_score_large.py ;;
    tests)
      local how=(tests/kernels/test_gpu.py)
      [ -n "$toy" ] || how=(tests/kernels --ignore tests/kernels/test_aot.py)
      [ -z "$toy" ] && "$PYTHON" -c 'import xdist' 2> /dev/null && how+=(-n 8)
      "${run[@]}" "${pytest[@]}" "${how[@]}"
      ;;
    memcheck | racecheck) sanitized "$1" ;;
  esac
}

"$PYTHON" -c 'from benchmarks.environment import environment; import json; print(json.dumps(environment(), indent=1))'
bad=()
while read -r name limit what; do
  [[ -n "$only" && "$only" != *" $name "* ]] && continue
  echo "=== $name, at most $limit s: $what"
  started=$SECONDS
  run=(timeout --kill-after=10 "$limit")
  stage "$name" < /dev/null 2>&1 | tee "$OUT/$name.log"
  status=${PIPESTATUS[0]}
  case $status in
    0) said=passed ;;
    "$NOT_RUN") said="NOT RUN" ;;
    124 | 137) said="OUT OF TIME, finished rows are kept" ;;
    *) said="FAILED with status $status" ;;
  esac
  echo "--- $name: $said, $((SECONDS - started)) s"
  [ "$status" -eq 0 ] || bad+=("$name: $said")
done < <(plan)

if [ ${#bad[@]} -gt 0 ]; then
  printf '%s\n' "${bad[@]}"
  exit 1
fi
echo "passed in $SECONDS s"
