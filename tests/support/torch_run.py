"""The reference's training step in plain PyTorch, on a whole checkpoint as torch itself reads it.

`PYTHONPATH=.:benchmarks python -m tests.support.torch_run` writes next_step.json, for
machines without torch: what the first step after tests/goldens/pth/full_checkpoint.pth does.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.torch_model import MultiCrop
from peers.torch_step import dino_loss

from tests.support.next_step import FULL, META, STEP, fingerprint, views

NETWORKS = ("student", "teacher")
SIZES = {
    "patch_size": META["patch"],
    "image_size": META["img"],
    "in_channels": 3,
    "embed_dim": META["dim"],
    "depth": META["depth"],
    "num_heads": META["heads"],
    "mlp_dim": 4 * META["dim"],
    "head_widths": [META["dim"], META["hidden"], META["hidden"], META["bottleneck"]],
    "out_dim": META["out_dim"],
}


class TorchRun:
    """A run of the reference in float64, between two steps.

    Args:
      file: a whole checkpoint, as `torch.load` gives it.
      optimizer: "adamw" or "sgd"; its state is that of the file, or new if the file has another.
    """

    def __init__(self, file: dict[str, Any], optimizer: str = "adamw") -> None:
        self.names = [name.removeprefix("module.") for name in file["student"]]  # in its order
        self.student, self.teacher = MultiCrop(SIZES, "plain"), MultiCrop(SIZES, "plain")
        for network, which in ((self.student, "student"), (self.teacher, "teacher")):
            network.double().load_state_dict(
                {here(name): tensor for name, tensor in file[which].items()}
            )
        self.center = file["dino_loss"]["center"].double()
        self.epoch = file["epoch"]
        self.trained = [n for n in self.names if n != "head.last_layer.weight_g"]
        tensors = dict(self.student.named_parameters())
        self.parameters = {name: tensors[here(name)] for name in self.trained}
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
        """One step on the views of `views`; returns its loss."""
        planes = [torch.tensor(x).double().permute(0, 3, 1, 2) for x in images]
        with torch.no_grad():
            teacher = self.teacher(planes[:2])
        temps = STEP["student_temp"], STEP["teacher_temp"]
        loss = dino_loss(self.student(planes), teacher, self.center, temps)
        self.student.zero_grad()
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
            pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
            for old, new in pairs:
                old.mul_(STEP["momentum"]).add_((1 - STEP["momentum"]) * new)
        keep = STEP["center_momentum"]
        self.center = keep * self.center + (1 - keep) * teacher.mean(0, keepdim=True)
        return loss.item()

    def tensors(self, which: str) -> dict[str, torch.Tensor]:
        """A network's tensors by the reference's names."""
        state = getattr(self, which).state_dict()
        return {name: state[here(name)] for name in self.names}

    def file(self) -> dict[str, Any]:
        """The whole checkpoint, in float32, as the reference saves it."""
        float32 = {w: {n: x.float() for n, x in self.tensors(w).items()} for w in NETWORKS}
        state = self.optimizer.state_dict()
        for entry in state["state"].values():
            entry.update({key: x.float() for key, x in entry.items() if torch.is_tensor(x)})
        return {
            "student": {f"module.{name}": x for name, x in float32["student"].items()},
            "teacher": float32["teacher"],
            "optimizer": state,
            "epoch": self.epoch,
            "args": argparse.Namespace(optimizer=self.kind, out_dim=SIZES["out_dim"]),
            "dino_loss": {"center": self.center.float()},
            "fp16_scaler": None,
        }


def here(name: str) -> str:
    """The reference's name of a tensor in our PyTorch network."""
    name = name.removeprefix("module.").replace("patch_embed.proj", "patch_embed")
    name = re.sub(r"head\.mlp\.(\d+)", lambda m: f"head.layers.{int(m[1]) // 2}", name)
    return name.replace("last_layer.weight_", "last_layer.")


def load(path: Path) -> dict[str, Any]:
    """A file of our own making, which may hold a namespace."""
    return torch.load(path, weights_only=False)


def main() -> None:
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
