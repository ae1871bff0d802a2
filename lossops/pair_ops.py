"""torch.library ops of losses over pairs, as those of `lossops.ops`; no autograd here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lossops import backends, reference_pairs
from lossops.binary import Binary, positive, positive_slope
from lossops.ops import check_target, in_full_precision, library
from lossops.reference import PRODUCT, accumulate_dtype, row_blocks
from lossops.schedules import flatten_none

library.define(
    "linear_binary_loss(Tensor x, Tensor w, Tensor? b, Tensor? scale, Tensor? target, "
    "Tensor? weight, Tensor? pos_weight, Tensor? negative_factor, Tensor? factor, str kind, "
    "float[] numbers, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "linear_pair_statistics(Tensor x, Tensor w, Tensor? scale, Tensor? target, str backend)"
    " -> Tensor[]"
)
library.define(
    "linear_pair_gradient(Tensor x, Tensor w, Tensor? scale, Tensor? target, Tensor[] statistics, "
    "Tensor?[] coefficients, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)"
)


def primitives(backend: str, x: Tensor) -> Any:
    """The module with the primitives of `lossops.reference_pairs`."""
    chosen = backends.select(backend, x.device, x.dtype)
    return reference_pairs if chosen.name == "reference" else chosen.primitives()


def _linear_binary_loss(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    target: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    negative_factor: Tensor | None,
    factor: Tensor | None,
    kind: str,
    numbers: list[float],
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    """Losses (N,) and the gradients of Σ factor · losses; dx before the scale."""
    check_target(target, w.shape[0])
    loss, acc = Binary.of(kind, numbers), accumulate_dtype(x.dtype)
    want_x, want_w, want_b, want_scale = needs
    positives = at_target = None
    if target is not None:
        z = reference_pairs.target_logits(x, w, b, scale, target)
        counted = reference_pairs.positive_factor(target, weight, pos_weight, acc)
        positives = (positive(loss, z) * counted).sum(1)
        at_target = positive_slope(loss, z) * counted
        at_target = at_target if factor is None else at_target * factor.unsqueeze(1)
    row_factor = factor
    if negative_factor is not None:
        row_factor = negative_factor if factor is None else factor * negative_factor
    shape = tuple(x.shape)
    dx = x.new_empty(shape, dtype=acc) if want_x or want_scale else None
    dw = w.new_empty(tuple(w.shape), dtype=acc) if want_w else None
    db = w.new_empty(w.shape[0], dtype=acc) if want_b and b is not None else None
    losses = primitives(backend, x).linear_binary(
        x, w, b, scale, target, weight, kind, loss.negative_parameters, row_factor, at_target,
        dx, dw, db,
    )  # fmt: skip
    if negative_factor is not None:
        losses = losses * negative_factor
    if positives is not None:
        losses = losses + positives
    dscale = inner(x, dx) if want_scale and dx is not None else None
    return (losses, *flatten_none([dx if want_x else None, dw, db, dscale], x))


def inner(x: Tensor, dx: Tensor) -> Tensor:
    """Σ x · dx in the dtype of dx, summed by blocks of rows."""
    blocks = row_blocks(x.shape[0], x.shape[1], PRODUCT // 4)
    return torch.stack([(x[rows].to(dx.dtype) * dx[rows]).sum() for rows in blocks]).sum()


def _linear_pair_statistics(
    x: Tensor, w: Tensor, scale: Tensor | None, target: Tensor | None, backend: str
) -> list[Tensor]:
    check_target(target, w.shape[0])
    found: list[Tensor] = primitives(backend, x).linear_pair_statistics(x, w, scale, target)
    return found


def _linear_pair_gradient(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    target: Tensor | None,
    statistics: list[Tensor],
    coefficients: list[Tensor | None],
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    want_x, want_w, want_scale = needs
    acc = accumulate_dtype(x.dtype)
    dx = x.new_empty(tuple(x.shape), dtype=acc) if want_x or want_scale else None
    dw = torch.empty_like(w, memory_format=torch.contiguous_format) if want_w else None
    primitives(backend, x).linear_pair_gradient(
        x, w, scale, target, statistics, coefficients, dx, dw
    )
    dscale = inner(x, dx) if want_scale and dx is not None else None
    if dx is not None and scale is not None:
        dx *= scale.to(acc)
    return tuple(
        flatten_none([dx.to(x.dtype) if want_x and dx is not None else None, dw, dscale], x)
    )


def _fake_linear_binary_loss(x: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    acc, needs = accumulate_dtype(x.dtype), rest[-2]
    shapes = (x.shape, w.shape, (w.shape[0],), ())
    found = [x.new_empty(x.shape[0], dtype=acc)]
    for shape, need in zip(shapes, needs, strict=True):
        found.append(x.new_empty(shape, dtype=acc) if need else x.new_empty(0))
    return tuple(found)


def _fake_linear_pair_statistics(
    x: Tensor, w: Tensor, scale: Tensor | None, target: Tensor | None, backend: str
) -> list[Tensor]:
    n, v, k = x.shape[0], w.shape[0], 0 if target is None else target.shape[1]
    shapes: Sequence[Any] = ((n,), (n,), (v,), (v,), (n, k))
    return [x.new_empty(shape, dtype=accumulate_dtype(x.dtype)) for shape in shapes]


def _fake_linear_pair_gradient(x: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    want_x, want_w, want_scale = rest[-2]
    acc = accumulate_dtype(x.dtype)
    return (
        x.new_empty(x.shape if want_x else 0),
        w.new_empty(w.shape if want_w else 0),
        x.new_empty((), dtype=acc) if want_scale else x.new_empty(0),
    )


for _name, _implementation, _fake in (
    ("linear_binary_loss", _linear_binary_loss, _fake_linear_binary_loss),
    ("linear_pair_statistics", _linear_pair_statistics, _fake_linear_pair_statistics),
    ("linear_pair_gradient", _linear_pair_gradient, _fake_linear_pair_gradient),
):
    library.impl(_name, in_full_precision(_implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lossops::{_name}", _fake, lib=library)
