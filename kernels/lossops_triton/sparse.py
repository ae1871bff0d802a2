"""Near and far parts of a gradient: sums of what is far, products of what is near.

    far sums        one read of M; a program has a block of rows and a group of classes
    near products   a program owns a tile of dx, or of rows of dw, and takes the near columns that
                    it needs from lists: dx those of its block, dw its classes in every block where
                    one of them is near

No atomics: every element of every output has one owner, and its terms one order. Products are
float32 as they are (no TF32): of M they multiply less than a hundredth. Making the lists waits for
the device once a chunk, as the trials of near and far do anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lossops.gpu_layout import dense_rows
from lossops_triton.launch import float32_precision, on

CLASSES = 64  # of a step of far sums
# Of steps and tiles of near products: two programs a multiprocessor, no spills.
NEAR_CLASSES = 32
DX_FEATURES, DW_FEATURES = 32, 64


@triton.jit
def far_sums_kernel(
    m_ptr,
    m_stride,
    factor_ptr,
    limit_ptr,
    near_ptr,
    r_ptr,
    r_abs_ptr,
    c_ptr,
    c_abs_ptr,
    n,
    v,
    groups,
    block,
    group,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Grid (B, G). M = factor · m (N, V) -> near (B, V) int8, r (N, G), c (B, V), and of |M|."""
    i = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    o_row = i * block + tl.arange(0, ROWS)
    m_row = (tl.arange(0, ROWS) < block) & (o_row < n)
    factor = tl.load(factor_ptr + o_row, mask=m_row, other=0.0)[:, None]
    limit = tl.load(limit_ptr + o_row, mask=m_row, other=0.0)[:, None]
    r = tl.zeros([ROWS], tl.float32)
    r_abs = tl.zeros([ROWS], tl.float32)
    last = tl.minimum((g + 1) * group, v)
    for first in range(g * group, last, CLASSES):
        o_class = first + tl.arange(0, CLASSES)
        m_class = o_class < last
        both = m_row[:, None] & m_class[None, :]
        m = factor * tl.load(
            m_ptr + o_row[:, None] * m_stride + o_class[None, :], mask=both, other=0.0
        )
        over = tl.where(tl.abs(m) > limit, 1, 0)
        is_near = tl.max(tl.where(both, over, 0), 0)
        far = tl.where((is_near == 0)[None, :], m, 0.0)
        size = tl.abs(far)
        o_c = i * v + o_class
        tl.store(near_ptr + o_c, is_near.to(tl.int8), mask=m_class)
        tl.store(c_ptr + o_c, tl.sum(far, 0), mask=m_class)
        tl.store(c_abs_ptr + o_c, tl.sum(size, 0), mask=m_class)
        r += tl.sum(far, 1)
        r_abs += tl.sum(size, 1)
    tl.store(r_ptr + o_row * groups + g, r, mask=m_row)
    tl.store(r_abs_ptr + o_row * groups + g, r_abs, mask=m_row)


@triton.jit
def near_dx_kernel(
    m_ptr,
    m_stride,
    factor_ptr,
    ids_ptr,
    ends_ptr,
    w_ptr,
    w_stride,
    dx_ptr,
    dx_stride,
    mass_ptr,
    n,
    d,
    block,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (B, D tiles). dx (N, D) += near M · w of the block's ids; mass (B,) = Σ near |M|.

    ``ids``: near classes block after block, those of block i before ``ends[i]``.
    """
    i = tl.program_id(0).to(tl.int64)
    o_row = i * block + tl.arange(0, ROWS)
    m_row = (tl.arange(0, ROWS) < block) & (o_row < n)
    o_feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    m_feature = o_feature < d
    factor = tl.load(factor_ptr + o_row, mask=m_row, other=0.0)[:, None]
    first = tl.load(ends_ptr + i - 1, mask=i > 0, other=0)
    last = tl.load(ends_ptr + i)
    total = tl.zeros([ROWS, FEATURES], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for k in range(first, last, CLASSES):
        o_id = k + tl.arange(0, CLASSES)
        m_id = o_id < last
        ids = tl.load(ids_ptr + o_id, mask=m_id, other=0)
        a = factor * tl.load(
            m_ptr + o_row[:, None] * m_stride + ids[None, :],
            mask=m_row[:, None] & m_id[None, :], other=0.0,
        )  # fmt: skip
        b_w = tl.load(
            w_ptr + ids[:, None] * w_stride + o_feature[None, :],
            mask=m_id[:, None] & m_feature[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(a, b_w.to(tl.float32), total, input_precision=PRECISION)
        mass += tl.sum(tl.abs(a), 1)
    if dx_ptr is not None:
        dx_ptrs = dx_ptr + o_row[:, None] * dx_stride + o_feature[None, :]
        own = m_row[:, None] & m_feature[None, :]
        tl.store(dx_ptrs, tl.load(dx_ptrs, mask=own, other=0.0) + total, mask=own)
    if tl.program_id(1) == 0:
        tl.store(mass_ptr + i, tl.sum(mass, 0))


@triton.jit
def near_dw_kernel(
    m_ptr,
    m_stride,
    factor_ptr,
    near_ptr,
    ids_ptr,
    x_ptr,
    x_stride,
    dw_ptr,
    dw_stride,
    db_ptr,
    n,
    v,
    d,
    count,
    blocks,
    block,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (id tiles, D tiles). dw (V, D) and db (V,) += near Mᵀ · x, of ``count`` ids."""
    o_id = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    m_id = o_id < count
    ids = tl.load(ids_ptr + o_id, mask=m_id, other=0)
    o_feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    m_feature = o_feature < d
    total = tl.zeros([CLASSES, FEATURES], tl.float32)
    column = tl.zeros([CLASSES], tl.float32)
    for j in range(blocks):
        i = tl.cast(j, tl.int64)
        is_near = tl.load(near_ptr + i * v + ids, mask=m_id, other=0) != 0
        if tl.max(is_near.to(tl.int32), 0) > 0:
            o_row = i * block + tl.arange(0, ROWS)
            m_row = (tl.arange(0, ROWS) < block) & (o_row < n)
            factor = tl.load(factor_ptr + o_row, mask=m_row, other=0.0)[None, :]
            a = factor * tl.load(
                m_ptr + o_row[None, :] * m_stride + ids[:, None],
                mask=m_row[None, :] & is_near[:, None], other=0.0,
            )  # fmt: skip
            b_x = tl.load(
                x_ptr + o_row[:, None] * x_stride + o_feature[None, :],
                mask=m_row[:, None] & m_feature[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(a, b_x.to(tl.float32), total, input_precision=PRECISION)
            column += tl.sum(a, 1)
    if dw_ptr is not None:
        dw_ptrs = dw_ptr + ids[:, None] * dw_stride + o_feature[None, :]
        own = m_id[:, None] & m_feature[None, :]
        tl.store(dw_ptrs, tl.load(dw_ptrs, mask=own, other=0.0) + total, mask=own)
    if db_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(db_ptr + ids, tl.load(db_ptr + ids, mask=m_id, other=0.0) + column, mask=m_id)


def far_sums(
    buffer: Tensor, row_factor: Tensor, limit: Tensor, block: int, group: int
) -> list[Tensor]:
    """As `lossops.reference.far_sums`; waits for the device to know whether M has both signs."""
    n, v = buffer.shape
    m = dense_rows(buffer)
    blocks, groups = triton.cdiv(n, block), triton.cdiv(v, group)
    near = m.new_empty(blocks, v, dtype=torch.int8)
    r, r_abs = m.new_empty(n, groups), m.new_empty(n, groups)
    c, c_abs = m.new_empty(blocks, v), m.new_empty(blocks, v)
    if n and v:
        with on(m.device):
            far_sums_kernel[(blocks, groups)](
                m, m.stride(0), row_factor.contiguous(), limit.contiguous(), near, r, r_abs, c,
                c_abs, n, v, groups, block, group, ROWS=_rows(block), CLASSES=CLASSES, num_warps=8,
            )  # fmt: skip
    both_signs = bool((r != r_abs).any())
    return [near.bool(), r, c, *([r_abs, c_abs] if both_signs else [])]


def near_products(
    m: Tensor,
    factor: Tensor,
    near: Tensor,
    xs: Tensor,
    w: Tensor,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    block: int,
) -> float:
    """As `lossops.near_far.near_products`: near columns of factor · m (N, V) to dx, dw and db."""
    n, v = m.shape
    d = xs.shape[1]
    m, xs, w, factor = dense_rows(m), dense_rows(xs), dense_rows(w), factor.contiguous()
    flags = near.contiguous().view(torch.int8)
    ids = near.nonzero()[:, 1].contiguous()
    if not ids.shape[0]:
        return 0.0
    ends = near.sum(1).cumsum(0)
    mass = m.new_empty(near.shape[0])
    sizes = {"ROWS": _rows(block), "CLASSES": NEAR_CLASSES, "num_warps": 8}
    tiles = 1 if dx is None else triton.cdiv(d, DX_FEATURES)
    with on(m.device):
        sizes["PRECISION"] = float32_precision()
        near_dx_kernel[(near.shape[0], tiles)](
            m, m.stride(0), factor, ids, ends, w, w.stride(0), dx,
            0 if dx is None else dx.stride(0), mass, n, d, block, FEATURES=DX_FEATURES, **sizes,
        )  # fmt: skip
        if dw is not None or db is not None:
            union = near.any(0).nonzero().squeeze(1)
            tiles = 1 if dw is None else triton.cdiv(d, DW_FEATURES)
            near_dw_kernel[(triton.cdiv(union.shape[0], NEAR_CLASSES), tiles)](
                m, m.stride(0), factor, flags, union, xs, xs.stride(0), dw,
                0 if dw is None else dw.stride(0), db, n, v, d, union.shape[0], near.shape[0],
                block, FEATURES=DW_FEATURES, **sizes,
            )  # fmt: skip
    return float(mass.sum())


def _rows(block: int) -> int:
    return max(16, triton.next_power_of_2(block))
