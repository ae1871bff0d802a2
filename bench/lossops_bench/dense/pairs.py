"""Contrastive and multi-label losses."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops_bench.dense.softmax import one_hot
from lossops_bench.dense.table import Draw, dense, of_target

__all__: list[str] = []


def views(draw: Draw) -> tuple[Tensor, Tensor]:
    """Unit vectors; those of a pair are near."""
    first = draw.normal(9, draw.features).double()
    second = first + draw.normal(9, draw.features).double()
    return tuple(F.normalize(t, dim=1).to(draw.dtype) for t in (first, second))  # type: ignore


def products(x: Tensor, w: Tensor) -> Tensor:
    s = x @ w.T
    return s.float() if s.itemsize < 4 else s


def both_views(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities over T of all features, (2 N, 2 N); those of the positives; the negatives."""
    both = torch.cat([first, second])
    s, n = products(both, both) / temperature, len(first)
    partner = torch.arange(2 * n).roll(n)
    other = ~(torch.eye(2 * n, dtype=torch.bool) | F.one_hot(partner, 2 * n).bool())
    return s, of_target(s, partner), other


@dense({"temperature": 0.1}, {"temperature": 0.2, "weight_temperature": 0.5}, leaves=views)
def decoupled_contrastive(
    first: Tensor,
    second: Tensor,
    temperature: float,
    weight_temperature: float | None = None,
) -> Tensor:
    cross, own = products(first, second), products(first, first)
    negatives = ~torch.eye(len(first), dtype=torch.bool)
    sums = (torch.exp(cross / temperature) * negatives).sum(1)
    sums = sums + (torch.exp(own / temperature) * negatives).sum(1)
    weight: Tensor | float = 1.0
    if weight_temperature is not None:
        weight = 2 - len(first) * (cross.diagonal() / weight_temperature).softmax(0)
    return -weight * cross.diagonal() / temperature + sums.log()


@dense(
    {"temperature": 0.1, "margin": 0.1},
    {"temperature": 0.2, "margin": 0.0},
    {"temperature": 0.2, "margin": 0.0, "angular_margin": 0.3},
    leaves=views,
)
def nt_xent_margin(
    first: Tensor, second: Tensor, temperature: float, margin: float, angular_margin: float = 0.0
) -> Tensor:
    s, positive, other = both_views(first, second, temperature)
    if angular_margin:
        cosine = temperature * positive
        turned = torch.cos(torch.acos(cosine) + angular_margin)
        line = cosine - angular_margin * math.sin(angular_margin)
        positive = torch.where(cosine > -math.cos(angular_margin), turned, line) / temperature
    moved = positive - margin / temperature
    return -moved + torch.log(moved.exp() + (s.exp() * other).sum(1))


@dense({"temperature": 0.5, "tau_plus": 0.1}, {"temperature": 0.5, "tau_plus": 0.6}, leaves=views)
def debiased_contrastive(
    first: Tensor, second: Tensor, temperature: float, tau_plus: float
) -> Tensor:
    s, positive, other = both_views(first, second, temperature)
    n = len(s) - 2
    sums = (s.exp() * other).sum(1)
    g = (-tau_plus * n * positive.exp() + sums) / (1 - tau_plus)
    g = torch.maximum(g, n * torch.exp(-1 / (s.new_zeros(()) + temperature)))
    return -torch.log(positive.exp() / (positive.exp() + g))


@dense({"beta": 1.0}, {"beta": 0.5, "tau_plus": 0.0}, {"beta": 0.0}, leaves=views)
def hard_negative_contrastive(
    first: Tensor, second: Tensor, beta: float, temperature: float = 0.5, tau_plus: float = 0.1
) -> Tensor:
    s, positive, other = both_views(first, second, temperature)
    n = len(s) - 2
    weights = (beta * s).exp() * other
    sums = (weights * s.exp()).sum(1) / (weights.sum(1) / n)
    g = (-tau_plus * n * positive.exp() + sums) / (1 - tau_plus)
    g = torch.maximum(g, n * torch.exp(-1 / (s.new_zeros(()) + temperature)))
    return -torch.log(positive.exp() / (positive.exp() + g))


@dense(
    {"kind": "softmax"},
    {"kind": "contrast", "scale": 3.0, "bias": -1.0},
    leaves=lambda draw: (draw.normal(4, 3, draw.features),),
)
def ge2e(embeddings: Tensor, kind: str, scale: float = 10.0, bias: float = -5.0) -> Tensor:
    e = embeddings.float() if embeddings.itemsize < 4 else embeddings
    centroids = F.normalize(e.mean(1), dim=1)
    losses = []
    for j in range(e.shape[0]):
        for i in range(e.shape[1]):
            own = F.normalize(e[j][torch.arange(e.shape[1]) != i].mean(0), dim=0)
            against = torch.stack([own if k == j else c for k, c in enumerate(centroids)])
            s = scale * (against @ F.normalize(e[j, i], dim=0)) + bias
            if kind == "softmax":
                losses.append(s.logsumexp(0) - s[j])
            else:
                rivals = torch.sigmoid(s[torch.arange(len(s)) != j])
                losses.append(1 - torch.sigmoid(s[j]) + rivals.max())
    return torch.stack(losses)


@dense()
def pairwise_logistic(z: Tensor, y: Tensor) -> Tensor:
    away = F.softplus(z - of_target(z, y).unsqueeze(-1), threshold=50)
    return (away * (1 - one_hot(z, y))).sum(-1)


def false_negatives(draw: Draw) -> dict[str, Tensor]:
    """Two a row, apart from each other; weights of their own."""
    first = draw.ids(draw.classes, *draw.lead, 1)
    second = (first + 1 + draw.ids(max(1, draw.classes - 1), *draw.lead, 1)) % draw.classes
    ids = torch.cat([first, second], -1)
    ids[::2, 1] = -1
    return {"false_negatives": ids, "false_weights": draw.uniform(*draw.lead, 2)}


@dense({"tau": 0.05}, {"tau": 0.9, "margin": 0.0, "least": 0.5}, extras=false_negatives,
       least_classes=4)  # fmt: skip
def hasa(
    z: Tensor,
    y: Tensor,
    tau: float,
    false_negatives: Tensor,
    false_weights: Tensor,
    margin: float = 1.0,
    least: float = 1.0,
) -> Tensor:
    others = 1 - one_hot(z, y)
    q = z.detach().masked_fill(others == 0, -torch.inf).softmax(-1)
    taken = (false_negatives >= 0) & (false_negatives != y.unsqueeze(-1))
    own = z.gather(1, false_negatives.clamp_min(0)).exp() * false_weights * taken
    g = (q * z.exp() * others).sum(-1) - tau * own.sum(-1)
    g = torch.where(g > 0, g, least)
    nu = (of_target(z, y) - margin).exp()
    return -torch.log(nu / (nu + z.shape[-1] / (1 - tau) * g))


def positives(draw: Draw) -> dict[str, Tensor]:
    ids = draw.ids(draw.classes, *draw.lead, 3)
    ids[..., 2] = -1
    return {"positives": ids}


@dense({}, {"most": 1.5}, extras=positives)
def gumbel(z: Tensor, y: Tensor, positives: Tensor, most: float = 10.0) -> Tensor:
    listed = torch.where(positives < 0, z.shape[-1], positives)
    label = z.new_zeros(len(z), z.shape[-1] + 1).scatter(1, listed, 1.0)[:, :-1]
    z = z.clamp(-4, most)
    eta = torch.exp(-torch.exp(-z))
    positive, negative = torch.exp(-z).clamp(0, 20), -torch.log1p(-eta)
    return torch.where(label > 0, positive, negative).sum(-1)
