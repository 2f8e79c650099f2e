"""The reference's training step in PyTorch, from a full checkpoint read by torch.

`python -m tests.support.torch_run` writes next_step.json, for machines without torch: the results
of the first step after tests/goldens/pth/full_checkpoint.pth.

The network is a function of tensors with the reference's names. It shares no code with the package
or its benchmarks. Dims: B images, V views, N tokens, D width, K prototypes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.next_step import FULL, META, STEP, fingerprint, views

NETWORKS = ("student", "teacher")
Tensors = dict[str, Tensor]


def linear(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def norm(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6)


def attention(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    """[B, N, D] -> [B, N, D]."""
    qkv = linear(tensors, f"{name}.qkv", x).unflatten(-1, (3, META["heads"], -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return linear(tensors, f"{name}.proj", (weights @ v).transpose(1, 2).flatten(2))


def positions(table: Tensor, side: int) -> Tensor:
    """The position table [1, 1 + M**2, D], resized to side x side patches."""
    grid = table[:, 1:].unflatten(1, (META["img"] // META["patch"], -1)).permute(0, 3, 1, 2)
    if grid.shape[2] != side:
        scale = (side + 0.1) / grid.shape[2]  # as in the reference, to avoid rounding errors
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def backbone(tensors: Tensors, images: Tensor) -> Tensor:
    """[B, 3, H, H] -> [B, D], the class token."""
    tensors = {name.removeprefix("backbone."): x for name, x in tensors.items()}
    kernel, bias = (tensors[f"patch_embed.proj.{part}"] for part in ("weight", "bias"))
    patches = F.conv2d(images, kernel, bias, stride=META["patch"])
    x = torch.cat(
        [tensors["cls_token"].expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)],
        dim=1,
    )
    x = x + positions(tensors["pos_embed"], patches.shape[-1])
    for block in (f"blocks.{i}" for i in range(META["depth"])):
        x = x + attention(tensors, f"{block}.attn", norm(tensors, f"{block}.norm1", x))
        hidden = F.gelu(linear(tensors, f"{block}.mlp.fc1", norm(tensors, f"{block}.norm2", x)))
        x = x + linear(tensors, f"{block}.mlp.fc2", hidden)
    return norm(tensors, "norm", x)[:, 0]


def logits(tensors: Tensors, images: list[Tensor]) -> Tensor:
    """V views [B, 3, H, H] -> [V, B, K]."""
    x = torch.stack([backbone(tensors, view) for view in images])
    x = F.gelu(linear(tensors, "head.mlp.0", x))
    x = F.gelu(linear(tensors, "head.mlp.2", x))
    x = F.normalize(linear(tensors, "head.mlp.4", x), dim=-1)
    return F.linear(x, F.normalize(tensors["head.last_layer.weight_v"], dim=-1)) * (
        tensors["head.last_layer.weight_g"].T
    )


def dino_loss(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    """The mean cross-entropy between every teacher view and every other student view."""
    targets = ((teacher - center) / STEP["teacher_temp"]).softmax(dim=-1)
    predicted = (student / STEP["student_temp"]).log_softmax(dim=-1)
    pairs = -torch.einsum("tbk,vbk->tv", targets, predicted) / student.shape[1]
    other = ~torch.eye(*pairs.shape, dtype=torch.bool)
    return pairs[other].mean()


class TorchRun:
    """A float64 run of the reference, between two steps.

    Args:
      file: a full checkpoint, as returned by `torch.load`.
      optimizer: "adamw" or "sgd". Its state comes from the file, or is new if the file contains the
        other optimizer.
    """

    def __init__(self, file: dict[str, Any], optimizer: str = "adamw") -> None:
        self.student, self.teacher = (
            {name.removeprefix("module."): x.double() for name, x in file[which].items()}
            for which in NETWORKS
        )
        self.center = file["dino_loss"]["center"].double()
        self.epoch = file["epoch"]
        self.parameters = {
            name: x.requires_grad_()
            for name, x in self.student.items()
            if name != "head.last_layer.weight_g"
        }
        groups = [
            {"params": [p for p in self.parameters.values() if p.ndim > 1]},
            {"params": [p for p in self.parameters.values() if p.ndim == 1]},
        ]
        self.kind = optimizer
        if optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(groups)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=0, momentum=0.9)
        if getattr(file["args"], "optimizer", "adamw") == optimizer:
            self.optimizer.load_state_dict(file["optimizer"])

    def step(self, images: list[np.ndarray], *, frozen: bool = False) -> float:
        """Takes one step on `views` and returns the loss."""
        planes = [torch.tensor(x).double().permute(0, 3, 1, 2) for x in images]
        with torch.no_grad():
            teacher = logits(self.teacher, planes[:2])
        loss = dino_loss(logits(self.student, planes), teacher, self.center)
        self.optimizer.zero_grad()
        loss.backward()
        for group, decay in zip(
            self.optimizer.param_groups, (STEP["weight_decay"], 0), strict=True
        ):
            group.update(lr=STEP["lr"], weight_decay=decay)
        for name, parameter in self.parameters.items():
            parameter.grad.mul_(min(1.0, STEP["clip_grad"] / (parameter.grad.norm().item() + 1e-6)))
            if frozen and "last_layer" in name:
                parameter.grad = None
        self.optimizer.step()
        with torch.no_grad():
            for name, old in self.teacher.items():
                old.mul_(STEP["momentum"]).add_((1 - STEP["momentum"]) * self.student[name])
        keep = STEP["center_momentum"]
        self.center = keep * self.center + (1 - keep) * teacher.mean((0, 1))[None]
        return loss.item()

    def tensors(self, which: str) -> Tensors:
        """A network's tensors by the reference's names."""
        return {name: x.detach() for name, x in getattr(self, which).items()}

    def file(self) -> dict[str, Any]:
        """A full float32 checkpoint, as saved by the reference."""
        float32 = {w: {n: x.float() for n, x in self.tensors(w).items()} for w in NETWORKS}
        state = self.optimizer.state_dict()
        for entry in state["state"].values():
            entry.update({key: x.float() for key, x in entry.items() if torch.is_tensor(x)})
        return {
            "student": {f"module.{name}": x for name, x in float32["student"].items()},
            "teacher": float32["teacher"],
            "optimizer": state,
            "epoch": self.epoch,
            "args": argparse.Namespace(optimizer=self.kind, out_dim=META["out_dim"]),
            "dino_loss": {"center": self.center.float()},
            "fp16_scaler": None,
        }


def load(path: Path) -> dict[str, Any]:
    """Reads a trusted file, which may contain a namespace."""
    return torch.load(path, weights_only=False)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    file = load(FULL)
    run = TorchRun(file)
    loss = run.step(views(0))
    before = {name.removeprefix("module."): x.double() for name, x in file["student"].items()}
    updates = {n: fingerprint((x - before[n]).numpy()) for n, x in run.tensors("student").items()}
    record = {"loss": loss, "torch": torch.__version__, "updates": updates}
    path = Path(__file__).parent / "next_step.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
