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
