"""How fast are features of images, compared with PyTorch? Prints one JSON line.

python benchmarks/features.py --config=configs/vit_small.py --batch-size=32

Both sides have the same weights and the same images, of the size of the global crops, on the device
from the start. They take turns. Their features must agree before anything is timed (`apart`:
the largest difference relative to the largest feature): within 1e-3 in float32 and 0.1 in bfloat16,
else the exit code is 1.
"""

import sys
from statistics import median

import numpy as np
from config_flag import describe, load, parser
from machine import report
from ml_collections import ConfigDict
from peers.task import Task
from peers.worker import Worker, share_gpu


def open_ours(config: ConfigDict) -> object:
    from peers.forward import OurForward  # here and below: in the worker process of that side

    return OurForward(config)


def open_torch(task: Task) -> object:
    from peers.forward import TorchForward

    return TorchForward(task)


def main() -> int:
    flags = parser(__doc__)
    flags.add_argument("--rounds", type=int, default=5, help="turns of each side")
    flags.add_argument("--steps", type=int, default=4, help="batches per turn")
    flags, overrides = flags.parse_known_args()
    config = load(flags, overrides)
    share_gpu(2)
    ours = Worker(open_ours, config)
    task = ours.call("task")
    sides = {"ours": ours, "torch": Worker(open_torch, task)}

    side = config.crops.global_size
    shape = flags.batch_size, side, side, task.sizes["in_channels"]
    images = np.random.default_rng(1).standard_normal(shape, np.float32)
    features = {name: worker.call("features", images) for name, worker in sides.items()}
    apart = float(np.abs(features["ours"] - features["torch"]).max() / features["torch"].max())
    result = {"apart": apart, "image_size": side}
    equal = apart < (1e-3 if task.dtype == "float32" else 0.1)
    if equal:
        times = [
            {name: worker.call("seconds", flags.steps) for name, worker in sides.items()}
            for _ in range(flags.rounds)
        ]
        result["images_per_s"] = {
            name: round(flags.batch_size / median(t[name] for t in times), 1) for name in sides
        }
        result["ratio"] = round(median(t["torch"] / t["ours"] for t in times), 3)
    result["sides"] = {name: worker.call("about") for name, worker in sides.items()}
    report("features", result | describe(flags, config), computed_on=ours.call("device"))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
