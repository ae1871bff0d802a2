"""Objectives of whole sequences: preferences, and unlearning against a reference.

With log π the log-probability of a sequence, Σ over its counted tokens of log p, and log ρ that of
a reference model:

    DPO      -log σ(β ((log π - log ρ)_chosen - (log π - log ρ)_rejected))
    NPO      -2/β log σ(-β (log π - log ρ))

Log-probabilities come from `lossops.linear_log_prob`: two sweeps, no logits stored.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops.catalogue.checks import above, at_least, constant
from lossops.catalogue.keywords import Keyword, Keywords, some
from lossops.catalogue.powers import log_1m_exp
from lossops.catalogue.recipe import TWO_SWEEPS, composed
from lossops.cross_entropy import linear_log_prob
from lossops.inputs import check_reduction, is_ignored

FAMILY = "Tokens and sequences"
LOG_PROB: Keywords = some(
    "linear_bias", "ignore_index", "logit_scale", "softcap", "class_group", "options", "backend"
)
SEQUENCES: Keywords = {
    "reduction": Keyword(str, "mean", 'over sequences: ``"mean"``, ``"sum"`` or ``"none"``.'),
    **LOG_PROB,
}


@composed(
    family=FAMILY,
    use="unlearning that does not diverge",
    statistics=("lse", "target"),
    memory=TWO_SWEEPS,
    head=SEQUENCES,
)
def linear_npo_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    reference_log_prob: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """Negative preference optimisation: sequences to be forgotten lose against a reference.

    loss_i = -2/β log σ(-β (log π_i - log ρ_i)),   log π_i = Σ_t log p(y_it)

    Args:
        input: x, (..., T, D) floating point.
        target: class ids (..., T), int64; ignored ones are no tokens.
        reference_log_prob: log ρ of each sequence, (...).
        beta: β. Default: ``0.1``.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(2, 5, 8, requires_grad=True), torch.randn(100, 8)
        >>> y, reference = torch.randint(100, (2, 5)), torch.tensor([-20.0, -25.0])
        >>> lossops.catalogue.linear_npo_loss(x, w, y, reference_log_prob=reference).backward()

    Reference:
        Zhang, Lin, Bai, Mei, Negative Preference Optimization: From Catastrophic Collapse to
        Effective Unlearning, arXiv 2404.05868
    """
    above("beta", beta, 0)
    gained, _ = _gains(input, linear_weight, target, reference_log_prob, head)
    return over_sequences(-2 / beta * F.logsigmoid(-beta * gained), head["reduction"])


@composed(
    family=FAMILY,
    use="preferences against a reference model",
    statistics=("lse", "target"),
    memory=TWO_SWEEPS,
    head=SEQUENCES,
)
def linear_dpo_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    reference_log_prob: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """Direct preference optimisation: the chosen half of the batch against the rejected half.

    loss_i = -log σ(β ((log π - log ρ)_i - (log π - log ρ)_{i+B}))

    Args:
        input: x, (2 B, T, D) floating point: B chosen sequences, then the B rejected ones.
        target: class ids (2 B, T), int64; ignored ones are no tokens.
        reference_log_prob: log ρ of each sequence, (2 B,).
        beta: β. Default: ``0.1``.

    Returns:
        Scalar, or (B,) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 5, 8, requires_grad=True), torch.randn(100, 8)
        >>> y, reference = torch.randint(100, (4, 5)), torch.zeros(4)
        >>> lossops.catalogue.linear_dpo_loss(x, w, y, reference_log_prob=reference).backward()

    Reference:
        Rafailov et al., Direct Preference Optimization: Your Language Model is Secretly a Reward
        Model, arXiv 2305.18290
    """
    above("beta", beta, 0)
    gained, _ = _gains(input, linear_weight, target, reference_log_prob, head)
    chosen, rejected = _halves(gained)
    return over_sequences(-F.logsigmoid(beta * (chosen - rejected)), head["reduction"])


@composed(
    family=FAMILY,
    use="preferences without a reference model",
    statistics=("lse", "target"),
    memory=TWO_SWEEPS,
    head=SEQUENCES,
)
def linear_simpo_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    beta: float,
    gamma: float,
) -> Tensor:
    """SimPO: average log-probabilities of chosen and rejected, a margin apart.

    loss_i = -log σ(β (log π / length)_i - β (log π / length)_{i+B} - γ)

    Args:
        input: x, (2 B, T, D) floating point: B chosen sequences, then the B rejected ones.
        target: class ids (2 B, T), int64; ignored ones are no tokens.
        beta: β; it is tuned.
        gamma: γ; it is tuned.

    Returns:
        Scalar, or (B,) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 5, 8, requires_grad=True), torch.randn(100, 8)
        >>> y = torch.randint(100, (4, 5))
        >>> lossops.catalogue.linear_simpo_loss(x, w, y, beta=2.0, gamma=1.0).backward()

    Reference:
        Meng, Xia, Chen, SimPO: Simple Preference Optimization with a Reference-Free Reward,
        arXiv 2405.14734
    """
    above("beta", beta, 0)
    total, length = _gains(input, linear_weight, target, None, head)
    chosen, rejected = _halves(total / length)
    return over_sequences(-F.logsigmoid(beta * (chosen - rejected) - gamma), head["reduction"])


@composed(
    family=FAMILY,
    use="supervised training and preferences in one",
    statistics=("lse", "target"),
    memory=TWO_SWEEPS,
    head=SEQUENCES,
)
def linear_orpo_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    lam: float,
) -> Tensor:
    """ORPO: likelihood of the chosen sequences, and their odds against the rejected ones.

    loss_i = -log p̄_i - λ log σ(logit p̄_i - logit p̄_{i+B}),   log p̄ = log π / length

    p̄ = 1, of a sequence without tokens for one, counts as odds of 1e38 (1e308 in float64), with no
    gradient.

    Args:
        input: x, (2 B, T, D) floating point: B chosen sequences, then the B rejected ones.
        target: class ids (2 B, T), int64; ignored ones are no tokens.
        lam: λ; it is tuned.

    Returns:
        Scalar, or (B,) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 5, 8, requires_grad=True), torch.randn(100, 8)
        >>> y = torch.randint(100, (4, 5))
        >>> lossops.catalogue.linear_orpo_loss(x, w, y, lam=0.1).backward()

    Reference:
        Hong, Lee, Thorne, ORPO: Monolithic Preference Optimization without Reference Model,
        arXiv 2403.07691
    """
    at_least("lam", lam, 0)
    total, length = _gains(input, linear_weight, target, None, head)
    average = total / length
    below_one = average.clamp_max(-torch.finfo(average.dtype).tiny)  # no inf - inf of the odds
    chosen, rejected = _halves(below_one - log_1m_exp(below_one))
    losses = -_halves(average)[0] - lam * F.logsigmoid(chosen - rejected)
    return over_sequences(losses, head["reduction"])


def _gains(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    reference: Tensor | None,
    head: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """log π - log ρ of each sequence, and its number of tokens, at least 1."""
    if target.ndim < 1 or input.ndim != target.ndim + 1:
        raise ValueError(
            f"input must have shape (..., T, D) and target (..., T), got {tuple(input.shape)} and "
            f"{tuple(target.shape)}"
        )
    shaping = {n: v for n, v in head.items() if n != "reduction"}
    total = linear_log_prob(input, linear_weight, target, **shaping).sum(-1)
    length = (~is_ignored(target, head["ignore_index"])).sum(-1).clamp_min(1)
    if reference is None:
        return total, length
    if reference.shape != total.shape:
        raise ValueError(
            f"reference_log_prob must have shape {tuple(total.shape)}, one value per sequence, "
            f"got {tuple(reference.shape)}"
        )
    return total - constant("reference_log_prob", reference).to(total.dtype), length


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    if values.ndim != 1 or values.shape[0] % 2:
        raise ValueError(
            "input must hold as many chosen as rejected sequences, (2 B, T, D), got "
            f"{tuple(values.shape)} sequences"
        )
    chosen, rejected = values.chunk(2)
    return chosen, rejected


def over_sequences(losses: Tensor, reduction: str) -> Tensor:
    check_reduction(reduction)
    if reduction == "none":
        return losses
    return losses.sum() / (max(1, losses.numel()) if reduction == "mean" else 1)
