"""Softmax losses of every probability of a row, which no row statistic holds.

    normalised focal    -(1 - p_y)^γ log p_y / Σ_k -(1 - p_k)^γ log p_k
    asymmetric          -Σ_k t_k a_k log p_k,   a = (1 - p_y)^γ⁺ of the target, p_k^γ⁻ of others

The logits of a chunk of rows exist at a time (`lossops.catalogue.chunked`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossops.catalogue.checks import at_least, between, ratio
from lossops.catalogue.chunked import loss_of_logits, refuse_compilers
from lossops.catalogue.keywords import Keywords, without
from lossops.catalogue.powers import raised
from lossops.catalogue.recipe import composed
from lossops.inputs import class_ids, head_inputs

FAMILY = "Every probability"
LOGITS = "a chunk of logits, 3 GEMMs"
CHUNKED: Keywords = without("near_threshold", "class_group")


@composed(
    family=FAMILY,
    use="focal loss as the active half under label noise",
    statistics="logits of a chunk of rows",
    memory=LOGITS,
    head=CHUNKED,
)
def linear_normalized_focal_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    gamma: float = 0.5,
) -> Tensor:
    """Normalised focal loss: focal loss by its sum over all labels.

    loss = (1 - p_y)^γ log p_y / Σ_k (1 - p_k)^γ log p_k

    The focal weights are constants of the gradient, as in the authors' code.

    Args:
        gamma: γ, at least 0. Default: ``0.5``.

    Reference:
        Ma, Huang, Wang, Romano, Erfani, Bailey, Normalized Loss Functions for Deep Learning with
        Noisy Labels, arXiv 2006.13554
    """
    at_least("gamma", gamma, 0)

    def losses(z: Tensor, y: Tensor) -> Tensor:
        log_p = z.log_softmax(1)
        lost = (1 - log_p.detach().exp()) ** gamma * log_p
        return ratio(lost.gather(1, y).squeeze(1), lost.sum(1))

    return of_rows(input, linear_weight, target, head, losses)


@composed(
    family=FAMILY,
    use="asymmetric loss for a single label",
    statistics="logits of a chunk of rows",
    memory=LOGITS,
    head=CHUNKED,
)
def linear_single_label_asymmetric_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    gamma_pos: float = 0.0,
    gamma_neg: float = 4.0,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Asymmetric loss of a softmax: the other classes fade with their probability.

    loss = -Σ_k t_k a_k log p_k,   t = (1 - ε) e_y + ε / V

    with a_y = (1 - p_y)^γ⁺ and a_k = p_k^γ⁻ for the others; the gradient goes through them.

    Args:
        gamma_pos: γ⁺, at least 0. Default: ``0.0``.
        gamma_neg: γ⁻, at least 0. Default: ``4.0``.
        label_smoothing: ε in [0, 1]. Default: ``0.1``.

    Reference:
        Ridnik et al., Asymmetric Loss For Multi-Label Classification, arXiv 2009.14119
    """
    at_least("gamma_pos", gamma_pos, 0)
    at_least("gamma_neg", gamma_neg, 0)
    between("label_smoothing", label_smoothing, 0, 1)

    def losses(z: Tensor, y: Tensor) -> Tensor:
        log_p = z.log_softmax(1)
        own = log_p.gather(1, y)
        share = label_smoothing / z.shape[1]
        focus = 1.0 if gamma_pos == 0 else raised(-torch.expm1(own), gamma_pos)
        of_target = (1 - label_smoothing + share) * (focus * own).squeeze(1)
        faded = ((gamma_neg * log_p).exp() * log_p).scatter(1, y, 0.0)
        return -of_target - share * faded.sum(1)

    return of_rows(input, linear_weight, target, head, losses)


def of_rows(
    input: Tensor, linear_weight: Tensor, target: Tensor, head: dict[str, Any], losses: Any
) -> Tensor:
    """The loss of a face whose F takes logits (R, V) and targets (R, 1)."""
    refuse_compilers()
    given = head_inputs(
        input, linear_weight, head["linear_bias"], head["logit_scale"], head["softcap"]
    )
    ids = class_ids(target, given.lead, given.w.shape[0], head["ignore_index"])
    at = ids.clamp(0, given.w.shape[0] - 1)
    return loss_of_logits(given, lambda chunk: lambda z, rows: losses(z, at[rows]), head, ids)
