"""Losses of sequences: preferences, unlearning, masked diffusion, edit-invariance."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops_bench.dense.table import Draw, dense, of_target

__all__: list[str] = []


def log_probs(z: Tensor, y: Tensor) -> Tensor:
    """log p of each token, (B, T)."""
    return of_target(z.log_softmax(-1), y)


def references(draw: Draw) -> dict[str, Tensor]:
    return {"reference_log_prob": -10 - 5 * draw.uniform(draw.lead[0])}


@dense({"beta": 0.1}, {"beta": 1.0}, extras=references, lead=(4, 5), whole=True)
def npo(z: Tensor, y: Tensor, beta: float, reference_log_prob: Tensor) -> Tensor:
    ratio = log_probs(z, y).sum(-1) - reference_log_prob
    return -2 / beta * torch.log(torch.sigmoid(-beta * ratio))


@dense({"beta": 0.1}, extras=references, lead=(4, 5), whole=True)
def dpo(z: Tensor, y: Tensor, beta: float, reference_log_prob: Tensor) -> Tensor:
    ratio = log_probs(z, y).sum(-1) - reference_log_prob
    chosen, rejected = ratio.chunk(2)
    return -torch.log(torch.sigmoid(beta * (chosen - rejected)))


@dense({"beta": 2.0, "gamma": 0.5}, lead=(4, 5), whole=True)
def simpo(z: Tensor, y: Tensor, beta: float, gamma: float) -> Tensor:
    chosen, rejected = log_probs(z, y).mean(-1).chunk(2)
    return -torch.log(torch.sigmoid(beta * chosen - beta * rejected - gamma))


@dense({"lam": 0.1}, lead=(4, 5), whole=True, least_classes=2)
def orpo(z: Tensor, y: Tensor, lam: float) -> Tensor:
    p = log_probs(z, y).mean(-1).exp()
    chosen, rejected = (p / (1 - p)).chunk(2)
    return -torch.log(p.chunk(2)[0]) - lam * torch.log(torch.sigmoid(torch.log(chosen / rejected)))


def noise(draw: Draw) -> dict[str, Tensor]:
    masked = draw.uniform(*draw.lead) < 0.6
    masked[..., 0] = True
    return {
        "masked": masked,
        "level": draw.uniform(draw.lead[0]) + 0.3,
        "rate": draw.uniform(draw.lead[0]) + 0.3,
    }


@dense({"kind": "lambda"}, {"kind": "t"}, {"kind": "k"}, extras=noise, lead=(4, 5), whole=True)
def masked_diffusion(
    z: Tensor, y: Tensor, kind: str, masked: Tensor, level: Tensor, rate: Tensor
) -> Tensor:
    lost = (-log_probs(z, y) * masked).sum(-1)
    if kind == "lambda":
        return lost / level
    if kind == "t":
        return lost * rate / (level.exp() - 1)
    return lost * masked.shape[-1] / masked.sum(-1)


@dense({"ngrams": (1, 2, 5)}, {"ngrams": (3,), "floor": -2.0}, lead=(3, 5), whole=True)
def edit_invariant(z: Tensor, y: Tensor, ngrams: tuple[int, ...], floor: float = -20.0) -> Tensor:
    length = y.shape[1]
    log_p = z.log_softmax(-1).clamp_min(floor)
    cost = log_p.gather(2, y.unsqueeze(1).expand(-1, length, -1)).unsqueeze(1)  # (B, 1, T, T)
    loss = z.new_zeros(len(z))
    for n in ngrams:
        g = F.conv2d(cost, torch.eye(n, dtype=z.dtype).reshape(1, 1, n, n)).squeeze(1) / n
        loss = loss - (g.softmax(1) * g).sum(1).mean(1) / len(ngrams)
    return loss
