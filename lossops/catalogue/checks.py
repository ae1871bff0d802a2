"""Checks of recipes' own arguments; a number that is a tensor is taken as it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lossops.inputs import check_tensor, is_ignored


def at_least(name: str, value: float | Tensor, least: float) -> None:
    """Raise unless the number is finite and not below ``least``."""
    if not isinstance(value, Tensor) and not least <= value < math.inf:
        raise ValueError(f"{name} must be at least {least:g} and finite, got {value}")


def above(name: str, value: float | Tensor, least: float) -> None:
    """Raise unless the number is finite and above ``least``."""
    if not isinstance(value, Tensor) and not least < value < math.inf:
        raise ValueError(f"{name} must be above {least:g} and finite, got {value}")


def between(name: str, value: float | Tensor, least: float, most: float) -> None:
    """Raise unless the number is in [least, most]."""
    if not isinstance(value, Tensor) and not least <= value <= most:
        raise ValueError(f"{name} must be in [{least:g}, {most:g}], got {value}")


def share(name: str, value: float | Tensor) -> None:
    """Raise unless the number is in [0, 1)."""
    if not isinstance(value, Tensor) and not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def among(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless it is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def constant(name: str, t: Tensor) -> Tensor:
    """``t``, refused where it wants a gradient that it would not get."""
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} is not differentiated, but wants a gradient; detach it")
    return t.detach()


def beside_target(target: Tensor, name: str, others: Tensor, ignore_index: int | None) -> Tensor:
    """Ids (..., 1 + K): the target, then ``others`` (..., K); all -1 in rows that are ignored."""
    for said, t in (("target", target), (name, others)):
        check_tensor(said, t)
    if others.ndim != target.ndim + 1 or others.shape[:-1] != target.shape:
        raise ValueError(
            f"{name} must have shape {(*target.shape, 'K')}, padded with -1, got "
            f"{tuple(others.shape)}"
        )
    ignored = is_ignored(target, ignore_index)
    listed = torch.cat([target.unsqueeze(-1), others], -1)
    return listed.masked_fill(ignored.unsqueeze(-1), -1)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 with gradient 0 where b is 0: a loss over the one class there is."""
    nothing = b == 0
    return torch.where(nothing, 0.0, a / torch.where(nothing, 1.0, b))
