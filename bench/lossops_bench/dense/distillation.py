"""Distillation: divergences between the softmax of a teacher and that of a student."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops_bench.dense.table import Draw, dense

__all__: list[str] = []


def teacher_head(draw: Draw) -> dict[str, Any]:
    """Features of another width, and their weight."""
    width = draw.features + 3
    weight = draw.normal(draw.classes, width)
    return {"teacher": (draw.normal(*draw.lead, width), weight)}


def teacher_logits(teacher: tuple[Tensor, Tensor], z: Tensor) -> Tensor:
    return (teacher[0] @ teacher[1].T).to(z.dtype)


@dense(
    {"kind": "kl"},
    {"kind": "kl", "temperature": 3.0},
    {"kind": "reverse_kl", "temperature": 2.0},
    {"kind": "jsd"},
    {"kind": "jsd", "beta": 0.9},
    {"kind": "binary_kl", "temperature": 2.0},
    extras=teacher_head,
)
def distillation(
    z: Tensor,
    y: Tensor,
    teacher: tuple[Tensor, Tensor],
    kind: str,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    zt = teacher_logits(teacher, z)
    if kind == "binary_kl":
        u = (z - zt) / temperature
        return temperature**2 * (F.softplus(u) - u / 2 - math.log(2)).sum(-1)
    p, q = (zt / temperature).softmax(-1), (z / temperature).softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    if kind == "kl":
        return temperature**2 * kl(p, q)
    if kind == "reverse_kl":
        return temperature**2 * kl(q, p)
    mixed = beta * p + (1 - beta) * q
    return temperature**2 * (beta * kl(p, mixed) + (1 - beta) * kl(q, mixed))


@dense(
    {"teacher_temperature": 0.4},
    {"teacher_temperature": 1.0, "student_temperature": 0.5},
    extras=lambda draw: {**teacher_head(draw), "center": draw.normal(draw.classes)},
)
def dino(
    z: Tensor,
    y: Tensor,
    teacher: tuple[Tensor, Tensor],
    center: Tensor,
    teacher_temperature: float,
    student_temperature: float = 0.1,
) -> Tensor:
    q = ((teacher_logits(teacher, z) - center) / teacher_temperature).softmax(-1)
    return -(q * (z / student_temperature).log_softmax(-1)).sum(-1)


def best(draw: Draw) -> dict[str, Tensor]:
    """The five best classes of each row, or all there are; the last of some rows is absent."""
    log_p = (2 * draw.normal(*draw.lead, draw.classes).double()).log_softmax(-1)
    found = log_p.topk(min(5, draw.classes))
    ids = found.indices.clone()
    if ids.shape[-1] > 1:
        ids[1::2, -1] = -1
    return {"ids": ids, "log_probs": found.values.to(draw.dtype)}


@dense(
    {},
    {"tail": "renormalize"},
    {"tail": "ignore", "temperature": 2.0},
    {"tail": "bucket", "temperature": 2.0},
    extras=best,
)
def top_k_distillation(
    z: Tensor,
    y: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    tail: str = "bucket",
    temperature: float = 1.0,
) -> Tensor:
    present = ids >= 0
    t = torch.where(present, log_probs.to(z.dtype).exp(), 0.0)
    if tail == "renormalize":
        t = t / t.sum(-1, keepdim=True)
    p = (z / temperature).softmax(-1).gather(-1, ids.clamp_min(0))
    kept = torch.where(present, t, 1.0)
    loss = torch.where(present, t * (kept / torch.where(present, p, 1.0)).log(), 0.0).sum(-1)
    if tail == "bucket" and z.shape[-1] > 1:
        rest = 1 - t.sum(-1)
        loss = loss + rest * torch.log(rest / (1 - torch.where(present, p, 0.0).sum(-1)))
    return temperature**2 * loss
