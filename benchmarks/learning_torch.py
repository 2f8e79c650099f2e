"""The first epochs of `learning_parity.py` in PyTorch, with crops by PIL; prints one JSON line.

python benchmarks/learning_torch.py --seed=0                 # 2 minutes on two CPU cores
python benchmarks/learning_torch.py --seed=0 --crops=ours

Model, initial weights, optimizer and crops are written for PyTorch and PIL from the paper (no
stochastic depth); `--crops=ours` puts our crops in place of PIL's. It says how far losses of the
same settings lie apart that share no code.
"""

import argparse
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import jax
import numpy as np
import torch
from learning_parity import REFERENCE, get_config
from peers.pil_views import views as pil_views
from peers.torch_model import MultiCrop
from peers.torch_step import TorchStep
from torch import nn

from dino_jax import settings
from dino_jax.data.pipeline import Records, train_batches
from dino_jax.data.sources import open_source
from dino_jax.plan import crop_maker

CONFIG = get_config()
SIZES = {
    "embed_dim": 96,
    "patch_size": 4,
    "image_size": 32,
    "in_channels": 3,
    "num_heads": 3,
    "mlp_dim": 384,
    "depth": 4,
    "head_widths": [96, 512, 512, 128],
    "out_dim": 1024,
    "norm_last_layer": True,
    "student_temp": CONFIG.loss.student_temp,
    "center_momentum": CONFIG.loss.center_momentum,
    "clip_grad": CONFIG.optim.clip_grad,
}


class Step(TorchStep):
    """With the last layer frozen in the first epoch."""

    freeze_steps: int

    def _clip(self) -> None:
        super()._clip()
        if self.step <= self.freeze_steps:
            self.student.head.last_layer.v.grad = None


def first_weights(seed: int) -> dict[str, np.ndarray]:
    """As the paper's code draws them."""
    torch.manual_seed(seed)
    model = MultiCrop(SIZES, fused=False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    for parameter in (model.backbone.pos_embed, model.backbone.cls_token):
        nn.init.trunc_normal_(parameter, std=0.02)
    bound = SIZES["head_widths"][-1] ** -0.5
    nn.init.uniform_(model.head.last_layer.v, -bound, bound)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def all_views(kind: str, seed: int) -> Iterator[list[torch.Tensor]]:
    """Views [B, C, H, W] of each step's batch."""
    batches = train_batches(
        Records(open_source(CONFIG.data.train), channels=3),
        batch_size=CONFIG.train.batch_size,
        seed=seed,
        start_step=0,
        canvas_size=CONFIG.data.canvas_size,
        num_threads=2,
    )
    if kind == "ours":
        make = jax.jit(crop_maker(CONFIG))
        for batch in batches:
            groups, _ = make(batch, np.int32(0))
            planes = [np.array(group).transpose(1, 0, 4, 2, 3) for group in groups]
            yield [torch.from_numpy(view) for group in planes for view in group]
    make = partial(pil_views, settings=settings.crop_settings(CONFIG))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for step, batch in enumerate(batches):
            seeds = (seed * 10**9 + step * 10**4 + i for i in range(len(batch["canvas"])))
            crops = list(pool.map(make, batch["canvas"], seeds, chunksize=32))
            stacked = (np.stack(view).transpose(0, 3, 1, 2) for view in zip(*crops, strict=True))
            yield [torch.from_numpy(np.ascontiguousarray(view)) for view in stacked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crops", choices=("pil", "ours"), default="pil")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    CONFIG.seed = args.seed
    steps = len(open_source(CONFIG.data.train)) // CONFIG.train.batch_size
    schedules = {
        name: np.asarray(jax.vmap(schedule)(np.arange(steps * CONFIG.train.epochs)))
        for name, schedule in settings.make_schedules(CONFIG, steps).items()
    }
    step = Step(
        SIZES,
        first_weights(args.seed),
        schedules,
        variant="eager",
        dtype=torch.float32,
        compiled=False,
        device=torch.device("cpu"),
    )
    step.freeze_steps = steps * CONFIG.optim.freeze_last_layer
    views = all_views(args.crops, args.seed)
    losses = [
        float(np.mean([float(step(v)) for v in itertools.islice(views, steps)]))
        for _ in range(args.epochs)
    ]
    result = {"benchmark": "learning_torch", "crops": args.crops, "seed": args.seed}
    result["loss"] = [round(loss, 3) for loss in losses]
    print(json.dumps(result | {"reference": REFERENCE["loss"], "torch": torch.__version__}))


if __name__ == "__main__":
    main()
