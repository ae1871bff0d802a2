"""autograd Functions around the ops: what is saved, what a backward gives away or recomputes.

x, w, b and the target are saved with ``save_for_backward`` and unpacked in every backward, so that
freed graphs, in-place edits and offload hooks behave as in PyTorch. One sweep has its gradients
before backward; the first backward scales these buffers in place and hands them out, a later one
computes them again. From a chunk that is kept every backward makes its own. Higher derivatives go
through `lossops.reference`, at the memory of the full logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from lossops import backends, ops, reference
from lossops.near_far import NearFar
from lossops.recipes import CrossEntropyTerms, cross_entropy_outputs, cross_entropy_rows
from lossops.schedules import (
    HALF_UNIT,
    Gradients,
    Head,
    Needs,
    flatten_none,
    kept_gradient,
    kept_sweep,
    power_of_two,
    row_stride,
    without_autocast,
)
from lossops.statistics import INDEX_OUTPUTS, outputs

Optional = Tensor | None
Value = Callable[[Tensor, Tensor, Optional, Optional], list[Tensor]]


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``, which has no annotations in torch."""
    return function.apply(*arguments)


Backward = TypeVar("Backward", bound=Callable[..., Any])


def differentiable_once(what: str) -> Callable[[Backward], Backward]:
    """Make a backward, which has no derivative of its own, refuse ``create_graph=True``.

    torch's ``once_differentiable`` refuses in a later ``backward`` alone: ``autograd.grad`` leaves
    its part out, and where the upstream gradient is a constant the result is one as well.
    """

    def decorated(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(f"{what} has first derivatives only, not for create_graph=True")
            return backward(ctx, *grads)

        return cast(Backward, run)

    return decorated


NO_GRADIENT = ("shift", *INDEX_OUTPUTS)


class LinearStatistics(torch.autograd.Function):
    """Statistics of a linear head; backward is the second sweep."""

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor,
        b: Optional,
        scale: Optional,
        target: Optional,
        class_vector: Optional,
        teacher: Optional,
        softcap: float,
        names: list[str],
        backend: str,
        near: NearFar,
    ) -> tuple[Tensor, ...]:
        head = (x, w, b, scale, softcap, target, class_vector, teacher, names)
        return tuple(torch.ops.lossops.linear_statistics(*head, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, softcap, names, backend, near = inputs
        ctx.static = (softcap, names, backend, near)
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(
            *(o for o, n in zip(output, outputs(names), strict=True) if n in NO_GRADIENT)
        )
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        names = ctx.static[1]
        saved = ctx.saved_tensors  # once: checkpoints refuse to unpack a tensor twice
        tensors, stats = saved[:7], saved[7:]
        coefficients = [
            None if n in NO_GRADIENT else g for g, n in zip(grads, outputs(names), strict=True)
        ]
        needs = list(ctx.needs_input_grad[:4])
        if not any(needs) or all(c is None for c in coefficients):
            return (None,) * 11
        if torch.compiler.is_compiling():  # compilers refuse a second derivative themselves
            x, w, b, scale, *rest = tensors
            softcap, _, backend, near = ctx.static
            head = (x, w, b, scale, softcap, *rest, names)
            found = torch.ops.lossops.linear_gradient(
                *head, list(stats), coefficients, needs, backend, *near
            )
        else:
            found = apply(StatisticsGradient, *tensors, *ctx.static, needs, *stats, *coefficients)
        kept = [g if wanted else None for g, wanted in zip(found, needs, strict=True)]
        kept[3] = like_scale(kept[3], tensors[3])
        return (*kept, *(None,) * 7)


class StatisticsGradient(torch.autograd.Function):
    """The second sweep; its own backward goes through the reference."""

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor,
        b: Optional,
        scale: Optional,
        target: Optional,
        class_vector: Optional,
        teacher: Optional,
        softcap: float,
        names: list[str],
        backend: str,
        near: NearFar,
        needs: list[bool],
        *tensors: Optional,
    ) -> tuple[Tensor, ...]:
        head = (x, w, b, scale, softcap, target, class_vector, teacher, names)
        count = len(tensors) // 2
        found: tuple[Tensor, ...] = torch.ops.lossops.linear_gradient(
            *head, list(tensors[:count]), list(tensors[count:]), needs, backend, *near
        )
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.static = inputs[7:12]
        ctx.tensors = len(inputs) - 12
        ctx.save_for_backward(*inputs[:7], *inputs[12:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Optional) -> tuple[Any, ...]:
        x, w, b, scale, target, class_vector, teacher, *rest = ctx.saved_tensors
        softcap, names, _, _, needs = ctx.static
        coefficients = rest[ctx.tensors // 2 :]
        order = outputs(names)

        def value(x: Tensor, w: Tensor, b: Optional, scale: Optional) -> list[Tensor]:
            found = reference.linear_statistics(
                x, w, b, scale, softcap, target, class_vector, teacher, names
            )
            kept = zip(found, coefficients, order, strict=True)
            return [f for f, c, n in kept if c is not None and n not in NO_GRADIENT]

        upstream = [c for c in coefficients if c is not None]
        inputs, again = differentiate_twice(value, (x, w, b, scale), upstream, cotangents, needs)
        found = iter(again)
        back = [None if c is None else next(found) for c in coefficients]
        return (*inputs, *(None,) * 8, *(None,) * (ctx.tensors // 2), *back)


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy in one sweep, with its gradients as further outputs."""

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor,
        b: Optional,
        scale: Optional,
        target: Optional,
        class_vector: Optional,
        teacher: Optional,
        nll: Optional,
        lse: Optional,
        smooth: Optional,
        taught: Optional,
        square: Optional,
        softcap: float,
        names: list[str],
        needs: list[bool],
        chunk_rows: int,
        backend: str,
        near: NearFar,
    ) -> tuple[Tensor, ...]:
        head = (x, w, b, scale, softcap, target, class_vector, teacher, names)
        terms = (nll, lse, smooth, taught, square)
        found: tuple[Tensor, ...] = torch.ops.lossops.linear_cross_entropy(
            *head, *terms, needs, chunk_rows, backend, *near
        )
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.static = inputs[12:]
        ctx.used = False
        ctx.save_for_backward(*inputs[:12], *output[2:6])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Optional, *_: Optional) -> tuple[Any, ...]:
        if g is None:
            return (None,) * 18
        saved = ctx.saved_tensors
        tensors, ready = saved[:12], saved[12:]
        x, w, b, scale, target, class_vector, teacher, *terms = tensors
        softcap, names, needs, chunk_rows, backend, near = ctx.static

        def sweep() -> tuple[Tensor, ...]:
            head = (x, w, b, scale, softcap, target, class_vector, teacher, names)
            found: tuple[Tensor, ...] = torch.ops.lossops.linear_cross_entropy(
                *head, *terms, needs, chunk_rows, backend, *near
            )
            return found[2:6]

        value = dense_cross_entropy(softcap, names, target, class_vector, teacher, terms)
        found = hand_out(ctx, (x, w, b, scale), needs, g, ready, sweep, value)
        return (*found, *(None,) * 14)


class KeptCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy whose backward finds the chunk of all rows; for no compiler."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        """As `LinearCrossEntropy`, with neither ``needs``, ``chunk_rows`` nor ``near``."""
        x, w, b, scale, target, class_vector, teacher, *terms, softcap, names, backend = inputs
        head = Head(x, w, b, scale, softcap, target, class_vector, teacher, names)
        call = ops.CrossEntropyCall.of(head, CrossEntropyTerms(*terms))
        primitives = backends.select(backend, x.device, x.dtype).primitives()
        with without_autocast(x.device):
            losses, chunk, stats, coefficients = kept_sweep(
                head, call.wanted, call.row_function, primitives, call.index
            )
        found = [losses.sum(), call.argmax, call.index, chunk, *stats, *coefficients]
        return tuple(flatten_none(found, x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.static = inputs[12:]
        ctx.save_for_backward(*inputs[:12], *output[2:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Optional, *_: Optional) -> tuple[Any, ...]:
        if g is None:
            return (None,) * 15
        saved = ctx.saved_tensors
        (x, w, b, scale, target, class_vector, teacher), terms = saved[:7], saved[7:12]
        index, chunk, *rest = saved[12:]
        softcap, names, backend = ctx.static
        head = Head(x, w, b, scale, softcap, target, class_vector, teacher, names)
        counted = index if chunk.numel() < len(x) * row_stride(len(w)) else None
        needs = ctx.needs_input_grad[:4]
        value = dense_cross_entropy(softcap, names, target, class_vector, teacher, terms)
        wanted = cross_entropy_outputs(names)
        found = hand_out_kept(head, wanted, chunk, rest, needs, backend, counted, g, value)
        return (*found, *(None,) * 11)


def dense_cross_entropy(
    softcap: float,
    names: list[str],
    target: Optional,
    class_vector: Optional,
    teacher: Optional,
    terms: Sequence[Optional],
) -> Value:
    """Summed cross-entropy through the reference, for derivatives of its gradient."""

    def value(x: Tensor, w: Tensor, b: Optional, scale: Optional) -> list[Tensor]:
        stats = reference.linear_statistics(
            x, w, b, scale, softcap, target, class_vector, teacher, names
        )
        found = dict(zip(outputs(names), stats, strict=True))
        factors = CrossEntropyTerms(*terms)
        return [cross_entropy_rows(found, factors, target, w.shape[0])[0].sum()]

    return value


def hand_out(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Optional, Optional],
    needs: Sequence[bool],
    g: Tensor,
    ready: Sequence[Tensor],
    sweep: Callable[[], Sequence[Tensor]],
    value: Value,
) -> tuple[Optional, ...]:
    """Gradients of one sweep times the upstream scalar g, for x, w, b and scale.

    The first plain backward scales the buffers in place; a later one runs ``sweep`` again;
    ``create_graph=True`` and compilers get new tensors.
    """
    if torch.compiler.is_compiling():
        return scaled(inputs, needs, g, ready, inplace=False)
    if torch.is_grad_enabled():
        buffers = sweep() if ctx.used else ready
        found: tuple[Optional, ...] = apply(ScaledGradients, value, needs, g, *inputs, *buffers)
        return found
    buffers = sweep() if ctx.used else ready
    ctx.used = True
    # A second backward finds `used` and never reads these buffers again; without `.data` it would
    # take an edit of the gradients handed out here for an edit of what was saved.
    return scaled(inputs, needs, g, [t.data for t in buffers], inplace=True)


class ScaledGradients(torch.autograd.Function):
    """Gradients of one sweep times g, differentiable again through the reference.

    A g with one value per row is in the buffers already.
    """

    @staticmethod
    def forward(
        value: Value, needs: Sequence[bool], g: Tensor, *tensors: Optional
    ) -> tuple[Optional, ...]:
        inputs, buffers = tensors[:4], tensors[4:]
        factor = g.new_ones(()) if g.ndim else g
        return scaled(inputs, needs, factor, buffers, inplace=False)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Optional, ...]) -> None:
        ctx.value, ctx.needs = inputs[:2]
        ctx.save_for_backward(*inputs[2:7])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Optional) -> tuple[Any, ...]:
        g, *inputs = ctx.saved_tensors
        found, again = differentiate_twice(ctx.value, inputs, [g], cotangents, ctx.needs)
        return (None, None, again[0], *found, *(None,) * 4)


def hand_out_kept(
    head: Head,
    wanted: Sequence[str],
    chunk: Tensor,
    rows: Sequence[Tensor],
    needs: Sequence[bool],
    backend: str,
    index: Optional,
    g: Tensor,
    value: Value,
) -> tuple[Optional, ...]:
    """Gradients for x, w, b and scale of what `kept_sweep` left, times the upstream scalar g.

    ``rows`` are its statistics and then its coefficients, empty for None, of the rows ``index``.
    The chunk is not used up: any backward is as good as the first.
    """
    x, scale = head.x, head.scale
    order = outputs(head.names)
    stats, given = rows[: len(order)], rows[len(order) :]
    primitives = backends.select(backend, x.device, x.dtype).primitives()

    def gradients(factor: Tensor, dtype: torch.dtype) -> Gradients:
        coefficients = [
            c * factor if o in wanted and c.numel() else None
            for c, o in zip(given, order, strict=True)
        ]
        with without_autocast(x.device):
            return kept_gradient(
                head, wanted, chunk, stats, coefficients, Needs(*needs), primitives, index, dtype
            )

    if torch.is_grad_enabled():
        ready = flatten_none(gradients(g.new_ones(()), g.dtype), x)
        found: tuple[Optional, ...] = apply(
            ScaledGradients, value, needs, g, x, head.w, head.b, scale, *ready
        )
        return found
    dx, dw, db, dscale = gradients(g, head.w.dtype)
    if dx is not None and scale is not None:
        dx *= scale.to(dx.dtype)
    return (None if dx is None else dx.to(x.dtype), dw, db, like_scale(dscale, scale))


def scaled(
    inputs: Sequence[Optional],
    needs: Sequence[bool],
    g: Tensor,
    buffers: Sequence[Tensor],
    *,
    inplace: bool,
) -> tuple[Optional, ...]:
    """Buffers times g (dx times g · scale), in the dtypes of x, w, b and scale."""
    scale = inputs[3]
    factors = Gradients(g if scale is None else g * scale.to(g.dtype), g, g, g)
    found: list[Optional] = []
    for t, wanted, factor, buffer in zip(inputs, needs, factors, buffers, strict=True):
        if not wanted or t is None:
            found.append(None)
            continue
        assert factor is not None
        product = buffer.mul_(factor) if inplace else buffer * factor
        found.append(product.to(t.dtype))
    found[3] = like_scale(found[3], scale)
    return tuple(found)


def like_scale(dscale: Optional, scale: Optional) -> Optional:
    """The gradient of the scale in the scale's dtype and shape."""
    return None if dscale is None or scale is None else dscale.to(scale.dtype).reshape(scale.shape)


def differentiate_twice(
    value: Value,
    inputs: Sequence[Optional],
    upstream: Sequence[Tensor],
    cotangents: Sequence[Optional],
    needs: Sequence[bool],
) -> tuple[list[Optional], list[Optional]]:
    """Backward of (inputs, upstream) -> gradients of Σ upstream · value(inputs), by autograd.

    Returns the gradients of ``inputs`` and of ``upstream``, differentiable again where asked.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(upstream[0].device):
        leaves = [
            None if t is None else alias(t, need) for t, need in zip(inputs, needs, strict=True)
        ]
        weights = [alias(u) for u in upstream]
        wanted = [t for t, need in zip(leaves, needs, strict=True) if t is not None and need]
        first = torch.autograd.grad(
            value(*leaves),  # type: ignore[arg-type]
            wanted,
            weights,
            create_graph=True,
            allow_unused=True,
        )
        given = [
            c for c, t, n in zip(cotangents, leaves, needs, strict=True) if t is not None and n
        ]
        pairs = [
            (f, c.to(f.dtype))
            for f, c in zip(first, given, strict=True)
            if f is not None and c is not None and f.requires_grad
        ]
        around = (*leaves, *weights)
        if not pairs:
            return [None] * len(leaves), [None] * len(weights)
        second = torch.autograd.grad(
            [f for f, _ in pairs],
            [t for t in around if t is not None and t.requires_grad],
            [c for _, c in pairs],
            create_graph=again,
            allow_unused=True,
        )
    found = iter(second)
    back = [None if t is None or not t.requires_grad else next(found) for t in around]
    return back[: len(leaves)], back[len(leaves) :]


def alias(t: Tensor, differentiated: bool = False) -> Tensor:
    """The same numbers as a node of their own, which leads back to what made them.

    Features made from the weight: a gradient for the weight's alias leaves theirs out.
    """
    if t.requires_grad:
        with torch.enable_grad():
            return t.view_as(t)
    return t.detach().requires_grad_() if differentiated else t


class LogitsStatistics(torch.autograd.Function):
    """Statistics of logits that exist; backward reads them again."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Optional,
        class_vector: Optional,
        teacher: Optional,
        names: list[str],
        backend: str,
    ) -> tuple[Tensor, ...]:
        spec = (logits, target, class_vector, teacher, names, backend)
        return tuple(torch.ops.lossops.logits_statistics(*spec))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, names, backend = inputs
        ctx.static = (names, backend)
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(
            *(o for o, n in zip(output, outputs(names), strict=True) if n in NO_GRADIENT)
        )
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        names, backend = ctx.static
        z, target, class_vector, teacher, *stats = ctx.saved_tensors
        pairs = zip(grads, outputs(names), strict=True)
        coefficients = [None if n in NO_GRADIENT else g for g, n in pairs]
        if all(c is None for c in coefficients):
            return (None,) * 6
        spec = (z, target, class_vector, teacher, names)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = reference.logits_statistics(*spec)
            used = [(f, c) for f, c in zip(found, coefficients, strict=True) if c is not None]
            values, weights = zip(*used, strict=True)
            dz = torch.autograd.grad(values, z, weights, create_graph=True)[0]
        else:
            dz = torch.ops.lossops.logits_gradient(*spec, stats, coefficients, backend)
        return (dz, *(None,) * 5)


class LogitsGradientInPlace(torch.autograd.Function):
    """Summed cross-entropy whose forward overwrites the logits with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Optional,
        class_vector: Optional,
        teacher: Optional,
        nll: Optional,
        lse: Optional,
        smooth: Optional,
        taught: Optional,
        square: Optional,
        names: list[str],
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        primitives = backends.select(backend, logits.device, logits.dtype).primitives()
        ops.check_target(target, logits.shape[1])
        spec = (target, class_vector, teacher, names)
        stats = primitives.logits_statistics(logits, *spec)
        order = outputs(names)
        losses, coefficients, argmax = cross_entropy_rows(
            dict(zip(order, stats, strict=True)),
            CrossEntropyTerms(nll, lse, smooth, taught, square),
            target,
            logits.shape[1],
        )
        ctx.gradient, ctx.unit = logits.detach(), None
        if logits.dtype == torch.float16:  # row weights of 1e5 overflow it, of 1e-7 vanish in it
            ctx.unit = HALF_UNIT / power_of_two(largest_slope(coefficients, class_vector, teacher))
            coefficients = {n: c * ctx.unit for n, c in coefficients.items()}
        given = [coefficients.get(n) for n in order]
        primitives.logits_gradient(ctx.gradient, *spec, stats, given, ctx.gradient)
        torch.autograd.graph.increment_version(logits)  # whoever saved the logits must notice
        argmax = logits.new_empty(0) if argmax is None else argmax
        ctx.mark_non_differentiable(argmax)
        return losses.sum(), argmax

    @staticmethod
    @differentiable_once("cross_entropy(inplace=True)")
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
        if ctx.gradient is None:
            raise RuntimeError(
                "cross_entropy(inplace=True) gave its gradient away in the first backward; "
                "a second one needs inplace=False"
            )
        dz, ctx.gradient = ctx.gradient, None
        return (dz.mul_(g if ctx.unit is None else g / ctx.unit), *(None,) * 10)


def largest_slope(
    coefficients: Mapping[str, Tensor], class_vector: Optional, teacher: Optional
) -> Tensor:
    """What no finite |dz| of cross-entropy exceeds, ()."""
    total = torch.zeros((), device=next(iter(coefficients.values())).device)
    for name, c in coefficients.items():
        bound = c.nan_to_num(0.0, 0.0, 0.0).abs().flatten()
        factors = {"weighted_sum": (class_vector,), "teacher": (class_vector, teacher)}
        for t in factors.get(name, ()):
            bound = bound if t is None else bound * t.abs().amax()
        total = total + bound.max() if bound.numel() else total
    return total
