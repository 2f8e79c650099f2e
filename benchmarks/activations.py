"""How much does a backward pass keep of each image, by remat policy? Prints one JSON line.

python benchmarks/activations.py --config=configs/vit_small.py

Counted from the shapes of what the student's forward pass hands to its backward pass, on any
machine and in no time: `kept_mb` for each image of a batch, all its crops together, and its `share`
of what is kept without remat. A real step needs besides what it computes again, for a block at a
time, and it may keep less where XLA fuses.
"""

import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from config_flag import describe, load, parser
from ml_collections import ConfigDict

from dino_jax.config import build
from dino_jax.models.network import Network, abstract
from dino_jax.models.remat import POLICIES


def kept_bytes(config: ConfigDict, images: int) -> int:
    """Bytes that the backward pass of so many images starts from, with the weights."""
    graphdef, params, batch_stats = abstract(partial(build.build_model, config))
    network, crops = Network(graphdef), config.crops
    views = tuple(
        jax.ShapeDtypeStruct((images, number, side, side, len(crops.mean)), jnp.float32)
        for number, side in ((2, crops.global_size), (crops.local_number, crops.local_size))
        if number
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images))

    def backward_pass(params: Any, batch_stats: Any, views: Any, keys: jax.Array) -> Any:
        return jax.vjp(lambda p: network(p, batch_stats, views, keys)[0], params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward_pass, params, batch_stats, views, keys))
    return sum(x.size * x.dtype.itemsize for x in kept if not _is_key(x))


def _is_key(array: jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def main() -> None:
    flags, overrides = parser(__doc__).parse_known_args()
    config = load(flags, overrides)
    kept = {}
    for policy in POLICIES:
        config.model.remat = policy
        kept[policy] = (kept_bytes(config, 4) - kept_bytes(config, 2)) / 2
    result = {
        "kept_mb": {policy: round(each / 1e6, 3) for policy, each in kept.items()},
        "share": {policy: round(each / kept["none"], 3) for policy, each in kept.items()},
        "dtype": jnp.dtype(build.compute_dtype(config.model.dtype)).name,
    }
    about = describe(flags, config)
    del about["batch_size"], about["remat"]
    print(json.dumps({"benchmark": "activations"} | result | about))


if __name__ == "__main__":
    main()
