"""autograd Functions of losses over pairs: what is saved, and what a backward computes again.

A sum over single logits has its gradients before backward, in one visit of each tile, and hands
them out as `lossops.autograd` does; row by row its backward visits the tiles again. Row and column
log-sums are the two sweeps of `lossops.autograd.LinearStatistics`, with both sums in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lossops import backends, reference_pairs
from lossops import pair_ops as pair_ops  # registers the ops
from lossops.autograd import ScaledGradients, apply, differentiate_twice, hand_out, like_scale
from lossops.autograd import scaled as scaled_gradients
from lossops.binary import Binary
from lossops.inputs import HeadInputs

Optional = Tensor | None


def binary_loss(
    head: HeadInputs,
    target: Optional,
    loss: Binary,
    *,
    weight: Optional = None,
    pos_weight: Optional = None,
    negative_factor: Optional = None,
    factor: Optional = None,
    reduced: bool,
    backend: str,
) -> Tensor:
    """Σ_i f_i loss_i as a scalar, or where not ``reduced`` the losses (N,), times f if given.

    Args:
        head: checked inputs; the bias is b (V,).
        target: positives (N, K), -1 where there is none; None for no positives at all.
        loss: which.
        weight: a (V,). Default: ``None``.
        pos_weight: p (V,). Default: ``None``.
        negative_factor: n (N,). Default: ``None``.
        factor: f (N,), differentiated only where not reduced. Default: ``None``.
        reduced: whether a scalar is wanted.
        backend: who computes.
    """
    diff = (head.x, head.w, head.b, head.scale)
    chosen = backends.select(backend, head.x.device, head.x.dtype).name
    once = reduced and not (factor is not None and factor.requires_grad)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in diff]
    found: Tensor = apply(
        BinaryLoss, *diff, target, weight, pos_weight, negative_factor, factor if once else None,
        loss.kind, loss.numbers, needs, once, chosen,
    )[0]  # fmt: skip
    if once:
        return found
    found = found if factor is None else found * factor
    return found.sum() if reduced else found


class BinaryLoss(torch.autograd.Function):
    """Losses of `lossops.binary`: their weighted sum with its gradients, or row by row."""

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor,
        b: Optional,
        scale: Optional,
        target: Optional,
        weight: Optional,
        pos_weight: Optional,
        negative_factor: Optional,
        factor: Optional,
        kind: str,
        numbers: list[float],
        needs: list[bool],
        reduced: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        spec = (target, weight, pos_weight, negative_factor)
        losses, *gradients = torch.ops.lossops.linear_binary_loss(
            x, w, b, scale, *spec, factor, kind, numbers, needs if reduced else [False] * 4, backend
        )
        if not reduced:
            return (losses,)
        total = (losses if factor is None else losses * factor).sum()
        return (total, *gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.static = inputs[9:]
        ctx.used = False
        ctx.save_for_backward(*inputs[:9], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Optional, *_: Optional) -> tuple[Any, ...]:
        if g is None:
            return (None,) * 14
        saved = ctx.saved_tensors
        tensors, ready = saved[:9], saved[9:]
        *inputs, target, weight, pos_weight, negative_factor, factor = tensors
        kind, numbers, needs, reduced, backend = ctx.static

        def sweep(row_factor: Optional) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = torch.ops.lossops.linear_binary_loss(
                *tensors[:8], row_factor, kind, numbers, needs, backend
            )
            return found[1:]

        def value(x: Tensor, w: Tensor, b: Optional, scale: Optional) -> list[Tensor]:
            losses = reference_pairs.binary_losses(
                x, w, b, scale, target, weight, pos_weight, negative_factor,
                Binary.of(kind, numbers),
            )  # fmt: skip
            if not reduced:
                return [losses]
            return [(losses if factor is None else losses * factor).sum()]

        given = (inputs[0], inputs[1], inputs[2], inputs[3])
        if reduced:
            found = hand_out(ctx, given, needs, g, ready, lambda: sweep(factor), value)
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with torch.no_grad():
                buffers = sweep(g)
            found = apply(ScaledGradients, value, needs, g, *given, *buffers)
        else:
            one = g.new_ones(())
            found = scaled_gradients(given, needs, one, sweep(g), inplace=False)
        return (*found, *(None,) * 10)


class PairStatistics(torch.autograd.Function):
    """Log-sums of rows and columns; backward computes the tiles again."""

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, scale: Optional, target: Optional, backend: str
    ) -> tuple[Tensor, ...]:
        return tuple(torch.ops.lossops.linear_pair_statistics(x, w, scale, target, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.backend = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[0], output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        (x, w, scale, target), statistics = saved[:4], saved[4:]
        coefficients = [grads[1], grads[3], grads[4]]
        needs = list(ctx.needs_input_grad[:3])
        if not any(needs) or all(c is None for c in coefficients):
            return (None,) * 5
        if torch.compiler.is_compiling():
            found = torch.ops.lossops.linear_pair_gradient(
                x, w, scale, target, list(statistics), coefficients, needs, ctx.backend
            )
        else:
            found = apply(
                PairGradient, x, w, scale, target, ctx.backend, needs, *statistics, *coefficients
            )
        kept = [g if wanted else None for g, wanted in zip(found, needs, strict=True)]
        kept[2] = like_scale(kept[2], scale)
        return (*kept, None, None)


class PairGradient(torch.autograd.Function):
    """The second sweep of `PairStatistics`; its own backward goes through the reference."""

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor,
        scale: Optional,
        target: Optional,
        backend: str,
        needs: list[bool],
        *tensors: Optional,
    ) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.ops.lossops.linear_pair_gradient(
            x, w, scale, target, list(tensors[:5]), list(tensors[5:]), needs, backend
        )
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.needs = inputs[5]
        ctx.save_for_backward(*inputs[:4], *inputs[11:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Optional) -> tuple[Any, ...]:
        x, w, scale, target, *coefficients = ctx.saved_tensors

        def value(x: Tensor, w: Tensor, _: Optional, scale: Optional) -> list[Tensor]:
            found = reference_pairs.linear_pair_statistics(x, w, scale, target)
            pairs = zip((found[1], found[3], found[4]), coefficients, strict=True)
            return [f for f, c in pairs if c is not None]

        upstream = [c for c in coefficients if c is not None]
        needs = [*ctx.needs[:2], False, ctx.needs[2]]
        given: Sequence[Optional] = (*cotangents[:2], None, cotangents[2])
        inputs, again = differentiate_twice(value, (x, w, None, scale), upstream, given, needs)
        found = iter(again)
        back = [None if c is None else next(found) for c in coefficients]
        return (inputs[0], inputs[1], inputs[3], *(None,) * 8, *back)
