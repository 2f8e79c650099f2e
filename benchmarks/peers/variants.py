"""Other ways to compute our training step; each changes the package in its own process.

A variant is a function that is called before the step is built. What it replaces must compute the
same: `variants.py` compares before it times.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from dino_jax.models import block, head, network, residual, vit
from dino_jax.models.attention import Attention, cudnn_attention
from dino_jax.training import losses, optim, step

PyTree = Any


def attention(config: ConfigDict, kernel: str) -> None:
    config.model.attention = kernel


def remat(config: ConfigDict, policy: str) -> None:
    config.model.remat = policy


def keep_activations(config: ConfigDict) -> None:
    """The backward passes of GELU and LayerNorm keep what they need, not their inputs alone."""
    block.gelu = head.gelu = partial(jax.nn.gelu, approximate=False)
    block.LayerNorm.__call__ = nnx.LayerNorm.__call__


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


def one_token_batch(config: ConfigDict) -> None:
    """Both sizes of crops go through a block together, apart in the attention alone."""

    def attend(
        attention: Attention, x: jax.Array, groups: list[tuple[int, int]], class_only: bool = False
    ) -> jax.Array:
        batch, _, dim = x.shape
        ends = np.cumsum([views * tokens for views, tokens in groups])
        mixed = []
        for part, (views, tokens) in zip(
            jnp.split(attention.qkv(x), ends[:-1], axis=1), groups, strict=True
        ):
            qkv = part.reshape(batch * views, tokens, 3, attention.num_heads, -1)
            q, k, v = qkv.transpose(2, 0, 3, 1, 4)
            q = q[:, :, :1] if class_only else q
            if attention.kernel == "cudnn" and not class_only:
                values = cudnn_attention(q, k, v)
            else:
                values = attention.weights(q, k).astype(v.dtype) @ v
            mixed.append(values.swapaxes(1, 2).reshape(batch, -1, dim))
        return attention.proj(jnp.concatenate(mixed, axis=1))

    def call(
        self: network.MultiCropModel, views: Sequence[jax.Array], keys: jax.Array | None
    ) -> jax.Array:
        backbone, groups, tokens = self.backbone, [], []
        for group in views:
            batch, number = group.shape[:2]
            part = backbone._tokens(group.reshape(batch * number, *group.shape[2:]))
            groups.append((number, part.shape[1]))
            tokens.append(part.reshape(batch, -1, part.shape[-1]))
        x = jnp.concatenate(tokens, axis=1)
        lengths = [length for number, length in groups for _ in range(number)]
        class_tokens = np.cumsum([0, *lengths])[:-1]
        *blocks, last = backbone.blocks
        for module in blocks:
            x = residual.add_branch(x, attend(module.attn, module.norm1(x), groups))
            x = residual.add_branch(x, module.mlp(module.norm2(x)))
        attended = attend(last.attn, last.norm1(x), groups, class_only=True)
        x = residual.add_branch(x[:, class_tokens], attended)
        x = residual.add_branch(x, last.mlp(last.norm2(x)))
        features = block.at_least_float32(backbone.norm(x))
        logits = self.head(features.reshape(-1, features.shape[-1]))
        return logits.reshape(*features.shape[:2], -1)

    network.MultiCropModel.__call__ = call


def stacked_optimizer(config: ConfigDict) -> None:
    """Clipping and optimizer see the weights of all blocks in stacks, one for each kind."""
    make = optim.make_optimizer

    def parts(tree: PyTree) -> tuple[PyTree, PyTree]:
        backbone = dict(tree["backbone"])
        blocks = backbone.pop("blocks")
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks.values())
        return stacked, {**tree, "backbone": backbone}

    def stack(*args: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
        tx = make(*args, **settings)

        def init(params: PyTree) -> PyTree:
            stacked, rest = parts(params)
            return jax.vmap(tx.init)(stacked), tx.init(rest)

        def update(
            updates: PyTree, state: PyTree, params: PyTree, **extra: Any
        ) -> tuple[PyTree, PyTree]:
            (stacked, rest), (stacked_params, rest_params) = parts(updates), parts(params)
            stacked, stacked_state = jax.vmap(
                lambda updates, state, params: tx.update(updates, state, params, **extra)
            )(stacked, state[0], stacked_params)
            rest, rest_state = tx.update(rest, state[1], rest_params, **extra)
            blocks = {
                name: jax.tree.map(lambda x, i=i: x[i], stacked)
                for i, name in enumerate(params["backbone"]["blocks"])
            }
            merged = {**rest, "backbone": {**rest["backbone"], "blocks": blocks}}
            return merged, (stacked_state, rest_state)

        return optax.GradientTransformationExtraArgs(init, update)

    optim.make_optimizer = stack


def bottleneck_loss(config: ConfigDict, blocks: int) -> None:
    """Teacher and student meet in the bottleneck: <q, z W> = <z, W q>.

    The student's logits are then only needed for their logsumexp, a block of prototypes at a time;
    with more than one block they are never stored, but computed again in the backward pass.
    """
    with_logits = network.MultiCropModel.__call__

    def call(
        self: network.MultiCropModel, views: Sequence[jax.Array], keys: jax.Array | None
    ) -> Any:
        if len(views) == 1:  # the teacher's
            return with_logits(self, views, keys)
        with mock.patch.object(head.WeightNormLinear, "__call__", lambda self, x: x):
            z = with_logits(self, views, keys)
        layer = self.head.last_layer
        v = layer.v[...]
        scale = layer.g[...] / jnp.linalg.norm(v, axis=0, keepdims=True)
        dtype = layer.dtype or z.dtype
        return z.astype(dtype), v.astype(dtype), jax.lax.optimization_barrier(scale)

    def loss(
        student: tuple[jax.Array, jax.Array, jax.Array],
        teacher_logits: jax.Array,
        center: jax.Array,
        *,
        student_temp: float,
        teacher_temp: jax.Array,
    ) -> losses.LossOutput:
        z, v, scale = student  # [B, V, C], [C, K], [1, K]
        log_q = jax.nn.log_softmax((teacher_logits - center) / teacher_temp)
        q = jnp.exp(log_q)
        product = partial(jnp.matmul, preferred_element_type=jnp.float32)

        def logsumexp(v: jax.Array, scale: jax.Array) -> jax.Array:
            return jax.nn.logsumexp(product(z, v) * scale / student_temp, axis=-1)

        if blocks == 1:
            lse = logsumexp(v, scale)
        else:
            again = jax.checkpoint(logsumexp, prevent_cse=False)
            pieces = [x.reshape(len(x), blocks, -1).swapaxes(0, 1) for x in (v, scale)]
            lse, _ = jax.lax.scan(
                lambda lse, piece: (jnp.logaddexp(lse, again(*piece)), None),
                jnp.full(z.shape[:2], -jnp.inf),
                pieces,
            )
        # A global view meets the other global's target, the local views both.
        targets = jnp.concatenate([q[:, ::-1], q.sum(1, keepdims=True)], axis=1)
        met = product((targets * scale).astype(v.dtype), v.T) / student_temp  # [B, 3, C]
        wide = z.astype(jnp.float32)
        dots = jnp.sum(met[:, :2] * wide[:, :2], axis=(1, 2))
        dots += jnp.sum(met[:, 2] * wide[:, 2:].sum(1), axis=-1)
        pairs = 2 * (z.shape[1] - 1)
        value = jnp.mean(lse[:, :2].sum(1) + 2 * lse[:, 2:].sum(1) - dots) / pairs
        entropy = -jnp.mean(jnp.sum(q * log_q, axis=-1))
        return losses.LossOutput(value, entropy, value - entropy, q.mean((0, 1)))

    network.MultiCropModel.__call__ = call
    step.dino_loss = loss


VARIANTS: dict[str, Callable[[ConfigDict], None]] = {
    "attention-xla": partial(attention, kernel="xla"),
    "remat-dots": partial(remat, policy="dots"),
    "remat-full": partial(remat, policy="full"),
    "keep-activations": keep_activations,
    "scan": scan,
    "one-token-batch": one_token_batch,
    "stacked-optimizer": stacked_optimizer,
    "bottleneck-loss": partial(bottleneck_loss, blocks=1),
    "blocked-loss": partial(bottleneck_loss, blocks=8),
    "half-logits": half_logits,
    "no-options": compiler,
    "no-triton-gemm": partial(compiler, xla_gpu_enable_triton_gemm=False),
    "barriers": barriers,
}
