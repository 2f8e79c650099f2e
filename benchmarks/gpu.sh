#!/usr/bin/env bash
# Checks the package on a GPU and measures it: one command for a machine with a GPU.
#
#   benchmarks/gpu.sh [STAGE ...]
#
#   step      the training step with 64 images: ViT-S/16, the same with remat, ViT-B/16; with it the
#             most memory that each takes
#   peer      the same step in PyTorch, as of 2021 and as of today, with the blocks of timm's ViT
#             too where it is installed; features of images likewise
#   check     numbers of the reference implementation, on the GPU at full matmul precision; crops
#             beside PIL's
#   augment   all crops on the GPU, and by PIL on one core
#   data      ViT-S/16 behind the real pipeline, reading generated JPEG files; the pipeline alone,
#             beside one of 2021, and the decoders that are installed
#   knn       k-NN with ImageNet's numbers of images; beside PyTorch at a tenth of both
#   startup   seconds until a run has made its first step, and until --help has answered
#   attention cuDNN's kernel beside XLA's, alone
#   batches   the step with 64, 128, ... images, until the GPU's memory does not do
#   variants  other ways to compute the step, each checked, then timed beside the package's;
#             variants:NAME,NAME tries some, of a group that is measured together
#   rest      augment data knn startup attention
#
# Without a stage: step peer check. These three take ten minutes at most, and so do `rest`, `batches`
# and a few variants. No stage begins, and none goes on, after ${DINO_JAX_BENCH_SECONDS:-570} seconds.
#
# Writes one JSON line for each result to ${OUT:-benchmarks/results}/gpu.jsonl, in place of those of
# an earlier run, and prints tables of that file at the end; whatever the commands wrote is in gpu.log
# beside it. A stage that fails or runs out of time says so there and does not stop the others; the
# exit code is then 1.
#
# Nothing is fetched. Wheels in the folder .whl of the repository are put on the path for this run;
# PYTHON names another interpreter than python3. Without a GPU, or with DINO_JAX_BENCH_TINY=1,
# everything runs at sizes that a CPU does in minutes; those figures say nothing about speed.
set -u -o pipefail

die() { echo "gpu.sh: $*" >&2; exit 2; }

[ $# -gt 0 ] || set -- step peer check
stages=()
for stage in "$@"; do
  case $stage in
    step | peer | check | augment | data | knn | startup | attention | batches) stages+=("$stage") ;;
    variants | variants:?*) stages+=("$stage") ;;
    rest) stages+=(augment data knn startup attention) ;;
    *) die "unknown stage '$stage': choose from step, peer, check, augment, data, knn, startup," \
      "attention, batches, variants, rest" ;;
  esac
done
budget=${DINO_JAX_BENCH_SECONDS:-570}
[[ $budget =~ ^[0-9]+$ ]] || die "DINO_JAX_BENCH_SECONDS=$budget: give a whole number of seconds"

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
failures=0

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if compgen -G '.whl/*.whl' >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" .whl/*.whl ||
    die "the wheels in .whl cannot be installed"
  PYTHONPATH=$scratch/site:$PYTHONPATH
fi
about=$("$python" benchmarks/machine.py) || die "$python cannot run the benchmarks; see above"
backend=$("$python" -c 'import json, sys; print(json.loads(sys.argv[1])["backend"])' "$about")
# What one process compiles and tunes, another finds; but start-up is timed with a cache of its own.
export JAX_COMPILATION_CACHE_DIR=$scratch/compiled
tiny=${DINO_JAX_BENCH_TINY:-}
if [ "$backend" = cpu ] && [ -z "$tiny" ]; then
  echo "gpu.sh: JAX finds no GPU; reduced sizes"
  tiny=1
fi

{ : >"$results"; : >"$log"; } || die "cannot write to $out"

# failed COMMAND WHY
failed() {
  failures=$((failures + 1))
  echo "gpu.sh: $1: $2" >&2
  record '{"benchmark": "failed", "command": sys.argv[2], "why": sys.argv[3]}' "$1" "$2" >>"$results"
}

# record EXPRESSION ARGUMENTS...: a JSON line of a Python dictionary, with what machine.py says.
record() {
  "$python" -c "import json, sys
about, row = json.loads(sys.argv[1]), $1
print(json.dumps(row | about | row))" "$about" "${@:2}"
}

# measure LIMIT BENCHMARK ARGUMENTS...: runs a benchmark; its last line, a JSON object, is the result.
measure() {
  local limit=$1 left=$((budget - SECONDS)) status
  shift
  : >"$scratch/line"
  ((left > 15)) || { failed "$*" "no time left of $budget s"; return 1; }
  ((limit < left)) || limit=$left
  echo "--- $* (at most $limit s)" | tee -a "$log"
  timeout -k 10 "$limit" "$python" "benchmarks/$1.py" "${@:2}" 2>>"$log" | tee -a "$log" |
    tail -n 1 >"$scratch/line"
  status=$?
  if record 'json.load(sys.stdin)' <"$scratch/line" >"$scratch/row" 2>/dev/null; then
    tee -a "$results" <"$scratch/row"
  fi
  ((status == 0)) && return
  tail -n 5 "$log" >&2
  if ((status == 124 || status == 137)); then
    failed "$*" "not ready after $limit s"
  else
    failed "$*" "exit code $status; see gpu.log"
  fi
  return 1
}

# verdict WHAT PASSED SUMMARY
verdict() {
  record '{"benchmark": "check", "what": sys.argv[2], "passed": sys.argv[3] == "true",
    "summary": sys.argv[4].strip("= ")}' "$1 on $backend" "$2" "$3" | tee -a "$results"
  [ "$2" = true ] || failed check "$1; see gpu.log"
}

check() {
  local limit=$((budget - SECONDS)) passed=false status summary
  ((limit > 15)) || { failed check "no time left of $budget s"; return; }
  ((limit < 80)) || limit=80
  local cases="train_vit_adamw or forward_vit_small16_224 or forward_xcit_small_12_p16 or head_in"
  cases="$cases or golden"
  [ -z "$tiny" ] || cases="golden"
  echo "--- check: tests of $cases"
  JAX_DEFAULT_MATMUL_PRECISION=highest timeout -k 10 "$limit" "$python" \
    benchmarks/reference_tests.py "$backend" -k "($cases) and not there_are" \
    tests/training/test_train_parity.py tests/models tests/data/transforms/test_color.py 2>&1 |
    tee -a "$log" >"$scratch/check"
  status=$?
  tail -n 15 "$scratch/check"
  summary=$(tail -n 1 "$scratch/check")
  ((status == 124 || status == 137)) && summary="not ready after $limit s"
  ((status == 0)) && passed=true
  verdict goldens $passed "$summary"

  passed=false
  measure 40 augment --batch=4 --canvas=128 --global-size=64 --local-size=32 --seconds=0.1
  "$python" -c 'import json, sys
sys.exit(json.load(sys.stdin)["grey_levels_apart_mean"] > 1)' <"$scratch/line" 2>>"$log" && passed=true
  verdict "crops and PIL at most one grey level apart in the mean" $passed ""
}

bf16=--config.model.dtype=bfloat16

step() {
  if [ -n "$tiny" ]; then
    measure 400 train_step --config=configs/default.py:debug --batch-size=8 --steps=2
    return
  fi
  measure 80 train_step --config=configs/vit_small.py --batch-size=64 --steps=40 $bf16
  measure 60 train_step --config=configs/vit_small.py --batch-size=64 --steps=20 $bf16 \
    --config.model.remat=dots
  measure 80 train_step --config=configs/vit_base.py --batch-size=64 --steps=20 $bf16
}

batches() {
  [ -n "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ] ||
    local -x XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.95}
  local config batch
  if [ -n "$tiny" ]; then
    measure 400 train_step --config=configs/default.py:debug --batch-size=8 --steps=2
    return
  fi
  for config in configs/vit_small.py configs/vit_base.py; do
    for batch in 64 128 256 512 1024; do
      measure 100 train_step --config=$config --batch-size=$batch --steps=5 $bf16 || break
      ! grep -q '"out_of_memory"' "$scratch/line" || break
    done
  done
}

peer() {
  if [ -n "$tiny" ]; then
    measure 400 peer_torch --config=configs/default.py:debug --batch-size=8 --steps=1 --rounds=2 \
      --variant eager modern
    measure 400 features --config=configs/default.py:debug --batch-size=8 --steps=1 --rounds=2
    return
  fi
  local variants="eager modern"
  if "$python" -c 'import timm.models.vision_transformer' 2>>"$log"; then
    variants="$variants timm"
  else
    echo "gpu.sh: timm is not installed (why: gpu.log), and so not compared"
  fi
  # shellcheck disable=SC2086
  measure 190 peer_torch --config=configs/vit_small.py --batch-size=64 --steps=10 --rounds=5 \
    --variant $variants $bf16
  measure 40 features --config=configs/vit_small.py --batch-size=256 --steps=10 $bf16
}

augment() {
  if [ -n "$tiny" ]; then
    measure 400 augment --batch=2 --canvas=64 --global-size=32 --local-size=16 --local-number=1 \
      --seconds=0.1
    return
  fi
  measure 40 augment --batch=64 --canvas=512 --seconds=3
}

data() {
  local number=4096
  ((budget - SECONDS > 15)) || { failed data "no time left of $budget s"; return; }
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
  measure 110 train_step --config=configs/vit_small.py --batch-size=256 --steps=20 $bf16 \
    --data="folder:$scratch/jpeg"
  measure 80 data --folder="$scratch/jpeg" --number=2048 --threads 1 16 --batch-size=128
  measure 40 decode --folder="$scratch/jpeg" --number=512 --threads 1 16 --rounds=3
}

knn() {
  if [ -n "$tiny" ]; then
    measure 400 knn --queries=200 --bank=2000 --width=32 --classes=20 --rounds=1 --no-reference
    return
  fi
  measure 60 knn --queries=50000 --bank=1281167 --memory-budget=8589934592 --no-reference
  measure 60 knn --queries=5000 --bank=128000
}

startup() {
  if [ -n "$tiny" ]; then
    measure 400 startup --config=configs/default.py:debug --batch-size=8 --rounds=1 --jobs knn
    return
  fi
  measure 130 startup --config=configs/vit_small.py --batch-size=64 --rounds=1 $bf16
}

attention() {
  if [ -n "$tiny" ]; then
    measure 400 attention --images=1 --lengths 37 --crops 2 --rounds=1 --steps=1
    return
  fi
  measure 40 attention
}

# variants [NAME,NAME]
variants() {
  # Each in a process with its part of the GPU's memory, so a few at a time.
  local group groups=("attention-xla keep-activations" "half-logits bottleneck-loss" \
    "one-token-batch stacked-optimizer" "scan barriers" "blocked-loss no-triton-gemm" \
    "remat-dots remat-full")
  local sizes=(--config=configs/vit_small.py --batch-size=64 --steps=10 --rounds=5 $bf16)
  [ -z "$tiny" ] || groups=("keep-activations bottleneck-loss")
  [ -z "$tiny" ] || sizes=(--config=configs/default.py:debug --batch-size=8 --steps=1 --rounds=1)
  [ $# -eq 0 ] || groups=("${1//,/ }")
  for group in "${groups[@]}"; do
    # shellcheck disable=SC2086
    measure 280 variants "${sizes[@]}" --variant $group
  done
}

for stage in "${stages[@]}"; do
  case $stage in
    variants:*) variants "${stage#variants:}" ;;
    *) "$stage" ;;
  esac
done
"$python" benchmarks/table.py "$results"
echo "gpu.sh: $failures failures, $SECONDS s"
((failures == 0))
