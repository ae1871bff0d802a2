"""Margins of a softmax over cosines: what the target's cosine becomes before it is scaled.

    z_y = s ψ(cos θ_y),   z_j = s cos θ_j for the other classes

Past the angle at which θ + m reaches π, where cos(θ + m) would rise again, ψ goes on as a line,
unless told otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CosFace:
    """ψ(c) = c - m.

    Args:
        scale: s, the factor of the cosines. Default: ``64.0``.
        margin: m. Default: ``0.4``.
        filter_above: other classes whose cosine is above it have the logit 0 and no gradient, as
            they may be the same class under another label; None for none. Default: ``None``.

    Example:
        >>> import torch, lossops
        >>> lossops.CosFace()(torch.tensor([0.9, 0.1]))
        tensor([ 0.5000, -0.3000])

    Reference:
        Wang and others, "CosFace: large margin cosine loss for deep face recognition", 2018,
        arXiv 1801.09414.
    """

    scale: float = 64.0
    margin: float = 0.4
    filter_above: float | None = None

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def __call__(self, cosine: Tensor) -> Tensor:
        """ψ of the targets' cosines."""
        return cosine - self.margin


@dataclass(frozen=True)
class ArcFace:
    """ψ(cos θ) = cos(θ + m), and cos θ - m sin m where θ + m > π.

    Args:
        scale: s, the factor of the cosines. Default: ``64.0``.
        margin: m in [0, π). Default: ``0.5``.
        straight_through: take ψ' = 1, as widely used code does, for the true derivative
            sin(θ + m) / sin θ. Default: ``False``.
        filter_above: as in `CosFace`. Default: ``None``.
        guard: whether the line is there; False for cos(θ + m) everywhere, which rewards targets
            beyond that angle for going further, as in the authors' PyTorch code. Default: ``True``.

    Example:
        >>> import torch, lossops
        >>> lossops.ArcFace()(torch.tensor([1.0, 0.6, -1.0]))
        tensor([ 0.8776,  0.1430, -1.2397])

    Reference:
        Deng and others, "ArcFace: additive angular margin loss for deep face recognition", 2019,
        arXiv 1801.07698.
    """

    scale: float = 64.0
    margin: float = 0.5
    straight_through: bool = False
    filter_above: float | None = None
    guard: bool = True

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        _check_angle("margin", self.margin)

    def __call__(self, cosine: Tensor) -> Tensor:
        """ψ of the targets' cosines."""
        return _angular(cosine, 1.0, self.margin, 0.0, self.straight_through, self.guard)


@dataclass(frozen=True)
class CombinedMargin:
    """ψ(cos θ) = cos(m1 θ + m2) - m3, and a falling line where m1 θ + m2 > π.

    The line is cos θ - m2 sin m2 - m3 for m1 = 1, as of `ArcFace`; else it has slope 1 in cos θ and
    meets the curve.

    Args:
        scale: s, the factor of the cosines. Default: ``64.0``.
        m1: factor of the angle, at least 1. Default: ``1.0``.
        m2: added to the angle, in [0, π). Default: ``0.0``.
        m3: taken from the cosine. Default: ``0.0``.
        straight_through: take ψ' = 1. Default: ``False``.
        filter_above: as in `CosFace`. Default: ``None``.

    Example:
        >>> import torch, lossops
        >>> lossops.CombinedMargin(m2=0.3, m3=0.2)(torch.tensor([0.6]))
        tensor([0.1368])
    """

    scale: float = 64.0
    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0
    straight_through: bool = False
    filter_above: float | None = None

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        _check_angle("m2", self.m2)
        if self.m1 < 1:
            raise ValueError(f"m1 must be at least 1, got {self.m1}")

    def __call__(self, cosine: Tensor) -> Tensor:
        """ψ of the targets' cosines."""
        return _angular(cosine, self.m1, self.m2, self.m3, self.straight_through)


Margin = CosFace | ArcFace | CombinedMargin


def _angular(
    cosine: Tensor, m1: float, m2: float, m3: float, straight_through: bool, guard: bool = True
) -> Tensor:
    if straight_through:
        with torch.no_grad():
            moved = _angular(cosine, m1, m2, m3, False, guard) - cosine
        return cosine + moved
    inside = cosine.abs() < 1  # at the ends the derivative of the angle is infinite
    c = torch.where(inside, cosine, 0.0)
    if m1 == 1:
        sine = ((1 - c) * (1 + c)).sqrt()
        ends = cosine.clamp(-1.0, 1.0) * math.cos(m2)
        bent = torch.where(inside, c * math.cos(m2) - sine * math.sin(m2), ends)
        beyond = cosine - m2 * math.sin(m2)
        limit = -math.cos(m2)
    else:
        angle = torch.where(inside, torch.acos(c), torch.where(cosine > 0, 0.0, math.pi))
        bent = torch.cos(m1 * angle + m2)
        limit = math.cos((math.pi - m2) / m1)
        beyond = cosine - limit - 1
    return (torch.where(cosine > limit, bent, beyond) if guard else bent) - m3


def _check_scale(scale: float) -> None:
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")


def _check_angle(name: str, angle: float) -> None:
    if not 0 <= angle < math.pi:
        raise ValueError(f"{name} must be in [0, π), got {angle}")
