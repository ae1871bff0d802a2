"""The primitives of losses over pairs in plain PyTorch, beside those of `lossops.reference`.

Shapes and dtypes as there: x (N, D), w (V, D), b (V,), target (N, K) with -1 where there is none.
The positives are the targets; sums run over the negatives, all other pairs. ``dx`` is before the
factor ``scale``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lossops.binary import Binary, negative, negative_slope, positive
from lossops.reference import (
    BLOCK,
    PRODUCT,
    TILE,
    accumulate_dtype,
    add_targets,
    gather,
    linear_logits,
    logsumexp,
    row_blocks,
    target_mask,
    within,
)
from lossops.statistics import logaddexp


def target_logits(
    x: Tensor, w: Tensor, b: Tensor | None, scale: Tensor | None, target: Tensor
) -> Tensor:
    """scale · x·w + b at the target ids, (N, K), 0 where there is none, some rows at a time."""
    acc = accumulate_dtype(x.dtype)
    factor = None if scale is None else scale.to(acc)
    columns = []
    for ids in target.clamp_min(0).unbind(1):
        parts = []
        for rows in row_blocks(x.shape[0], x.shape[1], BLOCK):
            z = (x[rows].to(acc) * w[ids[rows]].to(acc)).sum(1)
            z = z if factor is None else z * factor
            parts.append(z if b is None else z + b[ids[rows]].to(acc))
        columns.append(torch.cat(parts))
    return torch.stack(columns, 1).masked_fill(target < 0, 0.0)


def linear_binary(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    target: Tensor | None,
    weight: Tensor | None,
    kind: str,
    parameters: list[float],
    row_factor: Tensor | None,
    at_target: Tensor | None,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> Tensor:
    """Σ_{j ∉ P_i} a_j φ(z_ij), (N,), and the gradients of Σ_i f_i of them, in one sweep.

    ``weight``: a (V,). ``row_factor``: f (N,), 1 where None. ``at_target`` (N, K): dz at the
    targets. ``dx`` (accumulate dtype), ``dw`` and ``db`` (any dtype) are overwritten.
    """
    acc = accumulate_dtype(x.dtype)
    n = x.shape[0]
    sums = torch.zeros(n, dtype=acc, device=x.device)
    xs = x.to(acc) if scale is None else x.to(acc) * scale.to(acc)
    if dx is not None:
        dx.zero_()
    for tile in _class_tiles(n, w.shape[0]):
        wt = w[tile].to(acc)
        z = linear_logits(x, w[tile], None if b is None else b[tile], scale, 0.0)
        inside = None if target is None else within(target, tile.start, wt.shape[0])
        if inside is not None:
            z = z.masked_fill(target_mask(inside, n, wt.shape[0]), -torch.inf)
        a = None if weight is None else weight[tile].to(acc)
        value = negative(kind, parameters, z)
        sums += (value if a is None else value * a).sum(1)
        if dx is None and dw is None and db is None:
            continue
        dz = negative_slope(kind, parameters, z)
        dz = dz if a is None else dz * a
        dz = dz if row_factor is None else dz * row_factor.to(acc).unsqueeze(1)
        _add_tile(dx, dw, db, tile, dz, xs, wt, inside, at_target)
    return sums


def binary_losses(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    target: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    negative_factor: Tensor | None,
    loss: Binary,
) -> Tensor:
    """Losses (N,) of `lossops.binary` from all logits at once; differentiable."""
    z = linear_logits(x, w, b, scale, 0.0)
    at = None
    if target is not None:
        at = gather(z, target).masked_fill(target < 0, 0.0)
        z = z.masked_fill(target_mask(target, *z.shape), -torch.inf)
    value = negative(loss.kind, loss.negative_parameters, z)
    sums = (value if weight is None else value * weight).sum(1)
    sums = sums if negative_factor is None else sums * negative_factor
    if at is None or target is None:
        return sums
    factor = positive_factor(target, weight, pos_weight, sums.dtype)
    return sums + (positive(loss, at) * factor).sum(1)


def positive_factor(
    target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """a_j p_j at the target ids, (N, K), 0 where there is none."""
    factor = (target >= 0).to(dtype)
    for vector in (weight, pos_weight):
        if vector is not None:
            factor = factor * vector.to(dtype)[target.clamp_min(0)]
    return factor


def linear_pair_statistics(
    x: Tensor, w: Tensor, scale: Tensor | None, target: Tensor | None
) -> list[Tensor]:
    """Log-sums of the negatives by row and by column, from one sweep; differentiable.

    Returns:
        shift (N,), lse (N,), column shift (V,), column lse (V,), target (N, K); each lse is
        relative to its shift, and the target logits to the shift of the row, -inf where absent.
    """
    acc = accumulate_dtype(x.dtype)
    n, v = x.shape[0], w.shape[0]
    shifts, rows_lse, targets = [], [], []
    top = torch.full((v,), -torch.inf, dtype=acc, device=x.device)
    columns = top
    for rows in row_blocks(n, v, PRODUCT // 8):  # half a dozen temporaries of 2 MiB
        z = linear_logits(x[rows], w, None, scale, 0.0)
        ids = x.new_empty(z.shape[0], 0, dtype=torch.int64) if target is None else target[rows]
        negatives = z.masked_fill(target_mask(ids, *z.shape), -torch.inf)
        m = _finite(negatives.detach().amax(1)) if v else z.new_zeros(z.shape[0])
        shifts.append(m)
        rows_lse.append(logsumexp(negatives - m.unsqueeze(1)))
        targets.append(gather(z - m.unsqueeze(1), ids))
        if not z.shape[0]:
            continue
        raised = torch.maximum(top, negatives.detach().amax(0))
        part = logsumexp((negatives - _finite(raised)).T)
        columns = logaddexp(columns + _finite(top) - _finite(raised), part)
        top = raised
    return [torch.cat(shifts), torch.cat(rows_lse), _finite(top), columns, torch.cat(targets)]


def linear_pair_gradient(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    target: Tensor | None,
    statistics: Sequence[Tensor],
    coefficients: Sequence[Tensor | None],
    dx: Tensor | None,
    dw: Tensor | None,
) -> None:
    """Gradients from the statistics and the coefficients of lse, column lse and target.

    dz_ij = c_i e^{z_ij - lse_i} + h_j e^{z_ij - lse_j} off the targets. ``dx`` (accumulate dtype)
    and ``dw`` (any dtype) are overwritten.
    """
    acc = accumulate_dtype(x.dtype)
    n = x.shape[0]
    shift, lse, column_shift, column_lse, _ = statistics
    by_row, by_column, at_target = coefficients
    xs = x.to(acc) if scale is None else x.to(acc) * scale.to(acc)
    if dx is not None:
        dx.zero_()
    for tile in _class_tiles(n, w.shape[0]):
        wt = w[tile].to(acc)
        z = linear_logits(x, w[tile], None, scale, 0.0)
        dz = torch.zeros_like(z)
        if by_row is not None:
            dz += by_row.unsqueeze(1) * (z - shift.unsqueeze(1) - _floor(lse).unsqueeze(1)).exp()
        if by_column is not None:
            dz += by_column[tile] * (z - column_shift[tile] - _floor(column_lse[tile])).exp()
        inside = None if target is None else within(target, tile.start, wt.shape[0])
        if inside is not None:
            dz = dz.masked_fill(target_mask(inside, *z.shape), 0.0)
        _add_tile(dx, dw, None, tile, dz, xs, wt, inside, at_target)


def _add_tile(
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    tile: slice,
    dz: Tensor,
    xs: Tensor,
    wt: Tensor,
    inside: Tensor | None,
    at_target: Tensor | None,
) -> None:
    """Adds a tile of dz, and the targets in it, to the gradients."""
    if dx is not None:
        dx.addmm_(dz, wt)
    dw_tile = None if dw is None else dz.T @ xs
    db_tile = None if db is None else dz.sum(0)
    if inside is not None and at_target is not None:
        add_targets(dx, dw_tile, db_tile, xs, wt, inside, at_target.to(dz.dtype))
    if dw is not None and dw_tile is not None:
        dw[tile].copy_(dw_tile)
    if db is not None and db_tile is not None:
        db[tile].copy_(db_tile)


def _class_tiles(n: int, v: int) -> Iterator[slice]:
    size = min(TILE, max(256, BLOCK // max(n, 1)))
    for first in range(0, v, size):
        yield slice(first, min(first + size, v))


def _finite(top: Tensor) -> Tensor:
    return torch.where(top.isfinite(), top, 0.0)


def _floor(lse: Tensor) -> Tensor:
    """The log-sum of nothing as 0: its softmax is 0 then, not 0 / 0."""
    return torch.where(lse == -torch.inf, 0.0, lse)
