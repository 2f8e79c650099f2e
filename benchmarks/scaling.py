"""How well will many GPUs do? On paper, from one GPU's step time. Prints one JSON line.

python benchmarks/scaling.py --config=configs/vit_small.py --batch-size=64 --step-ms=22.9
python benchmarks/scaling.py --config=configs/vit_base.py --batch-size=64

  parameter_mb      the student's parameters, float32: P
  collectives_mb    what comes out of the collectives of a step: by `formula`, and `compiled`,
                    counted in the step as XLA compiles it for eight virtual CPU devices
  step_ms           one GPU's step with --batch-size images. Where --step-ms is not given it is an
                    assumption, the project's goal for that model, and `step_ms_from` says so
  communication_ms  of dp and fsdp by number of GPUs
  efficiency        images/s a GPU over those of one GPU alone, by number of GPUs: `none` where
                    nothing is computed meanwhile, `full` where everything is

dp adds up the gradients: one all-reduce of P. fsdp gathers the weights of student and teacher (two
all-gathers of P) and spreads the sum of the gradients (a reduce-scatter of P). An all-reduce is a
reduce-scatter and an all-gather; each of these takes, for n GPUs in nodes of g,

    P (g - 1)/g / node  +  P/g (m - 1)/m / network        with m = n/g nodes

seconds, where `node` and `network` are bytes/s a GPU in one direction: every GPU trades with those
of its node, and its own share of the result with its peers in the other nodes. Latency, stragglers
and links that do not reach their nominal speed are left out.
"""

import dataclasses
import json
import os

os.environ["JAX_PLATFORMS"] = "cpu"  # the step says itself what moves, on any platform
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from collectives import moved_bytes
from config_flag import describe, load, parser
from ml_collections import ConfigDict
from our_step import STEPS_PER_EPOCH

from dino_jax import sharding
from dino_jax.run.plan import make_plan
from dino_jax.training.step import compile_step

ASSUMED_IMAGES_PER_S = {"vit_small": 2800, "vit_base": 1000}  # of one H200: goals, not figures
ONE_WAYS = {"dp": 2, "fsdp": 3}  # reduce-scatters and all-gathers of P in a step


def compiled_bytes(config: ConfigDict, mode: str) -> dict[str, int]:
    """Bytes that come out of each collective of the compiled step; no array is made."""
    config.train.sharding = mode
    mesh = sharding.make_mesh()
    plan = make_plan(config, mesh, steps_per_epoch=STEPS_PER_EPOCH)
    size, side = config.train.batch_size, config.data.canvas_size
    batch = {
        "canvas": jax.ShapeDtypeStruct((size, side, side, len(config.crops.mean)), jnp.uint8),
        "size": jax.ShapeDtypeStruct((size, 2), jnp.int32),
        "index": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    spread = jax.tree.map(lambda _: sharding.batch_sharded(mesh), batch)
    batch = sharding.with_shardings(batch, spread)
    state = sharding.with_shardings(plan.shapes, plan.shardings)
    return dict(moved_bytes(compile_step(plan.step, state, batch, plan.shardings).as_text()))


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Equal nodes of GPUs; speeds in bytes/s of a GPU, in one direction."""

    node: int = 8  # GPUs
    link: float = 450e9  # within a node: NVLink 4
    network: float = 50e9  # between nodes: InfiniBand NDR, a port for each GPU

    def one_way_seconds(self, num_bytes: float, gpus: int) -> float:
        """Seconds of an all-gather or reduce-scatter over `gpus` GPUs, whole nodes of them.

        Args:
          num_bytes: of the whole result, or of all that is reduced.
          gpus: that take part.
        """
        nodes = gpus / self.node
        within = num_bytes * (self.node - 1) / self.node / self.link
        return within + num_bytes / self.node * (nodes - 1) / nodes / self.network


def expected_bytes(parameters: int) -> dict[str, dict[str, int]]:
    """What comes out of the collectives on each device, of so many bytes of parameters."""
    return {
        "dp": {"all-reduce": parameters},
        "fsdp": {
            "all-gather": 2 * parameters,
            "reduce-scatter": parameters // jax.device_count(),
        },
    }


def efficiency(step: float, communication: float) -> dict[str, float]:
    """Efficiency where nothing is computed while the devices talk, and where everything is."""
    return {
        "none": round(step / (step + communication), 4),
        "full": round(step / max(step, communication), 4),
    }


def megabytes(sizes: dict[str, int]) -> dict[str, float]:
    return {kind: round(size / 1e6, 4) for kind, size in sorted(sizes.items())}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--step-ms", type=float, help="of one GPU, measured")
    flags.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    for field in dataclasses.fields(Cluster):
        flags.add_argument(f"--{field.name}", type=field.type, default=field.default)
    flags.add_argument("--no-compile", action="store_true", help="the formula alone")
    flags, overrides = flags.parse_known_args()
    config = load(flags, overrides)
    cluster = Cluster(flags.node, flags.link, flags.network)
    if cluster.node < 1:
        raise SystemExit(f"--node={cluster.node}: give the GPUs of a node, at least 1")
    if refused := [n for n in flags.gpus if n < cluster.node or n % cluster.node]:
        raise SystemExit(f"--gpus {refused}: give multiples of --node={cluster.node}")
    step_ms, source = flags.step_ms, "given"
    if step_ms is None:
        if config.model.name not in ASSUMED_IMAGES_PER_S:
            raise SystemExit(f"--step-ms is needed: there is no goal for {config.model.name}")
        step_ms = 1e3 * flags.batch_size / ASSUMED_IMAGES_PER_S[config.model.name]
        source = "assumption: the goal"

    shapes = make_plan(config, sharding.make_mesh(), steps_per_epoch=STEPS_PER_EPOCH).shapes
    parameters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes.params))
    collectives = {"formula": expected_bytes(parameters)}
    if not flags.no_compile:
        config.train.batch_size = jax.device_count()  # what is told does not depend on it
        collectives["compiled"] = {mode: compiled_bytes(config, mode) for mode in ONE_WAYS}
        config.train.batch_size = flags.batch_size
    communication = {
        mode: {n: count * cluster.one_way_seconds(parameters, n) for n in flags.gpus}
        for mode, count in ONE_WAYS.items()
    }
    result = {
        "step_ms": round(step_ms, 2),
        "step_ms_from": source,
        "parameter_mb": round(parameters / 1e6, 4),
        "collectives_mb": {
            side: {mode: megabytes(sizes) for mode, sizes in modes.items()}
            for side, modes in collectives.items()
        },
        "communication_ms": {
            mode: {n: round(1e3 * s, 3) for n, s in by_gpus.items()}
            for mode, by_gpus in communication.items()
        },
        "efficiency": {
            mode: {n: efficiency(step_ms, 1e3 * s) for n, s in by_gpus.items()}
            for mode, by_gpus in communication.items()
        },
    }
    about = {"cluster": dataclasses.asdict(cluster), "jax": jax.__version__}
    print(json.dumps({"benchmark": "scaling"} | result | describe(flags, config) | about))


if __name__ == "__main__":
    main()
