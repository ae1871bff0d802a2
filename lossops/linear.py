"""Losses and statistics of a linear head whose logits are never all stored.

    z = softcap · tanh((logit_scale · x wᵀ + b) / softcap)     loss_n = F(statistics of row n)

`linear_statistics` returns the statistics, differentiable, for any loss of your own (two sweeps).
`linear_loss` takes F itself and computes its gradient in one sweep where it can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lossops import backends
from lossops.autograd import Value, hand_out
from lossops.autograd import LinearStatistics as _LinearStatistics
from lossops.inputs import HeadInputs, check_reduction, class_ids, class_weight, head_inputs, row_weight
from lossops.ops import check_target
from lossops.reference import accumulate_dtype, linear_statistics as reference_statistics
from lossops.schedules import Head, LinearLossOptions, Needs, one_sweep, one_sweep_rows
from lossops.statistics import INDEX_OUTPUTS, RowStatistics, canonical, outputs

LossFunction = Callable[..., Tensor]


def linear_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    names: Sequence[str] = ("lse", "target"),
    linear_bias: Tensor | None = None,
    class_vector: Tensor | None = None,
    teacher: Tensor | None = None,
    ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None,
    softcap: float | None = None,
    options: LinearLossOptions | None = None,
    backend: str = "auto",
) -> RowStatistics:
    """Row statistics of the logits ``input @ linear_weight.T``, differentiable.

    s_n = Σ_j or extreme_j of z_nj, with z never stored; ∂L/∂z_nj = Σ_k ∂L/∂s_k · basis_k(z_nj)

    Args:
        input: x, (..., D) floating point.
        linear_weight: w, (V, D).
        target: class ids (...), or (..., K) padded with -1, int64; None for no target.
            Default: ``None``.
        names: statistics to collect, of ``lossops.statistics.STATISTICS`` or ``"lse@t"``.
            ``"target"`` is left out where there is no target. Default: ``('lse', 'target')``.
        linear_bias: b, (V,). Default: ``None``.
        class_vector: a, (V,), for ``"weighted_sum"`` and ``"teacher"``; no gradient.
            Default: ``None``.
        teacher: t, (..., V), for ``"teacher"``; no gradient. Default: ``None``.
        ignore_index: target id of rows without a target; None means -100. Default: ``None``.
        logit_scale: factor of x·w, a number or a tensor with one element, differentiable.
            Default: ``None``.
        softcap: logits become softcap·tanh(z / softcap). Default: ``None``.
        options: how it is computed. Default: ``None``.
        backend: ``"auto"``, ``"cpp"`` or ``"reference"``. Default: ``'auto'``.

    Returns:
        RowStatistics with one value per row, shape (...), float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Forward 1 GEMM, backward 3; memory 4·N·D bytes for dx of half-precision inputs and a tile.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 8), torch.randn(100, 8)
        >>> s = lossops.linear_statistics(x, w, names=("lse", "sumsq"))
        >>> torch.allclose(s.lse, (x @ w.T).logsumexp(1), atol=1e-5)
        True
    """
    head = head_inputs(input, linear_weight, linear_bias, logit_scale, softcap)
    v = linear_weight.shape[0]
    several = target is not None and target.ndim == len(head.lead) + 1
    ids = None
    if target is not None:
        ids = class_ids(target, head.lead, v, ignore_index, several=True)
    listed = canonical(n for n in names if target is not None or n != "target")
    if target is not None and "target" not in listed:
        listed = canonical([*listed, "target"])
    stats = head_statistics(
        head, ids, listed, class_vector, None if teacher is None else teacher.flatten(0, -2), backend
    )
    values = dict(stats.values)
    if ids is not None and not several:
        values["target"] = values["target"].squeeze(1)
    tail = ids.shape[1:] if several and ids is not None else ()
    shaped = {
        n: t.reshape(head.lead + (tail if n == "target" else ())) for n, t in values.items()
    }
    teacher_sum = None if stats.teacher_sum is None else stats.teacher_sum.reshape(head.lead)
    return RowStatistics(shaped, v, stats.class_vector_sum, teacher_sum)


def head_statistics(
    head: HeadInputs,
    ids: Tensor | None,
    names: Sequence[str],
    class_vector: Tensor | None,
    teacher: Tensor | None,
    backend: str,
) -> RowStatistics:
    """Statistics of flattened inputs, differentiable: rows (N,), ``target`` (N, K)."""
    v = head.w.shape[0]
    acc = accumulate_dtype(head.x.dtype)
    a = class_vector_checked(class_vector, v, head.x)
    needed = {"weighted_sum": a, "teacher": teacher, "below_target": ids, "target": ids}
    for name in names:
        if name in needed and needed[name] is None:
            raise ValueError(f"statistic {name!r} needs its tensor, got None; see names=")
    if teacher is not None:
        if teacher.shape != (head.x.shape[0], v):
            raise ValueError(
                f"teacher must have shape {(*head.lead, v)}, got {tuple(teacher.shape)} flattened"
            )
        if teacher.requires_grad:
            raise ValueError("teacher is not differentiated; pass teacher.detach()")
    chosen = backends.select(backend, head.x.device, head.x.dtype).name
    found = _LinearStatistics.apply(
        head.x, head.w, head.b, head.scale, ids, a, teacher, head.softcap, list(names), chosen
    )
    values = dict(zip(outputs(names), found, strict=True))
    vector_sum = None if a is None else a.sum()
    teacher_sum = None
    if teacher is not None:
        weights = teacher.new_ones(v, dtype=acc) if a is None else a
        teacher_sum = teacher.to(acc) @ weights
    return RowStatistics(values, v, vector_sum, teacher_sum)


def class_vector_checked(vector: Tensor | None, num_classes: int, like: Tensor) -> Tensor | None:
    """Class vector a (V,), refused if it wants a gradient."""
    a = class_weight(vector, num_classes, like)
    if a is not None and a.requires_grad:
        raise ValueError("class_vector is not differentiated; pass class_vector.detach()")
    return a


def linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    loss_fn: LossFunction,
    *,
    names: Sequence[str] = ("lse", "target"),
    row_inputs: Mapping[str, Tensor] | None = None,
    parameters: Sequence[Tensor] = (),
    rowwise: bool = True,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None,
    softcap: float | None = None,
    class_vector: Tensor | None = None,
    options: LinearLossOptions | None = None,
    backend: str = "auto",
) -> Tensor:
    """A fused loss of your own: any differentiable function of row statistics.

    loss = Σ_n u_n F(s_n) / Σ_n u_n,   u_n = sample_weight_n · weight[y_n], 0 for ignored rows

    Args:
        input: x, (..., D) floating point.
        linear_weight: w, (V, D).
        target: class ids (...), int64, or None for no target.
        loss_fn: ``loss_fn(stats, **row_inputs) -> (R,)``, from `RowStatistics` of R rows.
        names: statistics to collect. Default: ``('lse', 'target')``.
        row_inputs: tensors (..., *) sliced with the rows and passed by name. Default: ``None``.
        parameters: tensors ``loss_fn`` closes over that want a gradient. Default: ``()``.
        rowwise: whether F treats rows independently; if not it is called once on all rows, in
            two sweeps. Default: ``True``.
        linear_bias: b, (V,). Default: ``None``.
        weight: class weights, (V,), no gradient. Default: ``None``.
        sample_weight: row weights, (...). Default: ``None``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. Default: ``'mean'``.
        ignore_index: target id of ignored rows; None means -100. Default: ``None``.
        logit_scale: factor of x·w, a number or a one-element tensor. Default: ``None``.
        softcap: logits become softcap·tanh(z / softcap). Default: ``None``.
        class_vector: a, (V,), for ``"weighted_sum"``; no gradient. Default: ``None``.
        options: schedule and memory. Default: ``None``.
        backend: ``"auto"``, ``"cpp"`` or ``"reference"``. Default: ``'auto'``.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Under ``torch.compile``, with ``reduction="none"``, ``create_graph`` or a ``loss_fn`` that
        closes over tensors wanting a gradient which are not in ``parameters``: two sweeps.

    Example:
        >>> import torch, lossops
        >>> def focal(s):  # -(1 - p)² log p
        ...     return -(2 * s.log_1mp).exp() * s.log_p
        >>> x, w = torch.randn(4, 8, requires_grad=True), torch.randn(100, 8)
        >>> lossops.linear_loss(x, w, torch.tensor([1, 2, 3, 4]), focal).backward()
        >>> x.grad.shape
        torch.Size([4, 8])
    """
    check_reduction(reduction)
    opts = options or LinearLossOptions()
    head = head_inputs(input, linear_weight, linear_bias, logit_scale, softcap)
    v, lead = linear_weight.shape[0], head.lead
    ids = None if target is None else class_ids(target, lead, v, ignore_index)
    row_weights = row_weight(sample_weight, lead, head.x)
    u, divisor = row_factors(ids, row_weights, class_weight(weight, v, head.x), head)
    extra = {k: t.flatten(0, len(lead) - 1) if lead else t.unsqueeze(0)
             for k, t in (row_inputs or {}).items()}  # fmt: skip
    listed = canonical(n for n in names if target is not None or n != "target")
    if target is not None and "target" not in listed:
        listed = canonical([*listed, "target"])
    a = class_vector_checked(class_vector, v, head.x)

    def losses(values: Sequence[Tensor], rows: slice | Tensor) -> Tensor:
        """u F of some rows; ignored rows feed F finite dummies and are cut."""
        named = dict(zip(outputs(listed), values, strict=True))
        active = None
        if ids is not None:
            named["target"] = named["target"].squeeze(1)
            active = ids[rows, 0] >= 0
            named = {n: t if n in INDEX_OUTPUTS else torch.where(active, t, 0.0)
                     for n, t in named.items()}  # fmt: skip
        found = loss_fn(
            RowStatistics(named, v, None if a is None else a.sum()),
            **{k: t[rows] for k, t in extra.items()},
        )
        if found.shape != named["shift"].shape:
            raise ValueError(
                f"loss_fn must return one loss per row, shape {tuple(named['shift'].shape)}, "
                f"got {tuple(found.shape)}"
            )
        found = found if u is None else found * u[rows]
        return found if active is None else torch.where(active, found, 0.0)

    diff = (head.x, head.w, head.b, head.scale)
    wants = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (*diff, *parameters)
    )
    rows = None
    if (
        wants and rowwise and reduction != "none" and not torch.compiler.is_compiling()
        and not any(t.requires_grad for t in (*extra.values(), *([] if u is None else [u])))
    ):  # fmt: skip
        rows = planned_rows(head, opts)
    if opts.schedule == "one_sweep" and wants and rows is None:
        raise ValueError("this call cannot run in one sweep; use schedule='auto'")
    chosen = backends.select(backend, head.x.device, head.x.dtype).name
    if rows is not None:
        static = _Sweep(head, ids, a, listed, losses, tuple(parameters), rows, chosen)
        total = _UserLoss.apply(static, *diff, *parameters)[0]
        if total is not None:
            return total if reduction == "sum" else total / divisor
    stats = head_statistics(head, ids, listed, a, None, chosen)
    each = losses(list(stats.values.values()), slice(None))
    return reduced(each, divisor, reduction, lead)


def row_factors(
    ids: Tensor | None, row_weights: Tensor | None, weight: Tensor | None, head: HeadInputs
) -> tuple[Tensor | None, Tensor]:
    """u_n = sample_weight · weight[y] (None for 1), and its sum over counted rows, 1 where 0."""
    u = row_weights
    if ids is not None and weight is not None:
        at = weight[ids[:, 0].clamp(0, weight.shape[0] - 1)]
        u = at if u is None else u * at
    if ids is not None:
        counted = (ids[:, 0] >= 0).to(accumulate_dtype(head.x.dtype))
        total = (counted if u is None else torch.where(ids[:, 0] >= 0, u, 0.0)).sum()
    elif u is not None:
        total = u.sum()
    else:
        total = torch.full((), float(head.x.shape[0]), dtype=accumulate_dtype(head.x.dtype),
                           device=head.x.device)  # fmt: skip
    return u, torch.where(total == 0, 1.0, total)


def reduced(losses: Tensor, divisor: Tensor, reduction: str, lead: torch.Size) -> Tensor:
    """Losses (N,) reduced as asked."""
    if reduction == "none":
        return losses.reshape(lead)
    total = losses.sum()
    return total if reduction == "sum" else total / divisor


def planned_rows(head: HeadInputs, options: LinearLossOptions) -> int | None:
    """Rows per chunk where this head runs in one sweep, None where in two."""
    n, v = head.x.shape[0], head.w.shape[0]
    if options.schedule == "two_sweeps":
        return None
    if options.chunk_rows is not None:
        return options.chunk_rows
    rows = one_sweep_rows(
        n, head.x.shape[1], v, head.x.dtype, head.w.requires_grad, options.max_workspace_bytes
    )
    if rows is None and options.schedule == "one_sweep":
        return 1 + (n - 1) // max(1, -(-n // 128))  # asked for: about 128 rows at a time
    return rows


class _Sweep:
    """One sweep of a user's loss: what its forward, and a second backward, run."""

    def __init__(
        self,
        head: HeadInputs,
        ids: Tensor | None,
        class_vector: Tensor | None,
        names: tuple[str, ...],
        losses: Callable[[Sequence[Tensor], slice | Tensor], Tensor],
        parameters: tuple[Tensor, ...],
        rows: int,
        backend: str,
    ) -> None:
        self.ids, self.class_vector, self.names = ids, class_vector, names
        self.losses, self.softcap = losses, head.softcap
        self.rows, self.backend = rows, backend
        self.known = {id(p) for p in parameters}
        needs = [t is not None and t.requires_grad for t in (head.x, head.w, head.b, head.scale)]
        self.needs = Needs(*needs)

    def run(self, x: Tensor, w: Tensor, b: Any, scale: Any, *parameters: Tensor) -> list[Any]:
        """Total loss, dx, dw, db, dscale and the parameters' gradients; [None] to take two sweeps."""
        check_target(self.ids, w.shape[0])
        head = Head(x, w, b, scale, self.softcap, self.ids, self.class_vector, None, self.names)
        order = outputs(self.names)
        smooth = [i for i, n in enumerate(order) if n != "shift" and n not in INDEX_OUTPUTS]
        sums = [torch.zeros_like(p) for p in parameters]
        foreign = False

        def row_function(
            stats: list[Tensor], rows: slice | Tensor
        ) -> tuple[Tensor, list[Tensor | None]]:
            nonlocal foreign
            with torch.enable_grad():
                leaves = [stats[i].detach().requires_grad_() for i in smooth]
                given = list(stats)
                for i, leaf in zip(smooth, leaves, strict=True):
                    given[i] = leaf
                losses = self.losses(given, rows)
                if _reaches_others(losses, {*map(id, leaves), *self.known}):
                    foreign = True
                    raise _TwoSweepsError
                wanted = [p for p in parameters if p.requires_grad]
                found = (
                    torch.autograd.grad(losses.sum(), [*leaves, *wanted], allow_unused=True)
                    if losses.requires_grad
                    else [None] * (len(leaves) + len(wanted))
                )
            coefficients: list[Tensor | None] = [None] * len(order)
            for i, c in zip(smooth, found, strict=False):
                coefficients[i] = c
            following = iter(found[len(leaves) :])
            for total, p in zip(sums, parameters, strict=True):
                if p.requires_grad and (grad := next(following)) is not None:
                    total += grad
            return losses.detach(), coefficients

        primitives = backends.select(self.backend, x.device, x.dtype).primitives()
        wanted = [n for n in order if n != "shift" and n not in INDEX_OUTPUTS]
        try:
            losses, grads = one_sweep(head, wanted, row_function, self.needs, primitives, self.rows)
        except _TwoSweepsError:
            return [None]
        return [losses.sum(), *(x.new_empty(0) if g is None else g for g in grads), *sums]


class _TwoSweepsError(Exception):
    """loss_fn closes over a tensor that wants a gradient and is not among its parameters."""


def _reaches_others(losses: Tensor, known: set[int]) -> bool:
    """Whether the graph of ``losses`` reaches a leaf that is not among ``known``."""
    pending, seen = [losses.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            return True
        pending.extend(following for following, _ in node.next_functions)
    return False


class _UserLoss(torch.autograd.Function):
    """Summed loss of a user's F in one sweep, with its gradients as further outputs."""

    @staticmethod
    def forward(sweep: _Sweep, *tensors: Tensor) -> tuple[Any, ...]:
        return tuple(sweep.run(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.sweep, ctx.used = inputs[0], False
        if output[0] is None:
            return
        ctx.count = len(inputs)
        ctx.save_for_backward(*inputs[1:], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Any, ...]:
        sweep, count = ctx.sweep, ctx.count
        if g is None:
            return (None,) * count
        inputs, ready = ctx.saved_tensors[: count - 1], ctx.saved_tensors[count - 1 :]
        if torch.is_grad_enabled() and len(inputs) > 4:
            raise NotImplementedError(
                "second derivatives with `parameters` are not supported in one sweep; "
                "pass options=LinearLossOptions(schedule='two_sweeps')"
            )

        def value(x: Tensor, w: Tensor, b: Any, scale: Any) -> list[Tensor]:
            stats = reference_statistics(
                x, w, b, scale, sweep.softcap, sweep.ids, sweep.class_vector, None, sweep.names
            )
            return [sweep.losses(stats, slice(None)).sum()]

        def again() -> Sequence[Tensor]:
            return sweep.run(*inputs)[1:]

        if ctx.used:
            ready = again()
        value_of: Value = value
        grads = hand_out(ctx, inputs[:4], sweep.needs, g, ready[:4], lambda: ready[:4], value_of)
        return (None, *grads, *(g * p for p in ready[4:]))
