"""How fast are the attention kernels, forward and backward? Prints one JSON line.

python benchmarks/attention.py                                  # ViT-S/16, 64 images: a GPU
python benchmarks/attention.py --images=2 --lengths 37 --crops 8   # a CPU, without cuDNN

  ms       forward and backward pass over the crops of all images, by kernel and length: 2 crops
           per image of 197 tokens, 8 of 37. Median of the rounds
  ratio    XLA's time divided by cuDNN's
  refused  why cuDNN's kernel cannot be used, by length
"""

import argparse
from collections.abc import Callable
from statistics import median

import jax
import jax.numpy as jnp
from flax import nnx
from machine import report
from our_step import seconds_per_call

from dino_jax.models.attention import Attention, cudnn_attention
from dino_jax.models.attention_kernel import what_is_wrong

Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def milliseconds(attend: Kernel, shape: tuple[int, ...], *, rounds: int, steps: int) -> float:
    """Median time of the output and its gradients, for arrays [B, h, N, d] in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 4)
    *arrays, cotangent = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)

    def both(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        output, pull_back = jax.vjp(attend, *arrays)
        return output, *pull_back(cotangent)

    compiled = jax.jit(both).lower(*arrays).compile()
    work = lambda: compiled(*arrays)  # noqa: E731
    seconds_per_call(work, groups=1, size=2)  # warm-up
    return round(1e3 * median(seconds_per_call(work, groups=rounds, size=steps)), 4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="+", default=[197, 37], help="tokens")
    parser.add_argument("--crops", type=int, nargs="+", default=[2, 8], help="of each length")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="per round")
    flags = parser.parse_args()
    module = Attention(flags.heads, flags.heads, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    def xla_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return module.weights(q, k).astype(v.dtype) @ v

    times: dict[str, dict[int, float]] = {"xla": {}, "cudnn": {}}
    refused = {}
    for length, crops in zip(flags.lengths, flags.crops, strict=True):
        shape = (flags.images * crops, flags.heads, length, flags.head_dim)
        timing = {"rounds": flags.rounds, "steps": flags.steps}
        times["xla"][length] = milliseconds(xla_attention, shape, **timing)
        if wrong := what_is_wrong(cudnn_attention, shape[1:], jnp.bfloat16, jax.local_devices()):
            refused[length] = wrong
        else:
            times["cudnn"][length] = milliseconds(cudnn_attention, shape, **timing)
    result = {
        "ms": times,
        "ratio": {n: round(times["xla"][n] / each, 3) for n, each in times["cudnn"].items()},
        "refused": refused,
    }
    report("attention", result | vars(flags))


if __name__ == "__main__":
    main()
