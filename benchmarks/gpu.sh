#!/usr/bin/env bash
# Checks the package on a GPU and measures it: one command for a machine with a GPU.
#
#   benchmarks/gpu.sh [check | step | peer | augment | data | knn | startup | variants | all] ...
#
#   check    numbers of the reference implementation, on the GPU at full matmul precision
#   step     the training step: ViT-S/16 at two batch sizes, ViT-B/16
#   peer     the same step in PyTorch, as of 2021 and as of today; features of images likewise
#   augment  all crops on the GPU, and by PIL on one core
#   data     ViT-S/16 behind the real pipeline, reading generated JPEG files; the pipeline alone,
#            beside one of 2021, and the decoders that are installed
#   knn      k-NN with ImageNet's numbers of images; beside PyTorch at a tenth of both
#   startup  seconds until a run has made its first step, and until --help has answered
#   variants other ways to compute the step, each checked, then timed beside the package's
#   all      every stage but the last, as without arguments
#
# Adds one JSON line for each result to ${OUT:-benchmarks/results}/gpu.jsonl and prints tables of
# that file at the end; whatever the commands wrote is in gpu.log beside it. A stage that fails or runs
# out of time says so there and does not stop the others; the exit code is then 1. All stages
# together take at most ${DINO_JAX_BENCH_SECONDS:-570} seconds.
#
# Nothing is fetched. Wheels in the folder .whl of the repository are put on the path for this run;
# PYTHON names another interpreter than python3. Without a GPU, or with DINO_JAX_BENCH_TINY=1,
# everything runs at sizes that a CPU does in minutes; those figures say nothing about speed.
set -u -o pipefail

die() { echo "gpu.sh: $*" >&2; exit 2; }

stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(all)
for stage in "${stages[@]}"; do
  case $stage in
    check | step | peer | augment | data | knn | startup | variants) ;;
    all) stages=(check step peer augment data knn startup) ;;
    *) die "unknown stage '$stage': choose from check, step, peer, augment, data, knn, startup," \
      "variants, all" ;;
  esac
done

caller=$PWD
cd "$(dirname "$0")/.." || die "cannot enter the repository"
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
case ${OUT:-} in '' | /*) ;; *) out=$caller/$OUT ;; esac
mkdir -p "$out" || die "cannot write to $out"
results=$out/gpu.jsonl
log=$out/gpu.log
scratch=$(mktemp -d) || die "cannot make a temporary folder"
trap 'rm -rf "$scratch"' EXIT
budget=${DINO_JAX_BENCH_SECONDS:-570}
failures=0

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if compgen -G '.whl/*.whl' >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" .whl/*.whl ||
    die "the wheels in .whl cannot be installed"
  PYTHONPATH=$scratch/site:$PYTHONPATH
fi
backend=$("$python" -c 'import jax; print(jax.default_backend())') ||
  die "JAX cannot be used by $python; see above"
tiny=${DINO_JAX_BENCH_TINY:-}
if [ "$backend" = cpu ] && [ -z "$tiny" ]; then
  echo "gpu.sh: JAX finds no GPU; reduced sizes"
  tiny=1
fi

# failed COMMAND WHY
failed() {
  failures=$((failures + 1))
  echo "gpu.sh: $1: $2" >&2
  "$python" -c 'import json, sys
print(json.dumps({"benchmark": "failed", "command": sys.argv[1], "why": sys.argv[2]}))' \
    "$1" "$2" >>"$results"
}

# measure LIMIT BENCHMARK ARGUMENTS...: runs a benchmark; its last line, a JSON object, is the result.
measure() {
  local limit=$1 left=$((budget - SECONDS)) status
  shift
  : >"$scratch/line"
  ((left > 15)) || { failed "$*" "no time left of $budget s"; return; }
  ((limit < left)) || limit=$left
  echo "--- $* (at most $limit s)" | tee -a "$log"
  timeout -k 10 "$limit" "$python" "benchmarks/$1.py" "${@:2}" 2>>"$log" | tee -a "$log" |
    tail -n 1 >"$scratch/line"
  status=$?
  if "$python" -m json.tool "$scratch/line" >/dev/null 2>&1; then
    tee -a "$results" <"$scratch/line"
  fi
  ((status == 0)) && return
  tail -n 5 "$log" >&2
  ((status == 124 || status == 137)) && failed "$*" "not ready after $limit s" && return
  failed "$*" "exit code $status; see gpu.log"
}

# verdict WHAT PASSED SUMMARY
verdict() {
  printf '{"benchmark": "check", "what": "%s on %s", "passed": %s, "summary": "%s"}\n' \
    "$1" "$backend" "$2" "${3//[\"\\=]/}" | tee -a "$results"
  [ "$2" = true ] || failed check "$1; see gpu.log"
}

check() {
  local limit=$((budget - SECONDS)) passed=false status summary
  ((limit > 15)) || { failed check "no time left of $budget s"; return; }
  ((limit < 240)) || limit=240
  # One of the tests wants the eight devices that a test run on a CPU has.
  local cases="(the_reference or golden or pil) and not pixels_against_pil"
  [ -z "$tiny" ] || cases="train_vit_adamw or forward_vit_tiny or golden_chains"
  echo "--- check: tests of $cases"
  # JAX is imported first: it then keeps the GPU, although the tests ask for a CPU.
  JAX_DEFAULT_MATMUL_PRECISION=highest timeout -k 10 "$limit" "$python" -c '
import sys, jax
print("tests on", jax.devices())
import pytest
sys.exit(pytest.main(sys.argv[1:]))' \
    -o filterwarnings=default -p no:cacheprovider -k "$cases" \
    tests/test_train_parity.py tests/models tests/data/test_{augment,color,preprocess,resample}.py \
    2>&1 | tee -a "$log" >"$scratch/check"
  status=$?
  tail -n 15 "$scratch/check"
  summary=$(tail -n 1 "$scratch/check")
  ((status == 124 || status == 137)) && summary="not ready after $limit s"
  ((status == 0)) && passed=true
  verdict goldens $passed "$summary"

  passed=false
  measure 90 augment --batch=4 --canvas=128 --global-size=64 --local-size=32 --seconds=0.1
  "$python" -c 'import json, sys
sys.exit(json.load(sys.stdin)["grey_levels_apart_mean"] > 1)' <"$scratch/line" 2>>"$log" && passed=true
  verdict "crops and PIL at most one grey level apart in the mean" $passed ""
}

step() {
  if [ -n "$tiny" ]; then
    measure 400 train_step --config=configs/default.py:debug --batch-size=8 --steps=2
    return
  fi
  local bf16=--config.model.dtype=bfloat16
  measure 150 train_step --config=configs/vit_small.py --batch-size=64 --steps=40 $bf16
  measure 150 train_step --config=configs/vit_small.py --batch-size=128 --steps=30 $bf16
  measure 180 train_step --config=configs/vit_base.py --batch-size=128 --steps=20 $bf16
}

peer() {
  if [ -n "$tiny" ]; then
    measure 400 peer_torch --config=configs/default.py:debug --batch-size=8 --steps=1 --rounds=2 \
      --variant eager modern
    measure 400 features --config=configs/default.py:debug --batch-size=8 --steps=1 --rounds=2
    return
  fi
  measure 300 peer_torch --config=configs/vit_small.py --batch-size=64 --steps=10 --rounds=5 \
    --variant eager modern --config.model.dtype=bfloat16
  measure 60 features --config=configs/vit_small.py --batch-size=256 --steps=10 \
    --config.model.dtype=bfloat16
}

augment() {
  if [ -n "$tiny" ]; then
    measure 400 augment --batch=2 --canvas=64 --global-size=32 --local-size=16 --local-number=1 \
      --seconds=0.1
    return
  fi
  measure 120 augment --batch=64 --canvas=512 --seconds=3
}

data() {
  local number=4096
  [ -z "$tiny" ] || number=64
  "$python" benchmarks/jpeg_folder.py "$scratch/jpeg" --number=$number ||
    { failed data "the pictures could not be written"; return; }
  if [ -n "$tiny" ]; then
    measure 400 train_step --config=configs/default.py:debug --batch-size=8 --steps=2 \
      --data="folder:$scratch/jpeg"
    measure 400 data --folder="$scratch/jpeg" --number=8 --pil-number=2 --threads 2 --rounds=1 \
      --batch-size=4 --canvas=64 --global-size=32 --local-size=16 --local-number=1
    measure 400 decode --folder="$scratch/jpeg" --number=8 --threads 2 --rounds=1
    return
  fi
  measure 200 train_step --config=configs/vit_small.py --batch-size=256 --steps=20 \
    --config.model.dtype=bfloat16 --data="folder:$scratch/jpeg"
  measure 120 data --folder="$scratch/jpeg" --number=2048 --threads 1 16 --batch-size=128
  measure 60 decode --folder="$scratch/jpeg" --number=512 --threads 1 16 --rounds=3
}

knn() {
  if [ -n "$tiny" ]; then
    measure 400 knn --queries=200 --bank=2000 --width=32 --classes=20 --rounds=1 --no-reference
    return
  fi
  measure 120 knn --queries=50000 --bank=1281167 --memory-budget=8589934592 --no-reference
  measure 120 knn --queries=5000 --bank=128000
}

startup() {
  if [ -n "$tiny" ]; then
    measure 400 startup --config=configs/default.py:debug --batch-size=8 --rounds=1 --jobs knn
    return
  fi
  measure 240 startup --config=configs/vit_small.py --batch-size=64 --rounds=1 \
    --config.model.dtype=bfloat16
}

variants() {
  if [ -n "$tiny" ]; then
    measure 400 variants --config=configs/default.py:debug --batch-size=8 --steps=1 --rounds=1 \
      --variant keep-activations bottleneck-loss
    return
  fi
  # A process each, so a few at a time: they share the memory of the GPU.
  local group
  for group in "attention-xla keep-activations" "one-token-batch stacked-optimizer" \
    "half-logits bottleneck-loss blocked-loss" "scan barriers" "no-triton-gemm" \
    "remat-dots remat-full"; do
    # shellcheck disable=SC2086
    measure 200 variants --config=configs/vit_small.py --batch-size=64 --steps=10 --rounds=5 \
      --config.model.dtype=bfloat16 --variant $group
  done
}

for stage in "${stages[@]}"; do "$stage"; done
"$python" benchmarks/table.py "$results"
echo "gpu.sh: $failures failures, $SECONDS s"
((failures == 0))
