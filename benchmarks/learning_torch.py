"""The first epochs of `learning_parity.py`, in PyTorch with PIL's crops. Prints one JSON line.

python benchmarks/learning_torch.py                          # 2 minutes on two CPU cores
python benchmarks/learning_torch.py --crops=ours --config.seed=1

Model, initial weights, optimizer and crops are written for PyTorch and PIL from the paper, without
stochastic depth. `--crops=ours` uses the package's crops instead of PIL's. The result shows how
much losses differ between two implementations with the same settings and no code in common.
"""

import argparse
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import jax
import numpy as np
import torch
from learning_parity import REFERENCE, get_config
from machine import report
from ml_collections import ConfigDict
from our_step import crop_settings, schedule_values
from peers.ours import OurSide
from peers.pil_views import views
from peers.torch_model import MultiCrop
from peers.torch_step import TorchStep
from torch import Tensor, nn

from dino_jax.config.file import override
from dino_jax.data.batches import Batch
from dino_jax.data.pipeline import Records, train_batches
from dino_jax.data.sources import open_source
from dino_jax.run.plan import crop_maker


class Step(TorchStep):
    """A step that freezes the last layer at first."""

    freeze_steps: int

    def _clip(self) -> None:
        super()._clip()
        if self.step <= self.freeze_steps:
            self.student.head.last_layer.v.grad = None


def first_weights(sizes: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Initial weights, drawn as the paper's code draws them."""
    torch.manual_seed(seed)
    model = MultiCrop(sizes, "plain")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    for parameter in (model.backbone.pos_embed, model.backbone.cls_token):
        nn.init.trunc_normal_(parameter, std=0.02)
    bound = sizes["head_widths"][-1] ** -0.5
    nn.init.uniform_(model.head.last_layer.v, -bound, bound)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def our_views(config: ConfigDict, batches: Iterable[Batch], steps: int) -> Iterator[list[Tensor]]:
    """Views [B, C, H, W] of each step's batch, made by our crops.

    Args:
      config: read for its crops and seed.
      batches: of canvases.
      steps: per epoch; every epoch draws new crops.
    """
    make = jax.jit(crop_maker(config))
    for step, batch in enumerate(batches):
        groups, _ = make(batch, np.int32(step // steps))
        planes = [np.array(group).transpose(1, 0, 4, 2, 3) for group in groups]
        yield [torch.from_numpy(view) for group in planes for view in group]


def pil_views(config: ConfigDict, batches: Iterable[Batch]) -> Iterator[list[Tensor]]:
    """The same, made by PIL."""
    make = partial(views, settings=crop_settings(config))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for step, batch in enumerate(batches):
            seeds = (config.seed * 10**9 + step * 10**4 + i for i in range(len(batch["canvas"])))
            crops = list(pool.map(make, batch["canvas"], seeds, chunksize=32))
            stacked = (np.stack(view).transpose(0, 3, 1, 2) for view in zip(*crops, strict=True))
            yield [torch.from_numpy(np.ascontiguousarray(view)) for view in stacked]


def losses(config: ConfigDict, crops: str, epochs: int) -> list[float]:
    """Mean loss of each epoch."""
    records = Records(open_source(config.data.train), channels=len(config.crops.mean))
    steps = len(records.source) // config.train.batch_size
    batches = train_batches(
        records,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=0,
        canvas_size=config.data.canvas_size,
        num_threads=config.data.num_threads,
    )
    schedules = schedule_values(config, steps_per_epoch=steps, steps=steps * config.train.epochs)
    sizes = OurSide(config).task().sizes
    step = Step(
        sizes,
        first_weights(sizes, config.seed),
        schedules,
        variant="eager",
        dtype=torch.float32,
        compiled=False,
        device=torch.device("cpu"),
    )
    step.freeze_steps = steps * config.optim.freeze_last_layer
    by_step = our_views(config, batches, steps) if crops == "ours" else pil_views(config, batches)
    return [
        float(np.mean([float(step(v)) for v in itertools.islice(by_step, steps)]))
        for _ in range(epochs)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--crops", choices=("pil", "ours"), default="pil")
    parser.add_argument("--epochs", type=int, default=2, help="to train, of those in the settings")
    args, overrides = parser.parse_known_args()
    config = get_config()
    override(config, overrides)
    loss = [round(each, 3) for each in losses(config, args.crops, args.epochs)]
    result = {"crops": args.crops, "seed": config.seed, "changed": overrides, "loss": loss}
    report("learning_torch", result | {"reference": REFERENCE["loss"]})


if __name__ == "__main__":
    main()
