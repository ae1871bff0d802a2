"""Statistics of rows of logits that exist, and dz in place of them: memory-bound row work.

    statistics   reads each logit once, grid (rows, parts of the classes)
    gradient     reads each logit once and writes dz once, grid (rows, parts)

Bytes a logit of b bytes: b and b + (b, or 2 where dz is half precision). Logits are read and
written as 16-byte vectors whatever V and the row stride: a row is cut at the 16-byte boundaries
inside it, and the few elements outside these are an edge of their own (`edges`).

dz in half precision lies in the first half of each row of a float32 buffer. One program has the
row; tile by tile it reads float32 at 4 j and writes at 2 j, never ahead of what it has read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lossops_triton.elements import logit_map, sigmoid, stable_slope
from lossops_triton.row import (
    BELOW_TARGET,
    STATE_ROWS,
    TEACHER,
    empty,
    finish,
    load,
    merge,
    of_tile,
    store,
)


@triton.jit
def no_target(m_negative, o_class, target_ptr, row, num_targets):
    """The negatives among the classes (n,): those that are no target of the row."""
    for k in range(num_targets):
        m_negative = m_negative & (o_class != tl.load(target_ptr + row * num_targets + k))
    return m_negative


@triton.jit
def scale_of(scale_ptr):
    """The scale of the logits; 1 where there is none."""
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    return scale


@triton.jit
def full_vectors(row_ptr, offset, v, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """How many of the v elements come before the first 16-byte boundary, and how many in vectors.

    ``offset``: elements between the boundary before the row and the row; 0 where ALIGNED.
    """
    head = 0
    if not ALIGNED:
        head = tl.minimum((VEC - offset % VEC) % VEC, v).to(tl.int32)
    return head, (v - head) // VEC * VEC


@triton.jit
def vectors_from(ptr, o_row, head, offset, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """The first vector of the row at ``o_row`` of a matrix, so that the compiler sees its boundary.

    Counted from the boundary before the matrix: what is known of a pointer itself AMD's compiler
    forgets.
    """
    if ALIGNED:
        return ptr + (o_row + head)
    o_vector = tl.multiple_of(offset + o_row + head, VEC)
    return tl.multiple_of(ptr - offset, 16) + o_vector


@triton.jit
def chunk_statistics_kernel(
    z_ptr,
    z_stride,
    offset,
    scale_ptr,
    b_ptr,
    target_ptr,
    num_targets,
    a_ptr,
    t_ptr,
    t_stride,
    out_ptr,
    ids_ptr,
    at_target_ptr,
    n,
    v,
    softcap,
    per_part,
    FLAGS: tl.constexpr,
    LOG_SUMS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """z (N, V) of any row stride -> statistics, or with PARTS > 1 states (PARTS, ...) to merge.

    ``per_part``: vectors' elements of a part, a multiple of BLOCK. ``at_target`` (N, K): z at the
    targets as it is, -inf where there is none.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row_ptr = z_ptr + row * z_stride
    scale = scale_of(scale_ptr)
    head, whole = full_vectors(row_ptr, offset + row * z_stride, v, VEC, ALIGNED)
    at_target = tl.zeros([1], tl.float32)
    if target_ptr is not None:
        if at_target_ptr is not None:
            for k in range(num_targets):
                o_target = row * num_targets + k
                z = _at(row_ptr, target_ptr + o_target, v, scale, b_ptr, softcap, SOFTCAP)
                if part == 0:
                    tl.store(at_target_ptr + o_target, z)
        if BELOW_TARGET & FLAGS:
            at_target += _at(
                row_ptr, target_ptr + row * num_targets, v, scale, b_ptr, softcap, SOFTCAP
            )
    state = empty(1, LOG_SUMS)
    count = tl.zeros([1], tl.float32)
    first = part * per_part
    last = tl.minimum(first + per_part, whole)
    body_ptr = vectors_from(z_ptr, row * z_stride, head, offset, VEC, ALIGNED)
    for start in range(first, last, BLOCK):
        o_vec = start + tl.arange(0, BLOCK)
        m_vec = o_vec < last
        r = tl.load(body_ptr + o_vec, mask=m_vec, other=0.0).to(tl.float32)
        state, count = _absorb(
            state, count, r, head + o_vec, m_vec, row, scale, b_ptr, target_ptr, num_targets,
            a_ptr, t_ptr, t_stride, softcap, at_target, FLAGS, LOG_SUMS, SOFTCAP,
        )  # fmt: skip
    if part == PARTS - 1:
        o_edge, m_edge = edges(head, whole, v, VEC)
        r = tl.load(row_ptr + o_edge, mask=m_edge, other=0.0).to(tl.float32)
        state, count = _absorb(
            state, count, r, o_edge, m_edge, row, scale, b_ptr, target_ptr, num_targets,
            a_ptr, t_ptr, t_stride, softcap, at_target, FLAGS, LOG_SUMS, SOFTCAP,
        )  # fmt: skip
    o_row = row + tl.arange(0, 1)
    if PARTS == 1:
        finish(state, out_ptr, ids_ptr, n, o_row, o_row < n, FLAGS, LOG_SUMS)
    else:
        rows = STATE_ROWS + 2 * len(LOG_SUMS)
        own = out_ptr + part.to(tl.int64) * rows * n
        own_ids = ids_ptr + part.to(tl.int64) * 3 * n
        store(state, count, own, own_ids, n, o_row, o_row < n, FLAGS, LOG_SUMS)


@triton.jit
def _at(row_ptr, y_ptr, v, scale, b_ptr, softcap, SOFTCAP: tl.constexpr):
    """z of one target of a row; -inf for -1, NaN for an id that is no class."""
    y = tl.load(y_ptr)
    m_known = (y >= 0) & (y < v)
    r = tl.load(row_ptr + y, mask=m_known, other=0.0).to(tl.float32)
    bias = 0.0
    if b_ptr is not None:
        bias = tl.load(b_ptr + y, mask=m_known, other=0.0).to(tl.float32)
    z = logit_map(r, scale, bias, softcap, b_ptr is not None, SOFTCAP)
    return tl.where(m_known, z, tl.where(y < 0, -float("inf"), float("nan")))


@triton.jit
def edges(head, whole, v, VEC: tl.constexpr):
    """The elements before the first full vector and after the last one, 2 VEC places."""
    i = tl.arange(0, 2 * VEC)
    m_front = i < VEC
    o_edge = tl.where(m_front, i, head + whole + i - VEC)
    return o_edge, tl.where(m_front, i < head, o_edge < v)


@triton.jit
def _absorb(
    state, count, r, o_class, m_class, row, scale, b_ptr, target_ptr, num_targets, a_ptr, t_ptr,
    t_stride, softcap, at_target, FLAGS: tl.constexpr, LOG_SUMS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The state with one more tile (n,) of a row's products r."""
    bias = 0.0
    if b_ptr is not None:
        bias = tl.load(b_ptr + o_class, mask=m_class, other=0.0).to(tl.float32)
    z = logit_map(r, scale, bias, softcap, b_ptr is not None, SOFTCAP)
    m_negative = m_class
    if target_ptr is not None:
        m_negative = no_target(m_class, o_class, target_ptr, row, num_targets)
    a, t = 0.0, 0.0
    if a_ptr is not None:
        a = tl.load(a_ptr + o_class, mask=m_class, other=0.0).to(tl.float32)
    if TEACHER & FLAGS:
        t = tl.load(t_ptr + row * t_stride + o_class, mask=m_class, other=0.0).to(tl.float32)
        if a_ptr is not None:
            t = t * a
        t = t[None, :]
    if a_ptr is not None:
        a = a[None, :]
    tile = of_tile(
        z[None, :], o_class[None, :], m_class[None, :], m_negative[None, :], at_target, a, t,
        FLAGS, LOG_SUMS,
    )  # fmt: skip
    more = tl.sum(m_class.to(tl.float32), 0)
    return merge(state, count, tile, more, FLAGS, LOG_SUMS), count + more


@triton.jit
def merge_kernel(
    states_ptr,
    state_ids_ptr,
    out_ptr,
    ids_ptr,
    n,
    PARTS: tl.constexpr,
    FLAGS: tl.constexpr,
    LOG_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """States of parts of the classes (PARTS, ..., N), in the order of the parts -> statistics."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n
    state = empty(ROWS, LOG_SUMS)
    count = tl.zeros([ROWS], tl.float32)
    rows = STATE_ROWS + 2 * len(LOG_SUMS)
    for _ in range(PARTS):
        q, more = load(states_ptr, state_ids_ptr, n, o_row, m_row, ROWS, FLAGS, LOG_SUMS)
        state = merge(state, count, q, more, FLAGS, LOG_SUMS)
        count += more
        states_ptr += rows * n
        state_ids_ptr += 3 * n
    finish(state, out_ptr, ids_ptr, n, o_row, m_row, FLAGS, LOG_SUMS)


@triton.jit
def chunk_gradient_kernel(
    z_ptr,
    z_stride,
    offset,
    scale_ptr,
    b_ptr,
    target_ptr,
    num_targets,
    a_ptr,
    t_ptr,
    t_stride,
    stats,
    coefs,
    log_stats,
    log_coefs,
    at_target_ptr,
    unit_ptr,
    out_ptr,
    out_stride,
    v,
    first_class,
    num_classes,
    softcap,
    per_part,
    LOG_SUMS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIKE: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """dr of the classes first_class + [0, v) from z (N, v), into out (N, v); 0 at the targets.

    stats: shift, lse, mean, variance, average, argmax, runner_up_index, below_target_index, each
    (N,) or None; coefs: lse, mean, variance, softplus, stable_sum, average, moment, weighted_sum,
    teacher, max, runner_up, below_target, likewise; log_stats, log_coefs: of LOG_SUMS.
    ``at_target`` (N, K): dz at the targets instead of 0. ``unit`` (): what dr is multiplied by.
    ALIKE: whether the rows of out begin where those of z do within 16 bytes.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row_ptr, out_row_ptr = z_ptr + row * z_stride, out_ptr + row * out_stride
    scale, unit = scale_of(scale_ptr), 1.0
    if unit_ptr is not None:
        unit = tl.load(unit_ptr)
    head, whole = full_vectors(row_ptr, offset + row * z_stride, v, VEC, ALIGNED)
    first = part * per_part
    last = tl.minimum(first + per_part, whole)
    body_ptr = vectors_from(z_ptr, row * z_stride, head, offset, VEC, ALIGNED)
    out_body_ptr = out_row_ptr + head
    if ALIKE:
        out_body_ptr = vectors_from(out_ptr, row * out_stride, head, offset, VEC, ALIGNED)
    for start in range(first, last, BLOCK):
        o_vec = start + tl.arange(0, BLOCK)
        m_vec = o_vec < last
        r = tl.load(body_ptr + o_vec, mask=m_vec, other=0.0).to(tl.float32)
        dr = _slope(
            r, head + o_vec, m_vec, row, scale, b_ptr, target_ptr, num_targets, a_ptr, t_ptr,
            t_stride, stats, coefs, log_stats, log_coefs, at_target_ptr, first_class, num_classes,
            softcap, LOG_SUMS, SOFTCAP,
        )  # fmt: skip
        if IN_PLACE:
            tl.debug_barrier()  # all of the tile is read before any of it is overwritten
        tl.store(out_body_ptr + o_vec, (dr * unit).to(out_ptr.dtype.element_ty), mask=m_vec)
    if part == PARTS - 1:
        o_edge, m_edge = edges(head, whole, v, VEC)
        r = tl.load(row_ptr + o_edge, mask=m_edge, other=0.0).to(tl.float32)
        dr = _slope(
            r, o_edge, m_edge, row, scale, b_ptr, target_ptr, num_targets, a_ptr, t_ptr,
            t_stride, stats, coefs, log_stats, log_coefs, at_target_ptr, first_class, num_classes,
            softcap, LOG_SUMS, SOFTCAP,
        )  # fmt: skip
        if IN_PLACE:
            tl.debug_barrier()
        tl.store(out_row_ptr + o_edge, (dr * unit).to(out_ptr.dtype.element_ty), mask=m_edge)


@triton.jit
def _slope(
    r, o_class, m_class, row, scale, b_ptr, target_ptr, num_targets, a_ptr, t_ptr, t_stride, stats,
    coefs, log_stats, log_coefs, at_target_ptr, first_class, num_classes, softcap,
    LOG_SUMS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dr of products r as csrc/row.h has it: (n,) of a row, or (rows, n) of rows (rows, 1)."""
    bias = 0.0
    if b_ptr is not None:
        bias = tl.load(b_ptr + o_class, mask=m_class, other=0.0).to(tl.float32)
    z = logit_map(r, scale, bias, softcap, b_ptr is not None, SOFTCAP)
    rel = z - tl.load(stats[0] + row)
    dz = z * 0.0
    dz = tl.where(dz == dz, dz, 0.0)
    if (coefs[0] is not None) or (coefs[1] is not None) or (coefs[2] is not None):
        lse = tl.load(stats[1] + row)
        q = tl.exp(rel - tl.where(lse == -float("inf"), 0.0, lse))
        if coefs[0] is not None:
            dz += tl.load(coefs[0] + row) * q
        if coefs[1] is not None:
            away = 1.0 + rel - tl.load(stats[2] + row)
            dz += tl.load(coefs[1] + row) * tl.where(q == 0, 0.0, q * away)
        if coefs[2] is not None:
            away = rel - tl.load(stats[2] + row)
            term = q * (away * (away + 2.0) - tl.load(stats[3] + row))
            dz += tl.load(coefs[2] + row) * tl.where(q == 0, 0.0, term)
    for k in tl.static_range(len(LOG_SUMS)):
        if log_coefs[k] is not None:
            lse = tl.load(log_stats[k] + row)
            power = LOG_SUMS[k][0] * rel - tl.where(lse == -float("inf"), 0.0, lse)
            q = tl.exp(power)
            if LOG_SUMS[k][1] != float("inf"):
                q = tl.where(z > LOG_SUMS[k][1], 0.0, q)
            dz += LOG_SUMS[k][0] * tl.load(log_coefs[k] + row) * q
    if coefs[3] is not None:
        dz += tl.load(coefs[3] + row) * sigmoid(z)
    if coefs[4] is not None:
        dz += tl.load(coefs[4] + row) * stable_slope(z)
    if coefs[5] is not None:
        dz += tl.load(coefs[5] + row) / num_classes
    if coefs[6] is not None:
        dz += 2.0 * tl.load(coefs[6] + row) * (rel - tl.load(stats[4] + row))
    if (coefs[7] is not None) or (coefs[8] is not None):
        a = 1.0
        if a_ptr is not None:
            a = tl.load(a_ptr + o_class, mask=m_class, other=0.0).to(tl.float32)
        if coefs[7] is not None:
            dz += tl.load(coefs[7] + row) * a
        if coefs[8] is not None:
            t = tl.load(t_ptr + row * t_stride + o_class, mask=m_class, other=0.0).to(tl.float32)
            dz += tl.load(coefs[8] + row) * (t * a)
    for k in tl.static_range(3):
        if coefs[9 + k] is not None:
            best = tl.load(stats[5 + k] + row)
            dz += tl.where(first_class + o_class == best, tl.load(coefs[9 + k] + row), 0.0)
    if SOFTCAP:
        dz *= 1.0 - (z / softcap) * (z / softcap)
    if target_ptr is not None:
        for k in range(num_targets):
            y = tl.load(target_ptr + row * num_targets + k)
            value = 0.0
            if at_target_ptr is not None:
                value = tl.load(at_target_ptr + row * num_targets + k)
            dz = tl.where(first_class + o_class == y, value, dz)
    return dz


@triton.jit
def column_sums_kernel(
    z_ptr,
    z_stride,
    scale_ptr,
    b_ptr,
    target_ptr,
    num_targets,
    a_ptr,
    t_ptr,
    t_stride,
    stats,
    coefs,
    log_stats,
    log_coefs,
    db_ptr,
    n,
    v,
    first_class,
    num_classes,
    softcap,
    accumulate,
    LOG_SUMS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """db (v,) float32 = Σ over the rows of dr, or += it: of dr as it is before any rounding."""
    o_class = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_class = o_class < v
    scale = scale_of(scale_ptr)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, ROWS):
        o_row = first + tl.arange(0, ROWS)
        row = tl.minimum(o_row, n - 1).to(tl.int64)[:, None]
        r = tl.load(z_ptr + row * z_stride + o_class[None, :], mask=m_class[None, :], other=0.0).to(
            tl.float32
        )
        dr = _slope(
            r, o_class[None, :], m_class[None, :], row, scale, b_ptr, target_ptr, num_targets,
            a_ptr, t_ptr, t_stride, stats, coefs, log_stats, log_coefs, None, first_class,
            num_classes, softcap, LOG_SUMS, SOFTCAP,
        )  # fmt: skip
        total += tl.sum(tl.where((o_row < n)[:, None], dr, 0.0), 0)
    if accumulate:
        total += tl.load(db_ptr + o_class, mask=m_class, other=0.0)
    tl.store(db_ptr + o_class, total, mask=m_class)
