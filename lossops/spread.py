"""Losses over pairs whose rows are spread over the ranks of a process group, around the ring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossops import backends
from lossops.autograd import apply
from lossops.binary import Binary
from lossops.distributed import (
    EXCHANGES,
    GatherRows,
    Peers,
    RingPairStatistics,
    Whole,
    all_agree,
    gather_rows,
    peers,
    ring_binary_loss,
    summed,
    wanting,
)
from lossops.inputs import HeadInputs, has_target
from lossops.pairs import binary_loss
from lossops.positives import check_groups, pair_ids, without
from lossops.schedules import without_autocast
from lossops.softmax_pairs import SoftmaxCall, divisor, nothing, one_direction


def spread_sigmoid(
    head: HeadInputs,
    bias: Tensor | None,
    positives: Any,
    factor: Tensor,
    reduction: str,
    batch_group: Any,
    exchange: str,
    backend: str,
) -> Tensor:
    """The sigmoid loss of the whole batch from this rank's rows and columns."""
    _check_reduced(reduction, "rows", factor)
    those = meet(batch_group, exchange, head, positives)
    head = joined(head, those)
    ids = spread_ids(positives, those, head)
    if exchange == "ring":
        chosen = backends.select(backend, head.x.device, head.x.dtype).name
        local = ring_binary_loss(head, bias, ids, factor, Binary(), those, chosen)
    else:
        everything = apply(GatherRows, head.w, those.columns, those.group)
        b = None if bias is None else bias.expand(everything.shape[0])
        local = binary_loss(
            head._replace(w=everything, b=b), ids, Binary(), factor=factor, reduced=True,
            backend=backend,
        )  # fmt: skip
    total: Tensor = apply(Whole, local, those)
    return total if reduction == "sum" else total / divisor(summed(factor.sum(), those.group))


def spread_softmax(
    call: SoftmaxCall,
    batch_group: Any,
    exchange: str,
    direction: str,
    positives: Any,
    exclude: Any,
    negatives: Tensor | None,
    image_negatives: Tensor | None,
) -> Tensor:
    """The loss of the whole batch from this rank's rows and columns."""
    head = call.head
    _check_reduced(call.reduction, "mean", call.weights)
    those = meet(batch_group, exchange, head, positives, exclude)
    call = call._replace(head=joined(head, those))
    head = call.head
    plain = direction == "both" and isinstance(positives, str) and exclude is None
    if exchange == "ring":
        if not plain or negatives is not None or image_negatives is not None:
            raise ValueError(
                "exchange='ring' takes direction='both', positives='diagonal' and no excluded or "
                "further negatives; use exchange='gather'"
            )
        return _ring_softmax(call, those)
    if not isinstance(positives, str | tuple | list) or not isinstance(
        exclude, tuple | list | None
    ):
        raise ValueError(
            "batch_group takes positives='diagonal' or groups, and exclude as groups, since a rank "
            f"does not know the pairs of others; got {type(positives).__name__} and "
            f"{type(exclude).__name__}"
        )
    sides = []
    if direction != "columns":
        sides.append((call, those, False, negatives))
    if direction != "rows":
        turned = call._replace(head=head._replace(x=head.w, w=head.x))
        there = those._replace(rows=those.columns, columns=those.rows)
        sides.append((turned, there, True, image_negatives))
    parts = []
    for side, those_here, flipped, more in sides:
        everything = apply(GatherRows, side.head.w, those_here.columns, those_here.group)
        ids = spread_ids(positives, those_here, side.head, flipped)
        excluded = None
        if exclude is not None:
            excluded = without(spread_ids(exclude, those_here, side.head, flipped), ids)
        full = side._replace(head=side.head._replace(w=everything))
        local = nothing(full.head)
        if everything.shape[0]:
            local = local + one_direction(full, ids, excluded, more, "sum")
        total: Tensor = apply(Whole, local, those)
        if call.reduction == "mean":
            u = has_target(ids).to(local.dtype)
            u = u if call.weights is None else u * call.weights
            total = total / divisor(summed(u.sum(), those.group))
        parts.append(total)
    return parts[0] if len(parts) == 1 else (parts[0] + parts[1]) / 2


def _ring_softmax(call: SoftmaxCall, those: Peers) -> Tensor:
    head, scale = call.head, call.scale
    n = head.x.shape[0]
    if those.rows != those.columns:
        raise ValueError(
            "exchange='ring' of the softmax loss needs as many rows as columns on every rank, got "
            f"{those.rows} and {those.columns}; use exchange='gather'"
        )
    chosen = backends.select(call.backend, head.x.device, head.x.dtype).name
    shift, lse, column_shift, column_lse, target = apply(
        RingPairStatistics, head.x, head.w, head.scale, those, chosen
    )
    kinds = torch.ones(n, 1, dtype=torch.int8, device=head.x.device)
    averages: tuple[Tensor | None, Tensor | None] = (None, None)
    everything = sum(those.rows)
    if call.terms.label_smoothing:
        with without_autocast(head.x.device):
            x, w = head.x.to(scale.dtype), head.w.to(scale.dtype)
            means = [
                apply(GatherRows, t.sum(0, keepdim=True), [1] * those.size, those.group).sum(0)
                / everything
                for t in (w, x)
            ]
            averages = (scale * (x @ means[0]) - shift, scale * (w @ means[1]) - column_shift)
    at_column = target + (shift - column_shift).unsqueeze(1)
    spec = (kinds, everything, scale)
    by_row = call.terms.losses(target, lse, shift, averages[0], *spec)
    by_column = call.terms.losses(at_column, column_lse, column_shift, averages[1], *spec)
    u = shift.new_ones(n) if call.weights is None else call.weights
    total: Tensor = apply(Whole, ((by_row + by_column) * u).sum() / 2, those)
    if call.reduction == "sum":
        return total
    return total / divisor(summed(u.sum(), those.group))


def _check_reduced(reduction: str, mean: str, weights: Tensor | None) -> None:
    if reduction == "none" or (weights is not None and weights.requires_grad):
        raise ValueError(
            f"batch_group needs reduction {mean!r} or 'sum' and weights without gradient, got "
            f"reduction={reduction!r}; reduce the loss or gather the features yourself"
        )


def meet(group: Any, exchange: str, head: HeadInputs, *pairs: Any) -> Peers:
    """The ranks of ``batch_group``, once this rank's groups are known to fit."""
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
    error = None
    try:
        for positives in pairs:
            if isinstance(positives, tuple | list):
                check_groups(positives, head.x.shape[0], head.w.shape[0], head.x)
    except (TypeError, ValueError) as refused:
        error = refused
    return peers(group, head.x, head.w, error)


def joined(head: HeadInputs, those: Peers) -> HeadInputs:
    """The inputs, wanting gradients where those of any rank do."""
    x, w = (wanting(t, n) for t, n in zip((head.x, head.w), those.needs, strict=True))
    return head._replace(x=x, w=w)


def spread_ids(positives: Any, those: Peers, head: HeadInputs, flipped: bool = False) -> Tensor:
    """Positive ids (N_r, K) among the columns of all ranks; ``flipped`` groups are of columns."""
    rows, total = those.rows[those.rank], sum(those.columns)
    if isinstance(positives, str):
        local = pair_ids(positives, rows, those.columns[those.rank], head.x)
        return torch.where(local < 0, -1, local + those.first_column)
    if isinstance(positives, tuple | list):
        here, there = reversed(positives) if flipped else positives
        everywhere = gather_rows(there, those.columns, those.group)
        return pair_ids((here, everywhere), rows, total, head.x)
    error, ids = None, head.x.new_empty(0, dtype=torch.int64)
    try:
        ids = pair_ids(positives, rows, total, head.x)
    except (TypeError, ValueError, IndexError) as refused:
        error = refused
    all_agree(error, those, head.x.device)
    return ids
