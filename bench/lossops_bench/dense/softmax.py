"""The softmax family: noisy labels, confidence, selection."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops_bench.dense.table import Draw, dense, of_target

__all__: list[str] = []


def probabilities(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """log p of the targets, and p of all classes."""
    log_p = z.log_softmax(-1)
    return of_target(log_p, y), log_p.exp()


def one_hot(z: Tensor, y: Tensor) -> Tensor:
    return F.one_hot(y, z.shape[-1]).to(z.dtype)


@dense({"tau": 1.5}, {"tau": 0.0}, {"tau": 1.0}, {"tau": 2.0})
def comp_sum(z: Tensor, y: Tensor, tau: float) -> Tensor:
    p = of_target(z.softmax(-1), y)
    u = 1 / p - 1
    if tau == 1:
        return torch.log(1 + u)
    return ((1 + u) ** (1 - tau) - 1) / (1 - tau)


@dense({"q": 0.7}, {"q": 0.3})
def generalized_cross_entropy(z: Tensor, y: Tensor, q: float) -> Tensor:
    return (1 - of_target(z.softmax(-1), y) ** q) / q


@dense()
def mae(z: Tensor, y: Tensor) -> Tensor:
    return (z.softmax(-1) - one_hot(z, y)).abs().sum(-1) / 2


@dense()
def sum_exp(z: Tensor, y: Tensor) -> Tensor:
    return 1 / of_target(z.softmax(-1), y) - 1


@dense()
def normalized_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    log_p = z.log_softmax(-1)
    return of_target(log_p, y) / log_p.sum(-1)


@dense({"floor": 1e-4})
def reverse_cross_entropy(z: Tensor, y: Tensor, floor: float) -> Tensor:
    labels = one_hot(z, y).clamp_min(floor)
    return -(z.softmax(-1) * labels.log()).sum(-1)


@dense({"q": 0.7}, {"q": 1.0})
def normalized_generalized_cross_entropy(z: Tensor, y: Tensor, q: float) -> Tensor:
    lost = 1 - z.softmax(-1) ** q
    return of_target(lost, y) / lost.sum(-1)


@dense(
    {"alpha": 10.0, "beta": 0.1},
    {"active": "cross_entropy", "passive": "mae", "alpha": 0.5, "beta": 2.0},
    {"passive": "mae"},
)
def active_passive(
    z: Tensor,
    y: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    active: str = "normalized_cross_entropy",
    passive: str = "reverse_cross_entropy",
) -> Tensor:
    pulls = F.cross_entropy(z, y, reduction="none")
    if active != "cross_entropy":
        pulls = normalized_cross_entropy(z, y)
    pushes = mae(z, y) if passive == "mae" else reverse_cross_entropy(z, y, 1e-4)
    return alpha * pulls + beta * pushes


@dense({"lam": 2.0, "margin": 1.0}, {"lam": 1.0, "margin": 2.0}, {"lam": 0.5, "margin": 0.3})
def ldr(z: Tensor, y: Tensor, lam: float, margin: float) -> Tensor:
    moved = z + margin * (1 - one_hot(z, y)) - of_target(z, y).unsqueeze(-1)
    return lam * ((moved / lam).logsumexp(-1) - math.log(z.shape[-1]))


@dense({"gamma": 2.0}, {"gamma": 0.5})
def focal(z: Tensor, y: Tensor, gamma: float) -> Tensor:
    log_p, p = probabilities(z, y)
    return -((1 - of_target(p, y)) ** gamma) * log_p


@dense({"gamma": 5.0}, {"gamma": 1.0})
def dual_focal(z: Tensor, y: Tensor, gamma: float) -> Tensor:
    log_p, p = probabilities(z, y)
    own = of_target(p, y)
    below = torch.where(z < of_target(z, y).unsqueeze(-1), p, 0.0).amax(-1)
    return -((1 - own + below) ** gamma) * log_p


@dense({"epsilon": 1.0}, {"epsilon": (-1.0, 2.0, 0.5)})
def poly(z: Tensor, y: Tensor, epsilon: float | tuple[float, ...]) -> Tensor:
    log_p, p = probabilities(z, y)
    terms = epsilon if isinstance(epsilon, tuple) else (epsilon,)
    missed = 1 - of_target(p, y)
    return -log_p + sum(e * missed**j for j, e in enumerate(terms, 1))


@dense({"epsilon": -1.0, "gamma": 2.0})
def poly_focal(z: Tensor, y: Tensor, epsilon: float, gamma: float) -> Tensor:
    missed = 1 - of_target(z.softmax(-1), y)
    return focal(z, y, gamma) + epsilon * missed ** (gamma + 1)


@dense({"log_end": 0.75}, {"log_end": 0.1}, {"log_end": 1.0})
def encouraging(z: Tensor, y: Tensor, log_end: float) -> Tensor:
    log_p, p = probabilities(z, y)
    own = of_target(p, y)
    bonus = torch.log(1 - own)
    if log_end < 1:
        tangent = math.log(1 - log_end) - (own - log_end) / (1 - log_end)
        bonus = torch.where(own > log_end, tangent, bonus)
    return -log_p + bonus


@dense({"rescale": 1.0}, {"rescale": 0.3})
def squentropy(z: Tensor, y: Tensor, rescale: float) -> Tensor:
    others = ((1 - one_hot(z, y)) * z.square()).sum(-1)
    count = max(1, z.shape[-1] - 1)
    return F.cross_entropy(z, y, reduction="none") + rescale * others / count


@dense({"lam": 0.1})
def max_sup(z: Tensor, y: Tensor, lam: float) -> Tensor:
    return F.cross_entropy(z, y, reduction="none") + lam * (z.max(-1).values - z.mean(-1))


@dense()
def stable_max(z: Tensor, y: Tensor) -> Tensor:
    s = torch.where(z >= 0, z + 1, 1 / (1 - torch.where(z < 0, z, 0.0)))
    return s.sum(-1).log() - of_target(s, y).log()


@dense({"beta": 2e-3}, {"beta": 0.1})
def logit_penalty(z: Tensor, y: Tensor, beta: float) -> Tensor:
    return F.cross_entropy(z, y, reduction="none") + beta / 2 * z.square().sum(-1)


@dense({"beta": 0.1})
def confidence_penalty(z: Tensor, y: Tensor, beta: float) -> Tensor:
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return -of_target(log_p, y) - beta * entropy


@dense()
def brier(z: Tensor, y: Tensor) -> Tensor:
    return (z.softmax(-1) - one_hot(z, y)).square().sum(-1)


@dense({"accuracy": 3.0}, extras=lambda draw: {"time": draw.uniform(*draw.lead)})
def bayesian_flow(z: Tensor, y: Tensor, accuracy: float, time: Tensor) -> Tensor:
    return z.shape[-1] * time * accuracy * brier(z, y)


@dense({"threshold": 1.1}, {"threshold": 2**0.5})
def error_norm_truncation(z: Tensor, y: Tensor, threshold: float) -> Tensor:
    norm = torch.linalg.vector_norm(z.detach().softmax(-1) - one_hot(z, y), dim=-1)
    return F.cross_entropy(z, y, reduction="none") * (norm <= threshold)


@dense({"fraction": 0.3}, {"fraction": 0.0})
def error_norm_fraction(z: Tensor, y: Tensor, fraction: float) -> Tensor:
    norm = torch.linalg.vector_norm(z.detach().softmax(-1) - one_hot(z, y), dim=-1)
    cut = norm.sort(descending=True).values[int(fraction * len(norm))]
    return F.cross_entropy(z, y, reduction="none") * (norm <= cut)


@dense({"fraction": 0.4, "lam": 0.7}, least_classes=2)
def sovr(z: Tensor, y: Tensor, fraction: float, lam: float) -> Tensor:
    rivals = z.masked_fill(one_hot(z, y).bool(), -torch.inf).amax(-1)
    hard = (rivals - of_target(z, y)).topk(int(fraction * len(z))).indices
    versus = F.binary_cross_entropy_with_logits(z, one_hot(z, y), reduction="none").sum(-1)
    switched = torch.zeros(len(z), dtype=torch.bool).scatter(0, hard, True)
    return torch.where(switched, lam * versus, F.cross_entropy(z, y, reduction="none"))


def candidates(draw: Draw) -> dict[str, Tensor]:
    """Five a row, with repeats, the target perhaps among them, and absent ones."""
    ids = draw.ids(draw.classes, *draw.lead, 5)
    ids[..., 3] = ids[..., 0]
    ids[..., 4] = -1
    return {"candidates": ids}


@dense({"alpha": 1.0}, {"alpha": 0.5, "floor": 0.0}, extras=candidates)
def unlikelihood(
    z: Tensor, y: Tensor, alpha: float, candidates: Tensor, floor: float = 1e-5
) -> Tensor:
    listed = torch.where(candidates < 0, z.shape[-1], candidates)
    marked = z.new_zeros(len(z), z.shape[-1] + 1).scatter(1, listed, 1.0)[:, :-1]
    marked = marked * (1 - one_hot(z, y))
    against = torch.log((1 - z.softmax(-1)).clamp_min(floor)) * marked
    return F.cross_entropy(z, y, reduction="none") - alpha * against.sum(-1)


NUMBERS = {3: 0.0, 7: 1.0, 1: 2.0, 12: 5.0}


@dense(
    {"numbers": NUMBERS, "kind": "wasserstein"},
    {"numbers": NUMBERS, "kind": "mse", "lam": 0.5},
    weighted=False,
    least_classes=13,
)
def number_token(
    z: Tensor, y: Tensor, numbers: dict[int, float], kind: str, lam: float = 0.3
) -> Tensor:
    ids, value = torch.tensor(list(numbers)), z.new_tensor(list(numbers.values()))
    q = z[:, ids].softmax(-1)
    own = (y.unsqueeze(1) == ids).to(z.dtype)  # (N, K)
    meant = (own * value).sum(1, keepdim=True)
    if kind == "mse":
        distance = ((q * value).sum(1) - meant[:, 0]).square()
    else:
        distance = (q * (value - meant).abs()).sum(1)
    counted = own.sum(1)
    share = len(z) / counted.sum().clamp_min(1)  # its mean is over the number tokens
    return F.cross_entropy(z, y, reduction="none") + lam * share * counted * distance


@dense({"margin": 1.0})
def crammer_singer(z: Tensor, y: Tensor, margin: float) -> Tensor:
    rivals = z.masked_fill(one_hot(z, y).bool(), -torch.inf).amax(-1)
    return (margin + rivals - of_target(z, y)).clamp_min(0)


@dense()
def one_vs_rest(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, one_hot(z, y), reduction="none").sum(-1)


@dense(extras=lambda draw: {"log_partition": 3 + draw.uniform(*draw.lead)})
def meco(z: Tensor, y: Tensor, log_partition: Tensor) -> Tensor:
    return (z.logsumexp(-1) - log_partition).exp() - 1 + log_partition - of_target(z, y)


@dense()
def uniform_kl(z: Tensor, y: Tensor) -> Tensor:
    uniform = torch.full_like(z, 1 / z.shape[-1])
    return F.kl_div(z.log_softmax(-1), uniform, reduction="none").sum(-1)


@dense({"gamma": 0.5}, {"gamma": 2.0})
def normalized_focal(z: Tensor, y: Tensor, gamma: float) -> Tensor:
    log_p = z.log_softmax(-1)
    lost = -((1 - log_p.exp().detach()) ** gamma) * log_p
    return of_target(lost, y) / lost.sum(-1)


@dense({}, {"gamma_pos": 1.0, "gamma_neg": 2.0, "label_smoothing": 0.3})
def single_label_asymmetric(
    z: Tensor,
    y: Tensor,
    gamma_pos: float = 0.0,
    gamma_neg: float = 4.0,
    label_smoothing: float = 0.1,
) -> Tensor:
    p, own = z.softmax(-1), one_hot(z, y)
    missed = 1 - p * own - (1 - p) * (1 - own)  # 1 - p of the target, p of the others
    weight = missed ** (gamma_pos * own + gamma_neg * (1 - own))
    labels = (1 - label_smoothing) * own + label_smoothing / z.shape[-1]
    return -(labels * weight * z.log_softmax(-1)).sum(-1)
