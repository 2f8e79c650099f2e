#!/usr/bin/env bash
# Checks the package on a GPU and measures it.
#
#   pip install -e '.[cuda12,test,torch]'      # or cuda13
#   benchmarks/gpu.sh | tee gpu.jsonl
#
# Each command prints one JSON line to stdout; progress and errors go to stderr. The commands are
# independent: copy the one you need. All of them run, even if one fails; the exit code is then 1.
set -u
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=$PWD
pictures=$(mktemp -d)
trap 'rm -r "$pictures"' EXIT
failed=0
trap 'failed=1' ERR

small="--config=configs/vit_small.py --config.model.dtype=bfloat16"
base="--config=configs/vit_base.py --config.model.dtype=bfloat16"

# Does it compute the reference's numbers on this device?
python benchmarks/reference_tests.py tests/training/test_train_parity.py tests/models \
  tests/data/transforms/test_color.py \
  -k "train_vit_adamw or forward_vit_small16_224 or forward_xcit_small_12_p16 or head_in or golden"

# The training step: speed and peak memory. A batch that does not fit is a result, too.
for batch in 64 128 256 512 1024; do
  python benchmarks/train_step.py $small --batch-size=$batch
  python benchmarks/train_step.py $base --batch-size=$batch
done
python benchmarks/train_step.py $small --batch-size=64 --config.model.remat=dots

# The same step in PyTorch, and features of images.
python benchmarks/peer_torch.py $small --batch-size=64 --steps=10 --variant eager modern
python benchmarks/features.py $small --batch-size=256 --steps=10

# The attention kernels alone, forward and backward.
python benchmarks/attention.py

# Data: generated JPEG files, the input pipeline, the crops, and a step fed by the pipeline.
python benchmarks/jpeg_folder.py "$pictures" --number=4096
python benchmarks/data.py --folder="$pictures" --number=2048 --threads 1 16 --batch-size=128
python benchmarks/augment.py --batch=64 --canvas=512
python benchmarks/train_step.py $small --batch-size=256 --data="folder:$pictures"

# k-NN at ImageNet's size, and at a tenth of it compared with PyTorch.
python benchmarks/knn.py --queries=50000 --bank=1281167 --memory-budget=8589934592 --no-reference
python benchmarks/knn.py

# Seconds until the first training step, with an empty and with a filled compilation cache.
python benchmarks/startup.py $small --batch-size=64

exit $failed
