"""Float64 truths, errors against them, and the one rule that calls a result wrong.

A truth costs one float64 product: the loss takes every row, but gradients are checked on a sample
of their rows (of dx: 128 rows; of dw: 1,024 classes, half of them targets).
"""

import math

import torch
from torch import Tensor

from lossops_bench.case import Tensors, Truth

__all__ = [
    "FLOOR",
    "SLACK",
    "errors",
    "linear_truth",
    "logits_truth",
    "some",
    "some_classes",
    "verdict",
]

SLACK = 4.0
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def verdict(found: dict[str, float], budget: dict[str, float], dtype: torch.dtype) -> str | None:
    """What is wrong, if anything: an error above both the floor and 4 times plain PyTorch's.

    Args:
        found: errors of the result, by name.
        budget: errors of plain PyTorch in the same dtype on the same inputs; may be empty.
        dtype: decides the floor.
    """
    for name, error in found.items():
        allowed = SLACK * budget.get(name, 0.0)
        limit = max(FLOOR[dtype], allowed if math.isfinite(allowed) else 0.0)
        if not error <= limit:  # a NaN is wrong too
            return f"{name} is off by {error:.1e}, allowed are {limit:.1e}"
    return None


def errors(outputs: Tensors, truth: Truth) -> dict[str, float]:
    """Relative to the truth: of the loss |a − b| / |b|, of each gradient ‖a − b‖₂ / ‖b‖₂."""
    found = {"loss": _relative(outputs["loss"], truth.loss)}
    for name, (ids, values) in truth.gradients.items():
        if name in outputs:
            found[name] = _relative(outputs[name][ids], values)
    return found


def _relative(ours: Tensor, true: Tensor) -> float:
    return float((ours.double() - true).norm() / true.norm())


def linear_truth(x: Tensor, w: Tensor, y: Tensor, slab: int = 2048) -> Truth:
    """Mean cross-entropy of the logits x wᵀ, by slabs of classes so that (N, V) never exists."""
    rows, classes = some(len(x), 128, x.device), some_classes(y, len(w), 512)
    x64 = x.detach().double()  # (N, D)
    w = w.detach()
    lse = x64.new_full((len(x),), -math.inf)
    dx = x64.new_zeros(len(rows), x.shape[1])  # softmax @ w so far, relative to lse so far
    for part in w.split(slab):
        slab64 = part.double()
        z = x64 @ slab64.T  # (N, slab)
        longer = torch.logaddexp(lse, z.logsumexp(dim=1))
        dx *= (lse - longer).exp()[rows, None]
        dx += (z[rows] - longer[rows, None]).exp() @ slab64
        lse = longer
    z_y = (x64 * w[y].double()).sum(dim=1)  # (N,)
    dx -= w[y[rows]].double()
    dz = torch.exp(x64 @ w[classes].double().T - lse[:, None])  # (N, classes)
    dz -= (y[:, None] == classes).double()
    gradients = {
        "dx": (rows, dx / len(x)),
        "dw": (classes, dz.T @ x64 / len(x)),
    }
    return Truth((lse - z_y).mean(), gradients)


def logits_truth(z: Tensor, y: Tensor, chunk: int = 256) -> Truth:
    """Mean cross-entropy of existing logits."""
    z = z.detach()
    parts = zip(z.split(chunk), y.split(chunk), strict=True)
    losses = [
        torch.nn.functional.cross_entropy(z_r.double(), y_r, reduction="sum") for z_r, y_r in parts
    ]
    rows = some(len(z), 128, z.device)
    dz = z[rows].double().softmax(dim=1)  # (rows, V)
    dz[torch.arange(len(rows), device=z.device), y[rows]] -= 1
    return Truth(torch.stack(losses).sum() / len(z), {"dz": (rows, dz / len(z))})


def some(total: int, count: int, device: torch.device) -> Tensor:
    """Up to `count` of `total` ids, sorted, always the same ones."""
    ids = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count]
    return ids.sort().values.to(device)


def some_classes(y: Tensor, classes: int, count: int) -> Tensor:
    """Up to `count` classes that are targets, and as many of all classes."""
    seen = y.unique()
    picked = seen[some(len(seen), count, y.device)]
    return torch.cat([picked, some(classes, count, y.device)]).unique()
