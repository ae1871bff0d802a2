"""Softmax losses that weigh rows, or logits, by confidence.

With p the softmax probability of the target: focal losses fade where p is high, the encouraging
loss does the opposite, PolyLoss bends cross-entropy, and penalties on logits keep it calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lossops.catalogue.checks import at_least, between
from lossops.catalogue.powers import raised
from lossops.catalogue.recipe import recipe
from lossops.reference import stable
from lossops.statistics import RowStatistics

FAMILY = "Confidence and calibration"


@recipe(family=FAMILY, use="many easy rows; calibration")
def linear_focal_loss(s: RowStatistics, *, gamma: float | Tensor = 2.0) -> Tensor:
    """Focal loss: rows that are right already count less.

    loss = -(1 - p)^γ log p

    Args:
        gamma: γ, at least 0. Default: ``2.0``.

    Reference:
        Lin, Goyal, Girshick, He, Dollár, Focal Loss for Dense Object Detection, arXiv 1708.02002
    """
    at_least("gamma", gamma, 0)
    return -raised(s.log_1mp.exp(), gamma) * s.log_p


@recipe(
    family=FAMILY,
    use="calibration: focal loss that also watches the next class",
    names=("lse", "target", "below_target"),
    example={"gamma": 5.0},
)
def linear_dual_focal_loss(s: RowStatistics, *, gamma: float | Tensor) -> Tensor:
    """Dual focal loss: focal in the gap between the target and the class just below it.

    loss = -(1 - p + p_s)^γ log p,   s = argmax {z_j : z_j < z_y},  p_s = 0 if there is none

    s is the next logit below the target, not the runner-up; the gradient goes through p_s.

    Args:
        gamma: γ, at least 0; it is tuned, the authors' code has 0, which is cross-entropy.

    Reference:
        Tao, Dong, Xu, Dual Focal Loss for Calibration, arXiv 2305.13665
    """
    at_least("gamma", gamma, 0)
    below = (s.relative("below_target") - s.relative_logsumexp).exp()
    return -raised(s.log_1mp.exp() + below, gamma) * s.log_p


@recipe(family=FAMILY, use="a tunable bend of cross-entropy")
def linear_poly_loss(
    s: RowStatistics, *, epsilon: float | Tensor | Sequence[float] = 1.0
) -> Tensor:
    """PolyLoss: cross-entropy with other coefficients for the first powers of 1 - p.

    loss = -log p + Σ_{j ≥ 1} ε_j (1 - p)^j

    Args:
        epsilon: ε_1, or a sequence ε_1, ..., ε_N. Default: ``1.0``.

    Reference:
        Leng, Tan, Liu, Cubuk, Shi, Cheng, Anguelov, PolyLoss: A Polynomial Expansion Perspective of
        Classification Loss Functions, arXiv 2204.12511
    """
    terms = epsilon if isinstance(epsilon, Sequence) else (epsilon,)
    loss = -s.log_p
    for j, factor in enumerate(terms, 1):
        loss = loss + factor * (j * s.log_1mp).exp()
    return loss


@recipe(family=FAMILY, use="PolyLoss on top of focal loss")
def linear_poly_focal_loss(
    s: RowStatistics, *, epsilon: float | Tensor = 1.0, gamma: float | Tensor = 2.0
) -> Tensor:
    """Poly-1 focal loss.

    loss = -(1 - p)^γ log p + ε (1 - p)^{γ+1}

    Args:
        epsilon: ε. Default: ``1.0``.
        gamma: γ, at least 0. Default: ``2.0``.

    Reference:
        Leng, Tan, Liu, Cubuk, Shi, Cheng, Anguelov, PolyLoss: A Polynomial Expansion Perspective of
        Classification Loss Functions, arXiv 2204.12511
    """
    at_least("gamma", gamma, 0)
    missed = s.log_1mp.exp()
    return raised(missed, gamma) * (epsilon * missed - s.log_p)


@recipe(family=FAMILY, use="keeps learning from rows that are right already")
def linear_encouraging_loss(s: RowStatistics, *, log_end: float = 0.75) -> Tensor:
    """Encouraging loss: a bonus for rows that are right, the mirror of cross-entropy.

    loss = -log p + log(1 - p),   the bonus log(1 - p) goes on as its tangent where p > LE

    Args:
        log_end: LE in [0, 1]; 1 has no tangent, and is a row of decoupled contrastive learning,
            lse over the other classes minus z_y. Default: ``0.75``.

    Note:
        The authors' code bounds 1 - p at 1e-5 with no gradient beyond, which only LE above
        1 - 1e-5 can see; here it is exact.

    Reference:
        Zhao et al., Well-classified Examples are Underestimated in Classification with Deep Neural
        Networks, arXiv 2110.06537
    """
    between("log_end", log_end, 0, 1)
    if log_end == 1:
        return -s.target_minus_lse
    end = 1 - log_end
    tangent = math.log(end) + s.log_1mp.exp() / end - 1
    return torch.where(s.log_1mp >= math.log(end), -s.target_minus_lse, tangent - s.log_p)


@recipe(
    family=FAMILY,
    use="accuracy and calibration without a parameter",
    names=("lse", "target", "sumsq"),
)
def linear_squentropy_loss(s: RowStatistics, *, rescale: float | Tensor = 1.0) -> Tensor:
    """Squentropy: cross-entropy plus the mean square of the other logits.

    loss = -log p + r/(V - 1) Σ_{j ≠ y} z_j²

    Args:
        rescale: r, 1 in the paper; the authors' code has it as ``resquare``. Default: ``1.0``.

    Reference:
        Hui, Belkin, Wright, Cut your Losses with Squentropy, arXiv 2302.03952
    """
    squares = s.sumsq - s.target.square()
    return -s.log_p + rescale / max(1, s.num_classes - 1) * squares


@recipe(
    family=FAMILY,
    use="label smoothing that does not sharpen wrong rows",
    names=("lse", "target", "max", "sum"),
)
def linear_max_sup_loss(s: RowStatistics, *, lam: float | Tensor = 0.1) -> Tensor:
    """MaxSup: label smoothing that pulls down the largest logit in place of the target's.

    loss = -log p + λ (max_j z_j - z̄)

    The authors raise λ from 0.1 to 0.2: ``lam=catalogue.ramp(epoch, epochs, 0.1, 0.2)``. Label
    smoothing itself is ``lossops.linear_cross_entropy(..., label_smoothing=λ)``, with z_y for
    the largest logit.

    Args:
        lam: λ. Default: ``0.1``.

    Reference:
        Zhou et al., MaxSup: Overcoming Representation Collapse in Label Smoothing,
        arXiv 2502.15798
    """
    top = torch.where(s.relative("target") >= s.relative("max"), s.relative("target"),
                      s.relative("max"))  # fmt: skip
    return -s.log_p + lam * (top - s.relative("average"))


@recipe(
    family=FAMILY,
    use="softmax without exponentials: float32 does not collapse once all rows are right",
    names=("target", "stable_sum"),
)
def linear_stable_max_loss(s: RowStatistics) -> Tensor:
    """StableMax cross-entropy: softmax with a slowly growing function for the exponential.

    loss = log Σ_j s(z_j) - log s(z_y),   s(z) = 1 + z for z ≥ 0, 1 / (1 - z) below

    Note:
        The authors' code computes it in float64; here the sum over the other classes is apart from
        the target, so that float32 keeps the digits of rows that are right.

    Reference:
        Prieto, Barsbey, Mediano, Birdal, Grokking at the Edge of Numerical Stability,
        arXiv 2501.04697
    """
    return torch.log1p(s.stable_sum / stable(s.target))


@recipe(family=FAMILY, use="keeps logits small", names=("lse", "target", "sumsq"))
def linear_logit_penalty_loss(s: RowStatistics, *, beta: float | Tensor = 2e-3) -> Tensor:
    """Cross-entropy with a penalty on all squared logits.

    loss = -log p + β/2 Σ_j z_j²

    Args:
        beta: β, the value of the code of MaxSup, which compares with it. Default: ``0.002``.
    """
    return -s.log_p + beta / 2 * s.sumsq


@recipe(
    family=FAMILY,
    use="spread predictions: a bonus for entropy",
    names=("lse", "target", "entropy"),
    example={"beta": 0.1},
)
def linear_confidence_penalty_loss(s: RowStatistics, *, beta: float | Tensor) -> Tensor:
    """Cross-entropy with a bonus for the entropy of the prediction.

    loss = -log p - β H(p)

    Args:
        beta: β; it is tuned.

    Reference:
        Pereyra, Tucker, Chorowski, Kaiser, Hinton, Regularizing Neural Networks by Penalizing
        Confident Output Distributions, arXiv 1701.06548
    """
    return -s.log_p - beta * s.entropy


@recipe(family=FAMILY, use="a bounded proper loss", names=("lse", "target", "lse@2"))
def linear_brier_loss(s: RowStatistics) -> Tensor:
    """Brier score: the squared distance of the softmax to the label.

    loss = ‖p - e_y‖² = (1 - p_y)² + Σ_{j ≠ y} p_j²
    """
    return error_square(s)


@recipe(
    family=FAMILY,
    use="discrete Bayesian flow networks",
    names=("lse", "target", "lse@2"),
    rows=("time",),
)
def linear_bayesian_flow_loss(s: RowStatistics, *, time: Tensor, accuracy: float) -> Tensor:
    """Continuous-time loss of Bayesian flow networks for discrete data.

    loss = V t β(1) ‖p - e_y‖²

    Args:
        time: t, (...) in [0, 1].
        accuracy: β(1), the final accuracy; it is tuned to the data.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 8, requires_grad=True), torch.randn(100, 8)
        >>> y = torch.tensor([3, 1, 4, 1])
        >>> loss = lossops.catalogue.linear_bayesian_flow_loss
        >>> loss(x, w, y, time=torch.rand(4), accuracy=3.0).backward()

    Reference:
        Graves, Srivastava, Atkinson, Gomez, Bayesian Flow Networks, arXiv 2308.07037
    """
    return time * (s.num_classes * accuracy * error_square(s))  # a half-precision t as it is


def error_square(s: RowStatistics) -> Tensor:
    """‖p - e_y‖², (R,), without the cancellation of Σ p² - 2 p_y + 1."""
    others = s.relative("lse@2") - 2 * s.relative_logsumexp
    return (2 * s.log_1mp).exp() + others.exp()
