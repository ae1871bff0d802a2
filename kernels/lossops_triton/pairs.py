"""Kernels of losses over pairs, on slabs of products: `lossops.gpu_pairs` has the sweep."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lossops.gpu_layout import Logits, dense
from lossops_triton.chunk import edges, full_vectors, no_target, scale_of, vectors_from
from lossops_triton.elements import addend, finite, logit_map
from lossops_triton.launch import aligned, misalignment, on
from lossops_triton.statistics import (
    COLUMNS,
    ROWS,
    WARPS,
    Split,
    step,
)

KINDS = {"sigmoid": 0, "hinge": 1, "gumbel": 2, "asymmetric": 3}


@triton.jit
def binary_kernel(
    z_ptr,
    z_stride,
    offset,
    scale_ptr,
    b_ptr,
    target_ptr,
    num_targets,
    a_ptr,
    factor_ptr,
    sums_ptr,
    out_ptr,
    out_stride,
    v,
    p,
    q,
    KIND: tl.constexpr,
    DETACHED: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """Σ a φ(z) over the negatives of a row of z (N, v), and with out factor · a · φ'(z) in (N, v).

    One program a row: it reads each logit once and writes its dz once, or 2 bytes of it.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = z_ptr + row * z_stride
    scale, factor = scale_of(scale_ptr), 1.0
    if factor_ptr is not None:
        factor = tl.load(factor_ptr + row)
    head, whole = full_vectors(row_ptr, offset + row * z_stride, v, VEC, ALIGNED)
    body_ptr = vectors_from(z_ptr, row * z_stride, head, offset, VEC, ALIGNED)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, whole, BLOCK):
        o_vec = start + tl.arange(0, BLOCK)
        m_vec = o_vec < whole
        r = tl.load(body_ptr + o_vec, mask=m_vec, other=0.0)
        value, slope = _pair_terms(
            r, head + o_vec, m_vec, row, scale, b_ptr, target_ptr, num_targets, a_ptr, p, q, KIND,
            DETACHED,
        )  # fmt: skip
        total += value
        if out_ptr is not None:
            if IN_PLACE:
                tl.debug_barrier()  # all of the tile is read before any of it is overwritten
            out_row_ptr = vectors_from(out_ptr, row * out_stride, head, offset, VEC, ALIGNED)
            dz = (slope * factor).to(out_ptr.dtype.element_ty)
            tl.store(out_row_ptr + o_vec, dz, mask=m_vec)
    o_edge, m_edge = edges(head, whole, v, VEC)
    r = tl.load(row_ptr + o_edge, mask=m_edge, other=0.0)
    value, slope = _pair_terms(
        r, o_edge, m_edge, row, scale, b_ptr, target_ptr, num_targets, a_ptr, p, q, KIND, DETACHED
    )
    if out_ptr is not None:
        if IN_PLACE:
            tl.debug_barrier()
        dz = (slope * factor).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * out_stride + o_edge, dz, mask=m_edge)
    tl.store(sums_ptr + row, tl.sum(total, 0) + tl.sum(value, 0))


@triton.jit
def _pair_terms(
    r, o_class, m_class, row, scale, b_ptr, target_ptr, num_targets, a_ptr, p, q,
    KIND: tl.constexpr, DETACHED: tl.constexpr,
):  # fmt: skip
    """a φ(z) and a φ'(z) of products r (n,), 0 where there is no negative."""
    bias = 0.0
    if b_ptr is not None:
        bias = tl.load(b_ptr + o_class, mask=m_class, other=0.0).to(tl.float32)
    z = logit_map(r, scale, bias, 0.0, b_ptr is not None, False)
    value, slope = addend(z, KIND, p, q, DETACHED)
    if a_ptr is not None:
        a = tl.load(a_ptr + o_class, mask=m_class, other=0.0).to(tl.float32)
        value, slope = value * a, slope * a
    m_negative = m_class
    if target_ptr is not None:
        m_negative = no_target(m_class, o_class, target_ptr, row, num_targets)
    return tl.where(m_negative, value, 0.0), tl.where(m_negative, slope, 0.0)


def binary(
    logits: Logits,
    ids: Tensor | None,
    weight: Tensor | None,
    kind: str,
    parameters: list[float],
    row_factor: Tensor | None,
    sums: Tensor,
    out: Tensor | None,
) -> None:
    """Sums (N,) of a slab's products (N, v), and dz into ``out``, the same memory, where given."""
    buffer = logits.r
    p, q, detached = (*parameters, 0.0, 0.0, 0.0)[:3]
    block, warps = step(buffer, kind in ("gumbel", "asymmetric"))
    split = Split.of(buffer, False, block)
    with on(buffer.device):
        binary_kernel[(buffer.shape[0],)](
            buffer, buffer.stride(0), misalignment(buffer), logits.scale, dense(logits.b), ids,
            0 if ids is None else ids.shape[1], dense(weight), dense(row_factor), sums, out,
            0 if out is None else out.stride(0), buffer.shape[1], float(p), float(q),
            KIND=KINDS[kind], DETACHED=bool(detached), BLOCK=split.block, VEC=split.vector,
            ALIGNED=aligned(buffer if out is None else out),
            IN_PLACE=out is not None and out.dtype != buffer.dtype, num_warps=warps,
        )  # fmt: skip


@triton.jit
def pair_columns_kernel(
    z_ptr,
    z_stride,
    scale_ptr,
    target_ptr,
    num_targets,
    shift_ptr,
    lse_ptr,
    n,
    v,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Log-sums (v,) of the negatives of each column of z (N, v), relative to their shifts (v,)."""
    o_class = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_class = o_class < v
    scale = scale_of(scale_ptr)
    top = tl.zeros([BLOCK], tl.float32) - float("inf")
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, ROWS):
        o_row = first + tl.arange(0, ROWS)
        row = tl.minimum(o_row, n - 1).to(tl.int64)[:, None]
        r = tl.load(z_ptr + row * z_stride + o_class[None, :], mask=m_class[None, :], other=0.0)
        m_negative = (o_row < n)[:, None] & m_class[None, :]
        if target_ptr is not None:
            m_negative = no_target(m_negative, o_class[None, :], target_ptr, row, num_targets)
        z = tl.where(m_negative, r * scale, -float("inf"))
        raised = tl.maximum(top, tl.max(z, 0))
        # What had no negatives has nothing to scale: its shift of 0 may be far above all others.
        down = tl.where(top == -float("inf"), 0.0, finite(top) - finite(raised))
        total = total * tl.exp(down) + tl.sum(tl.exp(z - finite(raised)[None, :]), 0)
        top = raised
    tl.store(shift_ptr + o_class, finite(top), mask=m_class)
    tl.store(lse_ptr + o_class, tl.log(total), mask=m_class)


@triton.jit
def pair_gradient_kernel(
    z_ptr,
    z_stride,
    offset,
    scale_ptr,
    target_ptr,
    num_targets,
    row_stats,
    column_stats,
    row_coef_ptr,
    column_coef_ptr,
    out_ptr,
    out_stride,
    v,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """dz of z (N, v) into out: c_i e^{z - lse_i} + h_j e^{z - lse_j}, 0 at the targets.

    row_stats, column_stats: shift and lse of rows (N,) and of columns (v,). One program a row.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr, out_row_ptr = z_ptr + row * z_stride, out_ptr + row * out_stride
    scale = scale_of(scale_ptr)
    head, whole = full_vectors(row_ptr, offset + row * z_stride, v, VEC, ALIGNED)
    body_ptr = vectors_from(z_ptr, row * z_stride, head, offset, VEC, ALIGNED)
    out_body_ptr = vectors_from(out_ptr, row * out_stride, head, offset, VEC, ALIGNED)
    for start in range(0, whole, BLOCK):
        o_vec = start + tl.arange(0, BLOCK)
        m_vec = o_vec < whole
        z = scale * tl.load(body_ptr + o_vec, mask=m_vec, other=0.0)
        dz = _pair_slope(
            z, head + o_vec, m_vec, row, target_ptr, num_targets, row_stats, column_stats,
            row_coef_ptr, column_coef_ptr,
        )  # fmt: skip
        if IN_PLACE:
            tl.debug_barrier()  # all of the tile is read before any of it is overwritten
        tl.store(out_body_ptr + o_vec, dz.to(out_ptr.dtype.element_ty), mask=m_vec)
    o_edge, m_edge = edges(head, whole, v, VEC)
    z = scale * tl.load(row_ptr + o_edge, mask=m_edge, other=0.0)
    dz = _pair_slope(
        z, o_edge, m_edge, row, target_ptr, num_targets, row_stats, column_stats, row_coef_ptr,
        column_coef_ptr,
    )  # fmt: skip
    if IN_PLACE:
        tl.debug_barrier()
    tl.store(out_row_ptr + o_edge, dz.to(out_ptr.dtype.element_ty), mask=m_edge)


@triton.jit
def _pair_slope(
    z, o_class, m_class, row, target_ptr, num_targets, row_stats, column_stats, row_coef_ptr,
    column_coef_ptr,
):  # fmt: skip
    """dz (n,) of logits z (n,) of a row."""
    dz = tl.zeros_like(z)
    if row_coef_ptr is not None:
        lse = tl.load(row_stats[1] + row)
        lse = tl.where(lse == -float("inf"), 0.0, lse)
        dz += tl.load(row_coef_ptr + row) * tl.exp(z - tl.load(row_stats[0] + row) - lse)
    if column_coef_ptr is not None:
        shift = tl.load(column_stats[0] + o_class, mask=m_class, other=0.0)
        lse = tl.load(column_stats[1] + o_class, mask=m_class, other=0.0)
        lse = tl.where(lse == -float("inf"), 0.0, lse)
        h = tl.load(column_coef_ptr + o_class, mask=m_class, other=0.0)
        dz += h * tl.exp(z - shift - lse)
    if target_ptr is not None:
        m_negative = no_target(m_class, o_class, target_ptr, row, num_targets)
        dz = tl.where(m_negative, dz, 0.0)
    return dz


def pair_columns(logits: Logits, ids: Tensor | None, shift: Tensor, lse: Tensor) -> None:
    """Log-sums (v,) of a slab's columns, into ``shift`` and ``lse``."""
    r = logits.r
    n, v = r.shape
    with on(r.device):
        pair_columns_kernel[(triton.cdiv(v, COLUMNS),)](
            r, r.stride(0), logits.scale, ids, 0 if ids is None else ids.shape[1], shift, lse, n, v,
            ROWS=ROWS, BLOCK=COLUMNS, num_warps=4,
        )  # fmt: skip


def pair_gradient(
    logits: Logits,
    ids: Tensor | None,
    row: tuple[Tensor, Tensor, Tensor | None],
    column: tuple[Tensor, Tensor, Tensor | None],
    out: Tensor,
) -> None:
    """dz of a slab's products into ``out``, the same memory."""
    r, split = logits.r, Split.of(logits.r, False)
    with on(r.device):
        pair_gradient_kernel[(r.shape[0],)](
            r, r.stride(0), misalignment(r), logits.scale, ids,
            0 if ids is None else ids.shape[1], row[:2], column[:2], row[2], column[2], out,
            out.stride(0), r.shape[1], BLOCK=split.block, VEC=split.vector,
            ALIGNED=aligned(r, out), IN_PLACE=out.dtype != r.dtype, num_warps=WARPS,
        )  # fmt: skip
