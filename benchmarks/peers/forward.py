"""Features of images, by our backbone and by PyTorch's, each in a process of its own."""

import time
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from peers.ours import OurSide
from peers.task import Task

from dino_jax.config import build
from dino_jax.models.network import split


class OurForward(OurSide):
    """What an evaluation computes of a batch that lies on the device."""

    def __init__(self, config: ConfigDict) -> None:
        super().__init__(config)
        graphdef, _, _ = split(nnx.eval_shape(lambda: build.build_model(config, nnx.Rngs(0))))
        self.forward = jax.jit(
            lambda params, images: nnx.merge(graphdef, params, {}).backbone(images)
        )
        self.placed = jax.device_put(self.params)

    def features(self, images: np.ndarray) -> np.ndarray:
        """[B, H, W, C] -> [B, D]; the batch stays to be timed."""
        self.images = jax.device_put(images)
        return np.asarray(self.forward(self.placed, self.images))

    def seconds(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            result = self.forward(self.placed, self.images)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / steps


class TorchForward:
    """The same with fused attention, under `inference_mode`; on a GPU by torch.compile."""

    def __init__(self, task: Task) -> None:
        import torch  # here: our process imports none
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
        return {"dtype": str(self.dtype), "torch": self.torch.__version__}
