"""Our side of a comparison: the training step of `dino_jax` on given views."""

import copy
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from our_step import STEPS_PER_EPOCH, build, peak_bytes, seconds_per_call
from peers.task import CHECKED_STEPS, Task

from dino_jax import sharding
from dino_jax.config import build as settings
from dino_jax.models.network import Network, PyTree, split
from dino_jax.training import step as training_step


class OurSide:
    """The step on one device; see `peers.task.Side`."""

    def __init__(self, config: ConfigDict) -> None:
        """Draws the weights; large enough for every part of the network to matter to the loss."""
        self.config, self.mesh = config, sharding.make_mesh(jax.devices()[:1])
        self.model = nnx.eval_shape(lambda: settings.build_model(config, nnx.Rngs(0)))
        random = np.random.default_rng(0)

        def draw(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> np.ndarray:
            noise, leaf = random.standard_normal(like.shape, np.float32), path[-1].key
            if leaf in ("kernel", "v"):
                return noise * np.float32(like.shape[0] ** -0.5)
            if leaf in ("scale", "g"):
                return 1 + np.float32(0.1) * noise
            return noise * np.float32(0.02 if leaf == "bias" else 0.2)

        _, shapes, _ = split(self.model)
        self.params = jax.tree_util.tree_map_with_path(draw, shapes)

    def task(self) -> Task:
        """What the other sides need to do the same."""
        config, backbone, layers = self.config, self.model.backbone, self.model.head.layers
        schedules = settings.make_schedules(config, STEPS_PER_EPOCH)
        dtype = np.dtype(settings.compute_dtype(config.model.dtype)).name
        sizes = {
            "patch_size": backbone.patch_size,
            "image_size": math.isqrt(backbone.pos_embed.shape[1] - 1) * backbone.patch_size,
            "in_channels": backbone.in_channels,
            "embed_dim": backbone.embed_dim,
            "depth": len(backbone.blocks),
            "num_heads": backbone.num_heads,
            "mlp_dim": backbone.blocks[0].mlp.fc1.out_features,
            "head_widths": [backbone.embed_dim, *(layer.out_features for layer in layers)],
            "out_dim": config.head.out_dim,
            "norm_last_layer": config.head.norm_last_layer,
            "global_size": config.crops.global_size,
            "local_size": config.crops.local_size,
            "local_number": config.crops.local_number,
            "student_temp": config.loss.student_temp,
            "center_momentum": config.loss.center_momentum,
            "clip_grad": config.optim.clip_grad,
        }
        return Task(
            sizes=sizes,
            weights=dict(
                torch_weight(path, array, backbone.in_channels)
                for path, array in jax.tree_util.tree_leaves_with_path(self.params)
            ),
            schedules={
                name: np.asarray(jax.vmap(schedule)(np.arange(STEPS_PER_EPOCH)))
                for name, schedule in schedules.items()
            },
            batch_size=config.train.batch_size,
            dtype=dtype,
            exact=jax.default_backend() == "cpu" and dtype == "float32",
        )

    def about(self) -> dict[str, Any]:
        """How this side computes."""
        dtype = settings.compute_dtype(self.config.model.dtype)
        device = self.mesh.devices.flat[0]
        return {
            "dtype": np.dtype(dtype).name,
            "attention": settings.attention_kernel(self.config).kernel,
            "backend": device.platform,
            "device": device.device_kind,
            "jax": jax.__version__,
        }

    def losses(self, task: Task, *, exact: bool) -> list[float]:
        self.step = None  # frees the former
        config = copy.deepcopy(self.config)
        config.model.dtype = "float32" if exact else task.dtype
        views = task.views(exact=exact)
        self.batch = jax.device_put({"views": views}, sharding.batch_sharded(self.mesh))
        with jax.default_matmul_precision("highest" if exact else None):
            step = build(config, self.batch, self.mesh, lambda batch, epoch: (batch["views"], None))
        # Two copies, since the step donates both.
        params, teacher_params = (
            jax.device_put(self.params, step.shardings.params, may_alias=False) for _ in range(2)
        )
        step.state = step.state.replace(params=params, teacher_params=teacher_params)
        self.step = step
        return [float(step(self.batch).meters.interval["loss"]) for _ in range(CHECKED_STEPS)]

    def derivatives(self, task: Task, *, exact: bool) -> list[np.ndarray]:
        """The teacher's logits, the loss and its gradients, on the views of the exact steps."""
        config = copy.deepcopy(self.config)
        config.model.dtype = "float32" if exact else task.dtype
        views = task.views(exact=True)
        model = nnx.eval_shape(lambda: settings.build_model(config, nnx.Rngs(0)))
        graphdef, _, batch_stats = split(model)
        network = Network(graphdef)

        def loss(params: PyTree, views: PyTree) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            teacher_logits, _ = network(params, batch_stats, views[:1])
            teacher_logits = jax.lax.stop_gradient(teacher_logits)
            output = training_step.dino_loss(
                network(params, batch_stats, views)[0],
                teacher_logits,
                jnp.zeros((1, teacher_logits.shape[-1])),
                student_temp=config.loss.student_temp,
                teacher_temp=config.loss.teacher_temp,
            )
            return output.loss, (teacher_logits, output.loss)

        with jax.default_matmul_precision("highest" if exact else None):
            gradients, values = jax.jit(jax.grad(loss, has_aux=True))(self.params, views)
        return jax.device_get([*values, *jax.tree.leaves(gradients)])

    def seconds(self, steps: int) -> float:
        return seconds_per_call(lambda: self.step(self.batch), groups=1, size=steps)[0]

    def temporary_bytes(self) -> int:
        """What the compiled step needs beside its arguments and results."""
        return self.step.compiled.memory_analysis().temp_size_in_bytes

    def peak_gib(self) -> float | None:
        peak, source = peak_bytes(self.step.compiled, jax.devices()[0])
        return round(peak / 2**30, 2) if source == "device" else None


def torch_weight(path: tuple[Any, ...], array: np.ndarray, channels: int) -> tuple[str, np.ndarray]:
    """Name and layout in `torch_step` of one of our parameters."""
    *parents, leaf = [str(key.key) for key in path]
    name = ".".join([*parents, "weight" if leaf in ("kernel", "scale") else leaf])
    if parents[-1] == "patch_embed" and leaf == "kernel":  # [P * P * C, D] -> [D, C, P, P]
        side = math.isqrt(array.shape[0] // channels)
        return name, array.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)
    return name, array.T if array.ndim == 2 else array
