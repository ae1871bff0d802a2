"""Powers of probabilities and what is left of 1, from their logarithms: exact near 0 and near 1."""

from __future__ import annotations

import torch
from torch import Tensor


def lse_at(t: float) -> str:
    """The name of the statistic log Σ e^{t z} over the negatives."""
    return "lse" if t == 1 else f"lse@{float(t)!r}"


def expm1(u: Tensor) -> Tensor:
    """e^u - 1, whose derivative keeps its digits where e^u is small; torch's is value + 1."""
    near = u > -0.7
    small, far = torch.where(near, u, 0.0), torch.where(near, -1.0, u)
    return torch.where(near, torch.expm1(small), far.exp() - 1)


def power(log_p: Tensor, t: float | Tensor) -> Tensor:
    """(p^t - 1) / t, log p at t = 0; differentiable in t there, too."""
    if not isinstance(t, Tensor):
        return log_p if t == 0 else expm1(t * log_p) / t
    # log p · (e^u - 1) / u with u = t log p; the derivative of the quotient cancels for small u,
    # where its series takes over: of terms u^k / (k + 1)!, the first left out is below 1e-16.
    u = t * log_p
    near = u.abs() < 0.1
    small, large = torch.where(near, u, 0.0), torch.where(near, 1.0, u)
    series = torch.ones_like(u)
    for k in range(11, 1, -1):
        series = 1 + small / k * series
    return log_p * torch.where(near, series, expm1(large) / large)


def raised(base: Tensor, t: float | Tensor) -> Tensor:
    """base^t of a base >= 0; at 0 with no gradient, which for t < 1 is infinite there."""
    zero = base == 0
    return torch.where(zero, base.detach() ** t, torch.where(zero, 1.0, base) ** t)


def log_1m_exp(log_p: Tensor) -> Tensor:
    """log(1 - e^a) for a <= 0; with no gradient 0 at -inf, and -inf at 0."""
    certain, near = log_p >= 0, log_p > -0.693
    close = torch.where(near & ~certain, log_p, -0.5)
    far = torch.where(near, -1.0, log_p)
    found = torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-far.exp()))
    return found.masked_fill(certain, -torch.inf)
