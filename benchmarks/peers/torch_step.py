"""DINO's training step in plain PyTorch, written from the paper and its reference's description.

Three variants:

  eager    as written in 2021: explicit attention; Python loops over the parameters for clipping,
           AdamW and moving average; fetches every gradient's norm and every loss; float16 with a
           gradient scaler on a GPU
  modern   scaled_dot_product_attention, fused AdamW, for-each kernels instead of loops, fetches
           nothing, bfloat16, and torch.compile for both networks and the loss
  timm     the same with the blocks of timm's ViT (timm must be installed)

Dims: B images, V views, K prototypes.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peers.task import CHECKED_STEPS, Task
from peers.torch_model import MultiCrop
from torch import Tensor

VARIANTS = {"eager": "plain", "modern": "fused", "timm": "timm"}  # the blocks of each


def dino_loss(
    student: Tensor, teacher: Tensor, center: Tensor, temps: tuple[float, Tensor]
) -> Tensor:
    """Mean cross-entropy of every teacher view with every other view of the student.

    Args:
      student: [V * B, K] logits.
      teacher: [2 * B, K] logits.
      center: [1, K].
      temps: of student and teacher.
    """
    student_temp, teacher_temp = temps
    targets = ((teacher - center) / teacher_temp).softmax(dim=-1).chunk(2)
    views = (student / student_temp).chunk(2 * len(student) // len(teacher))
    pairs = [
        torch.sum(-target * F.log_softmax(view, dim=-1), dim=-1).mean()
        for i, target in enumerate(targets)
        for v, view in enumerate(views)
        if v != i
    ]
    return sum(pairs) / len(pairs)


class TorchStep:
    """Student, teacher, center and optimizer. A call makes one step.

    Args:
      sizes: and settings of model, loss and clipping.
      tensors: initial weights of student and teacher, named as in `torch_model`.
      schedules: values of each step: lr, weight_decay, momentum, teacher_temp.
      variant: one of `VARIANTS`.
      dtype: of autocast; float32 disables it.
      compiled: use torch.compile, unless the variant is "eager".
      device: to run on.
    """

    def __init__(
        self,
        sizes: dict[str, Any],
        tensors: dict[str, np.ndarray],
        schedules: dict[str, np.ndarray],
        *,
        variant: str,
        dtype: torch.dtype,
        compiled: bool,
        device: torch.device,
    ) -> None:
        self.sizes, self.schedules, self.modern = sizes, schedules, variant != "eager"
        # On the device from the start: sending a value during a step makes the host wait.
        self.teacher_temps = torch.tensor(
            schedules["teacher_temp"], dtype=torch.float32, device=device
        )
        self.step = 0
        block = VARIANTS[variant]
        self.student, self.teacher = (MultiCrop(sizes, block).to(device) for _ in range(2))
        for network in (self.student, self.teacher):
            network.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()})
        self.teacher.requires_grad_(False)
        self.student.head.last_layer.g.requires_grad_(not sizes["norm_last_layer"])
        self.center = torch.zeros(1, sizes["out_dim"], device=device)
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        groups = [{"params": [p for p in self.trained if p.ndim > 1]}]
        groups.append({"params": [p for p in self.trained if p.ndim == 1], "weight_decay": 0.0})
        how = {"fused": True} if self.modern else {"foreach": False}
        self.optimizer = torch.optim.AdamW(groups, **how)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.autocast: Callable[[], Any] = contextlib.nullcontext
        if dtype != torch.float32:
            self.autocast = lambda: torch.autocast(device.type, dtype=dtype)
        self.losses = torch.compile(self._losses) if self.modern and compiled else self._losses

    def _losses(self, views: list[Tensor], teacher_temp: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the teacher's logits."""
        with self.autocast():
            with torch.no_grad():
                teacher = self.teacher(views[:2])
            student = self.student(views)
            temps = self.sizes["student_temp"], teacher_temp
            return dino_loss(student, teacher, self.center, temps), teacher

    def __call__(self, views: list[Tensor]) -> Tensor:
        """One step on V views [B, C, H, W], the two global ones first; returns its loss."""
        now = {name: float(x[self.step % len(x)]) for name, x in self.schedules.items()}
        # A tensor, so that torch.compile does not specialise on its value; a copy, to be aligned.
        teacher_temp = self.teacher_temps[self.step % len(self.teacher_temps)].clone()
        self.step += 1
        decayed, plain = self.optimizer.param_groups
        decayed.update(lr=now["lr"], weight_decay=now["weight_decay"])
        plain.update(lr=now["lr"])
        loss, teacher = self.losses(views, teacher_temp)
        if not self.modern and not math.isfinite(loss.item()):
            raise FloatingPointError("the loss is not finite")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        with torch.no_grad():
            self._clip()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._move_teacher(now["momentum"])
            keep = self.sizes["center_momentum"]
            self.center.mul_(keep).add_(teacher.float().mean(0, keepdim=True), alpha=1 - keep)
        return loss.detach()

    def _clip(self) -> None:
        """Scales each parameter's gradient down to the maximum norm."""
        limit = self.sizes["clip_grad"]
        if not limit:
            return
        grads = [p.grad for p in self.trained]
        if self.modern:
            factors = torch._foreach_add(torch._foreach_norm(grads), 1e-6)
            torch._foreach_reciprocal_(factors)
            torch._foreach_mul_(factors, limit)
            torch._foreach_clamp_max_(factors, 1.0)
            torch._foreach_mul_(grads, factors)
            return
        for grad in grads:
            factor = limit / (grad.norm(2).item() + 1e-6)
            if factor < 1:
                grad.mul_(factor)

    def _move_teacher(self, momentum: float) -> None:
        teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
        if self.modern:
            torch._foreach_lerp_(teacher, student, 1 - momentum)
            return
        for old, new in zip(teacher, student, strict=True):
            old.mul_(momentum).add_((1 - momentum) * new)


class TorchSide:
    """The step, on a GPU if there is one; see `peers.task.Side`."""

    def __init__(self, task: Task, variant: str, compiled: bool | None) -> None:
        self.variant = variant
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.backends.cudnn.benchmark = True
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = self.device.type == "cuda"
        self.compiled = variant != "eager" and (on_gpu if compiled is None else compiled)
        half = "float16" if variant == "eager" and on_gpu else "bfloat16"
        self.dtype = half if task.dtype == "bfloat16" else task.dtype

    def about(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "compiled": self.compiled}

    def losses(self, task: Task, *, exact: bool) -> list[float]:
        self.step = None  # frees the previous one
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        torch.set_float32_matmul_precision("highest" if exact else "high")  # as JAX does on GPUs
        torch.backends.cudnn.allow_tf32 = not exact
        self.step = TorchStep(
            task.sizes,
            task.weights,
            task.schedules,
            variant=self.variant,
            dtype=torch.float32 if exact else getattr(torch, self.dtype),
            compiled=self.compiled and exact == task.exact,  # only what is timed
            device=self.device,
        )
        groups = [torch.tensor(g, device=self.device) for g in task.views(exact=exact)]
        planes = [g.permute(1, 0, 4, 2, 3).contiguous() for g in groups]  # [V, B, C, H, W]
        self.views = [view for group in planes for view in group]
        return [float(self.step(self.views)) for _ in range(CHECKED_STEPS)]

    def seconds(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self.step(self.views)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    def peak_gib(self) -> float | None:
        if self.device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
