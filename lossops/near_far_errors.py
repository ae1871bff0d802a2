"""How good the far form of some rows is: measured on a sample, and bounded.

trial        the exact gradient in some features: of some rows for dx, some classes for dw
certificate  ΔM = M - far form of a block I and a group J has no row and no column sums, so
             |error of dx_I| <= Σ_J |ΔM_IJ| σ(w_J - w̄_J)
             |error of dw_J| <= Σ_I |ΔM_IJ| σ(x_I - x̄_I)
             in Frobenius norms, σ an upper bound of the largest singular value
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lossops.near_far import (
    BLOCK,
    GROUP,
    FarSums,
    NearFar,
    far_products,
    near_products,
    row_slices,
)
from lossops.reference import accumulate_dtype, add_targets, within

THRESHOLDS = tuple(2.0**-k for k in range(8, 16))  # what near_target_error chooses among

# Above this share of near columns the dense products are as fast.
MAX_NEAR = 0.3
# The errors of a trial at which the gradient is dense: relative to the norms of dx and dw, and for
# the median class to its own. Chunks of 512 rows of a trained model have at most 0.004, 0.0005 and
# 0.09; of random logits with standard deviation 0.6: 0.019, 0.0015 and 0.5.
MAX_ERROR, MAX_CLASS_ERROR = 0.01, 0.25
PROBE = 16  # mixtures of features that a trial looks at


class Errors(NamedTuple):
    """Of a trial: relative to the norms of dx and dw, and of the median class to its own."""

    dx: float
    dw: float
    median_class: float

    def within(self, near: NearFar) -> bool:
        """Whether they are small enough; NaN is not."""
        if not all(map(math.isfinite, self)):
            return False
        if near.target_error:
            return max(self.dx, self.dw) <= near.target_error
        return max(self.dx, self.dw) <= MAX_ERROR and self.median_class <= MAX_CLASS_ERROR


class Probe:
    """A few random mixtures of the features of x and w, on which the exact gradient is cheap.

    A norm of a gradient of the mixtures is, up to a factor, that of the gradient itself.
    """

    def __init__(self, xs: Tensor, w: Tensor) -> None:
        d = w.shape[1]
        mix = torch.randn(d, min(PROBE, d), generator=torch.Generator().manual_seed(0)).to(xs)
        self.xs = xs @ mix  # (N, P)
        self.w = torch.cat([part.to(xs.dtype) @ mix for part in w.split(GROUP)])  # (V, P)

    def dx(
        self, m: Tensor, factor: Tensor, far: FarSums, rows: slice, classes: slice
    ) -> tuple[slice, Tensor, Tensor]:
        """Some of the rows, and there off and exact dx of M = factor · m (R, n), targets apart."""
        step = min(_step(m), BLOCK)
        sample = slice(None, None, step)
        w = self.w[classes]
        dx = torch.zeros_like(self.xs[rows][sample])
        into = (self.xs[rows][sample], w, dx, None, None, BLOCK // step)
        near_products(m[sample], factor[sample], far.near, *into)
        far_products(far.rows(sample), *into)
        exact = (m[sample] @ w) * factor[sample].unsqueeze(1)
        return sample, dx - exact, exact

    def errors(
        self,
        m: Tensor,
        factor: Tensor,
        far: FarSums,
        rows: slice,
        target: Tensor | None,
        at_target: Tensor | None,
    ) -> Errors:
        """Of the far form of M = factor · m (R, V), whose rows are ``rows`` of all.

        dx is looked at in some rows of each block, dw in some groups of the classes, so many that
        either costs what 128 rows do. ``at_target`` (R, K) is dr at the targets.
        """
        step, xs = _step(m), self.xs[rows]
        sample, off_dx, exact_dx = self.dx(m, factor, far, rows, slice(None))
        if target is not None and at_target is not None:
            add_targets(exact_dx, None, None, xs[sample], self.w, target[sample], at_target[sample])
        off_dw, exact_dw = [], []
        groups = far.r.shape[1]
        for g in range(min(step, groups) // 2, groups, step):
            classes = slice(g * GROUP, min((g + 1) * GROUP, m.shape[1]))
            own, w = far.group(g), self.w[classes]
            dw = torch.zeros_like(w)
            near_products(m[:, classes], factor, own.near, xs, w, None, dw, None)
            far_products(own, xs, w, None, dw, None)
            exact = m[:, classes].T @ (xs * factor.unsqueeze(1))
            off_dw.append(dw - exact)
            if target is not None and at_target is not None:
                inside = within(target, classes.start, w.shape[0])
                add_targets(None, exact, None, xs, w, inside, at_target)
            exact_dw.append(exact)
        off, whole = torch.cat(off_dw), torch.cat(exact_dw)  # (n, P)
        size = whole.norm(dim=1)
        by_class = off.norm(dim=1) / torch.where(size == 0, torch.inf, size)
        return Errors(
            ratio(off_dx.norm(), exact_dx.norm()),
            ratio(off.norm(), whole.norm()),
            float(by_class.nanmedian()),
        )


def _step(m: Tensor) -> int:
    """One row, or one group, of so many is looked at: a power of two."""
    return 1 << max(0, (m.shape[0] // BLOCK).bit_length() - 1)


def ratio(part: Tensor, whole: Tensor) -> float:
    """part / whole, 0 for 0 / 0."""
    return float(part / whole) if float(whole) else float(part > 0)


class Trial:
    """Finds out whether the far form of some rows is good, and at which threshold."""

    def __init__(self, xs: Tensor, w: Tensor, primitives: Any, near: NearFar) -> None:
        self.probe, self.primitives, self.near = Probe(xs, w), primitives, near
        self.thresholds = THRESHOLDS if near.target_error else (near.threshold,)

    def __call__(
        self,
        m: Tensor,
        factor: Tensor,
        g: Tensor,
        rows: slice,
        target: Tensor | None,
        at_target: Tensor | None,
    ) -> tuple[FarSums, Errors | None]:
        """Far sums of M = factor · m and their errors, None where the gradient has to be dense.

        Of several thresholds the first that is good is taken; later rows start from there.
        """
        for i, threshold in enumerate(self.thresholds):
            limit = threshold * g
            far = FarSums.of(self.primitives.far_sums(m, factor, limit, BLOCK, GROUP))
            if too_near(far, factor):
                break
            errors = self.probe.errors(m, factor, far, rows, target, at_target)
            if errors.within(self.near):
                self.thresholds = self.thresholds[i:]
                return far, errors
        return far, None


def too_near(far: FarSums, factor: Tensor) -> bool:
    """Whether too much is near, or something is not finite, which would spread over a block."""
    if float(far.near.sum()) > MAX_NEAR * far.near.numel():
        return True
    return not bool(factor.isfinite().all() and far.r_abs.isfinite().all())


class Certificate:
    """Bounds of the errors of dx and dw, as chunks go by. Takes a pass over M and V·D² products."""

    def __init__(self, xs: Tensor, w: Tensor) -> None:
        groups = [w[first : first + GROUP].to(xs.dtype) for first in range(0, w.shape[0], GROUP)]
        blocks = [xs[rows] for _, rows in row_slices(len(xs), BLOCK)]
        none = xs.new_zeros(0)
        self.spread_w = torch.stack([spread(g) for g in groups]) if groups else none  # (G,)
        self.spread_x = torch.stack([spread(x) for x in blocks]) if blocks else none
        self.dx = xs.new_zeros(())  # squared
        self.dw = torch.zeros_like(self.spread_w)  # by group

    def add(self, m: Tensor, factor: Tensor, far: FarSums, rows: slice) -> None:
        """The rows ``rows`` of all, M = factor · m (R, V)."""
        for i, part in row_slices(m.shape[0], BLOCK):
            norms = []
            for g, first in enumerate(range(0, m.shape[1], GROUP)):
                classes = slice(first, first + GROUP)
                off = m[part, classes] * factor[part].unsqueeze(1)
                off = off.masked_fill(far.near[i, classes], 0.0) - far.form(i, part, g, classes)
                norms.append(off.norm())
            e = torch.stack(norms)  # (G,)
            self.dx += (e @ self.spread_w).square()
            self.dw += e * self.spread_x[rows.start // BLOCK + i]

    def relative(self, dx: Tensor | None, dw: Tensor | None) -> tuple[float, float]:
        """The bounds over the norms of the gradients, NaN for one that is not wanted."""
        x = torch.nan if dx is None else ratio(self.dx.sqrt(), dx.norm())
        return x, torch.nan if dw is None else ratio(self.dw.norm(), dw.norm())


def spread(rows: Tensor) -> Tensor:
    """An upper bound of the largest singular value of rows (n, D) less their mean.

    σ⁸ <= Σ σ_k⁸ = |G²|² with the Gram matrix G: at most 8 % too large for 2 equal values, 2.4 times
    for 1024.
    """
    a = rows - rows.mean(0)
    size = a.abs().amax()  # σ⁸ of what is tiny or huge is out of range
    a = a / torch.where(size == 0, 1.0, size)
    gram = a @ a.T if a.shape[0] < a.shape[1] else a.T @ a
    bound: Tensor = (gram @ gram).norm().pow(0.25)
    return bound * size * (1 + 1e-4)  # more than the rounding of it


class Tally:
    """Counts of a call, for its report."""

    def __init__(self) -> None:
        self.near = self.columns = self.dense = self.rows = 0.0
        self.far_mass = self.mass = 0.0
        self.errors = Errors(0.0, 0.0, 0.0)

    def add(self, far: FarSums, rows: int, dense: bool) -> None:
        self.near += float(far.near.sum())
        self.columns += far.near.numel()
        self.rows += rows
        self.dense += rows * dense

    def saw(self, errors: Errors) -> None:
        self.errors = Errors(*(max(a, b) for a, b in zip(self.errors, errors, strict=True)))

    def tensor(self, like: Tensor, certificates: tuple[float, float]) -> Tensor:
        """The values of a `NearFarReport`."""
        report = (
            self.near / max(self.columns, 1.0),
            self.far_mass / self.mass if self.mass else 0.0,
            self.dense / max(self.rows, 1.0),
            *self.errors,
            *certificates,
        )
        return torch.tensor(report, dtype=accumulate_dtype(like.dtype), device=like.device)
