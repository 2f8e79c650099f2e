"""Crop plans for small crops."""

import jax

from dino_jax.data.transforms.multicrop import CropSettings, plan_crops

SMALL = CropSettings(global_size=32, local_size=16, local_number=3)
plan = jax.jit(jax.vmap(plan_crops, in_axes=(0, 0, None)), static_argnums=2)
