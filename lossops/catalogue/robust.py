"""Softmax losses for noisy labels: powers of p, normalised losses, and sums of two of them.

With p the softmax probability of the target, z̄ the mean logit and lse over all V classes:

    comp-sum                (p^{τ-1} - 1) / (1 - τ)            -log p at τ = 1
    normalised              a loss by its sum over the labels: log p / Σ_k log p_k, ...
    active + passive        a loss that only raises p, and one that also lowers the other classes

Every 1 - p^q goes through expm1 of q log p, so that rows with p close to 1 keep their digits, and
the gradients of rows with p close to 0 theirs.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from lossops.catalogue.checks import above, among, at_least, between, ratio
from lossops.catalogue.powers import expm1, lse_at, power
from lossops.catalogue.recipe import recipe
from lossops.statistics import RowStatistics

FAMILY = "Noisy labels"


@recipe(family=FAMILY, use="one parameter from sum-exponential over cross-entropy to MAE")
def linear_comp_sum_loss(s: RowStatistics, *, tau: float | Tensor = 1.0) -> Tensor:
    """Comp-sum losses: cross-entropy, generalised cross-entropy and MAE as one family.

    loss = (p^{τ-1} - 1) / (1 - τ),   -log p at τ = 1

    τ = 0 is the sum-exponential loss 1/p - 1, τ in (1, 2) generalised cross-entropy with q = τ - 1,
    τ = 2 the mean absolute error 1 - p.

    Args:
        tau: τ, at least 0; the paper has no default, at 1 it is cross-entropy. Default: ``1.0``.

    Note:
        For τ < 1 it grows as p^{τ-1}: beyond the largest float it is inf, as in PyTorch.

    Reference:
        Mao, Mohri, Zhong, Cross-Entropy Loss Functions: Theoretical Analysis and Applications,
        arXiv 2304.07288
    """
    at_least("tau", tau, 0)
    return -power(s.log_p, tau - 1)


@recipe(family=FAMILY, use="between cross-entropy and MAE; wrong labels pull less")
def linear_generalized_cross_entropy_loss(s: RowStatistics, *, q: float | Tensor = 0.7) -> Tensor:
    """Generalised cross-entropy: noisy rows, with a small p, weigh p^q.

    loss = (1 - p^q) / q

    Args:
        q: in (0, 1]. Default: ``0.7``.

    Note:
        Code in use bounds p at 1e-7; here no bound is needed.

    Reference:
        Zhang, Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy
        Labels, arXiv 1805.07836
    """
    between("q", q, 1e-6, 1)
    return -power(s.log_p, q)


@recipe(family=FAMILY, use="robust to symmetric label noise; slow on many classes")
def linear_mae_loss(s: RowStatistics) -> Tensor:
    """Mean absolute error of the softmax, half of ‖p - e_y‖₁.

    loss = 1 - p

    Reference:
        Ghosh, Kumar, Sastry, Robust Loss Functions under Label Noise for Deep Neural Networks,
        arXiv 1712.09482
    """
    return s.log_1mp.exp()


@recipe(family=FAMILY, use="the steep end of the comp-sum family")
def linear_sum_exp_loss(s: RowStatistics) -> Tensor:
    """Sum-exponential loss: the odds against the target.

    loss = 1/p - 1 = Σ_{j ≠ y} e^{z_j - z_y}

    Note:
        inf where the sum is beyond the largest float, as in PyTorch.

    Reference:
        Mao, Mohri, Zhong, Cross-Entropy Loss Functions: Theoretical Analysis and Applications,
        arXiv 2304.07288
    """
    return (-s.target_minus_lse).exp()


@recipe(family=FAMILY, use="active half of active-passive losses", names=("lse", "target", "sum"))
def linear_normalized_cross_entropy_loss(s: RowStatistics) -> Tensor:
    """Normalised cross-entropy: by its sum over all labels, which makes it robust.

    loss = log p / Σ_k log p_k = (lse - z_y) / (V lse - Σ_k z_k)

    Note:
        0 where there is one class.

    Reference:
        Ma, Huang, Wang, Romano, Erfani, Bailey, Normalized Loss Functions for Deep Learning with
        Noisy Labels, arXiv 2006.13554
    """
    return ratio(-s.log_p, s.num_classes * (s.relative_logsumexp - s.relative("average")))


@recipe(family=FAMILY, use="passive half of active-passive losses")
def linear_reverse_cross_entropy_loss(s: RowStatistics, *, floor: float = 1e-4) -> Tensor:
    """Reverse cross-entropy: labels and predictions change places, log 0 becomes log floor.

    loss = -Σ_k p_k log [k = y]_{≥ floor} = -log(floor) (1 - p)

    Args:
        floor: what stands for a label's 0, in (0, 1]. Default: ``0.0001``.

    Note:
        Code in use bounds p at 1e-7 as well; here it is not.

    Reference:
        Wang, Ma, Chen, Luo, Yi, Bailey, Symmetric Cross Entropy for Robust Learning with Noisy
        Labels, arXiv 1908.06112
    """
    between("floor", floor, 1e-300, 1)
    return -math.log(floor) * s.log_1mp.exp()


def _of_q(q: float = 0.7) -> tuple[str, ...]:
    return ("lse", "target", lse_at(q))


@recipe(family=FAMILY, use="generalised cross-entropy made robust at any q", names=_of_q)
def linear_normalized_generalized_cross_entropy_loss(s: RowStatistics, *, q: float = 0.7) -> Tensor:
    """Normalised generalised cross-entropy.

    loss = (1 - p^q) / Σ_k (1 - p_k^q) = (1 - p^q) / (V - Σ_k p_k^q)

    Args:
        q: in (0, 1], a number. Default: ``0.7``.

    Note:
        0 where there is one class.

    Reference:
        Ma, Huang, Wang, Romano, Erfani, Bailey, Normalized Loss Functions for Deep Learning with
        Noisy Labels, arXiv 2006.13554
    """
    between("q", q, 1e-6, 1)
    others = (s.relative(lse_at(q)) - q * s.relative_logsumexp).exp()  # Σ_{k ≠ y} p_k^q
    lost = -expm1(q * s.log_p)
    return ratio(lost, (s.num_classes - 1) - others + lost)


ACTIVE = ("cross_entropy", "normalized_cross_entropy")
PASSIVE = ("mae", "reverse_cross_entropy")


def _of_active(active: str, **_: object) -> tuple[str, ...]:
    return ("lse", "target", "sum") if active == "normalized_cross_entropy" else ("lse", "target")


@recipe(
    family=FAMILY, use="robust and still fast: the usual choice under label noise", names=_of_active
)
def linear_active_passive_loss(
    s: RowStatistics,
    *,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    active: str = "normalized_cross_entropy",
    passive: str = "reverse_cross_entropy",
) -> Tensor:
    """Active-passive loss: a robust loss that raises p beside one that lowers the others.

    loss = α active + β passive

    The authors take α = β = 1 on CIFAR-10 and (10, 0.1) on CIFAR-100. With
    ``active="cross_entropy"`` it is symmetric cross-entropy (arXiv 1908.06112).

    Args:
        alpha: α. Default: ``1.0``.
        beta: β. Default: ``1.0``.
        active: ``"cross_entropy"`` or ``"normalized_cross_entropy"``.
            Default: ``'normalized_cross_entropy'``.
        passive: ``"mae"`` or ``"reverse_cross_entropy"``. Default: ``'reverse_cross_entropy'``.

    Reference:
        Ma, Huang, Wang, Romano, Erfani, Bailey, Normalized Loss Functions for Deep Learning with
        Noisy Labels, arXiv 2006.13554
    """
    among("active", active, ACTIVE)
    among("passive", passive, PASSIVE)
    missed = s.log_1mp.exp()
    rest = missed if passive == "mae" else -math.log(1e-4) * missed
    if active == "cross_entropy":
        return -alpha * s.log_p + beta * rest
    other = s.num_classes * (s.relative_logsumexp - s.relative("average"))
    return alpha * ratio(-s.log_p, other) + beta * rest


def _of_lambda(lam: float, margin: float = 0.0) -> tuple[str, ...]:
    return ("target", lse_at(1 / lam))


@recipe(
    family=FAMILY,
    use="cross-entropy with a margin and a temperature that bounds it",
    names=_of_lambda,
)
def linear_ldr_loss(s: RowStatistics, *, lam: float = 1.0, margin: float = 2.0) -> Tensor:
    """Label-distributionally robust loss: cross-entropy with a margin, at a temperature.

    loss = λ log (1/V) Σ_k exp((z_k + c [k ≠ y] - z_y) / λ)

    Args:
        lam: λ, above 0, a number. Default: ``1.0``.
        margin: c. Default: ``2.0``.

    Note:
        The authors' code first divides the logits of a row by the mean of their softplus, or of
        their absolute values. For the first, pass input rows divided so:
        ``s = lossops.linear_statistics(x, w, names=("softplus",))`` and
        ``x / (s.softplus / len(w)).unsqueeze(-1)``, which is a constant of the gradient; the
        second is no statistic here.

    Reference:
        Zhu, Ying, Yang, Label Distributionally Robust Losses for Multi-class Classification:
        Consistency, Robustness and Adaptivity, arXiv 2112.14869
    """
    above("lam", lam, 0)
    odds = s.relative(lse_at(1 / lam)) + (margin - s.relative("target")) / lam
    return -lam * F.logsigmoid(-odds) - lam * math.log(s.num_classes)
