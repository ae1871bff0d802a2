"""The targets' part of the gradients, apart from the tiles: gathered for dx, by segments for dw.

    dx_i += Σ_k v_ik w_{y_ik}     dw_j += Σ_{(i, k): y_ik = j} v_ik · scale · x_i     db_j += Σ v_ik

The pairs (i, k) are sorted by class, stably; the program at the first pair of a class owns its row
of dw and adds its pairs in order: the same bits every time, no atomics. A class of many pairs is
one chain of loads, as long as the pairs are many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lossops.gpu_layout import dense_rows
from lossops_triton.launch import on

BLOCK = 1024  # features of a program, 4 warps of two 16-byte vectors of half precision


@triton.jit
def segment_add_kernel(
    x_ptr,
    x_stride,
    scale_ptr,
    ids_ptr,
    order_ptr,
    value_ptr,
    dw_ptr,
    dw_stride,
    db_ptr,
    pairs,
    d,
    per_row,
    BLOCK: tl.constexpr,
):
    """Pairs sorted by class: ids (pairs,), order (pairs,) of them in value (N, K)."""
    i = tl.program_id(0).to(tl.int64)
    own = tl.load(ids_ptr + i)
    before = tl.load(ids_ptr + i - 1, mask=i > 0, other=-1)
    if (own >= 0) & (own != before):
        o_feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        m_feature = o_feature < d
        scale = 1.0
        if scale_ptr is not None:
            scale = tl.load(scale_ptr).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        sum_of_values = 0.0
        at = i
        following = own
        while following == own:
            pair = tl.load(order_ptr + at)
            value = tl.load(value_ptr + pair)
            sum_of_values += value
            if dw_ptr is not None:
                b_x = tl.load(
                    x_ptr + (pair // per_row) * x_stride + o_feature, mask=m_feature, other=0.0
                )
                total += (value * scale) * b_x.to(tl.float32)
            at += 1
            following = tl.load(ids_ptr + at, mask=at < pairs, other=-1)
        if dw_ptr is not None:
            o_dw = own * dw_stride + o_feature
            b_dw = tl.load(dw_ptr + o_dw, mask=m_feature, other=0.0)
            tl.store(dw_ptr + o_dw, b_dw + total, mask=m_feature)
        if db_ptr is not None:
            if tl.program_id(1) == 0:
                tl.store(db_ptr + own, tl.load(db_ptr + own) + sum_of_values)


def add_targets(
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    w: Tensor,
    target: Tensor,
    value: Tensor,
) -> None:
    """Add dr ``value`` (N, K) at ``target`` (N, K), -1 where there is none.

    dx (N, D) float32, before the factor scale; dw (V, D) and db (V,) float32. Ids that are no class
    are left out.
    """
    n, k = target.shape
    if n == 0 or k == 0 or w.shape[0] == 0:
        return
    known = (target >= 0) & (target < w.shape[0])
    ids = torch.where(known, target, -1)
    value = value.masked_fill(~known, 0.0)
    if dx is not None:
        for column, v in zip(ids.unbind(1), value.unbind(1), strict=True):
            dx += v.unsqueeze(1) * w[column.clamp_min(0)].to(dx.dtype)
    if dw is None and db is None:
        return
    x = dense_rows(x)
    flat, order = torch.sort(ids.flatten(), stable=True)
    with on(x.device):
        segment_add_kernel[(n * k, 1 if dw is None else triton.cdiv(x.shape[1], BLOCK))](
            x, x.stride(0), scale, flat, order, value.contiguous(), dw,
            0 if dw is None else dw.stride(0), db, n * k, x.shape[1], k, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
