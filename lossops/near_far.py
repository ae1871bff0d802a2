"""Near and far: the gradient of a head at a fraction of its GEMMs, with an error that is measured.

A trained softmax is peaked: almost all of dz is tiny. What is tiny adds up, so it is not dropped
but kept as sums. Rows are ordered so that a block of 128 consecutive ones is alike; M = dz of the
negatives, times the chain rule of the logit map, targets apart. Per block of rows I and group of
classes J:

    near columns   some |M_ij| > τ g_i in the block:  dx_i += M_ij w_j, dw_j += M_ij x_i, exact
    far columns    M ≈ r uᵀ + v cᵀ - S v uᵀ           r_i = Σ_J M_ij, c_j = Σ_I M_ij, S = Σ_IJ M_ij
                   u_j = Σ_I |M_ij| / Σ_IJ |M_ij|     v_i = Σ_J |M_ij| / Σ_IJ |M_ij|

Row and column sums of M, and with them db, are exact whatever its signs; for a softmax the form is
r cᵀ / S. The forward's GEMM stays whole; of the two of the backward a share of the near columns is
left, and 2 / 128 of them for the far ones. Rows that are alike have small differences x_i - x̄_I,
which is all that a far term loses: it is worth more than the first-order correction of the far
terms by covariances (`docs/near_far.md`).

Rows are tried first: on a sample of them, of the classes and of mixtures of the features the exact
gradient is computed as well. Where the far form is not good the gradient is dense.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lossops.reference import accumulate_dtype
from lossops.schedules import Head
from lossops.statistics import outputs

BLOCK = 128  # rows; 64 and 256 have nearly the same error on a trained model
GROUP = 2048  # classes; of two sweeps also the slab
DEFAULT_THRESHOLD = 2.0**-12

DIRECTIONS, SAMPLE = 8, 1024  # by which rows are found alike, and the rows that give them
FLUSH = 64  # blocks whose far sums are kept at a time: V·4·64 bytes
ROWS = 8192  # rows of a slab of two sweeps


class NearFar(NamedTuple):
    """What a call asks for: τ; an error to choose τ by instead, 0 for none; certificates."""

    threshold: float = 0.0
    target_error: float = 0.0
    certificate: bool = False

    @property
    def on(self) -> bool:
        """Whether any of it is wanted; without either the gradient is dense."""
        return self.threshold > 0 or self.target_error > 0


class NearFarReport(NamedTuple):
    """What became of the gradients of one call, scalars.

    Attributes:
        near_fraction: columns that were near, of those of all blocks of rows.
        far_mass: Σ of the far |dz| over Σ |dz|, targets apart, of the rows that were not dense.
        dense_fraction: rows whose gradient was dense after all.
        error_dx: relative error of dx, the largest that was measured on a sample of a chunk.
        error_dw: likewise of dw.
        error_class: likewise of a class's row of dw relative to itself, for the median class.
        certificate_dx: what the relative error of dx cannot exceed but for rounding; NaN where
            ``near_certificate`` did not ask for it.
        certificate_dw: likewise of dw.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(256, 8, requires_grad=True), torch.randn(500, 8)
        >>> found = lossops.linear_cross_entropy(
        ...     x, w, torch.arange(256), near_threshold="auto", outputs=("near_far",)
        ... )
        >>> found.near_far.dense_fraction  # random logits have no peaks: the exact gradient
        tensor(1.)
    """

    near_fraction: Tensor
    far_mass: Tensor
    dense_fraction: Tensor
    error_dx: Tensor
    error_dw: Tensor
    error_class: Tensor
    certificate_dx: Tensor
    certificate_dw: Tensor


class FarSums(NamedTuple):
    """Sums over far columns; those of |M| are r and c themselves where M has one sign."""

    near: Tensor  # (B, V) bool
    r: Tensor  # (N, G)
    c: Tensor  # (B, V)
    r_abs: Tensor
    c_abs: Tensor

    @property
    def signed(self) -> bool:
        return self.c_abs is not self.c

    @staticmethod
    def of(found: Sequence[Tensor]) -> FarSums:
        """From what a backend's ``far_sums`` returns."""
        near, r, c = found[:3]
        r_abs, c_abs = found[3:] if len(found) > 3 else (r, c)
        return FarSums(near, r, c, r_abs, c_abs)

    @staticmethod
    def cat(parts: Sequence[FarSums]) -> FarSums:
        """The sums of consecutive rows as one."""
        near, r, c, r_abs, c_abs = (torch.cat(t) for t in zip(*parts, strict=True))
        signed = any(p.signed for p in parts)
        return FarSums(near, r, c, *((r_abs, c_abs) if signed else (r, c)))

    def form(self, i: int, rows: slice, g: int, classes: slice) -> Tensor:
        """The far form of block i and group g, M's shape, as it is defined."""
        r, c = self.r[rows, g].unsqueeze(1), self.c[i, classes]
        size = self.c_abs[i, classes].sum()
        inverse = _inverse(size)
        u = self.c_abs[i, classes] * inverse
        v = self.r_abs[rows, g].unsqueeze(1) * inverse
        return r * u + v * (c - c.sum() * u)

    def rows(self, rows: slice) -> FarSums:
        """For dx of some of the rows."""
        r = self.r[rows]
        return self._replace(r=r, r_abs=self.r_abs[rows] if self.signed else r)

    def group(self, g: int) -> FarSums:
        """Those of one group of classes."""
        own, classes = slice(g, g + 1), slice(g * GROUP, (g + 1) * GROUP)
        r, c = self.r[:, own], self.c[:, classes]
        r_abs, c_abs = (self.r_abs[:, own], self.c_abs[:, classes]) if self.signed else (r, c)
        return FarSums(self.near[:, classes], r, c, r_abs, c_abs)


def alike_rows(x: Tensor, block: int = BLOCK) -> Tensor:
    """An order (N,) of the rows of x (N, D) in which blocks of consecutive rows are alike.

    A balanced tree: the rows of a node are split at the median along their direction of largest
    variance, among the leading directions of all rows.
    """
    n, d = x.shape
    if n <= block:
        return torch.arange(n, device=x.device)
    acc = torch.promote_types(x.dtype, torch.float32)
    rows = x[:: -(-n // SAMPLE)].to(acc).nan_to_num(0.0, 0.0, 0.0)
    rows = rows - rows.mean(0)
    start = torch.randn(d, min(DIRECTIONS, d), generator=torch.Generator().manual_seed(0))
    q = start.to(rows)
    for _ in range(2):
        q = torch.linalg.qr(rows.T @ (rows @ q))[0]  # (D, 8)
    points = (x @ q.to(x.dtype)).to(acc).nan_to_num(0.0, 0.0, 0.0)  # (N, 8)

    def split(order: Tensor) -> Iterator[Tensor]:
        count = order.shape[0]
        if count <= block:
            yield order
            return
        part = points[order]
        part = part - part.mean(0)
        covariance = part.T @ part
        v = covariance[:, int(covariance.diagonal().argmax())]
        for _ in range(6):
            v = covariance @ (v / v.norm().clamp_min(1e-30))
        sorted_ = order[(part @ v).argsort(stable=True)]
        half = (-(-count // block) + 1) // 2 * block
        yield from split(sorted_[:half])
        yield from split(sorted_[half:])

    return torch.cat(list(split(torch.arange(n, device=x.device))))


def row_slices(n: int, block: int) -> Iterator[tuple[int, slice]]:
    """The blocks of n rows, numbered."""
    for i, start in enumerate(range(0, n, block)):
        yield i, slice(start, min(start + block, n))


def near_products(
    m: Tensor,
    factor: Tensor,
    near: Tensor,
    xs: Tensor,
    w: Tensor,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    block: int = BLOCK,
) -> float:
    """Add the near columns of M = factor · m (N, V) to dx (N, D), dw (V, D) and db (V,).

    Returns Σ |M| over them.
    """
    mass = 0.0
    for i, rows in row_slices(m.shape[0], block):
        columns = near[i].nonzero().squeeze(1)  # (n,)
        if not columns.shape[0]:
            continue
        # Of the transpose: a selection along the last dim takes a hundred times as long.
        a = m[rows].T.index_select(0, columns) * factor[rows]  # (n, I)
        mass += float(a.abs().sum())
        if dx is not None:
            dx[rows].addmm_(a.T, w.index_select(0, columns).to(a.dtype))
        if dw is not None:
            dw.index_add_(0, columns, a @ xs[rows])
        if db is not None:
            db.index_add_(0, columns, a.sum(1))
    return mass


def far_products(
    far: FarSums,
    xs: Tensor,
    w: Tensor,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    block: int = BLOCK,
) -> None:
    """Add the far columns to dx (N, D), dw (V, D) and db (V,); xs (N, D) has the scale.

    ``far`` may lack rows of its blocks where only dx is wanted.
    """
    n, d = xs.shape
    blocks = far.c.shape[0]
    signed = far.signed
    xb = _padded(xs, blocks, block)  # (B, I, D)
    total = torch.zeros_like(xb) if dx is not None else None
    for g, first in enumerate(range(0, w.shape[0], GROUP)):
        classes = slice(first, first + GROUP)
        r = _padded(far.r[:, g].unsqueeze(1), blocks, block)  # (B, I, 1)
        v = _padded(far.r_abs[:, g].unsqueeze(1), blocks, block) if signed else r
        c, u = far.c[:, classes], far.c_abs[:, classes]  # (B, n)
        size = u.sum(1, keepdim=True)  # (B, 1), Σ |M|
        inverse = _inverse(size)
        net = c.sum(1, keepdim=True)  # S
        if total is not None:
            wg = w[classes].to(c.dtype)
            uw = (u @ wg) * inverse  # (B, D)
            total.baddbmm_(r, uw.unsqueeze(1))
            if signed:
                rest = (c @ wg - net * uw) * inverse
                total.baddbmm_(v, rest.unsqueeze(1))
        if dw is not None:
            vx = torch.bmm(v.transpose(1, 2), xb).squeeze(1) * inverse  # (B, D)
            dw[classes].addmm_(c.T, vx)
            if signed:
                rx = torch.bmm(r.transpose(1, 2), xb).squeeze(1)
                dw[classes].addmm_(u.T, (rx - net * vx) * inverse)
        if db is not None:
            db[classes] += c.sum(0)
    if dx is not None and total is not None:
        dx += total.view(-1, d)[:n]


def _padded(rows: Tensor, blocks: int, block: int) -> Tensor:
    """Rows (N, ...) as (B, I, ...), zeros after the last."""
    missing = blocks * block - rows.shape[0]
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    return rows.reshape(blocks, block, *rows.shape[1:])


class Constants:
    """Terms of dr that are a row's coefficient times a class vector: c_i a_j, all classes.

    Their share of the gradient is a matrix of rank one, exact and without M, where they would spoil
    the far form: dx_i = c_i Σ_j a_j w_j, dw_j = a_j Σ_i c_i x_i, db_j = a_j Σ_i c_i.
    """

    def __init__(self, head: Head) -> None:
        v = head.w.shape[0]
        self.vectors: dict[str, Tensor] = {}  # of an output, (V,)
        self.rows: dict[str, Tensor] = {}  # its coefficients (N,)
        if head.softcap:  # dr = dz (1 - (z / cap)²) is no such product
            return
        acc = accumulate_dtype(head.x.dtype)
        order = outputs(head.names)
        if "average" in order:
            self.vectors["average"] = head.w.new_full((v,), 1 / v, dtype=acc)
        if "weighted_sum" in order and head.class_vector is not None:
            self.vectors["weighted_sum"] = head.class_vector.to(acc)
        for name in self.vectors:
            self.rows[name] = head.x.new_zeros(head.x.shape[0], dtype=acc)

    def take(
        self, names: Sequence[str], coefficients: Sequence[Tensor | None], rows: slice
    ) -> list[Tensor | None]:
        """The other coefficients; these are kept for `add`."""
        rest: list[Tensor | None] = []
        for name, c in zip(outputs(names), coefficients, strict=True):
            if name in self.rows and c is not None:
                self.rows[name][rows] = c
                c = None
            rest.append(c)
        return rest

    def slab(self, classes: slice) -> Constants:
        """Those of some classes."""
        part = copy.copy(self)
        part.vectors = {name: a[classes] for name, a in self.vectors.items()}
        return part

    def add(
        self, xs: Tensor, w: Tensor, dx: Tensor | None, dw: Tensor | None, db: Tensor | None
    ) -> None:
        """Add them to the gradients of all rows and of the classes of w."""
        for name, a in self.vectors.items():
            c = self.rows[name]
            if dx is not None:
                total = sum(
                    (part @ tile.to(a.dtype)
                     for part, tile in zip(a.split(GROUP), w.split(GROUP), strict=True)),
                    dx.new_zeros(dx.shape[1]),
                )  # fmt: skip
                dx.addr_(c, total)
            if dw is not None:
                dw.addr_(a, c @ xs)
            if db is not None:
                db.add_(a * c.sum())


def _inverse(size: Tensor) -> Tensor:
    """1 / size, 0 where that is not finite: so small a sum of absolute values counts as none."""
    inverse = size.reciprocal()
    return torch.where(inverse.isfinite(), inverse, torch.where(size.isfinite(), 0.0, size))
