"""Statistics straight from x and w: logits live in the registers of one tile.

Grid (blocks of rows, parts of the classes), blocks of rows first, so that programs that run side
by side read the same tile of w from the second-level cache. A program takes the tiles of its part
in order: products over D in tensor cores with float32 accumulators, then the tile's state, merged
into the program's own (row.py). States of several parts are merged by a second kernel in order.

    tile model, bytes read     BM + BN rows of D for each of ⌈N / BM⌉ ⌈V / BN⌉ tiles
    MUFU a logit               1 + 2 / BN for the log-sum, and what softcap and softplus take
    overlap                    two blocks a multiprocessor: one's exponentials beside the other's
                               products; descriptors (TMA) load the tiles on sm_90 and newer

Targets are apart: `target_logits_kernel` takes them in float32, the tiles only leave them out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lossops.gpu_layout import (
    Kept,
    bits,
    dense,
    dense_rows,
    log_sums,
    multiprocessors,
    no_columns,
)
from lossops_triton import row
from lossops_triton.configurations import Tile, tile_of
from lossops_triton.elements import logit_map
from lossops_triton.launch import aligned, on
from lossops_triton.row import (
    STATE_ROWS,
    TEACHER,
    WEIGHTED_SUM,
    empty,
    finish,
    merge,
    of_tile,
    store,
)
from lossops_triton.statistics import merge_states

HALF = (torch.bfloat16, torch.float16)


@triton.jit
def fused_statistics_kernel(
    x,
    w,
    x_stride,
    w_stride,
    scale_ptr,
    b_ptr,
    target_ptr,
    num_targets,
    a_ptr,
    t_ptr,
    t_stride,
    out_ptr,
    ids_ptr,
    n,
    v,
    d,
    softcap,
    tiles_per_part,
    FLAGS: tl.constexpr,
    LOG_SUMS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WHOLE_D: tl.constexpr,
    UNIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """x (N, D), w (V, D), as pointers or descriptors of (BM, BK) and (BN, BK).

    ``x_stride``, ``w_stride`` and ``d`` count ``UNIT`` elements: 16 bytes where all are multiples,
    which the compiler then sees and loads by.
    """
    x_stride, w_stride, d = x_stride * UNIT, w_stride * UNIT, d * UNIT
    first_row = tl.program_id(0) * BM
    part = tl.program_id(1)
    o_row = first_row.to(tl.int64) + tl.arange(0, BM)
    m_row = o_row < n
    o_feature = tl.arange(0, BK)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    # Rows and classes past the end read the last one: what comes of them is left out.
    x_rows = tl.minimum(o_row, n - 1)[:, None]
    state = empty(BM, LOG_SUMS)
    count = tl.zeros([BM], tl.float32)
    first = part * tiles_per_part
    last = tl.minimum(first + tiles_per_part, tl.cdiv(v, BN))
    for tile in tl.range(first, last, flatten=FLATTEN):
        first_class = tile * BN
        o_class = first_class + tl.arange(0, BN)
        m_class = o_class < v
        w_rows = tl.minimum(o_class, v - 1).to(tl.int64)[:, None]
        r = tl.zeros([BM, BN], tl.float32)
        for k in range(0, d, BK):
            if DESCRIPTORS:
                b_x = x.load([first_row, k])
                b_w = w.load([first_class, k])
            else:
                x_ptrs = x + x_rows * x_stride + (k + o_feature)[None, :]
                w_ptrs = w + w_rows * w_stride + (k + o_feature)[None, :]
                if WHOLE_D:
                    b_x = tl.load(x_ptrs)
                    b_w = tl.load(w_ptrs)
                else:
                    m_feature = (k + o_feature < d)[None, :]
                    b_x = tl.load(x_ptrs, mask=m_feature, other=0.0)
                    b_w = tl.load(w_ptrs, mask=m_feature, other=0.0)
            r = tl.dot(b_x, b_w.T, r)
        bias = 0.0
        if b_ptr is not None:
            bias = tl.load(b_ptr + o_class, mask=m_class, other=0.0).to(tl.float32)[None, :]
        z = logit_map(r, scale, bias, softcap, b_ptr is not None, SOFTCAP)
        m_negative = m_class[None, :]
        if target_ptr is not None:
            m_negative = tl.broadcast_to(m_negative, [BM, BN])
            for j in range(num_targets):
                y = tl.load(target_ptr + o_row * num_targets + j, mask=m_row, other=-1)
                m_negative = m_negative & (o_class[None, :] != y[:, None])
        a, t = 0.0, 0.0
        if (WEIGHTED_SUM | TEACHER) & FLAGS:
            if a_ptr is not None:
                a = tl.load(a_ptr + o_class, mask=m_class, other=0.0).to(tl.float32)[None, :]
        if TEACHER & FLAGS:
            t_ptrs = t_ptr + o_row[:, None] * t_stride + o_class[None, :]
            t = tl.load(t_ptrs, mask=m_row[:, None] & m_class[None, :], other=0.0).to(tl.float32)
            if a_ptr is not None:
                t = t * a
        none = tl.zeros([BM], tl.float32)
        own = of_tile(
            z, o_class[None, :], m_class[None, :], m_negative, none, a, t, FLAGS, LOG_SUMS
        )
        more = tl.minimum(v - first_class, BN).to(tl.float32)
        state = merge(state, count, own, more, FLAGS, LOG_SUMS)
        count += more
    if PARTS == 1:
        finish(state, out_ptr, ids_ptr, n, o_row, m_row, FLAGS, LOG_SUMS)
    else:
        at = part.to(tl.int64) * n
        own_ptr = out_ptr + at * (STATE_ROWS + 2 * len(LOG_SUMS))
        store(state, count, own_ptr, ids_ptr + at * 3, n, o_row, m_row, FLAGS, LOG_SUMS)


@triton.jit
def target_logits_kernel(
    x_ptr,
    x_stride,
    w_ptr,
    w_stride,
    scale_ptr,
    b_ptr,
    target_ptr,
    num_targets,
    out_ptr,
    v,
    d,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z at the targets (N, K) float32; -inf for -1, NaN for an id that is no class."""
    pair = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + pair)
    m_known = (y >= 0) & (y < v)
    x_row_ptr = x_ptr + (pair // num_targets) * x_stride
    w_row_ptr = w_ptr + tl.where(m_known, y, 0) * w_stride
    sums = tl.zeros([BLOCK], tl.float32)
    for k in range(0, d, BLOCK):
        o_feature = k + tl.arange(0, BLOCK)
        m_feature = (o_feature < d) & m_known
        b_x = tl.load(x_row_ptr + o_feature, mask=m_feature, other=0.0).to(tl.float32)
        sums += b_x * tl.load(w_row_ptr + o_feature, mask=m_feature, other=0.0).to(tl.float32)
    scale, bias = 1.0, 0.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    if b_ptr is not None:
        bias = tl.load(b_ptr + y, mask=m_known, other=0.0).to(tl.float32)
    z = logit_map(tl.sum(sums, 0), scale, bias, softcap, b_ptr is not None, SOFTCAP)
    z = tl.where(m_known, z, tl.where(y < 0, -float("inf"), float("nan")))
    tl.store(out_ptr + pair, z)


def fuses(x: Tensor, w: Tensor, names: Sequence[str]) -> bool:
    """Whether one kernel can do it: half precision, and nothing that needs z of a target first."""
    return x.dtype in HALF and "below_target" not in names and x.shape[1] > 0 and w.shape[0] > 0


def fused_statistics(
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
    """`lossops.reference.linear_statistics` where `fuses` allows it; memory O(N · parts)."""
    x, w = dense_rows(x), dense_rows(w)
    n, d, v = x.shape[0], x.shape[1], w.shape[0]
    kept = Kept.room(names, n, target, x.device)
    if n == 0:
        return kept.listed()
    ids, b = no_columns(target), dense(b)
    flags, sums = bits(names), log_sums(names)
    with on(x.device):
        tile = tile_of(x, w, (softcap != 0) + len(sums) + (flags & ~row.LSE.value).bit_count())
    blocks, tiles = triton.cdiv(n, tile.bm), triton.cdiv(v, tile.bn)
    parts = max(1, min(tiles, tile.blocks * multiprocessors(x.device) // blocks))
    per_part = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, per_part)
    unit = 8 if d % 8 == 0 and aligned(x, w) else 1
    floats, numbers = kept.values, kept.ids
    if parts > 1:
        rows = STATE_ROWS.value + 2 * len(sums)
        floats = torch.empty(parts, rows, n, dtype=torch.float32, device=x.device)
        numbers = torch.empty(parts, 3, n, dtype=torch.int32, device=x.device)
    taught = dense_rows(teacher) if teacher is not None and "teacher" in names else None
    with on(x.device):
        if kept.at_target is not None and ids is None:
            kept.at_target.fill_(-torch.inf)
        elif kept.at_target is not None and ids is not None:
            target_logits_kernel[(ids.numel(),)](
                x, x.stride(0), w, w.stride(0), scale, b, ids, ids.shape[1], kept.at_target, v, d,
                softcap, SOFTCAP=softcap != 0, BLOCK=min(1024, triton.next_power_of_2(d)),
                num_warps=4,
            )  # fmt: skip
        fused_statistics_kernel[(blocks, parts)](
            *_operands(x, w, tile), x.stride(0) // unit, w.stride(0) // unit, scale, b, ids,
            0 if ids is None else ids.shape[1], dense(class_vector), taught,
            0 if taught is None else taught.stride(0), floats, numbers, n, v, d // unit, softcap,
            per_part, FLAGS=flags, LOG_SUMS=sums, SOFTCAP=softcap != 0, PARTS=parts, BM=tile.bm,
            BN=tile.bn, BK=tile.bk, WHOLE_D=d % tile.bk == 0, UNIT=unit,
            DESCRIPTORS=tile.descriptors, FLATTEN=tile.flatten, **tile.launch(),
        )  # fmt: skip
        if parts > 1:
            merge_states(floats, numbers, kept, flags, sums)
    return kept.listed()


def _operands(x: Tensor, w: Tensor, tile: Tile) -> tuple[object, object]:
    if not tile.descriptors:
        return x, w
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(x, [tile.bm, tile.bk]),
        TensorDescriptor.from_tensor(w, [tile.bn, tile.bk]),
    )
