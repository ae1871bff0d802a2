"""Rows of a table picked by id, in plain PyTorch: normalised on the way out, updated in place.

table (V, D), ids (S,) int64. Updates take distinct ids, and gradients (S, D) of those rows:

    sgd      g ← g + λ w      v ← μ v + g      w ← w - η v
    adamw    m ← β₁ m + (1 - β₁) g      v ← β₂ v + (1 - β₂) g²      k ← k + 1
             w ← (1 - η λ) w - η m̂ / (√v̂ + ε),   m̂ = m / (1 - β₁ᵏ),   v̂ = v / (1 - β₂ᵏ)

with k the updates of that row. Everything is computed in the accumulate dtype and rounded once.
"""

from __future__ import annotations

from torch import Tensor

from lossops.reference import accumulate_dtype


def normalized_rows(table: Tensor, ids: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """w / n (S, D) in the dtype of the table, and n = max(‖w‖, eps) (S,)."""
    rows = table[ids].to(accumulate_dtype(table.dtype))
    norms = rows.norm(dim=1).clamp_min(eps)
    return (rows / norms.unsqueeze(1)).to(table.dtype), norms


def normalized_rows_gradient(rows: Tensor, norms: Tensor, gradient: Tensor) -> Tensor:
    """(g - (g·u) u) / n for normalised rows u, (S, D)."""
    u, g = rows.to(norms.dtype), gradient.to(norms.dtype)
    found = (g - (g * u).sum(1, keepdim=True) * u) / norms.unsqueeze(1)
    return found.to(rows.dtype)


def sgd_rows(
    table: Tensor,
    velocity: Tensor | None,
    ids: Tensor,
    gradient: Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """One step of SGD on the rows ``ids``; ``velocity`` (V, D) where there is momentum."""
    acc = accumulate_dtype(table.dtype)
    w = table[ids].to(acc)
    v = gradient.to(acc) + weight_decay * w
    if velocity is not None:
        v += momentum * velocity[ids].to(acc)
        velocity[ids] = v.to(velocity.dtype)
    table[ids] = (w - lr * v).to(table.dtype)


def adamw_rows(
    table: Tensor,
    mean: Tensor,
    square: Tensor,
    count: Tensor,
    ids: Tensor,
    gradient: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW on the rows ``ids``; ``mean``, ``square`` (V, D), ``count`` (V,) int32."""
    acc = accumulate_dtype(table.dtype)
    w, g = table[ids].to(acc), gradient.to(acc)
    m = beta1 * mean[ids].to(acc) + (1 - beta1) * g
    v = beta2 * square[ids].to(acc) + (1 - beta2) * g.square()
    count[ids] += 1
    k = count[ids].unsqueeze(1).double()
    m_hat, v_hat = m / (1 - beta1**k), v / (1 - beta2**k)
    table[ids] = ((1 - lr * weight_decay) * w - lr * m_hat / (v_hat.sqrt() + eps)).to(table.dtype)
    mean[ids], square[ids] = m.to(mean.dtype), v.to(square.dtype)
