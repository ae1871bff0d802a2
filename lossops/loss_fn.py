"""One sweep of a loss the user wrote: F runs on each chunk's statistics, under autograd.

F sees R rows of statistics as leaves; its gradients there are the coefficients of dz. Nothing else
of the graph is kept. Where one chunk of all rows is, as of `schedules.kept_sweep`, the gradients of
the head wait for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lossops import backends, reference
from lossops.autograd import alias, apply, hand_out, hand_out_kept
from lossops.inputs import HeadInputs
from lossops.near_far_sweep import any_one_sweep
from lossops.ops import check_target
from lossops.schedules import Head, Needs, flatten_none, kept_sweep, without_autocast
from lossops.statistics import outputs, smooth_outputs

Losses = Callable[[Sequence[Tensor], "slice | Tensor", Sequence[Tensor]], Tensor]
"""Losses (R,) from statistics of some rows, which rows these are, and their row tensors."""
Value = Callable[..., list[Tensor]]


class LossSweep:
    """One sweep of a user's loss: what its forward runs, and a second backward where nothing is
    kept.
    """

    def __init__(
        self,
        head: HeadInputs,
        ids: Tensor | None,
        class_vector: Tensor | None,
        teacher: Tensor | None,
        names: tuple[str, ...],
        losses: Losses,
        parameters: Sequence[Tensor],
        row_tensors: Sequence[Tensor],
        index: Tensor | None,
        rows: int,
        kept: bool,
        backend: str,
    ) -> None:
        self.ids, self.names, self.losses, self.near = ids, names, losses, head.near
        self.fixed = (head.softcap, ids, class_vector, teacher, names)
        self.operands = [t for t in (class_vector, teacher) if t is not None]
        self.rows, self.kept, self.backend, self.parameters = rows, kept, backend, parameters
        self.row_tensors, self.index = row_tensors, index
        self.known = {id(p) for p in parameters}
        self.made_by = {p.grad_fn for p in parameters if p.grad_fn is not None}
        needs = [t is not None and t.requires_grad for t in (head.x, head.w, head.b, head.scale)]
        self.needs = Needs(*needs)

    def run(self, x: Tensor, w: Tensor, b: Any, scale: Any) -> list[Any]:
        """Total loss and gradients of x, w, b, scale, parameters and row tensors.

        Where the chunk is kept, it, its statistics and its coefficients stand for those of x, w, b
        and scale. [None] to take two sweeps.
        """
        check_target(self.ids, w.shape[0])
        head = Head(x, w, b, scale, *self.fixed)
        order = outputs(self.names)
        collected = smooth_outputs(self.names)
        smooth = [order.index(n) for n in collected]
        parameters = self.parameters  # those F holds; unpacked by hooks they would be copies
        sums = [torch.zeros_like(p) for p in parameters]
        by_row = [torch.zeros_like(t) for t in self.row_tensors]

        def row_function(
            stats: list[Tensor], rows: slice | Tensor
        ) -> tuple[Tensor, list[Tensor | None]]:
            with torch.enable_grad():
                leaves = [stats[i].detach().requires_grad_() for i in smooth]
                given = list(stats)
                for i, leaf in zip(smooth, leaves, strict=True):
                    given[i] = leaf
                own = [t.detach()[rows].requires_grad_(t.requires_grad) for t in self.row_tensors]
                losses = self.losses(given, rows, own)
                if _reaches_others(losses, {*map(id, (*leaves, *own)), *self.known}, self.made_by):
                    raise _TwoSweepsError
                wanted = [t for t in (*leaves, *parameters, *own) if t.requires_grad]
                found = (
                    # What loss_fn closes over may have a graph that every chunk goes back through.
                    torch.autograd.grad(losses.sum(), wanted, allow_unused=True, retain_graph=True)
                    if losses.requires_grad
                    else [None] * len(wanted)
                )
            coefficients: list[Tensor | None] = [None] * len(order)
            for i, c in zip(smooth, found, strict=False):
                coefficients[i] = c
            following = iter(found[len(leaves) :])
            for total, p in zip(sums, parameters, strict=True):
                if p.requires_grad and (grad := next(following)) is not None:
                    total += grad
            for total, t in zip(by_row, self.row_tensors, strict=True):
                if t.requires_grad and (grad := next(following)) is not None:
                    total[rows] = grad
            return losses.detach(), coefficients

        primitives = backends.select(self.backend, x.device, x.dtype).primitives()
        try:
            with without_autocast(x.device):
                if self.kept:
                    losses, chunk, stats, coefficients = kept_sweep(
                        head, collected, row_function, primitives, self.index
                    )
                    ready: Sequence[Any] = [chunk, *stats, *coefficients]
                else:
                    losses, ready, _ = any_one_sweep(
                        head, collected, row_function, self.needs, primitives, self.rows,
                        self.index, self.near, None,
                    )  # fmt: skip
        except _TwoSweepsError:
            return [None]
        return [losses.sum(), *flatten_none(ready, x), *sums, *by_row]

    def hand_out(
        self, x: Tensor, w: Tensor, b: Any, scale: Any, kept: Sequence[Tensor], g: Tensor,
        value: Value,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Gradients of x, w, b and scale, times g, from what `run` kept for them."""
        head = Head(x, w, b, scale, *self.fixed)
        wanted, needs = smooth_outputs(self.names), self.needs
        return hand_out_kept(
            head, wanted, kept[0], kept[1:], needs, self.backend, self.index, g, value
        )


class _TwoSweepsError(Exception):
    """loss_fn closes over a tensor that wants a gradient and is not among its parameters."""


def _reaches_others(losses: Tensor, known: set[int], made_by: set[Any]) -> bool:
    """Whether the graph of ``losses`` reaches a leaf that is not among ``known``.

    It ends at the nodes ``made_by`` which known parameters that are no leaves came about.
    """
    pending, seen = [losses.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen or node in made_by:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            return True
        pending.extend(following for following, _ in node.next_functions)
    return False


class ReferenceGradients(torch.autograd.Function):
    """Gradients of one sweep with parameters or row tensors, differentiable again, by autograd.

    All but the parameters, which F closes over, are stood in for: features computed from the weight
    must not count twice.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Value, sweep: LossSweep, g: Tensor, *tensors: Tensor | None
    ) -> tuple[Any, ...]:
        ctx.value, ctx.sweep = value, sweep
        ctx.save_for_backward(g, *tensors)
        ctx.set_materialize_grads(False)
        return tuple(_first(value, sweep, tensors, g, create_graph=False)[1])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        g, *tensors = ctx.saved_tensors
        again, upstream = torch.is_grad_enabled(), alias(g, True)
        leaves, first = _first(ctx.value, ctx.sweep, tensors, upstream, create_graph=True)
        pairs = zip(first, cotangents, strict=True)
        used = [(f, c) for f, c in pairs if f is not None and c is not None and f.requires_grad]
        given = (upstream, *leaves)
        if not used:
            return (None,) * (2 + len(given))
        wanted = [t for t in given if t is not None and t.requires_grad]
        values, weights = zip(*used, strict=True)
        options = {"create_graph": again, "allow_unused": True}
        found = iter(torch.autograd.grad(values, wanted, weights, **options))
        back = [None if t is None or not t.requires_grad else next(found) for t in given]
        return (None, None, *back)


def _first(
    value: Value, sweep: LossSweep, tensors: Sequence[Any], g: Tensor, *, create_graph: bool
) -> tuple[list[Any], list[Any]]:
    """What stands for the tensors, and the gradients of g · value for those that want one."""
    count = len(sweep.parameters)
    with torch.enable_grad(), without_autocast(g.device):
        leaves = [None if t is None else alias(t) for t in tensors]
        leaves[4 : 4 + count] = sweep.parameters
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        total = value(*leaves[:4], leaves[4 + count :])
        options = {"create_graph": create_graph, "allow_unused": True}
        found = iter(torch.autograd.grad(total, wanted, [g], **options))
    return leaves, [None if t is None or not t.requires_grad else next(found) for t in leaves]


class UserLoss(torch.autograd.Function):
    """Summed loss of a user's F in one sweep; its gradients, or what they come from, are further
    outputs.
    """

    @staticmethod
    def forward(sweep: LossSweep, *tensors: Tensor) -> tuple[Any, ...]:
        return tuple(sweep.run(*tensors[:4]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.sweep, ctx.used = inputs[0], False
        if output[0] is None:
            return
        ctx.count = len(inputs)
        # The operands are saved for their versions: an edit before backward is an error.
        ctx.save_for_backward(*inputs[1:], *output[1:], *ctx.sweep.operands)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Any, ...]:
        sweep: LossSweep = ctx.sweep
        count: int = ctx.count
        if g is None:
            return (None,) * count
        saved = ctx.saved_tensors
        inputs, ready = saved[: count - 1], saved[count - 1 : len(saved) - len(sweep.operands)]

        def value(
            x: Tensor, w: Tensor, b: Any, scale: Any, by_row: Sequence[Tensor] = sweep.row_tensors
        ) -> list[Tensor]:
            stats = reference.linear_statistics(x, w, b, scale, *sweep.fixed)
            return [sweep.losses(stats, slice(None), by_row).sum()]

        if torch.is_grad_enabled() and len(inputs) > 4:
            return (None, *apply(ReferenceGradients, value, sweep, g, *inputs))

        kept = 1 + 2 * len(outputs(sweep.names)) if sweep.kept else 4
        ready, own = ready[:kept], ready[kept:]
        if sweep.kept:
            x, w, b, scale = inputs[:4]
            grads = sweep.hand_out(x, w, b, scale, ready, g, value)
            return (None, *grads, *(g * p for p in own))

        def again() -> Sequence[Tensor]:
            found: Sequence[Tensor] = sweep.run(*inputs[:4])[1:5]
            return found

        grads = hand_out(ctx, inputs[:4], sweep.needs, g, ready, again, value)
        return (None, *grads, *(g * p for p in own))
