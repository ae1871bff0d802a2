"""Contrastive losses of queries against candidates: documents, entities, centroids of speakers.

GE2E     -s_jj + log Σ_k e^{s_jk}, utterances against centroids, their own without themselves
STAR     Σ_{j ≠ y} softplus(z_j - z_y), each negative on its own
HaSa     InfoNCE whose negatives are weighted by hardness, less a share of false ones
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops.catalogue.checks import among, beside_target, between, constant, share
from lossops.catalogue.contrastive import FAMILY, PAIRS
from lossops.catalogue.keywords import without
from lossops.catalogue.probabilities import CHUNKED, LOGITS, of_rows
from lossops.catalogue.recipe import ONE_SWEEP, composed
from lossops.inputs import check_float, distinct
from lossops.linear import linear_loss
from lossops.reference import accumulate_dtype
from lossops.statistics import RowStatistics


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

    loss_ji = -s_ji,j + log Σ_k e^{s_ji,k} or 1 - σ(s_ji,j) + max_{k ≠ j} σ(s_ji,k),
    s_ji,k = w cos(e_ji, c_k) + b

    The first is ``"softmax"``, the second ``"contrast"``. c_j for k = j is without utterance i.

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
    statistics="logits of a chunk of rows",
    memory=LOGITS,
    head=CHUNKED,
)
def linear_pairwise_logistic_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, head: dict[str, Any]
) -> Tensor:
    """In-batch pairwise logistic loss (STAR): every negative loses to the positive on its own.

    loss_n = Σ_{j ≠ y} softplus(z_j - z_y)

    With queries as input and their documents as weight it is the in-batch loss of STAR.

    Reference:
        Zhan, Mao, Liu, Guo, Zhang, Ma, Optimizing Dense Retrieval Model Training with Hard
        Negatives, arXiv 2104.08051
    """

    def losses(z: Tensor, y: Tensor) -> Tensor:
        # dz_y is a sum over all classes of like size: a GEMM, had it a column for it, would lose
        # 2e-4 of it at V = 100 000.
        away = F.softplus(z - z.gather(1, y), threshold=50)
        return away.scatter(1, y, 0.0).sum(1)

    return of_rows(input, linear_weight, target, head, losses)


@composed(
    family=FAMILY,
    use="entities or documents among whose negatives are unlabelled positives",
    statistics=("lse", "lse@2", "target"),
    memory=ONE_SWEEP,
    head=without("linear_bias", "weight", "softcap"),
)
def linear_hasa_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    false_negatives: Tensor | None = None,
    false_weights: Tensor | None = None,
    tau: float = 0.05,
    margin: float = 1.0,
    least: float = 1.0,
) -> Tensor:
    """HaSa: InfoNCE with hard negatives, less the share of those that are positives.

    loss = -log e^{z_y - m} / (e^{z_y - m} + V/(1 - τ) G),
    G = Σ_{j ≠ y} q_j e^{z_j} - τ Σ_f u_f e^{z_f}

    q is the softmax of the negatives, a constant of the gradient; f runs over the given false
    negatives, which stay among the negatives, as positives do among unlabelled ones. Where G ≤ 0
    it is ``least``, as in the authors' code, which adds the cross-entropy of the columns with the
    same m: `lossops.softmax_pairwise_loss` with ``direction="columns"`` and ``margin=m``.

    Args:
        target: class ids (...), int64.
        false_negatives: ids (..., F) of likely positives, padded with -1; one given twice counts
            once, the target not at all. None for none. Default: ``None``.
        false_weights: u, (..., F), no gradient; None for equal ones that sum to 1.
            Default: ``None``.
        tau: τ in [0, 1). Default: ``0.05``.
        margin: m. Default: ``1.0``.
        least: what stands for G where it is not positive, above 0. Default: ``1.0``.

    Reference:
        Zhang, Zhang, Molybog, HaSa: Hardness and Structure-Aware Contrastive Knowledge Graph
        Embedding, arXiv 2305.10563
    """
    share("tau", tau)
    between("least", least, 1e-30, 1e30)
    acc = accumulate_dtype(input.dtype)
    if false_negatives is None:
        false_negatives = target.unsqueeze(-1)[..., :0]
    listed = beside_target(target, "false_negatives", false_negatives, head["ignore_index"])
    once = distinct(listed)[..., 1:]
    present = (once >= 0).to(acc)
    given = present / present.sum(-1, keepdim=True).clamp_min(1)
    if false_weights is not None:
        if false_weights.shape != present.shape:
            raise ValueError(
                f"false_weights must have the shape of false_negatives, {tuple(present.shape)}, "
                f"got {tuple(false_weights.shape)}"
            )
        given = constant("false_weights", false_weights).to(acc) * present

    def loss_fn(s: RowStatistics, u: Tensor) -> Tensor:
        z, false = s.relative("target")[:, 0], s.relative("target")[:, 1:]
        parts = torch.cat([s.relative("lse").unsqueeze(1), false], 1)  # Σ over j is of both
        some = parts.amax(1) > -torch.inf
        parts = torch.where(some.unsqueeze(1), parts, 0.0)
        top = parts.detach().amax(1)  # so that G e^-top is at most 1
        squares = torch.cat([s.relative("lse@2").unsqueeze(1), 2 * false], 1)
        squares = torch.where(some.unsqueeze(1), squares, -torch.inf)
        hard = torch.exp(squares - (parts.logsumexp(1).detach() + top).unsqueeze(1)).sum(1)
        hard = (hard + hard.detach()) / 2  # of e^{2 z} the weights hold one half of the gradient
        g = hard - tau * (u * (false - top.unsqueeze(1)).exp()).sum(1)
        kept = g > 0
        log_g = torch.where(kept, torch.where(kept, g, 1.0).log() + top, math.log(least) - s.shift)
        return F.softplus(log_g + math.log(s.num_classes / (1 - tau)) - (z - margin),
                          threshold=50)  # fmt: skip

    return linear_loss(
        input, linear_weight, listed, loss_fn, names=("lse", "lse@2", "target"),
        row_inputs={"u": given}, **{n: v for n, v in head.items() if n != "ignore_index"},
    )  # fmt: skip
