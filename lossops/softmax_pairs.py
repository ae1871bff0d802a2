"""The softmax loss over pairs: what it makes of its statistics, in one direction and in both.

rows, columns   `lossops.linear.linear_loss`: one sweep, three products
both            log-sums of rows and of columns from the same tiles, then their gradient: four
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops import backends
from lossops.autograd import apply
from lossops.inputs import HeadInputs, check_tensor, has_target
from lossops.linear import linear_loss
from lossops.pairs import PairStatistics
from lossops.positives import transposed
from lossops.reference import accumulate_dtype
from lossops.schedules import LinearLossOptions, without_autocast
from lossops.statistics import RowStatistics


class SoftmaxTerms(NamedTuple):
    """What a softmax loss makes of its statistics."""

    decoupled: bool
    margin: float
    angular_margin: float
    label_smoothing: float

    def losses(
        self,
        target: Tensor,
        lse: Tensor,
        shift: Tensor,
        average: Tensor | None,
        kinds: Tensor,
        count: int,
        scale: Tensor,
    ) -> Tensor:
        """Losses (R,) from target logits (R, K) and log-sum (R,), both relative to the shift.

        ``average``: mean logit, relative too. ``kinds`` (R, K): 1 positive, 2 excluded, 0 absent.
        """
        positive, excluded = kinds == 1, kinds == 2
        raw = torch.where(kinds > 0, target, 0.0)
        moved = self._with_margin(raw, shift, scale)
        size = positive.sum(1).clamp_min(1)
        mean = torch.where(positive, moved, 0.0).sum(1) / size
        counted = positive.any(1)
        if self.decoupled:
            total = torch.where(lse == -torch.inf, mean, lse)  # nothing to compare with: loss 0
            loss = total - mean
        else:
            members = torch.where(positive, moved, -torch.inf)
            members = torch.where(counted.unsqueeze(1), members, 0.0)
            among = torch.logsumexp(members, 1)
            # log Σ over all - log Σ over the positives = -log σ(their difference), exact; the rest
            # is 0 for a single positive.
            missed = F.logsigmoid(among - lse)
            total, loss = among - missed, (among - mean) - missed
        if self.label_smoothing and average is not None:
            others = count * average - torch.where(excluded, raw, 0.0).sum(1)
            others = others + torch.where(positive, moved - raw, 0.0).sum(1)
            smooth = total - others / (count - excluded.sum(1)).clamp_min(1)
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * smooth
        return torch.where(counted, loss, 0.0)

    def _with_margin(self, z: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Target logits with the margins, relative to the shift as they were."""
        if self.angular_margin:
            m = self.angular_margin
            cosine = ((z + shift.unsqueeze(1)) / scale).clamp(-1 + 1e-7, 1 - 1e-7)
            turned = cosine * math.cos(m) - (1 - cosine.square()).sqrt() * math.sin(m)
            # Past π the cosine would rise again; there the margin goes on linearly.
            fair = cosine > math.cos(math.pi - m)
            z = z + scale * (torch.where(fair, turned, cosine - m * math.sin(m)) - cosine)
        return z - scale * self.margin if self.margin else z


class SoftmaxCall(NamedTuple):
    """A checked call: x against w."""

    head: HeadInputs
    terms: SoftmaxTerms
    weights: Tensor | None
    reduction: str
    options: LinearLossOptions | None
    backend: str

    @property
    def scale(self) -> Tensor:
        """t in the accumulate dtype."""
        assert self.head.scale is not None
        return self.head.scale.to(accumulate_dtype(self.head.x.dtype))


def one_direction(
    call: SoftmaxCall,
    ids: Tensor,
    excluded: Tensor | None,
    negatives: Tensor | None,
    reduction: str,
) -> Tensor:
    """Each row against all columns, in one sweep where it is reduced."""
    head, terms = call.head, call.terms
    w = head.w
    if negatives is not None:
        check_tensor("negatives", negatives)
        if negatives.ndim != 2 or negatives.shape[1] != w.shape[1]:
            raise ValueError(
                f"negatives must have shape (Q, {w.shape[1]}), got {tuple(negatives.shape)}"
            )
        w = torch.cat([w, negatives.to(w.dtype)])
    listed, kinds = _with_excluded(ids, excluded)
    scale = call.scale
    counted = has_target(ids).to(scale.dtype)
    u = counted if call.weights is None else counted * call.weights
    smooths = bool(terms.label_smoothing)

    def loss_fn(s: RowStatistics, kinds: Tensor) -> Tensor:
        average = s.relative("average") if smooths else None
        return terms.losses(
            s.relative("target"), s.relative("lse"), s.shift, average, kinds, w.shape[0], scale
        )

    names = ("lse", "target", "sum") if smooths else ("lse", "target")
    moving = terms.margin or terms.angular_margin
    return linear_loss(
        head.x, w, listed, loss_fn, names=names, row_inputs={"kinds": kinds},
        parameters=(scale,) if moving and scale.requires_grad else (), sample_weight=u,
        reduction=reduction, logit_scale=head.scale, options=call.options, backend=call.backend,
    )  # fmt: skip


def both_directions(
    call: SoftmaxCall, ids: Tensor, excluded: Tensor | None, diagonal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of rows (N,) and columns (M,) from the same tiles, and their weights."""
    head, terms, scale = call.head, call.terms, call.scale
    n, m = head.x.shape[0], head.w.shape[0]
    listed, kinds = _with_excluded(ids, excluded)
    chosen = backends.select(call.backend, head.x.device, head.x.dtype).name
    shift, lse, column_shift, column_lse, target = apply(
        PairStatistics, head.x, head.w, head.scale, listed, chosen
    )
    rows, columns = transposed(listed, m, diagonal=diagonal and excluded is None)
    at = columns.clamp_min(0)
    moved = shift[rows.clamp_min(0)] - column_shift.unsqueeze(1)  # first: the offsets cancel
    column_target = target.flatten()[at] + moved
    column_kinds = torch.where(columns < 0, 0, kinds.flatten()[at])
    averages: tuple[Tensor | None, Tensor | None] = (None, None)
    if terms.label_smoothing:
        with without_autocast(head.x.device):
            x, w = head.x.to(scale.dtype), head.w.to(scale.dtype)
            averages = (scale * (x @ w.mean(0)) - shift, scale * (w @ x.mean(0)) - column_shift)
    by_row = terms.losses(target, lse, shift, averages[0], kinds, m, scale)
    by_column = terms.losses(
        column_target, column_lse, column_shift, averages[1], column_kinds, n, scale
    )
    u = (kinds == 1).any(1).to(scale.dtype)
    v = (column_kinds == 1).any(1).to(scale.dtype)
    if call.weights is not None:
        u, v = u * call.weights, v * call.weights
    return by_row, by_column, u, v


def reduce_both(by_row: Tensor, by_column: Tensor, u: Tensor, v: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return (by_row * u + by_column * v) / 2
    rows, columns = (by_row * u).sum(), (by_column * v).sum()
    if reduction == "mean":
        rows, columns = rows / divisor(u.sum()), columns / divisor(v.sum())
    return (rows + columns) / 2


def _with_excluded(ids: Tensor, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids (N, K) the sums leave out, and what each is: 1 positive, 2 excluded, 0 absent."""
    kinds = (ids >= 0).to(torch.int8)
    if excluded is None:
        return ids, kinds
    return torch.cat([ids, excluded], 1), torch.cat([kinds, 2 * (excluded >= 0).to(torch.int8)], 1)


def nothing(head: HeadInputs) -> Tensor:
    """0, of no rows and columns, connected to both."""
    return (head.x[:0].sum() + head.w[:0].sum()).to(accumulate_dtype(head.x.dtype))


def divisor(total: Tensor) -> Tensor:
    """What a mean divides by: inf where there is nothing to average."""
    return torch.where(total == 0, torch.inf, total)
