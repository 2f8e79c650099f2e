"""How fast is k-NN evaluation, compared with the reference's method? Prints one JSON line.

python benchmarks/knn.py                                                  # ImageNet / 10, for a CPU
python benchmarks/knn.py --queries=50000 --bank=1281167                   # ImageNet, for a GPU
python benchmarks/knn.py --queries=50000 --bank=1281167 --no-reference    # ours alone

The reference's method is written in PyTorch (`peers/torch_knn.py`). Both take turns on the same
features. Their accuracies must agree within --tolerance percent (rounding decides between near
neighbours), else no ratio is printed and the exit code is 1. Times are medians of the rounds,
without compilation. Ours include the transfer of the features to the device; the reference's
features are already there.
"""

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from machine import report

from dino_jax.evaluate.classification.knn import KS, knn_accuracy

TEMPERATURE = 0.07

Scores = dict[int, tuple[float, float]]


def clusters(images: int, width: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit features in overlapping classes, [images, width] float32, and their labels."""
    means = np.random.default_rng(0).standard_normal((num_classes, width), np.float32)
    random = np.random.default_rng(seed)
    labels = random.integers(num_classes, size=images)
    features = means[labels] + 3.5 * random.standard_normal((images, width), np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True), labels


def reference(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, query_labels: np.ndarray, ks: list
) -> tuple[Callable[[], Scores], dict[str, Any]]:
    """The reference's evaluation, and the device it runs on."""
    import torch  # here: ours can be timed without PyTorch
    from peers.torch_knn import knn_accuracy as peer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    arrays = (np.ascontiguousarray(bank.T), labels, queries, query_labels)
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    num_classes = int(labels.max()) + 1

    def run() -> Scores:
        settings = {"temperature": TEMPERATURE, "num_classes": num_classes}
        return {k: peer(*tensors, k=k, **settings) for k in ks}

    return run, {"torch_device": device}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--bank", type=int, default=128_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--ks", type=int, nargs="+", default=list(KS))
    parser.add_argument("--memory-budget", type=int, default=1 << 30, help="bytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=0.1, help="percent")
    parser.add_argument("--reference", action=argparse.BooleanOptionalAction, default=True)
    flags = parser.parse_args()
    bank, labels = clusters(flags.bank, flags.width, flags.classes, seed=1)
    queries, query_labels = clusters(flags.queries, flags.width, flags.classes, seed=2)

    def ours() -> Scores:
        table = knn_accuracy(
            bank,
            labels,
            queries,
            query_labels,
            ks=flags.ks,
            temperature=TEMPERATURE,
            memory_budget=flags.memory_budget,
        )
        return {k: (row["top1"], row["top5"]) for k, row in table.items()}

    sides, about = {"ours": ours}, {}
    if flags.reference:
        arrays = (bank, labels, queries, query_labels)
        sides["reference"], about = reference(*arrays, flags.ks)
    start = time.perf_counter()
    scores = {name: side() for name, side in sides.items()}  # warm-up and compilation
    first_seconds = time.perf_counter() - start
    apart = max(
        float(np.abs(np.subtract(scores["ours"][k], side[k])).max())
        for side in scores.values()
        for k in flags.ks
    )
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(flags.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - start)
    seconds = {name: round(median(spent), 3) for name, spent in times.items()}
    agree = apart <= flags.tolerance
    result = {
        "seconds": seconds,
        "ratio": round(seconds["reference"] / seconds["ours"], 2)
        if flags.reference and agree
        else None,
        "percent_apart": round(apart, 4),
        "top1": {k: round(top1, 2) for k, (top1, _) in scores["ours"].items()},
        "first_round_s": round(first_seconds, 1),
        **{name: value for name, value in vars(flags).items() if name != "reference"},
    }
    report("knn", result | about)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
