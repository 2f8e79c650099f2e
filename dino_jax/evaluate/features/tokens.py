"""Which backbone outputs are used as an image's feature.

Each feature is a frozen dataclass that is called with a backbone and images. Its `repr` identifies
it in caches and results, so it contains all settings.

Dims: B images, N tokens (class token first), D width, n blocks.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from dino_jax.errors import UsageError


class Feature(Protocol):
    """Maps images to features."""

    def __call__(self, model: nnx.Module, images: jax.Array) -> jax.Array:
        """[B, H, W, C] normalised -> [B, ...] float32."""
        ...


@dataclasses.dataclass(frozen=True)
class ClassToken:
    """The output of the backbone: the class token of a ViT or XCiT, the pooled map of a ResNet."""

    def __call__(self, model: nnx.Module, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, D]."""
        return model(images)


@dataclasses.dataclass(frozen=True)
class ClassTokens:
    """Concatenated class tokens of the last blocks of a ViT (paper, sections 4.1.1 and F.2).

    With `avgpool_patchtokens`, the mean of the last block's patch tokens is interleaved with its
    class token, as in the reference: cls_0, mean_0, cls_1, mean_1, ...

    Raises:
      UsageError: `avgpool_patchtokens` with more than one block.
    """

    n_last_blocks: int = 4
    avgpool_patchtokens: bool = False

    def __post_init__(self) -> None:
        if self.avgpool_patchtokens and self.n_last_blocks != 1:
            raise UsageError(
                f"n_last_blocks={self.n_last_blocks} must be 1 with avgpool_patchtokens, which "
                "uses the patch tokens of the last block only: set n_last_blocks=1"
            )

    def __call__(self, model: nnx.Module, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, n * D], or [B, 2 * D] with the mean."""
        layers = intermediate_layers(model, images, self.n_last_blocks)
        tokens = jnp.concatenate([layer[:, 0] for layer in layers], axis=-1)
        if self.avgpool_patchtokens:
            mean = layers[-1][:, 1:].mean(axis=1)
            tokens = jnp.stack([tokens, mean], axis=-1).reshape(len(tokens), -1)
        return tokens


@dataclasses.dataclass(frozen=True)
class BlockTokens:
    """Tokens after one block of a ViT, through the final norm.

    Attributes:
      kind: "class" for the class token, "patches" for the patch tokens, "all" for both.
      from_last: 1 for the last block, 2 for the one before it, ...
    """

    kind: str = "class"
    from_last: int = 1

    def __call__(self, model: nnx.Module, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, D] for "class", [B, N - 1, D] for "patches", [B, N, D] for "all"."""
        tokens = intermediate_layers(model, images, self.from_last)[0]
        return {"class": tokens[:, 0], "patches": tokens[:, 1:], "all": tokens}[self.kind]


def intermediate_layers(model: nnx.Module, images: jax.Array, n: int) -> list[jax.Array]:
    """Tokens after each of the last n blocks: n arrays [B, N, D].

    Raises:
      UsageError: the backbone has no such tokens, or fewer blocks.
    """
    if not hasattr(model, "get_intermediate_layers"):
        raise UsageError(
            f"a {type(model).__name__} does not give the tokens of single blocks: use a ViT"
        )
    return model.get_intermediate_layers(images, n)


WIDE = 768  # ViTs of at least this width are probed as ViT-B is in the paper


def probed_feature(
    model: nnx.Module, n_last_blocks: int | None, avgpool_patchtokens: bool | None
) -> Feature:
    """The feature of the linear probe: as requested, else as in the paper."""
    if n_last_blocks is None and avgpool_patchtokens is None:
        if not hasattr(model, "get_intermediate_layers"):
            return ClassToken()
        avgpool_patchtokens = model.embed_dim >= WIDE
    if n_last_blocks is None:
        n_last_blocks = 1 if avgpool_patchtokens else min(4, len(model.blocks))
    return ClassTokens(n_last_blocks, bool(avgpool_patchtokens))


@jax.jit
def unit_rows(features: jax.Array) -> jax.Array:
    """Scales features [..., D] to length 1; zero vectors stay zero."""
    norms = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.maximum(norms, 1e-12)
