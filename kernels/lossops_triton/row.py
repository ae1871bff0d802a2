"""What a kernel keeps of a row of logits: the statistics of lossops/statistics.py, and their merge.

A state is a tuple of blocks (rows,), each relative to the state's own shift, the largest of its
negatives (0 where that is not finite):

    0 top        largest negative, as it is        9 softplus   Σ log(1 + e^z)
    1 sum        Σ e^rel                          10 stable     Σ s(z)
    2 mean       Σ e^rel rel / sum                11 weighted   Σ a rel
    3 spread     Σ e^rel (rel - mean)²            12 weights    Σ a
    4 best       id of top, lowest                13 taught     Σ t a rel
    5 second, 6 its id                            14 teacher    Σ t a
    7 average    Σ rel / count                    15 below, 16 its id: largest below the target
    8 moment     Σ (rel - average)²               17 log sums   (largest, Σ e^{t rel}) for each

`of_tile` makes one from a tile of logits, `merge` joins two: tiles within a kernel and parts of the
classes between kernels alike. Which are kept is a constexpr set of bits; what is not in it costs
nothing. MUFU instructions: one a logit for any of sum, mean and spread, one a row and tile for
`merge`, one a logit for each log sum at a temperature or with a limit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lossops.gpu_layout import BITS, FLOAT_ROWS
from lossops_triton.elements import finite, softplus, stable

# A set is written BIT & names, the constexpr first: the interpreter has plain integers.
LSE = tl.constexpr(BITS["lse"])
ENTROPY = tl.constexpr(BITS["entropy"])
VARIANCE = tl.constexpr(BITS["variance"])
MAX = tl.constexpr(BITS["max"])
RUNNER_UP = tl.constexpr(BITS["runner_up"])
BELOW_TARGET = tl.constexpr(BITS["below_target"])
SUM = tl.constexpr(BITS["sum"])
SUMSQ = tl.constexpr(BITS["sumsq"])
SOFTPLUS = tl.constexpr(BITS["softplus"])
STABLE_SUM = tl.constexpr(BITS["stable_sum"])
WEIGHTED_SUM = tl.constexpr(BITS["weighted_sum"])
TEACHER = tl.constexpr(BITS["teacher"])

# Rows of the outputs of `finish` are those of lossops/gpu_layout.py; log sums follow.
LOG_SUMS_FROM = tl.constexpr(len(FLOAT_ROWS))

# Rows of a stored state: all floats of it, two for each log sum at the end; and the ids.
STATE_ROWS = tl.constexpr(16)
NO_ID = tl.constexpr(2147483647)


@triton.jit
def empty(ROWS: tl.constexpr, LOG_SUMS: tl.constexpr):
    """The state of no logits."""
    none = tl.zeros([ROWS], tl.float32)
    least = none - float("inf")
    no_id = tl.full([ROWS], NO_ID, tl.int32)
    sums = ()
    for k in tl.static_range(len(LOG_SUMS)):
        sums = sums + ((least, none),)
    return (
        least, none, none, none, no_id, least, no_id, none, none, none, none, none, none, none,
        none, least, no_id, sums,
    )  # fmt: skip


@triton.jit
def first_of(z, ids, top):
    """The lowest id whose z is the top, NO_ID where there are none."""
    return tl.min(tl.where((z == top[:, None]) & (z > -float("inf")), ids, NO_ID), 1)


@triton.jit
def of_tile(
    z,
    ids,
    m_valid,
    m_negative,
    at_target,
    a,
    t,
    FLAGS: tl.constexpr,
    LOG_SUMS: tl.constexpr,
):
    """The state of a tile.

    z (rows, n) float32, anything where it is no class; ids (1, n); m_valid (1, n): classes;
    m_negative (rows, n): those that are no targets; at_target (rows,): z of the target, for
    BELOW_TARGET; a (1, n) class vector; t (rows, n) teacher times class vector.
    """
    neg = tl.where(m_negative, z, -float("inf"))
    top = tl.max(neg, 1)
    shift = finite(top)
    none = top * 0.0
    none = tl.where(none == none, none, 0.0)
    no_id = tl.zeros_like(top).to(tl.int32) + NO_ID
    least = none - float("inf")
    total, mean, spread, best, second, second_id = none, none, none, no_id, least, no_id
    average, moment, plus, steady, weighted, weights, taught, teacher = (
        none, none, none, none, none, none, none, none,
    )  # fmt: skip
    below, below_id = least, no_id
    rel = z - shift[:, None]
    if LSE & FLAGS:
        far = neg - shift[:, None]
        e = tl.exp(far)
        total = tl.sum(e, 1)
        if ENTROPY & FLAGS:
            far = tl.where(e == 0, 0.0, far)
            mean = tl.sum(e * far, 1) / tl.where(total == 0, 1.0, total)
        if VARIANCE & FLAGS:
            away = far - mean[:, None]
            spread = tl.sum(tl.where(e == 0, 0.0, e * away * away), 1)
    if MAX & FLAGS:
        best = first_of(neg, ids, top)
    if RUNNER_UP & FLAGS:
        rest = tl.where(ids == best[:, None], -float("inf"), neg)
        second = tl.max(rest, 1)
        second_id = first_of(rest, ids, second)
    if BELOW_TARGET & FLAGS:
        lower = tl.where(neg >= at_target[:, None], -float("inf"), neg)
        below = tl.max(lower, 1)
        below_id = first_of(lower, ids, below)
    if SUM & FLAGS:
        count = tl.sum(m_valid.to(tl.float32), 1)
        kept = tl.where(m_valid, rel, 0.0)
        average = tl.sum(kept, 1) / tl.where(count == 0, 1.0, count)
        if SUMSQ & FLAGS:
            away = tl.where(m_valid, rel - average[:, None], 0.0)
            moment = tl.sum(away * away, 1)
    if SOFTPLUS & FLAGS:
        plus = tl.sum(softplus(neg), 1)
    if STABLE_SUM & FLAGS:
        steady = tl.sum(stable(neg), 1)
    if WEIGHTED_SUM & FLAGS:
        weighted = tl.sum(tl.where(m_valid, rel * a, 0.0), 1)
        weights = tl.sum(tl.where(m_valid, a, 0.0), 1) + none
    if TEACHER & FLAGS:
        m_taught = m_valid & ((t != 0) | (rel != -float("inf")))
        taught = tl.sum(tl.where(m_taught, rel * t, 0.0), 1)
        teacher = tl.sum(tl.where(m_valid, t, 0.0), 1)
    sums = ()
    for k in tl.static_range(len(LOG_SUMS)):
        if LOG_SUMS[k][1] == float("inf"):
            power = tl.exp(LOG_SUMS[k][0] * (neg - shift[:, None]))
            sums = sums + ((top, tl.sum(power, 1)),)
        else:
            kept = tl.where(neg > LOG_SUMS[k][1], 0.0, neg)
            largest = tl.max(kept, 1)
            sums = sums + ((largest, tl.sum(tl.exp(kept - finite(largest)[:, None]), 1)),)
    return (
        top, total, mean, spread, best, second, second_id, average, moment, plus, steady, weighted,
        weights, taught, teacher, below, below_id, sums,
    )  # fmt: skip


@triton.jit
def larger(x, x_id, y, y_id):
    """The larger and its id, the first where they are equal."""
    return tl.where(y > x, y, x), tl.where(y > x, y_id, x_id)


@triton.jit
def merge(p, p_count, q, q_count, FLAGS: tl.constexpr, LOG_SUMS: tl.constexpr):
    """The state of both; the ids of p are below those of q; counts are of classes."""
    top = tl.maximum(p[0], q[0])
    shift = finite(top)
    p_down, q_down = finite(p[0]) - shift, finite(q[0]) - shift
    # Only the lower one is scaled. What has no negatives has nothing to scale: its shift of 0
    # may be far above all others.
    p_far = tl.where(p[0] == -float("inf"), 0.0, p_down)
    q_far = tl.where(q[0] == -float("inf"), 0.0, q_down)
    lower = tl.exp(p_far + q_far)
    p_scale, q_scale = tl.where(p_far == 0, 1.0, lower), tl.where(q_far == 0, 1.0, lower)
    total, mean, spread, best, second, second_id = p[1], p[2], p[3], p[4], p[5], p[6]
    average, moment, plus, steady, weighted, weights, taught, teacher = (
        p[7], p[8], p[9], p[10], p[11], p[12], p[13], p[14],
    )  # fmt: skip
    below, below_id = p[15], p[16]
    if LSE & FLAGS:
        p_total, q_total = p[1] * p_scale, q[1] * q_scale
        total = p_total + q_total
        if ENTROPY & FLAGS:
            whole = tl.where(total == 0, 1.0, total)
            p_part, q_part = p_total / whole, q_total / whole
            p_mean = tl.where(p_part == 0, 0.0, p[2] + p_down)
            q_mean = tl.where(q_part == 0, 0.0, q[2] + q_down)
            mean = p_part * p_mean + q_part * q_mean
            if VARIANCE & FLAGS:
                apart = q_mean - p_mean
                spread = p[3] * p_scale + q[3] * q_scale
                spread += apart * apart * p_part * q_total
    if RUNNER_UP & FLAGS:
        # The loser of the two firsts, or the second of the winner.
        second, second_id = larger(
            tl.where(q[0] > p[0], p[0], p[5]), tl.where(q[0] > p[0], p[4], p[6]),
            tl.where(q[0] > p[0], q[5], q[0]), tl.where(q[0] > p[0], q[6], q[4]),
        )  # fmt: skip
    if MAX & FLAGS:
        _, best = larger(p[0], p[4], q[0], q[4])
    if BELOW_TARGET & FLAGS:
        below, below_id = larger(p[15], p[16], q[15], q[16])
    if SUM & FLAGS:
        both = p_count + q_count
        both = tl.where(both > 0, both, 1.0)
        p_weight, q_weight = p_count / both, q_count / both
        p_average, q_average = p[7] + p_down, q[7] + q_down
        average = p_weight * p_average + q_weight * q_average
        if SUMSQ & FLAGS:
            apart = tl.where(p_weight * q_weight == 0, 0.0, q_average - p_average)
            moment = p[8] + q[8] + apart * apart * (p_weight * q_count)
    if SOFTPLUS & FLAGS:
        plus = p[9] + q[9]
    if STABLE_SUM & FLAGS:
        steady = p[10] + q[10]
    if WEIGHTED_SUM & FLAGS:
        weighted = (p[11] + p[12] * p_down) + (q[11] + q[12] * q_down)
        weights = p[12] + q[12]
    if TEACHER & FLAGS:
        taught = (p[13] + p[14] * p_down) + (q[13] + q[14] * q_down)
        teacher = p[14] + q[14]
    sums = ()
    for k in tl.static_range(len(LOG_SUMS)):
        if LOG_SUMS[k][1] == float("inf"):
            power = tl.exp(LOG_SUMS[k][0] * (p_far + q_far))
            x = p[17][k][1] * tl.where(p_far == 0, 1.0, power)
            y = q[17][k][1] * tl.where(q_far == 0, 1.0, power)
            sums = sums + ((top, x + y),)
        else:
            x_top, y_top = p[17][k][0], q[17][k][0]
            largest = tl.maximum(x_top, y_top)
            x = tl.where(x_top == -float("inf"), 0.0, finite(x_top) - finite(largest))
            y = tl.where(y_top == -float("inf"), 0.0, finite(y_top) - finite(largest))
            sums = sums + ((largest, p[17][k][1] * tl.exp(x) + q[17][k][1] * tl.exp(y)),)
    return (
        top, total, mean, spread, best, second, second_id, average, moment, plus, steady, weighted,
        weights, taught, teacher, below, below_id, sums,
    )  # fmt: skip


@triton.jit
def store(
    state, count, out_ptr, ids_ptr, n, o_row, m_row, FLAGS: tl.constexpr, LOG_SUMS: tl.constexpr
):
    """Keep a part's state: floats (STATE_ROWS + 2 log sums, N) and ids (3, N)."""
    tl.store(out_ptr + 14 * n + o_row, count, mask=m_row)
    tl.store(out_ptr + 0 * n + o_row, state[0], mask=m_row)
    if LSE & FLAGS:
        tl.store(out_ptr + 1 * n + o_row, state[1], mask=m_row)
    if ENTROPY & FLAGS:
        tl.store(out_ptr + 2 * n + o_row, state[2], mask=m_row)
    if VARIANCE & FLAGS:
        tl.store(out_ptr + 3 * n + o_row, state[3], mask=m_row)
    if MAX & FLAGS:
        tl.store(ids_ptr + 0 * n + o_row, state[4], mask=m_row)
    if RUNNER_UP & FLAGS:
        tl.store(out_ptr + 4 * n + o_row, state[5], mask=m_row)
        tl.store(ids_ptr + 1 * n + o_row, state[6], mask=m_row)
    if SUM & FLAGS:
        tl.store(out_ptr + 5 * n + o_row, state[7], mask=m_row)
    if SUMSQ & FLAGS:
        tl.store(out_ptr + 6 * n + o_row, state[8], mask=m_row)
    if SOFTPLUS & FLAGS:
        tl.store(out_ptr + 7 * n + o_row, state[9], mask=m_row)
    if STABLE_SUM & FLAGS:
        tl.store(out_ptr + 8 * n + o_row, state[10], mask=m_row)
    if WEIGHTED_SUM & FLAGS:
        tl.store(out_ptr + 9 * n + o_row, state[11], mask=m_row)
        tl.store(out_ptr + 10 * n + o_row, state[12], mask=m_row)
    if TEACHER & FLAGS:
        tl.store(out_ptr + 11 * n + o_row, state[13], mask=m_row)
        tl.store(out_ptr + 12 * n + o_row, state[14], mask=m_row)
    if BELOW_TARGET & FLAGS:
        tl.store(out_ptr + 13 * n + o_row, state[15], mask=m_row)
        tl.store(ids_ptr + 2 * n + o_row, state[16], mask=m_row)
    for k in tl.static_range(len(LOG_SUMS)):
        o_sum = (STATE_ROWS + 2 * k) * n + o_row
        tl.store(out_ptr + o_sum, state[17][k][0], mask=m_row)
        tl.store(out_ptr + o_sum + n, state[17][k][1], mask=m_row)


@triton.jit
def load(
    ptr, ids_ptr, n, o_row, m_row, ROWS: tl.constexpr, FLAGS: tl.constexpr, LOG_SUMS: tl.constexpr
):
    """What `store` kept: the state and the number of its classes."""
    none = tl.zeros([ROWS], tl.float32)
    least = none - float("inf")
    no_id = tl.full([ROWS], NO_ID, tl.int32)
    top = tl.load(ptr + 0 * n + o_row, mask=m_row, other=0.0)
    total, mean, spread, best, second, second_id = none, none, none, no_id, least, no_id
    average, moment, plus, steady, weighted, weights, taught, teacher = (
        none, none, none, none, none, none, none, none,
    )  # fmt: skip
    below, below_id = least, no_id
    if LSE & FLAGS:
        total = tl.load(ptr + 1 * n + o_row, mask=m_row, other=0.0)
    if ENTROPY & FLAGS:
        mean = tl.load(ptr + 2 * n + o_row, mask=m_row, other=0.0)
    if VARIANCE & FLAGS:
        spread = tl.load(ptr + 3 * n + o_row, mask=m_row, other=0.0)
    if MAX & FLAGS:
        best = tl.load(ids_ptr + 0 * n + o_row, mask=m_row, other=0)
    if RUNNER_UP & FLAGS:
        second = tl.load(ptr + 4 * n + o_row, mask=m_row, other=0.0)
        second_id = tl.load(ids_ptr + 1 * n + o_row, mask=m_row, other=0)
    if SUM & FLAGS:
        average = tl.load(ptr + 5 * n + o_row, mask=m_row, other=0.0)
    if SUMSQ & FLAGS:
        moment = tl.load(ptr + 6 * n + o_row, mask=m_row, other=0.0)
    if SOFTPLUS & FLAGS:
        plus = tl.load(ptr + 7 * n + o_row, mask=m_row, other=0.0)
    if STABLE_SUM & FLAGS:
        steady = tl.load(ptr + 8 * n + o_row, mask=m_row, other=0.0)
    if WEIGHTED_SUM & FLAGS:
        weighted = tl.load(ptr + 9 * n + o_row, mask=m_row, other=0.0)
        weights = tl.load(ptr + 10 * n + o_row, mask=m_row, other=0.0)
    if TEACHER & FLAGS:
        taught = tl.load(ptr + 11 * n + o_row, mask=m_row, other=0.0)
        teacher = tl.load(ptr + 12 * n + o_row, mask=m_row, other=0.0)
    if BELOW_TARGET & FLAGS:
        below = tl.load(ptr + 13 * n + o_row, mask=m_row, other=0.0)
        below_id = tl.load(ids_ptr + 2 * n + o_row, mask=m_row, other=0)
    sums = ()
    for k in tl.static_range(len(LOG_SUMS)):
        o_sum = (STATE_ROWS + 2 * k) * n + o_row
        largest = tl.load(ptr + o_sum, mask=m_row, other=0.0)
        sums = sums + ((largest, tl.load(ptr + o_sum + n, mask=m_row, other=0.0)),)
    count = tl.load(ptr + 14 * n + o_row, mask=m_row, other=1.0)
    state = (
        top, total, mean, spread, best, second, second_id, average, moment, plus, steady, weighted,
        weights, taught, teacher, below, below_id, sums,
    )  # fmt: skip
    return state, count


@triton.jit
def known(ids):
    """-1 for no id."""
    return tl.where(ids == NO_ID, -1, ids).to(tl.int64)


@triton.jit
def finish(state, out_ptr, ids_ptr, n, o_row, m_row, FLAGS: tl.constexpr, LOG_SUMS: tl.constexpr):
    """The statistics (FLOAT_ROWS + log sums, N) and ids (ID_ROWS, N), relative to the shift."""
    shift = finite(state[0])
    tl.store(out_ptr + 0 * n + o_row, shift, mask=m_row)
    if LSE & FLAGS:
        tl.store(out_ptr + 1 * n + o_row, tl.log(state[1]), mask=m_row)
    if ENTROPY & FLAGS:
        tl.store(out_ptr + 2 * n + o_row, state[2], mask=m_row)
    if VARIANCE & FLAGS:
        whole = tl.where(state[1] == 0, 1.0, state[1])
        tl.store(out_ptr + 3 * n + o_row, state[3] / whole, mask=m_row)
    if MAX & FLAGS:
        tl.store(out_ptr + 4 * n + o_row, state[0] - shift, mask=m_row)
        tl.store(ids_ptr + 0 * n + o_row, known(state[4]), mask=m_row)
    if RUNNER_UP & FLAGS:
        tl.store(out_ptr + 5 * n + o_row, state[5] - shift, mask=m_row)
        tl.store(ids_ptr + 1 * n + o_row, known(state[6]), mask=m_row)
    if BELOW_TARGET & FLAGS:
        tl.store(out_ptr + 6 * n + o_row, state[15] - shift, mask=m_row)
        tl.store(ids_ptr + 2 * n + o_row, known(state[16]), mask=m_row)
    if SUM & FLAGS:
        tl.store(out_ptr + 7 * n + o_row, state[7], mask=m_row)
    if SUMSQ & FLAGS:
        tl.store(out_ptr + 8 * n + o_row, state[8], mask=m_row)
    if SOFTPLUS & FLAGS:
        tl.store(out_ptr + 9 * n + o_row, state[9], mask=m_row)
    if STABLE_SUM & FLAGS:
        tl.store(out_ptr + 10 * n + o_row, state[10], mask=m_row)
    if WEIGHTED_SUM & FLAGS:
        tl.store(out_ptr + 11 * n + o_row, state[11], mask=m_row)
    if TEACHER & FLAGS:
        tl.store(out_ptr + 12 * n + o_row, state[13], mask=m_row)
    for k in tl.static_range(len(LOG_SUMS)):
        value = tl.log(state[17][k][1])
        if LOG_SUMS[k][1] != float("inf"):
            value = value + (finite(state[17][k][0]) - shift)
        tl.store(out_ptr + (LOG_SUMS_FROM + k) * n + o_row, value, mask=m_row)
