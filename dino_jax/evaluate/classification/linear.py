"""Linear classifiers on frozen features, one per learning rate, trained side by side.

The protocol of the DINO paper (section 3.2 and appendix F): normal initialisation with standard
deviation 0.01, SGD with momentum 0.9 and without weight decay, learning rate `base * batch / 256`
with a cosine decay to 0 per epoch. All classifiers share the features of a step.

Dims: R learning rates, B images, F feature width, C classes.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TOP = 5
MOMENTUM = 0.9
BLOCK_BYTES = 1 << 28  # for features and logits of one scoring block


class Heads(NamedTuple):
    """R linear classifiers."""

    kernel: jax.Array  # [R, F, C] float32
    bias: jax.Array  # [R, C]


class Probe(NamedTuple):
    """Classifiers in training."""

    heads: Heads
    momentum: Heads  # of the gradients


def new_probe(key: jax.Array, num_rates: int, width: int, num_classes: int) -> Probe:
    """Initial classifiers; all have the same weights."""
    kernel = 0.01 * jax.random.normal(key, (width, num_classes), jnp.float32)
    heads = Heads(jnp.tile(kernel, (num_rates, 1, 1)), jnp.zeros((num_rates, num_classes)))
    return Probe(heads, jax.tree.map(jnp.zeros_like, heads))


def learning_rates(
    base: tuple[float, ...], *, batch_size: int, epoch: int, epochs: int
) -> np.ndarray:
    """The rates [R] of an epoch.

    Args:
      base: R rates for 256 images.
      batch_size: images of a step over all devices.
      epoch: counted from 0.
      epochs: of the whole training; the rate reaches 0 after the last one.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    return np.array([rate * batch_size / 256 * cosine for rate in base], np.float32)


def probe_step(
    probe: Probe, features: jax.Array, labels: jax.Array, rates: jax.Array
) -> tuple[Probe, jax.Array]:
    """One step of SGD for every classifier.

    Args:
      probe: before the step.
      features: [B, F] float32.
      labels: [B] int32.
      rates: [R], from `learning_rates`.
    Returns: the probe after it, and the mean losses [R] before it.
    """

    def total(heads: Heads) -> tuple[jax.Array, jax.Array]:
        losses = cross_entropies(logits_of(heads, features), labels).mean(axis=0)
        return losses.sum(), losses  # the gradient of each classifier is that of its own loss

    (_, losses), gradients = jax.value_and_grad(total, has_aux=True)(probe.heads)
    momentum = jax.tree.map(lambda m, g: MOMENTUM * m + g, probe.momentum, gradients)
    kernel = probe.heads.kernel - rates[:, None, None] * momentum.kernel
    bias = probe.heads.bias - rates[:, None] * momentum.bias
    return Probe(Heads(kernel, bias), momentum), losses


def logits_of(heads: Heads, features: jax.Array) -> jax.Array:
    """[B, F] -> [B, R, C]."""
    products = jnp.einsum(
        "bf,rfc->brc", features, heads.kernel, precision=jax.lax.Precision.HIGHEST
    )
    return products + heads.bias


def cross_entropies(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """[B, R, C] and [B] -> [B, R]."""
    right = jnp.take_along_axis(logits, labels[:, None, None], axis=2)[..., 0]
    return jax.nn.logsumexp(logits, axis=2) - right


def score_heads(heads: Heads, features: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Scores classifiers.

    Args:
      heads: R classifiers.
      features: [B, F] float32.
      labels: [B] int32.
    Returns: `loss`, and `top1` and `top5` in percent, each [R]; top5 considers `min(5, C)` classes.
    """
    num_rates, width, num_classes = heads.kernel.shape
    totals = np.zeros((3, num_rates))
    size = max(1, BLOCK_BYTES // (8 * num_rates * num_classes + 4 * width))
    for start in range(0, len(labels), size):
        block = slice(start, start + size)
        totals += np.asarray(_score_block(heads, features[block], labels[block]))
    loss, top1, top5 = totals / len(labels)
    return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}


@jax.jit
def _score_block(heads: Heads, features: jax.Array, labels: jax.Array) -> jax.Array:
    """Sums over the images [3, R]: loss, top-1 hits and top-5 hits."""
    logits = logits_of(heads, features)
    ranks = jax.lax.top_k(logits, min(TOP, logits.shape[2]))[1]  # [B, R, 5]
    hits = ranks == labels[:, None, None]
    each = jnp.stack([cross_entropies(logits, labels), hits[..., 0], hits.any(axis=2)])
    return each.sum(axis=1)
