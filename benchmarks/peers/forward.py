"""Features of images by our backbone and by PyTorch's."""

import time
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from peers.ours import OurSide
from peers.task import Task

from dino_jax.models.network import split


class OurForward(OurSide):
    """What an evaluation computes for a batch on the device."""

    def __init__(self, config: ConfigDict) -> None:
        super().__init__(config)
        graphdef, _, _ = split(self.model)
        self.forward = jax.jit(
            lambda params, images: nnx.merge(graphdef, params, {}).backbone(images)
        )
        self.placed = jax.device_put(self.params)

    def features(self, images: np.ndarray) -> np.ndarray:
        """[B, H, W, C] -> [B, D]. Keeps the batch to be timed."""
        self.images = jax.device_put(images)
        return np.asarray(self.forward(self.placed, self.images))

    def seconds(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            result = self.forward(self.placed, self.images)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / steps


class TorchForward:
    """The same with fused attention and `inference_mode`, and torch.compile on a GPU."""

    def __init__(self, task: Task) -> None:
        import torch  # here: our worker process does not need PyTorch
        from peers.torch_model import VisionTransformer

        self.torch = torch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, task.dtype)
        torch.set_float32_matmul_precision("high")  # as JAX does on GPUs
        self.model = VisionTransformer(task.sizes, "fused").to(self.device).eval()
        self.model.load_state_dict(
            {
                name.removeprefix("backbone."): torch.tensor(array)
                for name, array in task.weights.items()
                if name.startswith("backbone.")
            }
        )
        if self.device.type == "cuda":
            self.model.compile()

    def _forward(self) -> Any:
        half = self.dtype != self.torch.float32
        with (
            self.torch.inference_mode(),
            self.torch.autocast(self.device.type, dtype=self.dtype, enabled=half),
        ):
            return self.model(self.images)

    def features(self, images: np.ndarray) -> np.ndarray:
        self.images = self.torch.tensor(images, device=self.device).permute(0, 3, 1, 2).contiguous()
        return self._forward().float().cpu().numpy()

    def seconds(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self._forward()
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    def about(self) -> dict[str, Any]:
        return {"dtype": str(self.dtype).removeprefix("torch.")}
