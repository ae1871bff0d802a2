"""The primitives on x and w for a GPU: products by the vendor's library, a backend's kernels.

A chunk's buffer holds the float32 products r = x wᵀ; scale, bias and softcap are applied where a
kernel reads them. Half-precision inputs multiply as they are, into float32, and dr is rounded to
their dtype in the first half of the buffer's rows:

    bfloat16   dr as it is: the range of float32
    float16    dr · 2^14 / G, G a power of two at or above the largest coefficient of the chunk,
               where |dr| ≤ G; a dr without such a bound stays float32, as do its products

dx, dw and db are float32 before their last rounding. Targets are added apart, in float32, by
segments of a sort.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossops.gpu_layout import Logits, Spec
from lossops.reference import TILE, Coefficients, scaled_rows, target_gradient
from lossops.schedules import HALF_UNIT, power_of_two
from lossops.statistics import is_log_sum, outputs, temperature

SLAB_BYTES = 256 * 2**20  # of float32 products where the caller gives no buffer
# Statistics whose basis is not within [-1, 1].
UNBOUNDED = ("mean", "variance", "moment", "weighted_sum", "teacher")


@dataclass(frozen=True)
class Kernels:
    """What a backend does with products in memory.

    Attributes:
        statistics: (logits, target, class_vector, teacher, names) -> statistics in the order of
            ``outputs(names)``.
        gradient: (logits, spec, out, at_target, unit, first_class, num_classes): dr (N, n) into
            ``out``, of any dtype with dense rows, which may be the memory of the products: a
            half-precision view of the first half of each row is written behind what is read.
            ``logits`` are those of the classes from ``first_class`` on of ``num_classes`` (None for
            n), as are class vector and teacher of ``spec``; its targets are among all classes.
            ``at_target`` (N, K): dr there, 0 where None. ``unit`` (): what dr is multiplied by
            before it is rounded.
        column_sums: (logits, spec, db, accumulate, first_class, num_classes): Σ over rows of dr.
        add_targets: (dx, dw, db, x, scale, w, target, value): the targets' part.
    """

    statistics: Callable[..., list[Tensor]]
    gradient: Callable[..., None]
    column_sums: Callable[..., None]
    add_targets: Callable[..., None]


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out (float32) = a b, or out += a b; half-precision factors are not rounded up first."""
    beta = 1 if accumulate else 0
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif out.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=beta, alpha=1, out=out)
    else:  # the interpreter's device has no such product
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def linear_products(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    buffer: Tensor,
    row_factor: Tensor,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    accumulate: bool,
) -> None:
    """dx, dw and db of dr = row_factor · buffer, a float32 buffer; the targets are the caller's."""
    factor = row_factor.unsqueeze(1)
    acc = buffer.dtype
    xs = factor * scaled_rows(x, scale, acc)
    if dx is not None:
        dx.zero_()
    for c in range(0, w.shape[0], TILE):
        tile = slice(c, c + TILE)
        if dx is not None:
            product(buffer[:, tile], w[tile].to(acc), dx, True)
        if dw is not None:
            product(buffer[:, tile].T, xs, dw[tile], accumulate)
    if dx is not None:
        dx *= factor
    if db is not None:
        db.copy_(row_factor @ buffer + (db if accumulate else 0))


@dataclass(frozen=True)
class LinearPrimitives:
    """The primitives of `lossops.reference` on x and w, by these kernels."""

    kernels: Kernels

    linear_products = staticmethod(linear_products)

    def logits_statistics(
        self,
        z: Tensor,
        target: Tensor | None,
        class_vector: Tensor | None,
        teacher: Tensor | None,
        names: Sequence[str],
    ) -> list[Tensor]:
        """Statistics of existing logits (N, V)."""
        return self.kernels.statistics(Logits(z), target, class_vector, teacher, names)

    def logits_gradient(
        self,
        z: Tensor,
        target: Tensor | None,
        class_vector: Tensor | None,
        teacher: Tensor | None,
        names: Sequence[str],
        statistics: Sequence[Tensor],
        coefficients: Coefficients,
        out: Tensor,
    ) -> None:
        """dz (N, V), targets included, into ``out``, which may be ``z`` itself."""
        spec = Spec(target, class_vector, teacher, names, statistics, coefficients)
        at_target = None if target is None else target_gradient(0.0, z.shape[1], *spec)
        dense = z if z.stride(1) == 1 or z.shape[1] <= 1 else z.contiguous()
        own = out if out.stride(1) == 1 or out.shape[1] <= 1 else torch.empty_like(dense)
        self.kernels.gradient(Logits(dense), spec, own, at_target=at_target)
        if own is not out:
            out.copy_(own)

    def linear_statistics(
        self,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        scale: Tensor | None,
        softcap: float,
        target: Tensor | None,
        class_vector: Tensor | None,
        teacher: Tensor | None,
        names: Sequence[str],
    ) -> list[Tensor]:
        """Statistics straight from x and w, chunk by chunk of rows."""
        n, v = x.shape[0], w.shape[0]
        rows = max(1, min(n, SLAB_BYTES // (4 * max(v, 1))))
        buffer = x.new_empty(min(rows, max(n, 1)), v, dtype=torch.float32)
        parts: list[list[Tensor]] = []
        for start in range(0, max(n, 1), rows):
            some = slice(start, min(start + rows, n))
            chunk = buffer[: some.stop - start]
            parts.append(
                self.linear_chunk_statistics(
                    x[some], w, b, scale, softcap, _at(target, some), class_vector,
                    _at(teacher, some), names, (), chunk,
                )
            )  # fmt: skip
        return parts[0] if len(parts) == 1 else [torch.cat(t) for t in zip(*parts, strict=True)]

    def linear_chunk_statistics(
        self,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        scale: Tensor | None,
        softcap: float,
        target: Tensor | None,
        class_vector: Tensor | None,
        teacher: Tensor | None,
        names: Sequence[str],
        wanted: Sequence[str],
        buffer: Tensor,
    ) -> list[Tensor]:
        """Statistics of a chunk of rows, leaving its products in ``buffer`` (N, V)."""
        if buffer.numel():
            product(x, w.T, buffer)
            if not names:  # the logits themselves
                if scale is not None:
                    buffer *= scale.to(buffer.dtype)
                if b is not None:
                    buffer += b.to(buffer.dtype)
                if softcap:
                    buffer.div_(softcap).tanh_().mul_(softcap)
                return self.kernels.statistics(Logits(buffer), None, None, None, names)
        return self.kernels.statistics(
            Logits(buffer, b, scale, softcap), target, class_vector, teacher, names
        )

    def linear_chunk_gradient(
        self,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        scale: Tensor | None,
        softcap: float,
        target: Tensor | None,
        class_vector: Tensor | None,
        teacher: Tensor | None,
        names: Sequence[str],
        wanted: Sequence[str],
        buffer: Tensor,
        statistics: Sequence[Tensor],
        coefficients: Coefficients,
        dx: Tensor | None,
        dw: Tensor | None,
        db: Tensor | None,
        accumulate: bool,
    ) -> None:
        """Gradients of a chunk from its buffer, which is destroyed."""
        spec = Spec(target, class_vector, teacher, names, statistics, coefficients)
        if not buffer.shape[1]:
            return
        logits = Logits(buffer, b, scale, softcap)
        if db is not None:
            self.kernels.column_sums(logits, spec, db, accumulate)
        dr, factor = self._rounded_gradient(logits, x.dtype, spec)
        products(x, w, scale, dr, factor, dx, dw, accumulate)
        if target is not None:
            at_target = target_gradient(softcap, w.shape[0], *spec)
            self.kernels.add_targets(dx, dw, db, x, scale, w, target, at_target)

    def linear_chunk_negatives(
        self,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        scale: Tensor | None,
        softcap: float,
        target: Tensor | None,
        class_vector: Tensor | None,
        teacher: Tensor | None,
        names: Sequence[str],
        wanted: Sequence[str],
        buffer: Tensor,
        statistics: Sequence[Tensor],
        coefficients: Coefficients,
    ) -> Tensor:
        """The buffer becomes dr of the negatives in float32; the row factor is 1."""
        spec = Spec(target, class_vector, teacher, names, statistics, coefficients)
        self.kernels.gradient(Logits(buffer, b, scale, softcap), spec, buffer)
        return buffer.new_ones(x.shape[0])

    def linear_negatives(
        self,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        scale: Tensor | None,
        softcap: float,
        target: Tensor | None,
        class_vector: Tensor | None,
        teacher: Tensor | None,
        names: Sequence[str],
        statistics: Sequence[Tensor],
        coefficients: Coefficients,
        first: int,
        buffer: Tensor,
    ) -> None:
        """dr of the negatives among the n classes from ``first`` on, into ``buffer`` (N, n)."""
        if not buffer.numel():
            return
        tile = slice(first, first + buffer.shape[1])
        product(x, w[tile].T, buffer)
        spec = Spec(target, class_vector, teacher, names, statistics, coefficients)
        self.kernels.gradient(
            Logits(buffer, _at(b, tile), scale, softcap), _among(spec, tile), buffer,
            first_class=first, num_classes=w.shape[0],
        )  # fmt: skip

    def linear_gradient(
        self,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        scale: Tensor | None,
        softcap: float,
        target: Tensor | None,
        class_vector: Tensor | None,
        teacher: Tensor | None,
        names: Sequence[str],
        statistics: Sequence[Tensor],
        coefficients: Coefficients,
        dx: Tensor | None,
        dw: Tensor | None,
        db: Tensor | None,
    ) -> None:
        """Gradients from statistics alone, by slabs of classes of ``SLAB_BYTES`` of products.

        Each slice of dw and db is one sum over all rows, rounded once.
        """
        v = w.shape[0]
        spec = Spec(target, class_vector, teacher, names, statistics, coefficients)
        at_target = None if target is None else target_gradient(softcap, v, *spec)
        sweep = Sweep(self.kernels.add_targets, x, w, scale, target, at_target, dx, dw, db)
        for tile, buffer in slabs(x, w):
            part = Logits(buffer, _at(b, tile), scale, softcap)
            own = _among(spec, tile)
            db_part = None if db is None else x.new_empty(buffer.shape[1], dtype=torch.float32)
            if db_part is not None:
                self.kernels.column_sums(part, own, db_part, False, tile.start, v)
            dr, factor = self._rounded_gradient(part, x.dtype, own, tile.start, v)
            sweep.add(tile, dr, factor, db_part)
        sweep.finish()

    def _rounded_gradient(
        self,
        logits: Logits,
        dtype: torch.dtype,
        spec: Spec,
        first: int = 0,
        num_classes: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """dr in the memory of the products, and the factor () that it lacks; None for 1."""
        names, coefficients = spec.names, spec.coefficients
        r = logits.r
        out, unit, factor = r, None, None
        bounded = True
        if dtype == torch.float16:
            given = zip(outputs(names), coefficients, strict=True)
            bounded = not any(c is not None and name in UNBOUNDED for name, c in given)
        if dtype in (torch.bfloat16, torch.float16) and bounded and can_pack(r):
            out = r.view(dtype)[:, : r.shape[1]]
            if dtype == torch.float16:
                factor = _power_of_two(names, coefficients, r) / HALF_UNIT
                unit = 1 / factor
        self.kernels.gradient(
            logits, spec, out, unit=unit, first_class=first, num_classes=num_classes
        )
        return out, factor


def slabs(x: Tensor, w: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the classes, and a buffer with their products (N, n), ``SLAB_BYTES`` at most.

    Every slab has the same memory; there is none where there are no rows.
    """
    n, v = x.shape[0], w.shape[0]
    if n == 0:
        return
    size = max(256, SLAB_BYTES // (4 * n) // 256 * 256)
    stride = -(-min(size, v) // 16) * 16
    memory = x.new_empty(n * stride, dtype=torch.float32)
    for first in range(0, v, size):
        tile = slice(first, min(first + size, v))
        buffer = memory.as_strided((n, tile.stop - first), (stride, 1))
        product(x, w[tile].T, buffer)
        yield tile, buffer


class Sweep:
    """Gradients that are filled slab by slab; ``dx`` in float32, dw and db rounded once."""

    def __init__(
        self,
        add_targets: Callable[..., None],
        x: Tensor,
        w: Tensor,
        scale: Tensor | None,
        target: Tensor | None,
        at_target: Tensor | None,
        dx: Tensor | None,
        dw: Tensor | None,
        db: Tensor | None,
    ) -> None:
        self.add_targets = add_targets
        self.x, self.w, self.scale = x, w, scale
        self.target, self.at_target = target, at_target
        self.dx, self.dw, self.db = dx, dw, db
        self.partial = None if dx is None else torch.empty_like(dx)
        if dx is not None:
            dx.zero_()
        if x.shape[0] == 0:
            for t in (dw, db):
                if t is not None:
                    t.zero_()

    def add(self, tile: slice, dr: Tensor, factor: Tensor | None, db_part: Tensor | None) -> None:
        """A slab's factor · dr, and the targets within it."""
        wt = self.w[tile]
        dw_part = None
        if self.dw is not None:
            dw_part = torch.empty(wt.shape, dtype=torch.float32, device=wt.device)
        products(self.x, wt, self.scale, dr, factor, self.partial, dw_part, False)
        if self.target is not None and self.at_target is not None:
            ids = inside(self.target, tile)
            self.add_targets(None, dw_part, db_part, self.x, self.scale, wt, ids, self.at_target)
        if self.dx is not None and self.partial is not None:
            self.dx += self.partial
        if self.dw is not None and dw_part is not None:
            self.dw[tile].copy_(dw_part)
        if self.db is not None and db_part is not None:
            self.db[tile].copy_(db_part)

    def finish(self) -> None:
        """The targets' part of dx."""
        if self.target is not None and self.at_target is not None:
            self.add_targets(
                self.dx, None, None, self.x, self.scale, self.w, self.target, self.at_target
            )


def inside(target: Tensor, tile: slice) -> Tensor:
    """Ids relative to the tile, -1 outside of it."""
    among = (target >= tile.start) & (target < tile.stop)
    return torch.where(among, target - tile.start, -1)


def _among(spec: Spec, tile: slice) -> Spec:
    """The specification of some of the classes."""
    teacher = None if spec.teacher is None else spec.teacher[:, tile]
    return spec._replace(class_vector=_at(spec.class_vector, tile), teacher=teacher)


def can_pack(r: Tensor) -> bool:
    """Whether the rows of a float32 matrix can hold half precision in their first halves."""
    return r.stride(1) == 1 and r.data_ptr() % 16 == 0 and r.stride(0) % 4 == 0


def _power_of_two(names: Sequence[str], coefficients: Coefficients, like: Tensor) -> Tensor:
    """G (), a power of two at or above every row's sum of finite coefficients."""
    total = like.new_zeros(())
    for name, c in zip(outputs(names), coefficients, strict=True):
        if c is not None and name != "target" and c.numel():
            t = temperature(name) if is_log_sum(name) else 1.0
            total = total + t * c.nan_to_num(0.0, 0.0, 0.0).abs().amax()
    return power_of_two(total)


def products(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    dr: Tensor,
    factor: Tensor | None,
    dx: Tensor | None,
    dw: Tensor | None,
    accumulate: bool,
) -> None:
    """dx and dw of factor · dr, whose dtype is that of the products."""
    if dr.dtype != x.dtype:
        linear_products(x, w, scale, dr, dr.new_ones(dr.shape[0]), dx, dw, None, accumulate)
        return
    for_w = factor
    if scale is not None:
        for_w = scale.to(torch.float32) if factor is None else factor * scale.to(torch.float32)
    if dx is not None:
        product(dr, w, dx)
        if factor is not None:
            dx *= factor
    if dw is not None:
        if for_w is None:
            product(dr.T, x, dw, accumulate)
        elif accumulate:
            dw += _scaled_product(dr.T, x, for_w, dw)
        else:
            product(dr.T, x, dw)
            dw *= for_w


def _scaled_product(a: Tensor, b: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    """factor · a b in float32."""
    found = torch.empty_like(like)
    product(a, b, found)
    return found.mul_(factor)


def _at(t: Tensor | None, rows: slice) -> Tensor | None:
    return None if t is None else t[rows]
