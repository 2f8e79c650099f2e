"""Our side of a comparison: the package's training step on given views."""

import copy
import math
from typing import Any

import jax
import machine
import numpy as np
from ml_collections import ConfigDict
from our_step import (
    STEPS_PER_EPOCH,
    abstract_model,
    arithmetic,
    compiled_step,
    peak_bytes,
    schedule_values,
    seconds_per_call,
)
from peers.task import CHECKED_STEPS, Task

from dino_jax import sharding
from dino_jax.models.network import split


class OurSide:
    """The step on one device; see `peers.task.Side`."""

    def __init__(self, config: ConfigDict) -> None:
        """Draws weights, large enough for every part of the network to affect the loss."""
        self.config, self.mesh = config, sharding.make_mesh(jax.devices()[:1])
        self.model = abstract_model(config)
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
        """What the other sides need to do the same work."""
        config, backbone, layers = self.config, self.model.backbone, self.model.head.layers
        dtype = arithmetic(config)["dtype"]
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
            schedules=schedule_values(
                config, steps_per_epoch=STEPS_PER_EPOCH, steps=STEPS_PER_EPOCH
            ),
            batch_size=config.train.batch_size,
            dtype=dtype,
            exact=jax.default_backend() == "cpu" and dtype == "float32",
        )

    def about(self) -> dict[str, Any]:
        return arithmetic(self.config)

    def device(self) -> dict[str, Any]:
        """The device that this process computes on."""
        return machine.device()

    def losses(self, task: Task, *, exact: bool) -> list[float]:
        self.step = None  # frees the previous one
        config = copy.deepcopy(self.config)
        config.model.dtype = "float32" if exact else task.dtype
        views = task.views(exact=exact)
        self.batch = jax.device_put({"views": views}, sharding.batch_sharded(self.mesh))
        with jax.default_matmul_precision("highest" if exact else None):
            step = compiled_step(
                config, self.batch, self.mesh, lambda batch, epoch: (batch["views"], None)
            )
        # Two copies, since the step donates both.
        params, teacher_params = (
            jax.device_put(self.params, step.plan.shardings.params, may_alias=False)
            for _ in range(2)
        )
        step.state = step.state.replace(params=params, teacher_params=teacher_params)
        self.step = step
        return [float(step(self.batch).meters.interval["loss"]) for _ in range(CHECKED_STEPS)]

    def seconds(self, steps: int) -> float:
        return seconds_per_call(lambda: self.step(self.batch), groups=1, size=steps)[0]

    def peak_gib(self) -> float | None:
        peak, source = peak_bytes(self.step.compiled, jax.devices()[0])
        return round(peak / 2**30, 2) if source == "device" else None


def torch_weight(path: tuple[Any, ...], array: np.ndarray, channels: int) -> tuple[str, np.ndarray]:
    """Name and layout in `torch_model` of one of our parameters."""
    *parents, leaf = [str(key.key) for key in path]
    name = ".".join([*parents, "weight" if leaf in ("kernel", "scale") else leaf])
    if parents[-1] == "patch_embed" and leaf == "kernel":  # [P * P * C, D] -> [D, C, P, P]
        side = math.isqrt(array.shape[0] // channels)
        return name, array.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)
    return name, array.T if array.ndim == 2 else array
