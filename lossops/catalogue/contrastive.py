"""Contrastive losses between two views, and of queries against candidates.

Features are used as given: normalise them first. Of N pairs, row i of ``first`` and of ``second``
belong together; s is x·w.

    decoupled      -s_ii / T + log Σ over the negatives alone
    debiased       log(1 + G / e^{s_ii / T}),   G from negatives of which some are positive
    GE2E           utterances against centroids of speakers

All are `lossops.linear_loss` over the features of the batch, or `lossops.softmax_pairwise_loss`, in
which a queue of past features (``negatives=``), margins and several positives are options.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops.catalogue.checks import above, among, at_least, between
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
FIRST = "features of one view, (N, D) floating point."
SECOND = "features of the other view, (N, D)."


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
    temperature: float = 0.1,
    weight_temperature: float | None = None,
) -> Tensor:
    """Decoupled contrastive learning (DCL, DCLW), of the first view against both.

    loss_i = -a_i s_ii / T + log Σ_{j ≠ i} (e^{s_ij / T} + e^{r_ij / T})

    s: first by second, r: first by first; a = 1, or with ``weight_temperature`` σ (DCLW; the
    authors take 0.5) a_i = 2 - N softmax_i(s_ii / σ). The authors add the loss with the views
    exchanged.

    Args:
        first: features of one view, (N, D) floating point.
        second: features of the other view, (N, D).
        temperature: T. Default: ``0.1``.
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
    temperature: float = 0.03,
    margin: float = 0.1,
    angular_margin: float = 0.0,
) -> Tensor:
    """NT-Xent (SimCLR) with an additive or angular margin on the positives.

    loss_i = -log e^{(s_ip - m) / T} / (e^{(s_ip - m) / T} + Σ_{j ≠ i, p} e^{s_ij / T})

    i runs over the 2 N features of both views, p is the other view of i. ``margin=0`` is NT-Xent.

    Args:
        first: features of one view, (N, D) floating point, normalised.
        second: features of the other view, (N, D), normalised.
        temperature: T. Default: ``0.03``.
        margin: m, taken from the positive. Default: ``0.1``.
        angular_margin: added to the angle of the positive, radians. Default: ``0.0``.

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
    temperature: float = 0.5,
    tau_plus: float = 0.1,
) -> Tensor:
    """Debiased contrastive loss: the share of positives among the negatives is taken out.

    loss_i = log(1 + G_i / e^{s_ip / T}),   n = 2 N - 2 negatives j

    G_i = max((Σ_j e^{s_ij / T} - n τ⁺ e^{s_ip / T}) / (1 - τ⁺), n e^{-1/T})

    Args:
        first: features of one view, (N, D) floating point, normalised.
        second: features of the other view, (N, D), normalised.
        temperature: T. Default: ``0.5``.
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
    temperature: float = 0.5,
    tau_plus: float = 0.1,
) -> Tensor:
    """Hard-negative contrastive loss: negatives weigh more the closer they are.

    loss_i = log(1 + G_i / e^{s_ip / T}),   n = 2 N - 2 negatives j

    G_i = max((n Σ_j e^{(1+β) s_ij / T} / Σ_j e^{β s_ij / T} - n τ⁺ e^{s_ip / T}) / (1 - τ⁺),
    n e^{-1/T})

    The gradient goes through the weights, as in the authors' code; β = 0 is
    `debiased_contrastive_loss`.

    Args:
        first: features of one view, (N, D) floating point, normalised.
        second: features of the other view, (N, D), normalised.
        beta: β, at least 0; it is tuned.
        temperature: T. Default: ``0.5``.
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
    temperature: float,
    tau_plus: float,
    beta: float,
) -> Tensor:
    above("temperature", temperature, 0)
    between("tau_plus", tau_plus, 0, 1 - 1e-9)
    both, partner, self_ids = _both_views(first, second)
    n = both.shape[0] - 2
    hard = [lse_at(1 + beta), lse_at(beta)] if beta else ["lse"]

    def loss_fn(s: RowStatistics) -> Tensor:
        own = s.relative("target")[:, 0]
        total = s.relative(hard[0])
        if beta:
            total = total - s.relative(hard[1]) + math.log(max(n, 1))
        least = n * (-1 / temperature - s.shift).exp()
        against = (total.exp() - n * tau_plus * own.exp()) / (1 - tau_plus)
        return F.softplus(torch.maximum(against, least).log() - own, threshold=50)

    return linear_loss(
        both, both, torch.stack([partner, self_ids], 1), loss_fn, names=(*hard, "target"),
        logit_scale=1 / temperature, **head,
    )  # fmt: skip


@composed(
    family=FAMILY,
    use="speaker verification",
    statistics=("lse", "target", "max"),
    memory=f"{ONE_SWEEP} of the J centroids",
    head=PAIRS,
)
def ge2e_loss(
    embeddings: Tensor,
    head: dict[str, Any],
    *,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -5.0,
    kind: str = "softmax",
) -> Tensor:
    """Generalised end-to-end loss: each utterance against the centroids of all speakers.

    s_ji,k = w cos(e_ji, c_k) + b,   c_j for k = j without utterance i itself

    loss_ji = -s_ji,j + log Σ_k e^{s_ji,k} (``"softmax"``) or
    1 - σ(s_ji,j) + max_{k ≠ j} σ(s_ji,k) (``"contrast"``)

    The paper sums over utterances: ``reduction="sum"``.

    Args:
        embeddings: e, (J, M, D) floating point, M ≥ 2 utterances of J speakers.
        scale: w, learned from 10 in the paper. Default: ``10.0``.
        bias: b, learned from -5; the softmax form does not depend on it. Default: ``-5.0``.
        kind: ``"softmax"`` or ``"contrast"``. Default: ``'softmax'``.

    Returns:
        Scalar, or (J M,) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Example:
        >>> import torch, lossops
        >>> e, w = torch.randn(3, 4, 8, requires_grad=True), torch.tensor(10.0, requires_grad=True)
        >>> lossops.catalogue.ge2e_loss(e, scale=w).backward()

    Reference:
        Wan, Wang, Papir, Moreno, Generalized End-to-End Loss for Speaker Verification,
        arXiv 1710.10467
    """
    among("kind", kind, ("softmax", "contrast"))
    check_float("embeddings", embeddings)
    if embeddings.ndim != 3 or embeddings.shape[1] < 2:
        raise ValueError(
            f"embeddings must have shape (J, M, D) with M at least 2, got {tuple(embeddings.shape)}"
        )
    speakers, utterances, _ = embeddings.shape
    acc = accumulate_dtype(embeddings.dtype)
    wide = embeddings.to(acc)
    total = wide.sum(1, keepdim=True)
    others = F.normalize(total - wide, dim=2)  # without the utterance; the length drops out
    w = torch.as_tensor(scale, dtype=acc, device=wide.device)
    b = torch.as_tensor(bias, dtype=acc, device=wide.device)
    own = (w * (F.normalize(wide, dim=2) * others).sum(2) + b).flatten()  # (J M,)
    learned = tuple(t for t in (b,) if t.requires_grad)

    def loss_fn(s: RowStatistics, own: Tensor) -> Tensor:
        if kind == "softmax":
            return -F.logsigmoid(own - b - s.shift - s.relative("lse"))
        rival = torch.where(s.argmax < 0, 0.0, torch.sigmoid(s.max + b))
        return 1 - torch.sigmoid(own) + rival

    return linear_loss(
        F.normalize(wide, dim=2).flatten(0, 1), F.normalize(total.squeeze(1), dim=1),
        torch.arange(speakers, device=wide.device).repeat_interleave(utterances), loss_fn,
        names=("lse" if kind == "softmax" else "max", "target"), row_inputs={"own": own},
        parameters=learned, logit_scale=w, **head,
    )  # fmt: skip


@composed(
    family=FAMILY,
    use="dense retrieval: each candidate against the positive, pair by pair",
    statistics=("softplus", "target"),
    memory=f"{ONE_SWEEP}, copies of x and w with two columns",
    head=some("sample_weight", "reduction", "ignore_index", "logit_scale", "options", "backend"),
)
def linear_pairwise_logistic_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, head: dict[str, Any]
) -> Tensor:
    """In-batch pairwise logistic loss (STAR): every negative loses to the positive on its own.

    loss_n = Σ_{j ≠ y} softplus(z_j - z_y)

    With queries as input and their documents as weight it is the in-batch loss of STAR.

    Note:
        z_y is a pair of further features, so that the sweep sees z_j - z_y.

    Reference:
        Zhan, Mao, Liu, Guo, Zhang, Ma, Optimizing Dense Retrieval Model Training with Hard
        Negatives, arXiv 2104.08051
    """
    check_float("input", input)
    acc = accumulate_dtype(input.dtype)
    own = linear_weight[target.clamp(0, linear_weight.shape[0] - 1)]
    z = (input.to(acc) * own.to(acc)).sum(-1, keepdim=True)
    high = z.to(input.dtype)
    low = (z - high.to(acc)).to(input.dtype)  # half precision alone would round z_y
    minus = -torch.ones_like(linear_weight[:, :2])
    rows = torch.cat([input, high, low], -1)
    return linear_loss(
        rows, torch.cat([linear_weight, minus], 1), target, lambda s: s.softplus,
        names=("softplus", "target"), **head,
    )  # fmt: skip


def _check_views(first: Tensor, second: Tensor) -> None:
    for name, t in (("first", first), ("second", second)):
        check_float(name, t)
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            f"first and second must have the same shape (N, D), got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
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
