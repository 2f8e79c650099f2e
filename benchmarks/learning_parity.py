"""Does a run learn what the reference learns? Prints one JSON line.

python benchmarks/learning_parity.py --workdir=runs/parity    # 15 minutes on two CPU cores

The reference implementation was run once on the first 10,000 training images of Fashion-MNIST with
the settings of `get_config`. Its losses and k-NN accuracies are recorded below. Settings can be
changed, as in `--config.seed=1`; the JSON line repeats the changes.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `configs`

from machine import report
from ml_collections import ConfigDict

from configs import default, fashion_mnist
from dino_jax import train
from dino_jax.config.file import override

REFERENCE = {
    "knn10": {"untrained": 49.3, "3": 50.9, "6": 55.1, "9": 56.9, "10": 56.6},
    "loss": [5.75, 6.44, 6.64, 6.64, 6.62, 6.60, 6.57, 6.54, 6.53, 6.53],
    "seconds": 850,  # two busy cores, 186 of them for data
}


def get_config() -> ConfigDict:
    """The settings of the reference's run."""
    config = default.get_config()
    config.model.update(name="vit_tiny", patch_size=4, drop_path_rate=0.1, dtype="float32")
    config.model.overrides.update(image_size=32, embed_dim=96, depth=4, num_heads=3)
    config.head.update(out_dim=1024, hidden_dim=512, bottleneck_dim=128)
    config.crops.update(global_size=32, local_size=16, local_number=4)
    config.data.update(train=fashion_mnist.source("train") + "[:10000]", canvas_size=28)
    config.data.num_threads = 2
    config.train.update(batch_size=128, epochs=10)
    config.optim.update(lr=0.002, warmup_epochs=1, momentum_teacher=0.99)
    config.eval.update(knn_every_epochs=1, knn_at_start=True, knn_ks=(10,), resize=32, crop=32)
    config.eval.update(knn_test=fashion_mnist.source("test") + "[:2000]", canvas_size=32)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="a new folder")
    args, overrides = parser.parse_known_args()
    if args.workdir.exists():
        raise SystemExit(
            f"--workdir={args.workdir} exists, so its run would be resumed: give a new folder"
        )
    config = get_config()
    override(config, overrides)
    start = time.perf_counter()
    train.run(config, args.workdir)
    seconds = time.perf_counter() - start
    epochs = [json.loads(line) for line in (args.workdir / "log.txt").open()]
    first = json.loads((args.workdir / "metrics.jsonl").open().readline())
    knn = {"untrained": first["knn_10_top1"]}
    knn |= {str(e["epoch"] + 1): e["knn_10_top1"] for e in epochs}
    ours = {"knn10": knn, "loss": [round(e["train_loss"], 3) for e in epochs]}
    ours["seconds"] = round(seconds)
    report("learning_parity", {"ours": ours, "reference": REFERENCE, "changed": overrides})


if __name__ == "__main__":
    main()
