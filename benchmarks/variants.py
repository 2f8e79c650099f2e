"""Ways to compute our training step, beside the way the package does; prints one JSON line.

python benchmarks/variants.py --variant remat-dots scan
python benchmarks/variants.py --config=configs/vit_small.py --batch-size=8

The variants are in `peers/variants.py`; unnamed, all are tried. Each lives in a process of its own.
Before any timing, the teacher's logits, the loss and all its gradients must agree in float32 at
full matmul precision, and then the losses of the first three steps; a variant that differs, or
that the machine cannot compile, is refused and not timed.

  step_ms, ratio    median of the rounds; a ratio above 1 says that the variant is faster
  mb_per_image      memory for temporaries, as the compiler planned it, by image of the batch
  refused           why a variant has no figures
"""

import json
import sys
from statistics import median
from typing import Any

import numpy as np
from config_flag import describe, load, parser
from ml_collections import ConfigDict
from peer_torch import check, make_comparable, open_ours
from peers.task import Side
from peers.worker import Worker

TOLERANCE = 1e-4  # on logits, loss and gradients, of the largest value of an array


def open_variant(config: ConfigDict, name: str) -> Side:
    from peers.ours import OurSide
    from peers.variants import VARIANTS

    VARIANTS[name](config)
    return OurSide(config)


def difference(ours: list[np.ndarray], others: list[np.ndarray]) -> float:
    """The largest difference, as a share of the largest value of its array."""
    return max(
        float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(ours, others, strict=True)
    )


def compare(config: ConfigDict, names: list[str], *, rounds: int, steps: int) -> dict[str, Any]:
    sides, refused = {"ours": Worker(open_ours, config)}, {}
    task = sides["ours"].call("task")
    expected = sides["ours"].call("derivatives", task)
    for name in names:
        print("checking", name, file=sys.stderr, flush=True)
        side = Worker(open_variant, config, name)
        try:
            apart = difference(expected, side.call("derivatives", task))
        except Exception as error:  # the others may still be compared
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        if apart > TOLERANCE:
            refused[name] = f"logits, loss or gradients are {apart:.1e} apart"
            continue
        sides[name] = side
    refused |= check(sides, task)[1]
    timed = {name: side for name, side in sides.items() if name not in refused}
    for side in timed.values():
        side.call("seconds", 2)  # warm-up
    times = [
        {name: side.call("seconds", steps) for name, side in timed.items()} for _ in range(rounds)
    ]
    return {
        "step_ms": {name: round(1e3 * median(r[name] for r in times), 2) for name in timed},
        "ratio": {name: round(median(r["ours"] / r[name] for r in times), 3) for name in timed},
        "mb_per_image": {
            name: round(side.call("temporary_bytes") / task.batch_size / 1e6, 1)
            for name, side in timed.items()
        },
        "refused": refused,
        "about": sides["ours"].call("about"),
    }


def main() -> None:
    from peers.variants import VARIANTS

    flags = parser(__doc__)
    flags.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    flags.add_argument("--rounds", type=int, default=5, help="turns of each variant")
    flags.add_argument("--steps", type=int, default=4, help="in a turn")
    flags, overrides = flags.parse_known_args()
    config = load(flags, overrides)
    make_comparable(config)
    result = compare(config, flags.variant, rounds=flags.rounds, steps=flags.steps)
    about = {"rounds": flags.rounds, "steps": flags.steps}
    print(json.dumps({"benchmark": "variants"} | result | describe(flags, config) | about))


if __name__ == "__main__":
    sys.exit(main())
