"""The algebra of one exact SGD step on a weight in factored form, in time independent of its rows.

The state S = [w̃] (V, E), or [w̃, velocity] with momentum, is kept as

    S = T U + 1 ωᵀ        table T (V, E): only rows of targets change in a step
    P = U⁻ᵀ,  m = mean_j s_j,  G = Σ_j (s_j - m)(s_j - m)ᵀ       E×E matrices, exact beside T

A step has gradients α (N, K), β, γ (N,) of the centred target, the moment and the average of each
row of x (N, D): ∂L/∂z_nj = Σ_k α_nk [j = y_nk] + 2 β_n (z_nj - z̄_n) + (γ_n - Σ_k α_nk) / V. With
rows r = -η x, or [-η x, x] with momentum μ, and weight decay λ it is

    S' = S M + (∂L/∂z)ᵀ r,        M = 1 - ηλ,  or  [[1 - ηλ, λ], [-ημ, μ]] ⊗ I

Everything in S' that is common to all rows goes to U and ω, the rest is sparse:

    U' = U M + (x Uₓᵀ)ᵀ (2β r)              ω' = ω M + (2β (x ωₓ) + γ₀)ᵀ r      Uₓ, ωₓ: of w̃ alone
    P' = P₀ - Kᵀ (2β x̂),  K = (I + r (2β x̂)ᵀ)⁻¹ r P₀ᵀ,  P₀ = P M⁻ᵀ,  x̂ = [x, 0] M⁻ᵀ     (Woodbury)
    t'_y = t_y + Σ α K                      for the targets
    m' = m M + γ/V · r                      γ₀ = (γ - Σ_k α) / V - 2 β z̄
    G' = Mᵀ G M + Aᵀ r + rᵀ A,  A = C M + H r / 2
    C = 2β x Gₓ + Σ_k α (s_y - m),          H = the inner products of the centred ∂L/∂z, (N, N)

7 products of 2 N E² operations, a solve of N×N, and nothing of the size of V.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lossops.gram import Statistics


class Factors(NamedTuple):
    """The small matrices: U, P (E, E) and ω (E,) in the table's dtype, m (E,) and G (E, E) wide."""

    factor: Tensor
    inverse: Tensor
    offset: Tensor
    mean: Tensor
    gram: Tensor


class Gradient(NamedTuple):
    """What a backward leaves for the step: N rows with K targets; E as in `Factors`.

    Row scalars are wide, matrices of the table's dtype.
    """

    x: Tensor  # (N, D)
    ids: Tensor  # (N, K) classes, -1 where there is none
    base: Tensor  # (N, K, E) table rows of the targets
    target: Tensor  # (N, K) α
    average: Tensor  # (N,) γ
    moment: Tensor  # (N,) β
    logit_mean: Tensor  # (N,) z̄
    pulled: Tensor  # (N, E) Σ_k α (s_y - m)
    centred: Tensor  # (N, E) C = 2β x Gₓ + pulled

    def scaled(self, factor: Tensor) -> Gradient:
        """The gradient times a factor."""
        return self._replace(
            target=self.target * factor,
            average=self.average * factor,
            moment=self.moment * factor,
            pulled=self.pulled * factor.to(self.x.dtype),
            centred=self.centred * factor.to(self.x.dtype),
        )


class Mixing(NamedTuple):
    """M without its ⊗ I: a 1×1 or 2×2 matrix."""

    rows: tuple[tuple[float, ...], ...]

    @staticmethod
    def of(lr: float, momentum: float, weight_decay: float) -> Mixing:
        """What a step of SGD does to [w̃] or [w̃, velocity] where the loss has no gradient."""
        keep = 1 - lr * weight_decay
        if not momentum:
            return Mixing(((keep,),))
        return Mixing(((keep, weight_decay), (-lr * momentum, momentum)))

    def inverse_transposed(self) -> Mixing:
        """M⁻ᵀ."""
        if len(self.rows) == 1:
            return Mixing(((1 / self.rows[0][0],),))
        (a, b), (c, e) = self.rows
        det = a * e - b * c
        return Mixing(((e / det, -c / det), (-b / det, a / det)))

    def apply(self, rows: Tensor) -> Tensor:
        """rows (..., E) times M; ``rows`` itself where M = I."""
        if self.rows == ((1.0,),):
            return rows
        if len(self.rows) == 1:
            return rows * self.rows[0][0]
        first, second = rows.chunk(2, -1)
        (a, b), (c, e) = self.rows
        return torch.cat([first * a + second * c, first * b + second * e], -1)


def fresh_factors(mean: Tensor, gram: Tensor, dtype: torch.dtype) -> Factors:
    """U = P = I and ω = 0, for a table that is S itself."""
    e = mean.shape[0]
    eye = torch.eye(e, dtype=dtype, device=mean.device)
    return Factors(eye, eye.clone(), eye.new_zeros(e), mean, gram)


def row_statistics(
    factors: Factors, x: Tensor, base: Tensor, counted: Tensor
) -> tuple[Statistics, Tensor, Tensor]:
    """Statistics of rows x (N, D) with table rows ``base`` (N, K, E); also s_y - m and x Gₓ."""
    d, wide = x.shape[1], factors.mean.dtype
    state = torch.addmm(factors.offset, base.flatten(0, 1), factors.factor).to(wide)
    own = (state - factors.mean).reshape(base.shape)  # (N, K, E)
    rows = x.to(wide)
    product = rows @ factors.gram[:d]  # (N, E)
    target = (own[..., :d] * rows.unsqueeze(1)).sum(2)
    target = torch.where(counted, target, 0.0)  # (N, K)
    moment = (product[:, :d] * rows).sum(1)
    return Statistics(target, rows @ factors.mean[:d], moment), own, product


def joined(gradients: Sequence[Gradient]) -> Gradient:
    """Several batches as one."""
    if len(gradients) == 1:
        return gradients[0]
    width = max(g.ids.shape[1] for g in gradients)
    padded = [_padded(g, width) for g in gradients]
    return Gradient(*(torch.cat(parts) for parts in zip(*padded, strict=True)))


def _padded(g: Gradient, width: int) -> Gradient:
    """With ``width`` targets per row; those more are the first again, with α = 0."""
    more = width - g.ids.shape[1]
    return g._replace(
        ids=torch.cat([g.ids, g.ids[:, :1].expand(-1, more)], 1),
        base=torch.cat([g.base, g.base[:, :1].expand(-1, more, -1)], 1),
        target=torch.cat([g.target, g.target.new_zeros(len(g.target), more)], 1),
    )


def inner_products(g: Gradient, num_classes: int) -> Tensor:
    """H_ab = Σ_j of the centred ∂L/∂z_aj ∂L/∂z_bj, (N, N)."""
    d, dtype = g.x.shape[1], g.x.dtype
    n, k = g.ids.shape
    rows = g.x * g.moment.to(dtype).unsqueeze(1)
    cross = rows @ (g.pulled + g.centred)[:, :d].T
    pull = g.target.sum(1).to(dtype)
    weights, same = g.target.to(dtype), rows.new_zeros(n, n)
    for i in range(k):  # pair by pair of targets, N² at a time
        for j in range(k):
            equal = g.ids[:, i].unsqueeze(1) == g.ids[:, j]
            same += torch.where(equal, torch.outer(weights[:, i], weights[:, j]), 0.0)
    same.addr_(pull, pull, alpha=-1 / num_classes)
    products: Tensor = same.add_(cross).add_(cross.T)
    return products


def squared_norm(g: Gradient, num_classes: int) -> Tensor:
    """‖∂L/∂w̃‖², (): the trace of the inner products of ∂L/∂z with those of x."""
    average = g.average.to(g.x.dtype)
    whole = inner_products(g, num_classes).addr_(average, average, alpha=1 / num_classes)
    return (whole * (g.x @ g.x.T)).sum(dtype=g.average.dtype)


def step_(
    factors: Factors,
    g: Gradient,
    num_classes: int,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> Tensor:
    """One step, in place; returns what it adds to the table rows of the targets, (N, K, E)."""
    u, p, offset, mean, gram = factors
    dtype, d = u.dtype, g.x.shape[1]
    mix = Mixing.of(lr, momentum, weight_decay)
    back = mix.inverse_transposed()
    twice = (2 * g.moment).to(dtype).unsqueeze(1)  # (N, 1)
    r = g.x * -lr  # (N, E)
    x_hat = g.x
    if momentum:
        r = torch.cat([r, g.x], 1)
        x_hat = torch.cat([g.x, torch.zeros_like(g.x)], 1)
    a = back.apply(x_hat) * twice  # (N, E) 2β x̂

    p.copy_(back.apply(p))
    core = r @ a.T
    core.diagonal().add_(1.0)
    k = torch.linalg.inv_ex(core)[0] @ (r @ p.T)  # (N, E)
    p.addmm_(k.T, a, alpha=-1)

    common = (g.average - g.target.sum(1)) / num_classes - 2 * g.moment * g.logit_mean  # γ₀
    along = twice.squeeze(1) * (g.x @ offset[:d]) + common.to(dtype)
    offset.copy_(mix.apply(offset) + along @ r)
    across = g.x @ u[:, :d].T  # (N, E)
    u.copy_(mix.apply(u)).addmm_(across.T, r * twice)

    mean.copy_(mix.apply(mean) + (g.average / num_classes) @ r.to(mean.dtype))
    half = torch.addmm(mix.apply(g.centred), inner_products(g, num_classes), r, alpha=0.5)
    grown = half.T @ r
    if mix.apply(mean) is not mean:
        gram.copy_(mix.apply(mix.apply(gram).T))
    gram.add_(grown).add_(grown.T)
    added: Tensor = g.target.to(dtype).unsqueeze(2) * k.unsqueeze(1)
    return added


def refined(factors: Factors) -> Factors:
    """P after a step of Newton's iteration, which takes its rounding errors to their squares."""
    u, p = factors.factor, factors.inverse
    return factors._replace(inverse=2 * p - p @ (u.T @ p))


def extremes(factors: Factors, watched: Tensor, look: int) -> tuple[Tensor, Tensor]:
    """Largest singular values of U and P, (2,), by two warm power iterations; the new vectors.

    A direction that once died out of a vector would never come back: each look mixes in another.
    """
    values, vectors = [], []
    e = watched.shape[1]
    places = torch.arange(1, e + 1, dtype=watched.dtype, device=watched.device)
    watched = watched + 0.1 * (2 / e) ** 0.5 * torch.cos(places * (look * 0.6180339887 % 1 * 6.2))
    for matrix, vector in zip((factors.factor, factors.inverse), watched, strict=True):
        for _ in range(2):
            image = matrix @ vector
            vector = matrix.T @ image
            vector = vector / torch.linalg.vector_norm(vector)
        values.append(torch.linalg.vector_norm(matrix @ vector))
        vectors.append(vector)
    return torch.stack(values), torch.stack(vectors)
