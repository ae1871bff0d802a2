"""Losses over pairs that are sums of single logits: the sigmoid sweep with both gradients.

Slabs of classes: products into float32, then one kernel takes the sums of a row's negatives and
leaves dz in their place, then the two products of the gradients. 3 GEMMs; each logit is read once
and its dz written once. Row and column log-sums together (`linear_pair_*`) are PyTorch's own
operations on blocks: lossops/reference_pairs.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lossops_triton.chunk import edges, full_vectors, no_target, scale_of, vectors_from
from lossops_triton.elements import addend, logit_map
from lossops_triton.launch import aligned, dense, misalignment, on
from lossops_triton.linear import SLAB_BYTES, can_pack, product, products
from lossops_triton.statistics import Split, no_columns, step
from lossops_triton.targets import add_targets

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
    """Σ_{j ∉ P_i} a_j φ(z_ij), (N,), and the gradients of Σ_i f_i of them, in one sweep."""
    n, v = x.shape[0], w.shape[0]
    if dx is not None:
        dx.zero_()
    if n == 0 or v == 0:
        for t in (dw, db):
            if t is not None:
                t.zero_()
        return x.new_zeros(n, dtype=torch.float32)
    p, q, detached = (*parameters, 0.0, 0.0, 0.0)[:3]
    wants = not (dx is None and dw is None and db is None)
    size = max(256, SLAB_BYTES // (4 * n) // 256 * 256)
    stride = -(-min(size, v) // 16) * 16
    memory = x.new_empty(n * stride, dtype=torch.float32)
    slabs = range(0, v, size)
    sums = x.new_empty(len(slabs), n, dtype=torch.float32)
    partial = None if dx is None else torch.empty_like(dx)
    # Rounded where the slope is at most 1 and no bias asks for sums of what is not.
    packs = x.dtype == torch.bfloat16 and db is None
    for index, first in enumerate(slabs):
        tile = slice(first, min(first + size, v))
        buffer = memory.as_strided((n, tile.stop - first), (stride, 1))
        product(x, w[tile].T, buffer)
        ids = None if target is None else _inside(target, tile)
        out = None
        if wants:
            packed = packs and can_pack(buffer)
            out = buffer.view(x.dtype)[:, : buffer.shape[1]] if packed else buffer
        _one_slab(
            buffer, scale, None if b is None else b[tile], ids,
            None if weight is None else weight[tile], kind, p, q, bool(detached), row_factor,
            sums[index], out,
        )  # fmt: skip
        if out is None:
            continue
        wt = w[tile]
        dw_part = None if dw is None else x.new_empty(wt.shape, dtype=torch.float32)
        db_part = None if db is None else out.sum(0)
        products(x, wt, scale, out, None, partial, dw_part, False)
        if ids is not None and at_target is not None:
            add_targets(None, dw_part, db_part, x, scale, wt, ids, at_target)
        if dx is not None and partial is not None:
            dx += partial
        if dw is not None and dw_part is not None:
            dw[tile].copy_(dw_part)
        if db is not None and db_part is not None:
            db[tile].copy_(db_part)
    if dx is not None and target is not None and at_target is not None:
        add_targets(dx, None, None, x, scale, w, target, at_target)
    return sums.sum(0)


def _one_slab(
    buffer: Tensor,
    scale: Tensor | None,
    b: Tensor | None,
    ids: Tensor | None,
    weight: Tensor | None,
    kind: str,
    p: float,
    q: float,
    detached: bool,
    row_factor: Tensor | None,
    sums: Tensor,
    out: Tensor | None,
) -> None:
    """Sums (N,) of a slab's products (N, v), and dz into ``out``, the same memory, where given."""
    ids = no_columns(ids)
    block, warps = step(buffer, kind in ("gumbel", "asymmetric"))
    split = Split.of(buffer, False, block)
    with on(buffer.device):
        binary_kernel[(buffer.shape[0],)](
            buffer, buffer.stride(0), misalignment(buffer), scale, dense(b), ids,
            0 if ids is None else ids.shape[1], dense(weight), dense(row_factor), sums, out,
            0 if out is None else out.stride(0), buffer.shape[1], float(p), float(q),
            KIND=KINDS[kind], DETACHED=detached, BLOCK=split.block, VEC=split.vector,
            ALIGNED=aligned(buffer if out is None else out),
            IN_PLACE=out is not None and out.dtype != buffer.dtype, num_warps=warps,
        )  # fmt: skip


def _inside(target: Tensor, tile: slice) -> Tensor:
    """Ids relative to the tile, -1 outside of it."""
    inside = (target >= tile.start) & (target < tile.stop)
    return torch.where(inside, target - tile.start, -1)
