"""Losses as functions of row statistics: the spherical family, and cross-entropy.

The spherical losses are those of `lossops.spherical`, in the letters of its formulas. Cross-entropy
is here once differentiable and once in closed form.

With t = target, l = lse over the other classes, m the row shift and L = log(e^t + e^l), per row

    loss = -nll log σ(t - l) + lse L - smooth S - taught T + square (L + m)²

    S = z̄ (or Σ a_j z_j with class weights), T = Σ t_j a_j z_j, all relative to m, and
    p = σ(t - l):   ∂/∂t = -nll (1 - p) + λ p     ∂/∂l = nll (1 - p) + λ (1 - p)
                    λ = lse + 2 square (L + m)    ∂/∂S = -smooth     ∂/∂T = -taught

The row factors nll, lse, smooth, taught, square hold all weights, so that hard targets, class
weights, label smoothing, class probabilities and the lse² penalty are one formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops.statistics import RowStatistics, smooth_outputs


class CrossEntropyTerms(NamedTuple):
    """Row factors (N,) of the terms of cross-entropy, None where a term is absent."""

    nll: Tensor | None
    lse: Tensor | None
    smooth: Tensor | None
    taught: Tensor | None
    square: Tensor | None

    def rows(self, rows: slice | Tensor) -> CrossEntropyTerms:
        """The factors of some of the rows."""
        return CrossEntropyTerms(*(None if t is None else t[rows] for t in self))

    @property
    def row_scale(self) -> Tensor | None:
        """Σ of the absolute factors (N,): what the dz of a row is measured by."""
        given = [t.abs() for t in self if t is not None]
        return torch.stack(given).sum(0) if given else None


def poison(*extremes: Tensor) -> Tensor:
    """1, or NaN for rows with a +inf or NaN among ``extremes``: PyTorch's loss is NaN there."""
    factor = torch.ones_like(extremes[0])
    for value in extremes:
        factor = factor + 0.0 * value.detach().clamp_min(0.0)
    return factor


def extremes(values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """What a row of cross-entropy is poisoned by; lse of -inf over all classes is 0 / 0 too."""
    lse = values["lse"]
    return (lse, values["target"]) if "target" in values else (lse, -lse)


def cross_entropy_outputs(names: Iterable[str]) -> list[str]:
    """Outputs of collected statistics that cross-entropy may give a coefficient."""
    return [o for o in smooth_outputs(names) if o != "max"]  # which is for argmax


def cross_entropy_losses(stats: RowStatistics, terms: CrossEntropyTerms) -> Tensor:
    """Loss of each row (N,), differentiable in the statistics and the factors."""
    values = stats.values
    relative = stats.relative_logsumexp
    losses = torch.zeros_like(stats.shift)
    if terms.nll is not None:
        losses = losses - terms.nll * stats.log_p
    if terms.lse is not None:
        losses = losses + terms.lse * relative
    if terms.smooth is not None:
        name = "weighted_sum" if "weighted_sum" in values else "average"
        losses = losses - terms.smooth * values[name]
    if terms.taught is not None:
        losses = losses - terms.taught * values["teacher"]
    if terms.square is not None:
        losses = losses + terms.square * stats.logsumexp.square()
    return losses * poison(*extremes(values))


def cross_entropy_rows(
    values: dict[str, Tensor], terms: CrossEntropyTerms, target: Tensor | None, num_classes: int
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Loss of each row, its coefficients in closed form, and argmax over all classes if collected.

    ``values`` are the tensors of one chunk by output name, ``target`` (R, 1) or None. Rows whose
    target is -1 have loss 0 and no gradient.
    """
    single = dict(values)
    active = None
    if target is not None:
        active = target[:, 0] >= 0
        single["target"] = torch.where(active, values["target"][:, 0], 0.0)
        single["lse"] = torch.where(active, values["lse"], 0.0)
    stats = RowStatistics(single, num_classes)
    losses = cross_entropy_losses(stats, terms)
    coefficients: dict[str, Tensor] = {}
    factor = poison(*extremes(single))
    slope = None  # λ
    if terms.lse is not None:
        slope = terms.lse
    if terms.square is not None:
        square = 2 * terms.square * stats.logsumexp
        slope = square if slope is None else slope + square
    if active is None:
        if slope is not None:
            coefficients["lse"] = slope * factor
    else:
        odds = stats.target_minus_lse
        p, other = torch.sigmoid(odds), torch.sigmoid(-odds)
        pull = torch.zeros_like(p) if terms.nll is None else terms.nll * other
        at_target = -pull if slope is None else slope * p - pull
        at_lse = pull if slope is None else slope * other + pull
        coefficients["target"] = torch.where(active, at_target * factor, 0.0).unsqueeze(1)
        coefficients["lse"] = torch.where(active, at_lse * factor, 0.0)
        losses = torch.where(active, losses, 0.0)
    if terms.smooth is not None:
        name = "weighted_sum" if "weighted_sum" in values else "average"
        coefficients[name] = -terms.smooth * factor
        if active is not None:
            coefficients[name] = torch.where(active, coefficients[name], 0.0)
    if terms.taught is not None:
        coefficients["teacher"] = -terms.taught * factor
    best = None
    if "argmax" in values:
        best = overall_argmax(values, target)
    return losses, coefficients, best


def overall_argmax(values: dict[str, Tensor], target: Tensor | None) -> Tensor:
    """argmax over all classes from that over the negatives; ties go to the lowest id."""
    best = values["argmax"]
    if target is None:
        return best
    y, z = target[:, 0], values["target"].reshape(best.shape) - values["shift"]
    first = (z > values["max"]) | ((z == values["max"]) & (y < best)) | (best < 0)
    return torch.where(first & (y >= 0), y, best)


SphericalLoss = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def z_losses(
    target: Tensor,
    sum: Tensor,
    sumsq: Tensor,
    num_classes: int,
    *,
    a: float | Tensor = 0.1,
    b: float | Tensor = 10.0,
) -> Tensor:
    """The Z-loss as a function of row statistics."""
    mean = sum / num_classes
    variance = sumsq / num_classes - mean.square()
    # Logits that are all equal, up to rounding, have no standard score: it counts as 0, constant.
    spread = variance > 1e-14 * mean.square()
    deviation = torch.where(spread, variance, 1.0).sqrt()
    score = torch.where(spread, (target - mean) / deviation, 0.0)
    return F.softplus(a * (b - score)) / a


def log_taylor_losses(target: Tensor, sum: Tensor, sumsq: Tensor, num_classes: int) -> Tensor:
    """-log of the Taylor softmax, whose weights are 1 + z + z²/2."""
    return (num_classes + sum + sumsq / 2).log() - (1 + target + target.square() / 2).log()


def log_spherical_losses(
    target: Tensor, sum: Tensor, sumsq: Tensor, num_classes: int, *, eps: float | Tensor = 0.1
) -> Tensor:
    """-log of the spherical softmax, whose weights are z² + ε."""
    return (sumsq + num_classes * eps).log() - (target.square() + eps).log()


def mse_losses(target: Tensor, sum: Tensor, sumsq: Tensor, num_classes: int) -> Tensor:
    """Squared distance of the logits to the one-hot vector of the target."""
    return sumsq - 2 * target + 1
