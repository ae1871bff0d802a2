"""The arithmetic of one logit in float32, as csrc/row.h has it: functions of tensors of any shape.

Exponentials and divisions are the device's own (ex2.approx, rcp.approx, 2 ulp); everything that
would lose digits for small arguments is written out here, so that no libdevice is needed and the
same source compiles for every target. MUFU instructions an element: tanh 2, softplus 2, sigmoid 2,
stable 1.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(u):
    """tanh(u) = u + u³ P(u²) below 0.6, within 3e-8; 1 - 2 / (1 + e^{2|u|}) above."""
    size = tl.abs(u)
    s = u * u
    p = -0.00594624 * s + 0.02089109
    p = p * s - 0.05382805
    p = p * s + 0.13332617
    p = p * s - 0.33333327
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * size))
    return tl.where(size < 0.6, u + u * s * p, tl.where(u < 0, -far, far))


@triton.jit
def log1p(e):
    """log(1 + e) for 0 ≤ e ≤ 1 = 2 artanh(s), s = e / (2 + e): tiny e keep their digits."""
    s = e / (2.0 + e)
    square = s * s
    q = 0.14006335 * square + 0.14000839
    q = q * square + 0.20010768
    q = q * square + 0.3333321
    return 2.0 * (s * square * q + s)


@triton.jit
def softplus(z):
    """log(1 + e^z); 0 at -inf."""
    return tl.where(z < 0, 0.0, z) + log1p(tl.exp(-tl.abs(z)))


@triton.jit
def sigmoid(z):
    """1 / (1 + e^{-z}), the derivative of softplus."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@triton.jit
def stable(z):
    """1 + z from 0 on, 1 / (1 - z) below; 0 at -inf."""
    return tl.where(z < 0, 1.0 / (1.0 - tl.where(z < 0, z, 0.0)), 1.0 + z)


@triton.jit
def stable_slope(z):
    """The derivative of stable."""
    s = stable(z)
    return tl.where(z < 0, s * s, tl.where(z == z, 1.0, z))


@triton.jit
def finite(top):
    """top, 0 where it is infinite: what a row may be relative to."""
    return tl.where(tl.abs(top) < float("inf"), top, 0.0)


@triton.jit
def logit_map(r, scale, b, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """z = softcap · tanh((scale · r + b) / softcap) of products r; b is 0 where there is none."""
    z = r * scale
    if BIAS:
        z = z + b
    if SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def expm1(y):
    """e^y - 1 = 2 t / (1 - t), t = tanh(y / 2); for y up to 1."""
    t = tanh(0.5 * y)
    return 2.0 * t / (1.0 - t)


@triton.jit
def addend(z, KIND: tl.constexpr, p, q, DETACHED: tl.constexpr):
    """What a negative logit adds to a sum over single logits, and the derivative: csrc/row.h.

    KIND and p, q: 0 sigmoid; 1 hinge (margin); 2 gumbel (most); 3 asymmetric (gamma, clip).
    """
    if KIND == 0:
        e = tl.exp(-tl.abs(z))
        value = tl.where(z < 0, 0.0, z) + log1p(e)
        slope = tl.where(z < 0, e, 1.0) / (1.0 + e)
    elif KIND == 1:
        above = z - p
        value = tl.where(above < 0, 0.0, above)
        slope = tl.where(above > 0, 1.0, value * 0.0)  # NaN stays NaN
    elif KIND == 2:
        bounded = tl.where(z < -7.0, -7.0, z)
        u = tl.exp(-tl.where(bounded > p, p, bounded))
        eta = tl.exp(-u)
        rest = -expm1(-u)  # 1 - η
        odds = eta / rest
        near = -tl.log(tl.where(u < 0.7, rest, 1.0))
        value = tl.where(u < 0.7, near, log1p(tl.where(odds > 1.0, 1.0, odds)))
        slope = tl.where(z > p, 0.0, u * odds)
    else:
        e = tl.exp(-tl.abs(z))
        both = 1.0 / (1.0 + e)
        sigma = tl.where(z < 0, e, 1.0) * both
        tau = tl.where(z < 0, 1.0, e) * both  # 1 - σ
        m = sigma - q
        rest = tl.where(tau + q > 1.0, 1.0, tau + q)  # 1 - m
        # The logarithm of 1 - σ itself would underflow.
        log_rest = tl.log(rest)
        if q == 0:
            log_rest = -(tl.where(z < 0, 0.0, z) + log1p(e))
        safe = tl.where(m > 0, m, 1.0)
        focus = tl.exp(p * tl.log(safe))
        value = -focus * log_rest
        slope = focus * sigma * tau / rest
        if q == 0:
            slope = focus * sigma
        if not DETACHED:
            slope = slope - p * focus / safe * sigma * tau * log_rest
        value = tl.where(m > 0, value, m * 0.0)
        slope = tl.where(m > 0, slope, m * 0.0)
    return value, slope
