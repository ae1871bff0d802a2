"""The two schedules of `lossops.schedules` with near and far gradients. No autograd here.

Rows are taken in the order of `alike_rows`; what is returned is in the caller's.

one sweep    a chunk's buffer becomes M, its near columns go to dx and dw at once, its far sums are
             kept and multiplied out 64 blocks at a time. 1 GEMM and a little.
two sweeps   slabs of classes outside, M computed again: 2 GEMMs and a little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lossops import schedules
from lossops.near_far import (
    BLOCK,
    FLUSH,
    GROUP,
    ROWS,
    Constants,
    FarSums,
    NearFar,
    alike_rows,
    far_products,
    near_products,
)
from lossops.near_far_errors import Certificate, Errors, Probe, Tally, Trial, ratio, too_near
from lossops.reference import accumulate_dtype, add_targets, scaled_rows, target_gradient, within
from lossops.schedules import Gradients, Head, Needs, RowFunction, row_stride
from lossops.statistics import outputs

Coefficients = Sequence[Tensor | None]


def one_sweep(
    head: Head,
    wanted: Sequence[str],
    row_function: RowFunction,
    needs: Needs,
    primitives: Any,
    chunk_rows: int,
    index: Tensor | None,
    near: NearFar,
    scale: Tensor | None,
) -> tuple[Tensor, Gradients, Tensor]:
    """As `schedules.one_sweep`, with near and far gradients.

    Args:
        head, wanted, row_function, needs, primitives, chunk_rows, index: as there.
        near: the threshold, or the error to choose it by.
        scale: g (N,), what a row's dz is held against; None: the largest coefficient of a chunk.

    Returns:
        Losses (N,), gradients, and a report (the values of `NearFarReport`).
    """
    x, w = head.x, head.w
    n, d, v, acc = x.shape[0], x.shape[1], w.shape[0], accumulate_dtype(x.dtype)
    order = alike_rows(x) if index is None else index[alike_rows(x[index])]
    part = head.rows(order)
    own = None if scale is None else scale[order]
    sweep = _Chunks(part, needs, primitives, near)
    losses = x.new_zeros(order.shape[0], dtype=acc)
    size = max(BLOCK, chunk_rows // BLOCK * BLOCK)
    buffer = torch.empty(min(size, order.shape[0]) * row_stride(v), dtype=acc, device=x.device)
    for start in range(0, order.shape[0], size):
        rows = slice(start, min(start + size, order.shape[0]))
        some = part.rows(rows)
        chunk = buffer.as_strided((some.x.shape[0], v), (row_stride(v), 1))
        stats = primitives.linear_chunk_statistics(*some, wanted, chunk)
        losses[rows], coefficients = row_function(stats, order[rows])
        if any(needs):
            rest = sweep.constants.take(some.names, coefficients, rows)
            factor = primitives.linear_chunk_negatives(*some, wanted, chunk, stats, rest)
            g = _largest_coefficient(some.names, rest, some.x) if own is None else own[rows]
            sweep.add(chunk, factor, g, rows, stats, rest)
    sweep.finish()
    found = x.new_zeros(n, dtype=acc)
    found[order] = losses
    dx = dscale = None
    if sweep.dx is not None:
        dscale = (part.x.to(acc) * sweep.dx).sum() if needs.dscale else None
        dx = x.new_zeros(n, d, dtype=acc)
        dx[order] = sweep.dx
    gradients = Gradients(dx if needs.dx else None, sweep.dw, sweep.db, dscale)
    return found, gradients, sweep.report()


def any_one_sweep(
    head: Head,
    wanted: Sequence[str],
    row_function: RowFunction,
    needs: Needs,
    primitives: Any,
    chunk_rows: int,
    index: Tensor | None,
    near: NearFar,
    scale: Tensor | None,
) -> tuple[Tensor, Gradients, Tensor | None]:
    """`one_sweep`, or the dense one without a report where ``near`` is off."""
    call = (head, wanted, row_function, needs, primitives, chunk_rows, index)
    if near.on and any(needs):
        return one_sweep(*call, near, scale)
    return *schedules.one_sweep(*call), None


class _Chunks:
    """The gradients of ordered rows, filled chunk by chunk."""

    def __init__(self, head: Head, needs: Needs, primitives: Any, near: NearFar) -> None:
        self.head, self.primitives = head, primitives
        x, w = head.x, head.w
        acc = accumulate_dtype(x.dtype)
        self.xs = scaled_rows(x, head.scale, acc)  # (N, D)
        wants_dx = needs.dx or needs.dscale
        self.dx = torch.zeros_like(self.xs) if wants_dx else None
        self.dw = w.new_zeros(w.shape, dtype=acc) if needs.dw else None
        self.db = x.new_zeros(w.shape[0], dtype=acc) if needs.db else None
        self.trial = Trial(self.xs, w, primitives, near) if any(needs) else None
        self.constants = Constants(head)
        self.tally = Tally()
        self.certificate = Certificate(self.xs, w) if near.certificate else None
        self.seen = self.refused = 0  # chunks, and those among them whose gradient was dense
        self.kept: list[FarSums] = []
        self.live = False  # whether there is anything in them
        self.flushed = 0  # rows

    def add(
        self,
        m: Tensor,
        factor: Tensor,
        g: Tensor,
        rows: slice,
        statistics: Sequence[Tensor],
        coefficients: Coefficients,
    ) -> None:
        """A chunk of M = factor · m (R, V), whose rows are ``rows``."""
        head = self.head
        dx = None if self.dx is None else self.dx[rows]
        at_target = target = None
        if head.target is not None:
            some = head.rows(rows)
            target = head.target[rows]
            at_target = target_gradient(
                head.softcap, head.w.shape[0], target, head.class_vector, some.teacher,
                head.names, statistics, coefficients,
            )  # fmt: skip
        far = self.split(m, factor, g, rows, target, at_target)
        if far is None:
            blocks = -(-m.shape[0] // BLOCK)
            none = m.new_zeros(blocks, m.shape[1])
            r = m.new_zeros(m.shape[0], -(-m.shape[1] // GROUP))
            far = FarSums.of((none.bool(), r, none))
            self.primitives.linear_products(
                head.x[rows], head.w, head.scale, m, factor, dx, self.dw, self.db, True
            )
        else:
            mass = _near_products(self.primitives)(
                m, factor, far.near, self.xs[rows], head.w, dx, self.dw, self.db, BLOCK
            )
            self.tally.mass += mass
            self.live = True
            if self.certificate is not None:
                self.certificate.add(m, factor, far, rows)
        self.keep(far)
        if target is not None and at_target is not None:
            add_targets(dx, self.dw, self.db, self.xs[rows], head.w, target, at_target)

    def split(
        self,
        m: Tensor,
        factor: Tensor,
        g: Tensor,
        rows: slice,
        target: Tensor | None,
        at_target: Tensor | None,
    ) -> FarSums | None:
        """Far sums of a chunk, or None where its gradient has to be dense.

        After two that had to be, at the start of a call, the others are not tried.
        """
        self.seen += 1
        if self.refused >= 2 and self.refused == self.seen - 1:
            self.refused += 1
            self.tally.dense += m.shape[0]
            self.tally.rows += m.shape[0]
            return None
        assert self.trial is not None
        far, errors = self.trial(m, factor, g, rows, target, at_target)
        if errors is not None:
            self.tally.saw(errors)
        dense = errors is None
        self.tally.add(far, m.shape[0], dense)
        self.refused += dense
        return None if dense else far

    def keep(self, far: FarSums) -> None:
        far_mass = float(far.r_abs.sum())
        self.tally.far_mass += far_mass
        self.tally.mass += far_mass
        self.kept.append(far)
        if sum(f.c.shape[0] for f in self.kept) >= FLUSH:
            self.flush()

    def finish(self) -> None:
        """What is done once for all chunks."""
        self.flush()
        self.constants.add(self.xs, self.head.w, self.dx, self.dw, self.db)

    def report(self) -> Tensor:
        """The values of a `NearFarReport`, once all is done."""
        bounds = (torch.nan, torch.nan)
        if self.certificate is not None:
            bounds = self.certificate.relative(self.dx, self.dw)
        return self.tally.tensor(self.xs, bounds)

    def flush(self) -> None:
        """Multiply out the far sums that are kept."""
        if not self.kept:
            return
        rows = slice(self.flushed, self.flushed + sum(f.r.shape[0] for f in self.kept))
        if self.live:
            dx = None if self.dx is None else self.dx[rows]
            far = FarSums.cat(self.kept)
            far_products(far, self.xs[rows], self.head.w, dx, self.dw, self.db)
        self.flushed, self.kept, self.live = rows.stop, [], False


def _near_products(primitives: Any) -> Callable[..., float]:
    """The backend's own form of `near_products`, where it has one."""
    found: Callable[..., float] = getattr(primitives, "near_products", near_products)
    return found


def _largest_coefficient(names: Sequence[str], coefficients: Coefficients, like: Tensor) -> Tensor:
    """The largest coefficient of a row, for every row (R,)."""
    given = [
        c.abs()
        for name, c in zip(outputs(names), coefficients, strict=True)
        if c is not None and name not in ("target", "average")
    ]
    if not given:
        return like.new_zeros(like.shape[0])
    total = torch.stack(given).sum(0)
    return total.amax().expand_as(total) if total.numel() else total


def two_sweeps_gradient(
    head: Head,
    statistics: Sequence[Tensor],
    coefficients: Coefficients,
    needs: Needs,
    primitives: Any,
    near: NearFar,
) -> Gradients:
    """As `schedules.two_sweeps_gradient`, with near and far gradients."""
    x, w, b = head.x, head.w, head.b
    v, acc = w.shape[0], accumulate_dtype(x.dtype)
    order = alike_rows(x)
    part = head.rows(order)
    stats = [t[order] for t in statistics]
    constants = Constants(part)
    coefs = constants.take(
        head.names, [None if c is None else c[order] for c in coefficients], slice(None)
    )
    g = _largest_coefficient(head.names, coefs, x)
    xs = scaled_rows(part.x, head.scale, acc)  # (N, D)
    at_target = None
    if head.target is not None:
        at_target = target_gradient(
            head.softcap, v, part.target, part.class_vector, part.teacher, head.names, stats, coefs
        )
    trial = Trial(xs, w, primitives, near)
    threshold = _threshold(part, stats, coefs, xs, at_target, g, primitives, trial)
    if threshold is None:
        return schedules.two_sweeps_gradient(head, statistics, coefficients, needs, primitives)
    check = _Check(trial.probe, xs.shape[0])
    total = torch.zeros_like(xs) if needs.dx or needs.dscale else None
    dw = torch.empty_like(w, memory_format=torch.contiguous_format) if needs.dw else None
    db = torch.empty_like(b) if needs.db and b is not None else None
    for first in range(0, v, GROUP):
        classes = slice(first, min(v, first + GROUP))
        ws = w[classes]
        dw_part = ws.new_zeros(ws.shape, dtype=acc) if dw is not None else None
        db_part = ws.new_zeros(ws.shape[0], dtype=acc) if db is not None else None
        for start in range(0, x.shape[0], ROWS):
            rows = slice(start, min(start + ROWS, x.shape[0]))
            _slab(
                part.rows(rows), [t[rows] for t in stats],
                [None if c is None else c[rows] for c in coefs], classes, xs[rows],
                threshold * g[rows], primitives, None if total is None else total[rows],
                dw_part, db_part, check, rows,
            )  # fmt: skip
        constants.slab(classes).add(xs, ws, None, dw_part, db_part)
        if part.target is not None and at_target is not None:
            inside = within(part.target, first, ws.shape[0])
            some = (inside >= 0).any(1).nonzero().squeeze(1)
            add_targets(None, dw_part, db_part, xs[some], ws, inside[some], at_target[some])
        if dw is not None and dw_part is not None:
            dw[classes].copy_(dw_part)
        if db is not None and db_part is not None:
            db[classes].copy_(db_part)
    if not check.good(part.target, at_target, near):
        return schedules.two_sweeps_gradient(head, statistics, coefficients, needs, primitives)
    dx = dscale = None
    if total is not None:
        constants.add(xs, w, total, None, None)
        if part.target is not None and at_target is not None:
            add_targets(total, None, None, xs, w, part.target, at_target)
        dscale = (part.x.to(acc) * total).sum() if needs.dscale else None
        if head.scale is not None:
            total *= head.scale.to(acc)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dx[order] = total.to(x.dtype)
    return Gradients(dx if needs.dx else None, dw, db, dscale)


def _slab(
    head: Head,
    statistics: Sequence[Tensor],
    coefficients: Coefficients,
    classes: slice,
    xs: Tensor,
    limit: Tensor,
    primitives: Any,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    check: _Check,
    rows: slice,
) -> None:
    """Add the negatives of some rows among some classes to dx (N, D), dw (n, D), db (n,)."""
    n, count = head.x.shape[0], classes.stop - classes.start
    stride = row_stride(count)
    m = xs.new_empty(n * stride).as_strided((n, count), (stride, 1))
    primitives.linear_negatives(*head, statistics, coefficients, classes.start, m)
    ones = xs.new_ones(n)
    far = FarSums.of(primitives.far_sums(m, ones, limit, BLOCK, GROUP))
    w = head.w[classes]
    check.add(m, ones, far, rows, classes)
    if too_near(far, ones):
        added = None if dx is None else torch.empty_like(dx)
        primitives.linear_products(head.x, w, head.scale, m, ones, added, dw, db, True)
        if dx is not None and added is not None:
            dx += added
        return
    _near_products(primitives)(m, ones, far.near, xs, w, dx, dw, db, BLOCK)
    far_products(far, xs, w, dx, dw, db)


def _threshold(
    head: Head,
    statistics: Sequence[Tensor],
    coefficients: Coefficients,
    xs: Tensor,
    at_target: Tensor | None,
    g: Tensor,
    primitives: Any,
    trial: Trial,
) -> float | None:
    """The threshold, tried on one block of every 8; None where the gradient has to be dense."""
    v, n = head.w.shape[0], xs.shape[0]
    blocks = -(-n // BLOCK)
    for i in range(min(3, blocks // 2), blocks, 8):
        rows = slice(i * BLOCK, min((i + 1) * BLOCK, n))
        some = head.rows(rows)
        m = xs.new_empty(BLOCK * row_stride(v))
        m = m.as_strided((some.x.shape[0], v), (row_stride(v), 1))
        stats = [t[rows] for t in statistics]
        coefs = [None if c is None else c[rows] for c in coefficients]
        primitives.linear_negatives(*some, stats, coefs, 0, m)
        value = None if at_target is None else at_target[rows]
        ones = xs.new_ones(some.x.shape[0])
        if trial(m, ones, g[rows], rows, some.target, value)[1] is None:
            return None
    return trial.thresholds[0]


class _Check:
    """What came of all blocks, once all slabs are done: the error of dx in some rows of each."""

    def __init__(self, probe: Probe, rows: int) -> None:
        self.probe = probe
        self.off, self.exact = torch.zeros_like(probe.xs), torch.zeros_like(probe.xs)
        self.sampled = torch.zeros(rows, dtype=torch.bool, device=probe.xs.device)

    def add(self, m: Tensor, factor: Tensor, far: FarSums, rows: slice, classes: slice) -> None:
        """One slab of the rows ``rows``; one that is dense has no error worth a look."""
        sample, off, exact = self.probe.dx(m, factor, far, rows, classes)
        self.off[rows][sample] += off
        self.exact[rows][sample] += exact
        self.sampled[rows][sample] = True

    def good(self, target: Tensor | None, at_target: Tensor | None, near: NearFar) -> bool:
        """Whether the gradient can stay; ``at_target`` (N, K) is dr at the targets."""
        some = self.sampled.nonzero().squeeze(1)
        exact = self.exact[some]
        if target is not None and at_target is not None:
            add_targets(
                exact, None, None, self.probe.xs[some], self.probe.w, target[some], at_target[some]
            )
        return Errors(ratio(self.off[some].norm(), exact.norm()), 0.0, 0.0).within(near)
