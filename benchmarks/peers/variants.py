"""Other ways to compute our training step; each changes the package in its own process.

A variant is a function that is called before the step is built. What it replaces must compute the
same: `variants.py` compares before it times.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from dino_jax import step
from dino_jax.models import block, head, residual, vit


def fused_attention(config: ConfigDict, implementation: str) -> None:
    """`jax.nn.dot_product_attention` in place of two products and a softmax."""

    def call(self: block.Attention, x: jax.Array, *, class_only: bool = False) -> jax.Array:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1)
        q, k, v = (qkv[:, :, i] for i in range(3))
        half = x.dtype.itemsize == 2
        mixed = jax.nn.dot_product_attention(
            q[:, :1] if class_only else q,
            k,
            v,
            # cuDNN has no float32, and one query is no work for it.
            implementation=implementation if half and not class_only else "xla",
        )
        return self.proj(mixed.reshape(batch, -1, dim))

    block.Attention.__call__ = call


def remat(config: ConfigDict, policy: str) -> None:
    config.model.remat = policy


def inputs_only(config: ConfigDict, gelu: bool, norm: bool) -> None:
    """The backward pass of GELU or LayerNorm starts from the layer's input alone."""
    if gelu:
        activation = jax.checkpoint(partial(jax.nn.gelu, approximate=False))
        block.Mlp.__call__ = lambda self, x: self.fc2(activation(self.fc1(x)))
    if norm:

        class LayerNorm(nnx.LayerNorm):
            def __call__(self, x: jax.Array) -> jax.Array:
                graphdef, arrays = nnx.split(self)
                return jax.checkpoint(
                    lambda arrays, x: nnx.LayerNorm.__call__(nnx.merge(graphdef, arrays), x)
                )(arrays, x)

        nnx_norm = partial(LayerNorm, epsilon=1e-6, use_fast_variance=False)
        block.layer_norm = vit.layer_norm = lambda dim, **rest: nnx_norm(dim, **rest)


def scan(config: ConfigDict) -> None:
    """All blocks but the last in one loop over stacked weights; without stochastic depth."""

    def call(
        self: vit.VisionTransformer, images: jax.Array, keys: jax.Array | None = None
    ) -> jax.Array:
        *blocks, last = self.blocks
        graphdef = nnx.graphdef(blocks[0])
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, blocks))
        x, _ = jax.lax.scan(
            lambda x, arrays: (nnx.merge(graphdef, arrays)(x, None), None),
            self._tokens(images),
            stacked,
        )
        return block.at_least_float32(self.norm(last(x, None, class_only=True)[:, 0]))

    vit.VisionTransformer.__call__ = call


def half_logits(config: ConfigDict) -> None:
    """Logits leave the last layer in the compute dtype, where that is bfloat16."""
    exact = head.WeightNormLinear.__call__

    def call(self: head.WeightNormLinear, x: jax.Array) -> jax.Array:
        logits = exact(self, x)
        return logits.astype(self.dtype or logits.dtype).astype(logits.dtype)

    head.WeightNormLinear.__call__ = call


def compiler(config: ConfigDict, **options: str | bool) -> None:
    """The step is compiled with other options."""
    step.compiler_options = lambda: options


def barriers(config: ConfigDict) -> None:
    """Residual sums are kept whole on every back end, as they are on a CPU."""
    residual.add_branch = block.add_branch = lambda x, branch: jax.lax.optimization_barrier(
        x + branch
    )


def random_bits(config: ConfigDict, implementation: str) -> None:
    jax.config.update("jax_default_prng_impl", implementation)


VARIANTS: dict[str, Callable[[ConfigDict], None]] = {
    "attention-xla": partial(fused_attention, implementation="xla"),
    "attention-cudnn": partial(fused_attention, implementation="cudnn"),
    "remat-dots": partial(remat, policy="dots"),
    "remat-full": partial(remat, policy="full"),
    "gelu-from-input": partial(inputs_only, gelu=True, norm=False),
    "norm-from-input": partial(inputs_only, gelu=False, norm=True),
    "both-from-input": partial(inputs_only, gelu=True, norm=True),
    "scan": scan,
    "half-logits": half_logits,
    "no-options": compiler,
    "no-triton-gemm": partial(compiler, xla_gpu_enable_triton_gemm=False),
    "barriers": barriers,
    "rbg": partial(random_bits, implementation="rbg"),
}
