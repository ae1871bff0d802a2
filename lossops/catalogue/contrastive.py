"""Contrastive losses between two views of a batch.

Features are used as given: normalise them first. Of N pairs, row i of ``first`` and of ``second``
belong together; s is x·w.

    decoupled      -s_ii / T + log Σ over the negatives alone
    debiased       log(1 + G / e^{s_ii / T}),   G from negatives of which some are positive

All are `lossops.linear_loss` over the features of the batch, or `lossops.softmax_pairwise_loss`, in
which a queue of past features (``negatives=``), margins and several positives are options.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops.catalogue.checks import above, at_least, share
from lossops.catalogue.keywords import Keyword, Keywords, some
from lossops.catalogue.powers import lse_at
from lossops.catalogue.recipe import ONE_SWEEP, composed
from lossops.inputs import check_float, check_reduction
from lossops.linear import linear_loss
from lossops.pairwise import softmax_pairwise_loss
from lossops.reference import accumulate_dtype
from lossops.statistics import RowStatistics

FAMILY = "Contrastive"
PAIRS: Keywords = {
    "reduction": Keyword(str, "mean", '``"mean"``, ``"sum"`` or ``"none"``.'),
    **some("options", "backend"),
}


@composed(
    family=FAMILY,
    use="small batches: positives do not push themselves away",
    statistics=("lse", "target"),
    memory=ONE_SWEEP,
    head=PAIRS,
)
def decoupled_contrastive_loss(
    first: Tensor,
    second: Tensor,
    head: dict[str, Any],
    *,
    temperature: float | Tensor = 0.1,
    weight_temperature: float | None = None,
) -> Tensor:
    """Decoupled contrastive learning (DCL, DCLW), of the first view against both.

    loss_i = -a_i s_ii / T + log Σ_{j ≠ i} (e^{s_ij / T} + e^{r_ij / T}),
    s first by second, r first by first, a_i = 1 or 2 - N softmax_i(s_ii / σ)

    a is 1, or with ``weight_temperature`` σ that of DCLW, whose authors take 0.5. They add the loss
    with the views exchanged.

    Args:
        first: features of one view, (N, D) floating point.
        second: features of the other view, (N, D).
        temperature: T, a number or a tensor of one that learns. Default: ``0.1``.
        weight_temperature: σ; None for a = 1. Default: ``None``.

    Returns:
        Scalar, or (N,) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Example:
        >>> import torch, lossops
        >>> x, w = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in "xw")
        >>> lossops.catalogue.decoupled_contrastive_loss(x, w).shape
        torch.Size([])

    Reference:
        Yeh et al., Decoupled Contrastive Learning, arXiv 2110.06848
    """
    above("temperature", temperature, 0)
    _check_views(first, second)
    ids = torch.arange(first.shape[0], device=first.device).unsqueeze(1)
    plain = softmax_pairwise_loss(
        first, torch.cat([second, first]), 1 / temperature, direction="rows", positives=ids,
        exclude=ids + first.shape[0], decoupled=True, **head,
    )  # fmt: skip
    if weight_temperature is None:
        return plain
    above("weight_temperature", weight_temperature, 0)
    acc = accumulate_dtype(first.dtype)
    own = (first.to(acc) * second.to(acc)).sum(1)  # (N,)
    factor = 2 - first.shape[0] * (own / weight_temperature).softmax(0)
    return plain + _reduced((1 - factor) * own / temperature, head["reduction"])


@composed(
    family=FAMILY,
    use="speaker verification: SimCLR with a margin",
    statistics=("lse", "target"),
    memory=ONE_SWEEP,
    head=PAIRS,
)
def nt_xent_margin_loss(
    first: Tensor,
    second: Tensor,
    head: dict[str, Any],
    *,
    temperature: float | Tensor = 0.03,
    margin: float = 0.1,
    angular_margin: float = 0.0,
) -> Tensor:
    """NT-Xent (SimCLR) with an additive or angular margin on the positives.

    loss_i = -log e^{a_i / T} / (e^{a_i / T} + Σ_{j ≠ i, p} e^{s_ij / T}),
    a_i = cos(θ_ip + m') - m

    i runs over the 2 N features of both views, p is the other view of i, s_ip = cos θ_ip.
    ``margin=0`` is NT-Xent; the paper's angular form (AAM) is ``margin=0, angular_margin=m'``.

    Args:
        first: features of one view, (N, D) floating point, normalised.
        second: features of the other view, (N, D), normalised.
        temperature: T, a number or a tensor of one that learns. Default: ``0.03``.
        margin: m, taken from the positive. Default: ``0.1``.
        angular_margin: m', added to the angle of the positive, radians; past π the positive goes on
            as the line s_ip - m' sin m'. Default: ``0.0``.

    Returns:
        Scalar, or (2 N,) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Example:
        >>> import torch, lossops
        >>> x, w = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in "xw")
        >>> lossops.catalogue.nt_xent_margin_loss(x, w).shape
        torch.Size([])

    Reference:
        Lepage, Dehak, Experimenting with Additive Margins for Contrastive Self-Supervised Speaker
        Verification, arXiv 2306.03664
    """
    above("temperature", temperature, 0)
    both, partner, self_ids = _both_views(first, second)
    return softmax_pairwise_loss(
        both, both, 1 / temperature, direction="rows", positives=partner.unsqueeze(1),
        exclude=self_ids.unsqueeze(1), margin=margin, angular_margin=angular_margin, **head,
    )  # fmt: skip


@composed(
    family=FAMILY,
    use="negatives that may be positives",
    statistics=("lse", "target"),
    memory=ONE_SWEEP,
    head=PAIRS,
)
def debiased_contrastive_loss(
    first: Tensor,
    second: Tensor,
    head: dict[str, Any],
    *,
    temperature: float | Tensor = 0.5,
    tau_plus: float = 0.1,
) -> Tensor:
    """Debiased contrastive loss: the share of positives among the negatives is taken out.

    loss_i = log(1 + G_i / e^{s_ip / T}),
    G_i = max((Σ_j e^{s_ij / T} - n τ⁺ e^{s_ip / T}) / (1 - τ⁺), n e^{-1/T})

    j runs over the n = 2 N - 2 negatives of i, p is its other view; 0 for the one pair of N = 1.

    Args:
        first: features of one view, (N, D) floating point, normalised.
        second: features of the other view, (N, D), normalised.
        temperature: T, a number or a tensor of one that learns. Default: ``0.5``.
        tau_plus: τ⁺, the share of positives, in [0, 1). Default: ``0.1``.

    Returns:
        Scalar, or (2 N,) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Example:
        >>> import torch, lossops
        >>> x, w = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in "xw")
        >>> lossops.catalogue.debiased_contrastive_loss(x, w).shape
        torch.Size([])

    Reference:
        Chuang, Robinson, Yen-Chen, Torralba, Jegelka, Debiased Contrastive Learning,
        arXiv 2007.00224
    """
    return _debiased(first, second, head, temperature, tau_plus, 0.0)


@composed(
    family=FAMILY,
    use="hard negatives without mining them",
    statistics=("lse@1+β", "lse@β", "target"),
    memory=ONE_SWEEP,
    head=PAIRS,
    example={"beta": 1.0},
)
def hard_negative_contrastive_loss(
    first: Tensor,
    second: Tensor,
    head: dict[str, Any],
    *,
    beta: float,
    temperature: float | Tensor = 0.5,
    tau_plus: float = 0.1,
) -> Tensor:
    """Hard-negative contrastive loss: negatives weigh more the closer they are.

    loss_i = log(1 + G_i / e^{s_ip / T}),
    G_i = max((n Σ_j e^{(1+β) s_ij / T} / Σ_j e^{β s_ij / T} - n τ⁺ e^{s_ip / T}) / (1 - τ⁺),
    n e^{-1/T})

    j runs over the n = 2 N - 2 negatives of i, p is its other view. The gradient goes through the
    weights, as in the authors' code; β = 0 is `debiased_contrastive_loss`.

    Args:
        first: features of one view, (N, D) floating point, normalised.
        second: features of the other view, (N, D), normalised.
        beta: β, at least 0; it is tuned.
        temperature: T, a number or a tensor of one that learns. Default: ``0.5``.
        tau_plus: τ⁺, the share of positives, in [0, 1). Default: ``0.1``.

    Returns:
        Scalar, or (2 N,) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Example:
        >>> import torch, lossops
        >>> x, w = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in "xw")
        >>> lossops.catalogue.hard_negative_contrastive_loss(x, w, beta=1.0).shape
        torch.Size([])

    Reference:
        Robinson, Chuang, Sra, Jegelka, Contrastive Learning with Hard Negative Samples,
        arXiv 2010.04592
    """
    at_least("beta", beta, 0)
    return _debiased(first, second, head, temperature, tau_plus, beta)


def _debiased(
    first: Tensor,
    second: Tensor,
    head: dict[str, Any],
    temperature: float | Tensor,
    tau_plus: float,
    beta: float,
) -> Tensor:
    above("temperature", temperature, 0)
    share("tau_plus", tau_plus)
    both, partner, self_ids = _both_views(first, second)
    n = both.shape[0] - 2
    hard = [lse_at(1 + beta), lse_at(beta)] if beta else ["lse"]

    def loss_fn(s: RowStatistics) -> Tensor:
        own = s.relative("target")[:, 0]
        if not n:
            return 0 * own
        total = s.relative(hard[0])
        if beta:
            total = total - s.relative(hard[1]) + math.log(n)
        # The negatives' e^z, relative to the largest, are at most n: against e^80 they lose.
        against = (total.exp() - n * tau_plus * own.clamp_max(80).exp()) / (1 - tau_plus)
        kept = against > 0
        log_g = torch.where(kept, against, 1.0).log().masked_fill(~kept, -torch.inf)
        least = math.log(n) - 1 / temperature - s.shift
        return F.softplus(torch.maximum(log_g, least) - own, threshold=50)

    learned = [temperature] if isinstance(temperature, Tensor) else []
    return linear_loss(
        both, both, torch.stack([partner, self_ids], 1), loss_fn, names=(*hard, "target"),
        parameters=learned, logit_scale=1 / temperature, **head,
    )  # fmt: skip


def _check_views(first: Tensor, second: Tensor) -> None:
    for name, t in (("first", first), ("second", second)):
        check_float(name, t)
    if first.ndim != 2 or first.shape != second.shape or not first.shape[0]:
        raise ValueError(
            "first and second must have the same shape (N, D), N at least 1, got "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )


def _both_views(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features of both views (2 N, D), the row of the other view of each, and its own row."""
    _check_views(first, second)
    n = first.shape[0]
    self_ids = torch.arange(2 * n, device=first.device)
    return torch.cat([first, second]), self_ids.roll(n), self_ids


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    check_reduction(reduction)
    if reduction == "none":
        return losses
    return losses.sum() / (max(1, losses.shape[0]) if reduction == "mean" else 1)
