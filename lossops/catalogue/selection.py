"""Softmax losses that choose rows, classes or candidates: truncation, switching, unlikelihood.

Those that choose by rank within the batch see all rows at once, in two sweeps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops.catalogue.checks import among, at_least, beside_target, between, constant, share
from lossops.catalogue.confidence import error_square
from lossops.catalogue.keywords import without
from lossops.catalogue.powers import expm1, log_1m_exp
from lossops.catalogue.recipe import ONE_SWEEP, composed, recipe
from lossops.cross_entropy import linear_cross_entropy
from lossops.inputs import head_inputs, is_ignored, row_weight
from lossops.linear import linear_loss
from lossops.schedules import without_autocast
from lossops.statistics import RowStatistics

FAMILY = "Selection"


@recipe(
    family=FAMILY,
    use="leaves out tokens that are likely wrong",
    names=("lse", "target", "lse@2"),
    example={"threshold": 1.3},
)
def linear_error_norm_truncation_loss(s: RowStatistics, *, threshold: float) -> Tensor:
    """Error norm truncation: rows whose prediction is far from the label do not count.

    loss = [‖p - e_y‖ ≤ τ] (-log p)

    The mask is a constant of the gradient. τ = √2 keeps every row: the authors' code begins so and
    goes over to τ at one step, ``threshold=τ if step > start else 2**0.5``. The mean divides by all
    counted rows, as there.

    Args:
        threshold: τ, in [0, √2], more is no different; it is tuned.

    Reference:
        Li, Xu, Koehn, Khashabi, Murray, Error Norm Truncation: Robust Training in the Presence of
        Data Noise for Text Generation Models, arXiv 2310.00840
    """
    at_least("threshold", threshold, 0)
    return torch.where(error_square(s).detach().sqrt() <= threshold, -s.log_p, 0.0)


@recipe(
    family=FAMILY,
    use="leaves out a fixed part of the tokens",
    names=("lse", "target", "lse@2"),
    rows=("counted",),
    rowwise=False,
    example={"fraction": 0.1},
)
def linear_error_norm_fraction_loss(
    s: RowStatistics, *, fraction: float, counted: Tensor
) -> Tensor:
    """Error norm truncation of a fixed part of the batch.

    loss = [rank of ‖p - e_y‖ among the n counted rows ≥ ⌊fraction · n⌋] (-log p)

    Rank 0 is the largest; rows whose norm equals that at the cut are kept, as in the authors' code,
    whose n counts padding too. Begin with ``fraction=0``, as there.

    Args:
        fraction: part of the counted rows that is left out, in [0, 1), rounded down.

    Reference:
        Li, Xu, Koehn, Khashabi, Murray, Error Norm Truncation: Robust Training in the Presence of
        Data Noise for Text Generation Models, arXiv 2310.00840
    """
    share("fraction", fraction)
    norms = error_square(s).detach()
    cut = _largest(norms, counted, fraction)[1]
    return torch.where(norms <= cut, -s.log_p, 0.0)


@recipe(
    family=FAMILY,
    use="adversarially trained classifiers: hard rows count every rival",
    names=("lse", "target", "max", "softplus"),
    rows=("counted",),
    rowwise=False,
    example={"fraction": 0.3, "lam": 0.4},
)
def linear_sovr_loss(
    s: RowStatistics, *, fraction: float, lam: float | Tensor, counted: Tensor
) -> Tensor:
    """Switching one-versus-the-rest loss: the rows closest to an error, or beyond, switch.

    loss = λ [softplus(-z_y) + Σ_{k ≠ y} softplus(z_k)] on the rows with the largest
    max_{k ≠ y} z_k - z_y, -log p on the others

    Args:
        fraction: part of the counted rows that switch, in [0, 1], rounded down; it is tuned.
        lam: λ; it is tuned.

    Reference:
        Kanai, Yamaguchi, Yamada, Takahashi, Ohno, Ida, One-vs-the-Rest Loss to Focus on Important
        Samples in Adversarial Training, arXiv 2207.10283
    """
    between("fraction", fraction, 0, 1)
    margins = (s.relative("max") - s.relative("target")).detach()
    switched = _largest(margins, counted, fraction)[0]
    versus = F.softplus(-s.target, threshold=50) + s.softplus
    return torch.where(switched, lam * versus, -s.log_p)


def _largest(values: Tensor, counted: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Which rows are the ⌊fraction · n⌋ largest of the n counted, and the next value after them."""
    ranked = values.masked_fill(~counted, -torch.inf)
    order = ranked.sort(descending=True, stable=True)
    number = (counted.sum().double() * fraction + 1e-6).floor().long()  # 1e-6: 0.3 · 10 is 3
    rank = torch.empty_like(order.indices)
    rank[order.indices] = torch.arange(values.shape[0], device=values.device)
    if not values.shape[0]:
        return counted, values
    last = number.clamp_max(values.shape[0] - 1).unsqueeze(0)
    return rank < number, order.values.gather(0, last)  # an index would wait for the device


@composed(
    family=FAMILY,
    use="against repetition: what must not be predicted",
    statistics=("lse", "target"),
    head=without("weight"),
    memory=f"{ONE_SWEEP}, 8·N·C bytes of candidates",
)
def linear_unlikelihood_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    candidates: Tensor,
    alpha: float = 1.0,
    floor: float = 1e-5,
) -> Tensor:
    """Unlikelihood: cross-entropy, and a penalty on the probability of candidate classes.

    loss = -log p_y - α Σ_{c ∈ C \\ {y}} log(1 - p_c)

    A candidate given twice counts once. `catalogue.previous_tokens` makes the authors' candidates.

    Args:
        candidates: C, class ids (..., C), padded with -1.
        alpha: α. Default: ``1.0``.
        floor: least 1 - p_c, with no gradient below, as in the authors' code; 0 for none.
            Default: ``1e-05``.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(2, 5, 8, requires_grad=True), torch.randn(100, 8)
        >>> y = torch.randint(100, (2, 5))
        >>> seen = lossops.catalogue.previous_tokens(y)
        >>> seen.shape
        torch.Size([2, 5, 5])
        >>> lossops.catalogue.linear_unlikelihood_loss(x, w, y, candidates=seen).backward()

    Reference:
        Welleck, Kulikov, Roller, Dinan, Cho, Weston, Neural Text Generation with Unlikelihood
        Training, arXiv 1908.04319
    """
    between("floor", floor, 0, 1)
    listed = beside_target(target, "candidates", candidates, head["ignore_index"])
    present = listed[..., 1:] >= 0

    def loss_fn(s: RowStatistics, present: Tensor) -> Tensor:
        log_p = s.log_p  # (R, 1 + C), -inf for candidates that are absent
        taken = log_p[:, 1:].masked_fill(~present, -torch.inf)
        rest = log_1m_exp(taken)
        rest = rest.clamp_min(torch.tensor(floor).log().item()) if floor else rest
        return -log_p[:, 0] - alpha * rest.sum(1)

    others = {n: v for n, v in head.items() if n != "ignore_index"}
    return linear_loss(
        input, linear_weight, listed, loss_fn, row_inputs={"present": present}, **others
    )


def previous_tokens(
    target: Tensor, *, window: int | None = None, ignore_index: int | None = None
) -> Tensor:
    """The tokens before each of a sequence, as candidates of `linear_unlikelihood_loss`.

    candidates[..., t, :] = target[..., t-1], target[..., t-2], ..., -1 where there is none

    Args:
        target: ids (..., T).
        window: how many; None for all T. Default: ``None``.
        ignore_index: id of what is no token; None means -100. Default: ``None``.

    Returns:
        Ids (..., T, window).

    Raises:
        ValueError: a window below 1.

    Example:
        >>> import torch, lossops
        >>> lossops.catalogue.previous_tokens(torch.tensor([7, 8, 9]), window=2)
        tensor([[-1, -1],
                [ 7, -1],
                [ 8,  7]])
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    length = target.shape[-1] if window is None else window
    if not target.shape[-1]:
        return target.new_empty(*target.shape, length)
    tokens = target.masked_fill(is_ignored(target, ignore_index), -1)
    padded = F.pad(tokens, (length, 0), value=-1)  # (..., length + T)
    return padded[..., :-1].unfold(-1, length, 1).flip(-1)


def ramp(step: int, steps: int, first: float, last: float) -> float:
    """A parameter that moves in a straight line during training.

    value = first + (last - first) · min(step / steps, 1)

    Args:
        step: how far it is, from 0.
        steps: where ``last`` is reached.
        first: the value at 0.
        last: the value from ``steps`` on.

    Returns:
        A number.

    Raises:
        ValueError: steps below 1.

    Example:
        >>> import lossops
        >>> lossops.catalogue.ramp(5, 10, 0.0, 1.0)
        0.5
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return first + (last - first) * min(max(step / steps, 0.0), 1.0)


@composed(
    family=FAMILY,
    use="numbers in text: near misses cost less than far ones",
    statistics=("lse", "target"),
    head=without("softcap", "class_group"),
    memory=f"{ONE_SWEEP}, and N·K values for the K number tokens",
    example={"numbers": {3: 3.0, 4: 4.0}},
)
def linear_number_token_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    numbers: dict[int, float],
    lam: float = 0.3,
    kind: str = "wasserstein",
) -> Tensor:
    """Number token loss: cross-entropy, and the distance of the number meant to those predicted.

    loss = mean -log p + λ mean over number tokens of D,
    D = Σ_k q_k |v_k - v_y| or (Σ_k q_k v_k - v_y)²,   q = softmax over the number tokens

    The first D is ``"wasserstein"``, the second ``"mse"``. Each mean is over its own rows, as in
    the authors' code; with ``reduction="none"`` the two are added row by row.

    Args:
        numbers: value of each number token, by its class id.
        lam: λ; the authors' class for ``"mse"`` has 0.5. Default: ``0.3``.
        kind: ``"wasserstein"`` or ``"mse"``. Default: ``'wasserstein'``.

    Reference:
        Zausinger et al., Regress, Don't Guess: A Regression-like Loss on Number Tokens for Language
        Models, arXiv 2411.02083
    """
    among("kind", kind, ("wasserstein", "mse"))
    at_least("lam", lam, 0)
    if not numbers or not all(0 <= i < linear_weight.shape[0] for i in numbers):
        raise ValueError(
            f"numbers must give values of class ids in [0, {linear_weight.shape[0]}), at least "
            f"one, got {numbers}"
        )
    plain: Tensor = linear_cross_entropy(input, linear_weight, target, **head)
    x = head_inputs(input, linear_weight, head["linear_bias"], head["logit_scale"], None)
    acc = plain.dtype
    ids = torch.tensor(list(numbers), device=input.device)
    value = torch.tensor(list(numbers.values()), device=input.device, dtype=acc)
    with without_autocast(input.device):
        z = x.x.to(acc) @ x.w[ids].to(acc).T  # (N, K)
    z = z if x.scale is None else z * x.scale.to(acc)
    z = z if x.b is None else z + x.b[ids].to(acc)
    ignored = is_ignored(target, head["ignore_index"])
    found = (target.reshape(-1, 1) == ids) & ~ignored.reshape(-1, 1)  # (N, K)
    counted, meant = found.any(1), (found * value).sum(1)
    q = torch.where(counted.unsqueeze(1), z, 0.0).softmax(1)  # what is left out may be NaN
    if kind == "mse":
        distance = ((q * value).sum(1) - meant).square()
    else:
        distance = (q * (value - meant.unsqueeze(1)).abs()).sum(1)
    u = torch.where(counted, 1.0, 0.0).to(acc)
    if (given := row_weight(head["sample_weight"], x.lead, input)) is not None:
        u = u * given
    if head["weight"] is not None:
        u = u * head["weight"].to(acc)[target.reshape(-1).clamp(0, x.w.shape[0] - 1)]
    each = lam * u * distance
    if head["reduction"] == "none":
        return plain + each.reshape(x.lead)
    if head["reduction"] == "sum":
        return plain + each.sum()
    total = u.sum()
    return plain + each.sum() / torch.where(total == 0, torch.inf, total)


@recipe(family=FAMILY, use="the margin to the strongest rival", names=("target", "max"))
def linear_crammer_singer_loss(s: RowStatistics, *, margin: float | Tensor = 1.0) -> Tensor:
    """Multi-class hinge loss: the target must beat every other class by a margin.

    loss = max(0, margin + max_{k ≠ y} z_k - z_y)

    Args:
        margin: at least 0. Default: ``1.0``.

    Reference:
        Crammer, Singer, On the Algorithmic Implementation of Multiclass Kernel-based Vector
        Machines, 2001
    """
    at_least("margin", margin, 0)
    return (margin + s.relative("max") - s.relative("target")).relu()


@recipe(family=FAMILY, use="one sigmoid per class, a single label", names=("target", "softplus"))
def linear_one_vs_rest_loss(s: RowStatistics) -> Tensor:
    """One-versus-rest: binary cross-entropy of every class.

    loss = softplus(-z_y) + Σ_{k ≠ y} softplus(z_k)

    Several labels a row: `lossops.linear_binary_cross_entropy`.
    """
    return F.softplus(-s.target, threshold=50) + s.softplus


@recipe(
    family=FAMILY, use="a running log-partition in place of the row's own", rows=("log_partition",)
)
def linear_meco_loss(s: RowStatistics, *, log_partition: Tensor) -> Tensor:
    """Compositional maximum likelihood: the log-partition is linearised at its running estimate.

    loss = e^{lse - u} - 1 + u - z_y,   lse over all classes, u its running estimate

    It is lse - z_y where u = lse, and above it elsewhere; its gradient has e^{z - u} for the
    softmax. `catalogue.running_log_partition` moves u.

    Args:
        log_partition: u, (...); no gradient.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 8, requires_grad=True), torch.randn(100, 8)
        >>> y, u = torch.tensor([3, 1, 4, 1]), torch.full((4,), 5.0)
        >>> lossops.catalogue.linear_meco_loss(x, w, y, log_partition=u).backward()
        >>> lse = lossops.linear_statistics(x, w, names=("lse",)).lse
        >>> u = lossops.catalogue.running_log_partition(u, lse, momentum=0.9)
    """
    u = constant("log_partition", log_partition)
    return expm1(s.relative_logsumexp + (s.shift - u)) + u - s.target


@torch.no_grad()
def running_log_partition(log_partition: Tensor, lse: Tensor, *, momentum: float) -> Tensor:
    """The running estimate of `linear_meco_loss`, moved towards the batch.

    u' = log(momentum · e^u + (1 - momentum) · e^lse)

    Args:
        log_partition: u, of any shape that ``lse`` can be broadcast to.
        lse: log Σ_j e^{z_j}; for one u of all rows ``lse.logsumexp(0) - log N``.
        momentum: in [0, 1).

    Returns:
        u', of the common shape.

    Raises:
        ValueError: momentum outside [0, 1).

    Example:
        >>> import torch, lossops
        >>> u, lse = torch.zeros(2), torch.zeros(2)
        >>> lossops.catalogue.running_log_partition(u, lse, momentum=0.5)
        tensor([0., 0.])
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    kept = torch.log(torch.tensor(momentum, dtype=lse.dtype, device=lse.device))
    moved = torch.log1p(torch.tensor(-momentum, dtype=lse.dtype, device=lse.device))
    return torch.logaddexp(log_partition + kept, lse + moved)
