"""Losses that change the head: margins of cosines, priors, norms, covariances."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops_bench.dense.softmax import ldr, one_hot
from lossops_bench.dense.table import dense, of_target

__all__: list[str] = []


def cosines(x: Tensor, w: Tensor) -> Tensor:
    """(N, V), computed in the dtype of x and upcast."""
    c = F.normalize(x, dim=-1) @ F.normalize(w, dim=-1).T
    return c.float() if c.itemsize < 4 else c


def margin_softmax(
    c: Tensor, y: Tensor, scale: float, moved: Tensor, most: float | None = None
) -> Tensor:
    z = scale * c
    if most is not None:
        z = torch.where(c > most, 0.0, z)
    own = one_hot(c, y).bool()
    return F.cross_entropy(torch.where(own, scale * moved.unsqueeze(-1), z), y, reduction="none")


@dense(
    {"scale": 8.0, "margin": 0.4},
    {"scale": 8.0, "margin": 0.2, "filter_above": 0.3},
    of_features=True,
)
def cos_face(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    scale: float,
    margin: float,
    filter_above: float | None = None,
) -> Tensor:
    c = cosines(x, w)
    return margin_softmax(c, y, scale, of_target(c, y) - margin, filter_above)


@dense(
    {"scale": 8.0, "margin": 0.5},
    {"scale": 8.0, "margin": 2.0, "straight_through": True, "guard": False},
    {"scale": 8.0, "margin": 0.5, "filter_above": 0.3},
    of_features=True,
)
def arc_face(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    scale: float,
    margin: float,
    straight_through: bool = False,
    guard: bool = True,
    filter_above: float = 1.0,
) -> Tensor:
    c = cosines(x, w)
    own = of_target(c, y)
    inside = own.clamp(-1 + 1e-12, 1 - 1e-12)
    moved = torch.cos(torch.acos(inside) + margin)
    if guard:
        moved = torch.where(own > -math.cos(margin), moved, own - margin * math.sin(margin))
    if straight_through:
        moved = own + (moved - own).detach()
    return margin_softmax(torch.where(c > filter_above, 0.0, c), y, scale, moved)


@dense(
    {"scale": 8.0, "m1": 1.0, "m2": 0.3, "m3": 0.2},
    {"scale": 4.0, "m1": 1.4, "m2": 0.2, "m3": 0.1, "filter_above": 0.3},
    {"scale": 8.0, "m1": 1.0, "m2": 0.3, "m3": 0.2, "straight_through": True},
    of_features=True,
)
def combined_margin(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    scale: float,
    m1: float,
    m2: float,
    m3: float,
    straight_through: bool = False,
    filter_above: float = 1.0,
) -> Tensor:
    c = cosines(x, w)
    own = of_target(c, y)
    turned = torch.cos(m1 * torch.acos(own.clamp(-1 + 1e-12, 1 - 1e-12)) + m2)
    limit = math.cos((math.pi - m2) / m1)  # beyond it a line, which for m1 > 1 meets the curve
    line = own - m2 * math.sin(m2) if m1 == 1 else own - limit - 1
    moved = torch.where(own > limit, turned, line) - m3
    if straight_through:
        moved = own + (moved - own).detach()
    return margin_softmax(torch.where(c > filter_above, 0.0, c), y, scale, moved)


@dense({}, {"tau": 0.5}, extras=lambda draw: {"log_prior": draw.uniform(draw.classes).log()})
def logit_adjusted(z: Tensor, y: Tensor, log_prior: Tensor, tau: float = 1.0) -> Tensor:
    return F.cross_entropy(z + tau * log_prior, y, reduction="none")


@dense({"tau": 1.0}, {"tau": 4.0, "clipped_norm": 0.25})
def logit_clip(z: Tensor, y: Tensor, tau: float, clipped_norm: float | None = None) -> Tensor:
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    clipped = z / norm * (clipped_norm or tau)
    return F.cross_entropy(torch.where(norm > tau, clipped, z), y, reduction="none")


def spread(draw) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    a = draw.normal(draw.features, draw.features).double()
    return {"covariance": (0.1 * a @ a.T).to(draw.dtype)}


@dense({"strength": 0.5}, extras=spread, of_features=True, by_feature=True)
def shared_covariance(
    x: Tensor, w: Tensor, y: Tensor, covariance: Tensor, strength: float
) -> Tensor:
    z = x @ w.T
    away = w - w[y].unsqueeze(1)  # (N, V, D)
    margins = strength / 2 * torch.einsum("nvd,de,nve->nv", away, covariance, away)
    z = z + margins
    return F.cross_entropy(z.float() if z.itemsize < 4 else z, y, reduction="none")


@dense({"margin": 1.0}, extras=lambda draw: {"lam": draw.uniform(*draw.lead) + 0.5})
def adaptive_ldr(z: Tensor, y: Tensor, lam: Tensor, margin: float) -> Tensor:
    rows = [ldr(z[i : i + 1], y[i : i + 1], float(lam[i]), margin) for i in range(len(z))]
    return torch.cat(rows) if rows else z.sum(-1)
