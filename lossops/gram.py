"""Sums over all classes of z and z², from D×D matrices: no logits, whatever the number of classes.

With x̃ = [x, 1] and w̃ = [w, b] where there is a bias, and m = mean_j w̃_j:

    average_n = mean_j z_nj = x̃_n·m                 G = Σ_j (w̃_j - m)(w̃_j - m)ᵀ      (E, E)
    moment_n  = Σ_j (z_nj - average_n)² = x̃_nᵀ G x̃_n
    target_nk = z_n,y_nk - average_n = x̃_n·(w̃_y - m)

and with their gradients g, per row, where the derivatives by m inside G and `target` cancel or add:

    dx̃_n = 2 g_moment G x̃_n + g_average m + Σ_k g_target_k (w̃_y - m)
    dw̃_j = (w̃_j - m) (2 Σ_n g_moment x̃_n x̃_nᵀ) + Σ_n (g_average - Σ_k g_target_k) x̃_n / V
           + Σ_{n,k: y_nk = j} g_target_nk x̃_n

V E² + N E² multiply-adds forward and 2 V E² + 2 N E² backward, for the N E V of every product with
the logits. Row scalars and sums are float64: centring removes a common mean of w, not one direction
that outweighs the others, and the relative error of a moment is at most eps ‖G‖ ‖x̃_n‖² / moment_n.
Rows above the tolerance get a G made in float64, those still above it the moment of their logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lossops.inputs import has_target
from lossops.reference import accumulate_dtype

CLASSES = 1024
"""Classes per product: float32 sums of so many are off by 3e-8, and are added up in float64."""
COLUMNS = 128
"""Columns per product: of the symmetric G only what is left of each diagonal block is made."""
ROWS = 1024
"""Rows of x whose float64 copies exist at a time."""
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Relative error of a moment beyond which a row takes the more exact way."""


class ClassMoments(NamedTuple):
    """Mean (E,) and Gram matrix (E, E) of the centred classes, in the wide dtype."""

    mean: Tensor
    gram: Tensor


class Statistics(NamedTuple):
    """Of each row, in the wide dtype: centred target (N, K), 0 where there is none, and moments."""

    target: Tensor
    average: Tensor  # (N,)
    moment: Tensor  # (N,)


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def class_moments(w: Tensor, b: Tensor | None, dtype: torch.dtype) -> ClassMoments:
    """Mean and centred Gram matrix of the classes, products in ``dtype``, sums in the wide one."""
    wide = wide_dtype(w.device)
    mean = extended(class_sum(w), None if b is None else class_sum(b)) / w.shape[0]
    e = mean.shape[0]
    gram = torch.zeros(e, e, dtype=wide, device=w.device)
    for _, part in centred_blocks(w, b, mean.to(dtype)):
        for start in range(0, e, COLUMNS):
            stop = min(start + COLUMNS, e)
            gram[start:stop, :stop] += part[:, start:stop].T @ part[:, :stop]
    return ClassMoments(mean, gram.tril() + gram.tril(-1).T)


def class_sum(w: Tensor) -> Tensor:
    """Σ_j w_j in the wide dtype, float32 within a block: fifteen times as fast as ``dtype=``."""
    acc, wide = accumulate_dtype(w.dtype), wide_dtype(w.device)
    return torch.stack([part.sum(0, dtype=acc).to(wide) for part in w.split(CLASSES)]).sum(0)


def centred_blocks(
    w: Tensor, b: Tensor | None, mean: Tensor, size: int = CLASSES
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of classes with [w, b] - mean, (B, E) in the dtype of ``mean``, in reused memory."""
    v, d = w.shape
    scratch = mean.new_empty(min(size, v), mean.shape[0])
    for start in range(0, v, size):
        rows = slice(start, min(start + size, v))
        part = scratch[: rows.stop - start]
        torch.sub(w[rows], mean[:d], out=part[:, :d])
        if b is not None:
            torch.sub(b[rows], mean[d : d + 1], out=part[:, d])  # mean[d] would not widen b
        yield rows, part


def extended(x: Tensor, last: Tensor | None) -> Tensor:
    """``x`` (..., D) with one more feature, (...,); ``x`` itself where there is none."""
    return x if last is None else torch.cat([x, last.unsqueeze(-1)], -1)


def rows_of(x: Tensor, b: Tensor | None, dtype: torch.dtype, ids: Tensor | None = None) -> Tensor:
    """x̃ in ``dtype``; 0 for rows that ``ids`` (N, K) ignore, where a NaN must reach no gradient."""
    x = x.to(dtype)
    if ids is not None:
        x = x.masked_fill(~has_target(ids).unsqueeze(1), 0.0)
    return extended(x, None if b is None else x.new_ones(x.shape[:-1]))


def gathered(w: Tensor, b: Tensor | None, ids: Tensor, mean: Tensor) -> Tensor:
    """w̃_y - m, (N, K, E) in the dtype of ``mean``; that of class 0 where the id is -1."""
    ids = ids.clamp_min(0)
    found = extended(w[ids], None if b is None else b[ids])
    return found.to(mean.dtype) - mean


def statistics(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor
) -> tuple[Statistics, ClassMoments]:
    """Row statistics of x (N, D), and the class moments they came from."""
    wide, product = wide_dtype(x.device), accumulate_dtype(x.dtype)
    # Whether a row needs more than float32 products shows only in the values: reading them would
    # stall a device, so there all products are made in float64 from the start.
    checks = x.device.type == "cpu"
    moments = class_moments(w, b, product if checks else wide)
    found = row_statistics(x, w, b, target, moments)
    if not checks:
        return found, moments
    tolerance, counted = TOLERANCE[product], has_target(target)
    unsure = uncertain_rows(x, b, found, moments, product, tolerance)
    if product != wide and (unsure & counted).any():
        moments = class_moments(w, b, wide)
        found = row_statistics(x, w, b, target, moments)
    unsure = uncertain_rows(x, b, found, moments, wide, tolerance)
    for rows in (unsure & counted).nonzero().squeeze(1).split(ROWS):
        if len(rows):
            found.moment[rows] = swept_moments(rows_of(x[rows], b, wide), w, b, moments.mean)
    return found, moments


def row_statistics(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, moments: ClassMoments
) -> Statistics:
    """Target, average and moment of each row; differentiable."""
    mean, gram = moments
    parts = []
    for part, ids in zip(x.split(ROWS), target.split(ROWS), strict=True):
        rows = rows_of(part, b, mean.dtype, ids)  # (R, E)
        own = (gathered(w, b, ids, mean) * rows.unsqueeze(1)).sum(2).masked_fill(ids < 0, 0.0)
        parts.append(Statistics(own, rows @ mean, ((rows @ gram) * rows).sum(1)))
    return Statistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def uncertain_rows(
    x: Tensor,
    b: Tensor | None,
    found: Statistics,
    moments: ClassMoments,
    product: torch.dtype,
    tolerance: float,
) -> Tensor:
    """Which moments may be off by more than ``tolerance``, (N,), products made in ``product``."""
    norms = torch.linalg.vector_norm(x, dim=1, dtype=found.moment.dtype)
    squares = norms.square() + (0.0 if b is None else 1.0)
    error = torch.finfo(product).eps / 2 * torch.linalg.matrix_norm(moments.gram) * squares
    above: Tensor = error > tolerance * found.moment
    return above


def swept_moments(rows: Tensor, w: Tensor, b: Tensor | None, mean: Tensor) -> Tensor:
    """Σ_j (z_j - average)² of x̃ (R, E) from the logits themselves."""
    total = rows.new_zeros(rows.shape[0])
    for _, part in centred_blocks(w, b, mean):
        total += (rows @ part.T).square().sum(1)
    return total


def gradient(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    moments: ClassMoments,
    given: Statistics,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dw and db, in the dtypes of x, w and b, for the gradients ``given`` of the statistics."""
    mean, gram = moments
    d, v, e = x.shape[1], w.shape[0], mean.shape[0]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    second = mean.new_zeros(e, e)  # Σ g_moment x̃ x̃ᵀ
    common = mean.new_zeros(e)  # Σ (g_average - Σ_k g_target) x̃
    pulls = []  # g_target x̃ of each target, (R, K, E)
    for start in range(0, x.shape[0], ROWS):
        part = slice(start, start + ROWS)
        ids = target[part]
        rows = rows_of(x[part], b, mean.dtype, ids)  # (R, E)
        pull = given.target[part].masked_fill(ids < 0, 0.0)  # (R, K)
        scaled = rows * (2 * given.moment[part]).unsqueeze(1)
        if dx is not None:
            own = (gathered(w, b, ids, mean) * pull.unsqueeze(2)).sum(1)
            back = own.addmm_(scaled, gram) + given.average[part].unsqueeze(1) * mean
            dx[part] = back[:, :d]
        if needs[1] or needs[2]:
            second += rows.T @ scaled
            common += (given.average[part] - pull.sum(1)) @ rows
            pulls.append((pull.unsqueeze(2) * rows.unsqueeze(1)).to(accumulate_dtype(w.dtype)))
    if not (needs[1] or needs[2]):
        return dx, None, None
    acc = accumulate_dtype(w.dtype)
    dw = torch.empty(v, d, dtype=acc, device=w.device) if needs[1] else None
    db = torch.empty(v, dtype=acc, device=w.device) if needs[2] else None
    shift, second = (common / v).to(acc), second.to(acc)
    for block, classes in centred_blocks(w, b, mean.to(acc)):
        if dw is not None:
            torch.addmm(shift[:d], classes, second[:, :d], out=dw[block])
        if db is not None:
            torch.addmv(shift[d].expand(len(classes)), classes, second[:, d], out=db[block])
    own = torch.cat(pulls) if pulls else second.new_zeros(0, 1, e)
    ids = target.clamp_min(0).flatten()  # what has no target pulls class 0 by 0
    if dw is not None:
        dw.index_put_((ids,), own[..., :d].flatten(0, 1), accumulate=True)
    if db is not None:
        db.index_put_((ids,), own[..., d].flatten(), accumulate=True)
    return (
        dx,
        None if dw is None else dw.to(w.dtype),
        None if db is None or b is None else db.to(b.dtype),
    )


def reference_statistics(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same statistics in plain differentiable PyTorch, for second derivatives."""
    wide = wide_dtype(x.device)
    classes = extended(w.to(wide), None if b is None else b.to(wide))  # (V, E)
    mean = classes.mean(0)
    centred = classes - mean
    rows = rows_of(x, b, wide, target)
    own = (centred[target.clamp_min(0)] * rows.unsqueeze(1)).sum(2).masked_fill(target < 0, 0.0)
    return own, rows @ mean, ((rows @ (centred.T @ centred)) * rows).sum(1)
