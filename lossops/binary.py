"""Losses that are sums over single logits: what a negative and a positive logit add.

    loss_i = n_i Σ_{j ∉ P_i} a_j φ(z_ij) + Σ_{j ∈ P_i} a_j p_j ψ(z_ij)

    kind         φ(z)                                          ψ(z)
    sigmoid      softplus(z)                                   softplus(-z)
    hinge        max(z - margin, 0)                            max(1 - z, 0)
    asymmetric   -m^γ⁻ log(1 - m), m = max(σ(z) - clip, 0)     -σ(-z)^γ⁺ log σ(z)
    gumbel       -log(1 - η), η = exp(-e^{-z}), z up to margin    min(e^{-z}, 20)

Each once differentiable, and once as its derivative in closed form, which is what a sweep uses.
Where ``detached``, the focusing factors m^γ⁻ and σ(-z)^γ⁺ are constants of the gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GUMBEL_MOST = 20.0
"""The largest loss of a positive of the kind "gumbel"."""


class Binary(NamedTuple):
    """One of the losses above; `negative_parameters` is what a sweep over negatives needs."""

    kind: str = "sigmoid"
    margin: float = 0.0
    gamma_neg: float = 0.0
    gamma_pos: float = 0.0
    clip: float = 0.0
    detached: bool = False

    @classmethod
    def of(cls, kind: str, numbers: list[float]) -> Binary:
        """From what a library op takes: the kind and five numbers."""
        margin, gamma_neg, gamma_pos, clip, detached = numbers
        return cls(kind, margin, gamma_neg, gamma_pos, clip, bool(detached))

    @property
    def numbers(self) -> list[float]:
        """What `of` takes beside the kind."""
        return [self.margin, self.gamma_neg, self.gamma_pos, self.clip, float(self.detached)]

    @property
    def negative_parameters(self) -> list[float]:
        """The parameters of φ, in the order of the primitives."""
        if self.kind == "sigmoid":
            return []
        if self.kind in ("hinge", "gumbel"):
            return [self.margin]
        return [self.gamma_neg, self.clip, float(self.detached)]


def negative(kind: str, parameters: list[float], z: Tensor) -> Tensor:
    """φ(z), differentiable, 0 at -inf."""
    if kind == "sigmoid":
        return softplus(z)
    if kind == "hinge":
        return (z - parameters[0]).relu()
    if kind == "gumbel":
        u, eta = _gumbel(z, parameters[0])
        near = u < 0.7  # either branch is exact
        rest = torch.where(near, -torch.expm1(-u), 1.0)
        return -torch.where(near, rest.log(), torch.log1p(-torch.where(near, 0.0, eta)))
    gamma, clip, detached = parameters
    m = torch.sigmoid(z) - clip
    kept = m > 0
    focus = torch.where(kept, m, 1.0) ** gamma
    value = (focus.detach() if detached else focus) * -_log_rest(z, clip)
    return torch.where(kept | m.isnan(), value, 0.0)


def negative_slope(kind: str, parameters: list[float], z: Tensor) -> Tensor:
    """φ'(z)."""
    if kind == "sigmoid":
        return torch.sigmoid(z)
    if kind == "hinge":
        above = z - parameters[0]
        return torch.where(above > 0, 1.0, above.clamp_min(0.0) * 0.0)  # NaN stays NaN
    if kind == "gumbel":
        u, eta = _gumbel(z, parameters[0])
        return torch.where(z > parameters[0], 0.0, u * eta / -torch.expm1(-u))
    gamma, clip, detached = parameters
    p, q = torch.sigmoid(z), torch.sigmoid(-z)
    m = p - clip
    kept = m > 0
    safe = torch.where(kept, m, 1.0)
    slope = safe**gamma * (p if clip == 0 else p * q / (q + clip).clamp_max(1.0))
    if not detached and gamma != 0:
        slope = slope - gamma * safe ** (gamma - 1) * p * q * _log_rest(z, clip)
    return torch.where(kept | m.isnan(), slope, 0.0)


def positive(loss: Binary, z: Tensor) -> Tensor:
    """ψ(z), differentiable."""
    if loss.kind == "hinge":
        return (1 - z).relu()
    if loss.kind == "gumbel":
        return (-z.clamp_max(loss.margin)).exp().clamp_max(GUMBEL_MOST)
    value = softplus(-z)
    if loss.kind == "sigmoid" or loss.gamma_pos == 0:
        return value
    focus = torch.sigmoid(-z) ** loss.gamma_pos
    return (focus.detach() if loss.detached else focus) * value


def positive_slope(loss: Binary, z: Tensor) -> Tensor:
    """ψ'(z)."""
    if loss.kind == "hinge":
        return torch.where(z < 1, -1.0, (1 - z).clamp_min(0.0) * 0.0)
    if loss.kind == "gumbel":
        value = (-z).exp()
        flat = (z > loss.margin) | (value > GUMBEL_MOST)
        return torch.where(flat, 0.0, -value)
    q = torch.sigmoid(-z)
    if loss.kind == "sigmoid" or loss.gamma_pos == 0:
        return -q
    slope = -(q ** (loss.gamma_pos + 1))
    if not loss.detached:
        slope = slope - loss.gamma_pos * q**loss.gamma_pos * torch.sigmoid(z) * softplus(-z)
    return slope


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z): `torch.nn.functional.softplus` is the identity from 20 on."""
    return F.softplus(z, threshold=50)


def _gumbel(z: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """u = e^{-z} and η = e^{-u}; below -7 η is 0 in any dtype."""
    u = (-z.clamp(-7.0, most)).exp()
    return u, (-u).exp()


def _log_rest(z: Tensor, clip: float) -> Tensor:
    """log(1 - m); with no clip that of σ(-z) itself, which would underflow."""
    if clip == 0:
        return -softplus(z)
    return torch.log((torch.sigmoid(-z) + clip).clamp_max(1.0))
