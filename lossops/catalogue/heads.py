"""Softmax losses that change the head: priors, norms, covariances, temperatures of rows.

Each is cross-entropy, or one function of row statistics, of other features, weights or biases:

    logit adjustment    z_j + τ log π_j
    LogitClip           z · min(1, τ / ‖z‖)
    covariance margin   z_j + λ/2 (w_j - w_y)ᵀ S (w_j - w_y)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops.catalogue.checks import above, constant
from lossops.catalogue.keywords import without
from lossops.catalogue.recipe import ONE_SWEEP, composed
from lossops.cross_entropy import linear_cross_entropy
from lossops.inputs import check_float, head_inputs, is_ignored
from lossops.linear import linear_loss, linear_statistics
from lossops.reference import accumulate_dtype
from lossops.schedules import without_autocast
from lossops.spherical import linear_spherical_loss
from lossops.statistics import RowStatistics

FAMILY = "Priors, norms, margins"


@composed(
    family=FAMILY,
    use="long tails: every class as if it were as frequent",
    statistics=("lse", "target"),
    memory=ONE_SWEEP,
    head=without("softcap"),
)
def linear_logit_adjusted_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    log_prior: Tensor,
    tau: float = 1.0,
) -> Tensor:
    """Logit-adjusted cross-entropy: frequent classes must win by the odds of their prior.

    loss = -log e^{z_y + τ log π_y} / Σ_j e^{z_j + τ log π_j}

    Predict with z alone. Class weights in place of priors: ``weight=`` of any loss here.

    Args:
        log_prior: log π, (V,); logarithms of class counts will do.
        tau: τ. Default: ``1.0``.

    Note:
        The prior is a bias, and as such rounded to the dtype of the weight.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 8, requires_grad=True), torch.randn(100, 8)
        >>> y, counts = torch.tensor([3, 1, 4, 1]), torch.randint(1, 1000, (100,))
        >>> adjusted = lossops.catalogue.linear_logit_adjusted_loss
        >>> adjusted(x, w, y, log_prior=counts.log()).backward()

    Reference:
        Menon, Jayasumana, Rawat, Jain, Veit, Kumar, Long-tail Learning via Logit Adjustment,
        arXiv 2007.07314
    """
    check_float("log_prior", log_prior)
    if log_prior.shape != linear_weight.shape[:1]:
        raise ValueError(
            f"log_prior must have shape {tuple(linear_weight.shape[:1])}, one value per class, got "
            f"{tuple(log_prior.shape)}"
        )
    bias = (tau * log_prior).to(linear_weight.dtype)
    bias = bias if head["linear_bias"] is None else head["linear_bias"] + bias
    loss: Tensor = linear_cross_entropy(
        input, linear_weight, target, **{**head, "linear_bias": bias}
    )
    return loss


@composed(
    family=FAMILY,
    use="noisy labels: logits of bounded length",
    statistics=("sumsq", "lse", "target"),
    memory=f"{ONE_SWEEP}, and the norms from a D×D matrix: V·D² more multiply-adds",
    head=without("linear_bias", "softcap", "class_group"),
)
def linear_logit_clip_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    tau: float = 1.0,
    clipped_norm: float | None = None,
) -> Tensor:
    """LogitClip: cross-entropy of logits whose norm is bounded.

    loss = CE(z'),   z' = z where ‖z‖ ≤ τ, else τ' z / ‖z‖,   τ' = clipped_norm or τ

    The authors' code tests ‖z‖ > τ but rescales to the norm 1/τ: ``clipped_norm=1 / tau``. At its
    default τ = 1 the two agree.

    Args:
        tau: τ. Default: ``1.0``.
        clipped_norm: τ' > 0, the norm that rows beyond τ get; None for τ. Default: ``None``.

    Note:
        Rows are scaled through their features; the gradient goes through the norm.

    Reference:
        Wei et al., Mitigating Memorization of Noisy Labels by Clipping the Model Prediction,
        arXiv 2212.04055
    """
    above("tau", tau, 0)
    norm = tau if clipped_norm is None else clipped_norm
    above("clipped_norm", norm, 0)
    scale = head["logit_scale"]
    check_float("input", input)
    squares = linear_spherical_loss(
        input, linear_weight, target, lambda target, sum, sumsq, num_classes: sumsq,
        reduction="none", ignore_index=head["ignore_index"], backend=head["backend"],
    )  # fmt: skip
    if scale is not None:
        own = head_inputs(input, linear_weight, None, scale, None).scale
        assert own is not None
        squares = squares * own.to(squares.dtype).square()
    long = squares > tau * tau
    factor = torch.where(long, norm / torch.where(long, squares, 1.0).sqrt(), 1.0)
    scaled = (input.to(factor.dtype) * factor.unsqueeze(-1)).to(input.dtype)
    loss: Tensor = linear_cross_entropy(scaled, linear_weight, target, **head)
    return loss


@composed(
    family=FAMILY,
    use="intra-class spread of the features as a margin",
    statistics=("lse", "target"),
    head=without("logit_scale", "softcap", "class_group"),
    memory=f"{ONE_SWEEP}, a product w S (V, D), all in float32",
)
def linear_shared_covariance_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    covariance: Tensor,
    strength: float = 1.0,
) -> Tensor:
    """Margins from one covariance of the features, shared by all classes.

    loss = -log e^{z_y} / Σ_j e^{z_j + λ/2 (w_j - w_y)ᵀ S (w_j - w_y)}

    The quadratic form folds into the head: features x - λ S w_y and biases b_j + λ/2 w_jᵀ S w_j.
    It bounds the expected cross-entropy of Gaussian features of covariance λ S.

    Args:
        covariance: S, (D, D); its symmetric part is what counts.
        strength: λ. Default: ``1.0``.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 8, requires_grad=True), torch.randn(100, 8)
        >>> y, s = torch.tensor([3, 1, 4, 1]), 0.1 * torch.eye(8)
        >>> lossops.catalogue.linear_shared_covariance_loss(x, w, y, covariance=s).backward()
    """
    check_float("input", input)
    check_float("covariance", covariance)
    d = input.shape[-1]
    if covariance.shape != (d, d):
        raise ValueError(f"covariance must have shape {(d, d)}, got {tuple(covariance.shape)}")
    acc = accumulate_dtype(input.dtype)
    s = covariance.to(acc)
    s = strength / 2 * (s + s.T)  # the form sees no more of it
    taught = target.clamp(0, linear_weight.shape[0] - 1)
    wide = linear_weight.to(acc)  # half precision would round features and biases once more
    with without_autocast(input.device):
        moved = input.to(acc) - wide[taught] @ s
        bias = ((wide @ s) * wide).sum(1) / 2
        if head["linear_bias"] is not None:
            bias = bias + head["linear_bias"].to(acc)
        loss: Tensor = linear_cross_entropy(moved, wide, target, **{**head, "linear_bias": bias})
    return loss


@composed(
    family=FAMILY,
    use="label-distributional robustness with a temperature of its own for each row",
    statistics=("lse", "target"),
    memory=ONE_SWEEP,
    head=without("linear_bias", "softcap"),
)
def linear_adaptive_ldr_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    lam: Tensor,
    margin: float = 1.0,
) -> Tensor:
    """Adaptive label-distributionally robust loss: `linear_ldr_loss` with a λ per row.

    loss_n = λ_n log (1/V) Σ_k exp((z_k + c [k ≠ y] - z_y) / λ_n)

    `catalogue.adaptive_lambda` moves λ, which is kept with the data.

    Args:
        lam: λ, (...), above 0; no gradient.
        margin: c. Default: ``1.0``.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 8, requires_grad=True), torch.randn(100, 8)
        >>> y, lam = torch.tensor([3, 1, 4, 1]), torch.ones(4)
        >>> lossops.catalogue.linear_adaptive_ldr_loss(x, w, y, lam=lam).backward()
        >>> lam = lossops.catalogue.adaptive_lambda(x, w, y, lam, lam0=1.0, alpha=2.0)

    Reference:
        Zhu, Ying, Yang, Label Distributionally Robust Losses for Multi-class Classification:
        Consistency, Robustness and Adaptivity, arXiv 2112.14869
    """
    rows, lam = _cooled(input, lam, target, head["ignore_index"])

    def loss_fn(s: RowStatistics, lam: Tensor) -> Tensor:
        odds = margin / lam - s.target_minus_lse
        return lam * (-F.logsigmoid(-odds) - math.log(s.num_classes))

    return linear_loss(rows, linear_weight, target, loss_fn, row_inputs={"lam": lam}, **head)


@torch.no_grad()
def adaptive_lambda(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    lam: Tensor,
    *,
    lam0: float,
    alpha: float,
    margin: float = 1.0,
    ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None,
    class_group: Any = None,
) -> Tensor:
    """The next λ of `linear_adaptive_ldr_loss`: smaller where the distribution is certain.

    λ' = λ_0 (1 - KL(p, uniform) / (α log V)),   p_k ∝ exp((z_k + c [k ≠ y] - z_y) / λ)

    Args:
        input: x, (..., D).
        linear_weight: w, (V, D).
        target: class ids (...).
        lam: λ, (...).
        lam0: λ_0.
        alpha: α, above 1: λ' stays above 0.
        margin: c. Default: ``1.0``.
        ignore_index: target id of rows that keep their λ; None means -100. Default: ``None``.
        logit_scale: factor of x·w, as of the loss. Default: ``None``.
        class_group: as of the loss. Default: ``None``.

    Returns:
        λ', (...).

    Raises:
        ValueError: α not above 1.

    Example:
        >>> import torch, lossops
        >>> x, w, lam = torch.zeros(2, 8), torch.randn(100, 8), torch.ones(2)
        >>> y = torch.tensor([1, 2])
        >>> lossops.catalogue.adaptive_lambda(x, w, y, lam, lam0=0.5, alpha=2.0, margin=0.0)
        tensor([0.5000, 0.5000])
    """
    above("alpha", alpha, 1)
    rows, cooled = _cooled(input, lam, target, ignore_index)
    s = linear_statistics(
        rows, linear_weight, target, names=("entropy",), ignore_index=ignore_index,
        logit_scale=logit_scale, class_group=class_group,
    )  # fmt: skip
    odds = s.target_minus_lse - margin / cooled
    log_p, log_1mp = F.logsigmoid(odds), F.logsigmoid(-odds)
    others = s.relative("lse") - s.relative("mean")  # entropy of the negatives among themselves
    entropy = -log_p.exp() * log_p + log_1mp.exp() * (others - log_1mp)
    most = math.log(s.num_classes)
    moved = lam0 * (1 - (most - entropy) / (alpha * most)) if most else torch.full_like(lam, lam0)
    return torch.where(is_ignored(target, ignore_index), lam, moved)


def _cooled(
    input: Tensor, lam: Tensor, target: Tensor, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """Rows divided by λ, and λ as a constant in the accumulate dtype, 1 for ignored rows."""
    check_float("input", input)
    if lam.shape != input.shape[:-1]:
        raise ValueError(
            f"lam must have shape {tuple(input.shape[:-1])} (input without its last dim), "
            f"got {tuple(lam.shape)}"
        )
    lam = constant("lam", lam).to(accumulate_dtype(input.dtype))
    if target.shape == lam.shape:  # else refused, with its name, by what follows
        lam = torch.where(is_ignored(target, ignore_index), 1.0, lam)
    return (input.to(lam.dtype) / lam.unsqueeze(-1)).to(input.dtype), lam
