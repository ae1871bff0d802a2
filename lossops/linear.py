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
from lossops.autograd import LinearStatistics, apply
from lossops.class_parallel import (
    at_targets,
    classes_of_all,
    local_ids,
    of_all,
    spread_head,
    with_near,
)
from lossops.inputs import (
    HeadInputs,
    check_devices,
    check_reduction,
    check_tensor,
    checked_options,
    class_columns,
    class_ids,
    class_weight,
    counted_rows,
    has_target,
    near_request,
    row_weight,
)
from lossops.loss_fn import Losses, LossSweep, UserLoss
from lossops.ops import check_target
from lossops.reference import accumulate_dtype
from lossops.schedules import (
    LinearLossOptions,
    chunk_size,
    kept_dtype,
    one_sweep_rows,
    row_stride,
    without_autocast,
)
from lossops.shards import Shards
from lossops.statistics import (
    INDEX_OUTPUTS,
    RowStatistics,
    canonical,
    outputs,
    smooth_outputs,
)

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
    near_threshold: float | str | None = None,
    class_group: Any = None,
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
        near_threshold: as in `linear_cross_entropy`; what a row is held against is the largest
            coefficient of all rows. Default: ``None``.
        class_group: as in `linear_cross_entropy`; ``class_vector`` and ``teacher`` have this rank's
            classes, ids and statistics (not ``"below_target"``) are of all. Default: ``None``.
        options: how it is computed. Default: ``None``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.

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
    head, shards = spread_head(
        input, linear_weight, linear_bias, logit_scale, softcap, class_group,
        {"class_vector": class_vector}, {"teacher": teacher},
    )  # fmt: skip
    check_two_sweeps(head, options)
    head = with_near(head, near_request(near_threshold, checked_options(options)), shards)
    check_devices(head.x, target=target)
    v, own = classes_of_all(head, shards), head.w.shape[0]
    several = target is not None and target.ndim == len(head.lead) + 1
    ids = None
    if target is not None:
        ids = class_ids(target, head.lead, v, ignore_index, several=True)
    if shards is not None:
        check_target(ids, v)
    taught = None
    if teacher is not None:
        taught = class_columns(teacher, head.lead, own, head.x, "teacher")
    listed = collected(names, target)
    stats = statistics_of_all(head, shards, ids, listed, class_vector, taught, backend)
    values = dict(stats.values)
    if ids is not None and not several:
        values["target"] = values["target"].squeeze(1)
    tail = ids.shape[1:] if several and ids is not None else ()
    shaped = {n: t.reshape(head.lead + (tail if n == "target" else ())) for n, t in values.items()}
    teacher_sum = None if stats.teacher_sum is None else stats.teacher_sum.reshape(head.lead)
    vector_sum = stats.class_vector_sum
    if vector_sum is not None and vector_sum.ndim:
        vector_sum = vector_sum.reshape(head.lead)
    return RowStatistics(shaped, v, vector_sum, teacher_sum)


def statistics_of_all(
    head: HeadInputs,
    shards: Shards | None,
    ids: Tensor | None,
    names: Sequence[str],
    class_vector: Tensor | None,
    teacher: Tensor | None,
    backend: str,
) -> RowStatistics:
    """As `head_statistics`, over the classes of all ranks; ids are of all classes."""
    here = ids if ids is None else local_ids(ids, shards)
    return of_all(head_statistics(head, here, names, class_vector, teacher, backend), shards)


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
    needed = {
        "weighted_sum": ("class_vector", a),
        "teacher": ("teacher", teacher),
        "below_target": ("target", ids),
    }
    for name, (argument, tensor) in needed.items():
        if name in names and tensor is None:
            raise ValueError(f"statistic {name!r} needs {argument}, got None; pass {argument}=")
    if teacher is not None and teacher.requires_grad:
        raise ValueError("teacher is not differentiated; pass teacher.detach()")
    chosen = chosen_backend(backend, head)
    found = apply(
        LinearStatistics,
        head.x,
        head.w,
        head.b,
        head.scale,
        ids,
        a,
        teacher,
        head.softcap,
        list(names),
        chosen,
        head.near,
    )
    values = dict(zip(outputs(names), found, strict=True))
    vector_sum = None if a is None else a.sum()
    teacher_sum = None if teacher is None else teacher_sums(teacher, a, acc)
    return RowStatistics(values, v, vector_sum, teacher_sum)


def teacher_sums(teacher: Tensor, class_vector: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Σ_j t_j a_j, (N,), in ``dtype``; differentiable."""
    t = teacher.to(dtype)
    with without_autocast(t.device):
        return t.sum(1) if class_vector is None else t @ class_vector


def collected(names: Sequence[str], target: Tensor | None) -> tuple[str, ...]:
    """Canonical names of one call: always with ``"target"`` where there is one, else never."""
    if isinstance(names, str):
        raise TypeError(f"names must be a sequence of names, got {names!r}; write ({names!r},)")
    others = [n for n in names if n != "target"]
    return canonical(others if target is None else [*others, "target"])


def chosen_backend(backend: str, head: HeadInputs, *, one_sweep: bool = False) -> str:
    """Name of the backend of a call."""
    order = backends.ONE_SWEEP if one_sweep else tuple(backends.BACKENDS)
    if head.near.on:
        order = tuple(name for name in backends.BACKENDS if name != "cuda")
    name = backends.select(backend, head.x.device, head.x.dtype, order).name
    if name == "cuda" and head.near.on:
        raise ValueError(
            "backend 'cuda' cannot run this call: it has no kernels for near_threshold; use "
            "'triton' or 'auto'"
        )
    return name


def check_two_sweeps(head: HeadInputs, options: LinearLossOptions | None) -> None:
    """Raise a ValueError where options ask for one sweep of what is known to take two."""
    wants = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (head.x, head.w, head.b, head.scale)
    )
    if checked_options(options).schedule == "one_sweep" and wants:
        raise ValueError(
            "schedule='one_sweep' needs a loss that is reduced here; what is returned row by row "
            "takes two sweeps: use schedule='auto'"
        )


def class_vector_checked(vector: Tensor | None, num_classes: int, like: Tensor) -> Tensor | None:
    """Class vector a (V,), refused if it wants a gradient."""
    return class_weight(vector, num_classes, like, "class_vector")


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
    near_threshold: float | str | None = None,
    class_group: Any = None,
    options: LinearLossOptions | None = None,
    backend: str = "auto",
) -> Tensor:
    """A fused loss of your own: any differentiable function of row statistics.

    loss = Σ_n u_n F(s_n) / Σ_n u_n,   u_n = sample_weight_n · weight[y_n], 0 for ignored rows

    Args:
        input: x, (..., D) floating point.
        linear_weight: w, (V, D).
        target: class ids (...), or (..., K) padded with -1, int64, or None for no target.
        loss_fn: ``loss_fn(stats, **row_inputs) -> (R,)``, from `RowStatistics` of R rows; with
            several targets ``stats.target`` is (R, K), -inf where there is none.
        names: statistics to collect. Default: ``('lse', 'target')``.
        row_inputs: tensors (..., *) sliced with the rows and passed by name. Default: ``None``.
        parameters: tensors ``loss_fn`` closes over that want a gradient. Default: ``()``.
        rowwise: whether F treats rows independently; if not it is called once on all rows, in
            two sweeps. Default: ``True``.
        linear_bias: b, (V,). Default: ``None``.
        weight: class weights, (V,), no gradient; for one target per row. Default: ``None``.
        sample_weight: row weights, (...). Default: ``None``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. Default: ``'mean'``.
        ignore_index: target id of ignored rows; None means -100. Of several targets, rows without
            any are ignored. Default: ``None``.
        logit_scale: factor of x·w, a number or a one-element tensor. Default: ``None``.
        softcap: logits become softcap·tanh(z / softcap). Default: ``None``.
        class_vector: a, (V,), for ``"weighted_sum"``; no gradient. Default: ``None``.
        near_threshold: as in `linear_cross_entropy`; what a row is held against is the largest
            coefficient of its chunk. Default: ``None``.
        class_group: as in `linear_cross_entropy`; ``weight`` and ``class_vector`` are those of this
            rank's classes. ``loss_fn`` sees the statistics of all classes, on every rank: it, its
            parameters and row inputs must be the same there, and so are their gradients.
            Default: ``None``.
        options: schedule and memory. Default: ``None``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.

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
    parameters = tuple(parameters)
    for i, p in enumerate(parameters):
        check_tensor(f"parameters[{i}]", p)
    head, shards = spread_head(
        input, linear_weight, linear_bias, logit_scale, softcap, class_group,
        {"weight": weight, "class_vector": class_vector},
    )  # fmt: skip
    head = with_near(head, near_request(near_threshold, checked_options(options)), shards)
    v, own, lead = classes_of_all(head, shards), head.w.shape[0], head.lead
    check_devices(head.x, target=target)
    ids = None if target is None else class_ids(target, lead, v, ignore_index, several=True)
    several = target is not None and target.ndim == len(lead) + 1
    if target is not None and several and weight is not None:
        raise ValueError(
            f"weight needs one target per row, got target of shape {tuple(target.shape)}; "
            "pass sample_weight"
        )
    if shards is not None:
        check_target(ids, v)
    row_weights = row_weight(sample_weight, lead, head.x)
    at = at_targets(class_weight(weight, own, head.x), ids, shards)
    u, divisor = row_factors(ids, row_weights, at, head.x)
    extra = _flat_rows(row_inputs or {}, lead, head.x)
    listed = collected(names, target)
    a = class_vector_checked(class_vector, own, head.x)

    def losses(values: Sequence[Tensor], rows: slice | Tensor, given: Sequence[Tensor]) -> Tensor:
        """u F of some rows; ignored rows feed F finite dummies and are cut."""
        stats = RowStatistics(dict(zip(outputs(listed), values, strict=True)), own,
                              None if a is None else a.sum())  # fmt: skip
        stats = of_all(stats, shards)
        named, active = dict(stats.values), None
        if ids is not None:
            active = has_target(ids[rows])
            if not several:
                named["target"] = named["target"].squeeze(1)
            named = {n: t if n in INDEX_OUTPUTS
                     else torch.where(active.unsqueeze(1) if t.ndim == 2 else active, t, 0.0)
                     for n, t in named.items()}  # fmt: skip
        with without_autocast(head.x.device):  # the same F in either schedule
            found = loss_fn(
                RowStatistics(named, v, stats.class_vector_sum),
                **dict(zip(extra, given, strict=False)),
            )
        check_tensor("what loss_fn returns", found)
        if found.shape != named["shift"].shape:
            raise ValueError(
                f"loss_fn must return one loss per row, shape {tuple(named['shift'].shape)}, "
                f"got {tuple(found.shape)}"
            )
        found = found if u is None else found * given[-1]
        return found if active is None else torch.where(active, found, 0.0)

    here = ids if ids is None else local_ids(ids, shards)
    found = swept_losses(
        head, here, listed, losses, class_vector=a, parameters=parameters,
        row_tensors=[*extra.values(), *([] if u is None else [u])], rowwise=rowwise,
        reduced=reduction != "none", options=options, backend=backend, counted=ids,
        num_classes=None if shards is None else max(shards.counts),
    )  # fmt: skip
    if reduction == "none":
        return found.reshape(lead)
    return found if reduction == "sum" else found / divisor


def swept_losses(
    head: HeadInputs,
    ids: Tensor | None,
    names: tuple[str, ...],
    losses: Losses,
    *,
    class_vector: Tensor | None = None,
    teacher: Tensor | None = None,
    parameters: Sequence[Tensor] = (),
    row_tensors: Sequence[Tensor] = (),
    rowwise: bool = True,
    reduced: bool,
    options: LinearLossOptions | None,
    backend: str,
    counted: Tensor | None,
    num_classes: int | None = None,
) -> Tensor:
    """Σ of the losses of all rows, in one sweep where that can be, or each of them (N,).

    Args:
        head: checked inputs.
        ids: targets (N, K), which are no negatives; None for none.
        names: canonical names of the statistics.
        losses: the loss of some rows.
        class_vector: a (V,). Default: ``None``.
        teacher: t (N, V). Default: ``None``.
        parameters: tensors that ``losses`` closes over. Default: ``()``.
        row_tensors: tensors (N, ...) handed to ``losses`` by rows; differentiable. Default: ``()``.
        rowwise: False for a loss that must see all rows at once. Default: ``True``.
        reduced: whether a sum is wanted.
        options: schedule and memory.
        backend: who computes.
        counted: ids (N, K) of which rows with none have loss 0; None where all rows count.
        num_classes: classes to plan chunks for, where other processes must plan the same ones; None
            for those of the head. Default: ``None``.
    """
    opts = checked_options(options)
    diff = (head.x, head.w, head.b, head.scale)
    wants = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (*diff, *parameters, *row_tensors)
    )
    rows, kept = None, False
    if (
        wants and rowwise and reduced and not torch.compiler.is_compiling()
        # torch.func wraps what loss_fn closes over, out of sight of the gradient of one sweep.
        and not torch._C._are_functorch_transforms_active()
    ):  # fmt: skip
        kept = num_classes is None and keeps_one_chunk(head, opts, names, backend)
        rows = head.x.shape[0] if kept else planned_rows(head, opts, names, backend, num_classes)
    if opts.schedule == "one_sweep" and wants and rows is None:
        raise ValueError(
            "schedule='one_sweep' needs rowwise=True, reduction 'mean' or 'sum', and neither "
            "torch.compile nor torch.func; use schedule='auto'"
        )
    chosen = chosen_backend(backend, head, one_sweep=rows is not None)
    if rows is not None:
        once = list({id(p): p for p in parameters}.values())  # given twice it would count twice
        index = counted_rows(counted)
        sweep = LossSweep(
            head, ids, class_vector, teacher, names, losses, once, row_tensors, index, rows,
            kept, chosen,
        )  # fmt: skip
        total: Tensor | None = apply(UserLoss, sweep, *diff, *once, *row_tensors)[0]
        if total is not None:
            return total
    stats = head_statistics(head, ids, names, class_vector, teacher, chosen)
    each = losses(list(stats.values.values()), slice(None), row_tensors)
    return each.sum() if reduced else each


def _flat_rows(
    row_inputs: Mapping[str, Tensor], lead: torch.Size, input: Tensor
) -> dict[str, Tensor]:
    """Row inputs with their leading dims flattened to (N, *)."""
    for name, t in row_inputs.items():
        check_tensor(f"row_inputs[{name!r}]", t)
        if t.shape[: len(lead)] != lead:
            raise ValueError(
                f"row_inputs[{name!r}] must have the leading dims of input, {tuple(lead)}, "
                f"got shape {tuple(t.shape)}"
            )
    check_devices(input, **row_inputs)
    return {
        name: t.flatten(0, len(lead) - 1) if lead else t.unsqueeze(0)
        for name, t in row_inputs.items()
    }


def row_factors(
    ids: Tensor | None, row_weights: Tensor | None, at_target: Tensor | None, x: Tensor
) -> tuple[Tensor | None, Tensor]:
    """u_n = sample_weight · weight[y] (None for 1), and its sum over counted rows, inf where 0."""
    u = row_weights
    if at_target is not None:
        u = at_target if u is None else u * at_target
    if ids is not None:
        counted = has_target(ids)
        ones = counted.to(accumulate_dtype(x.dtype))
        total = (ones if u is None else torch.where(counted, u, 0.0)).sum()
    elif u is not None:
        total = u.sum()
    else:
        total = torch.full((), float(x.shape[0]), dtype=accumulate_dtype(x.dtype),
                           device=x.device)  # fmt: skip
    return u, torch.where(total == 0, torch.inf, total)  # nothing to average: loss and gradients 0


def reduced(losses: Tensor, divisor: Tensor, reduction: str, lead: torch.Size) -> Tensor:
    """Losses (N,) reduced as asked."""
    if reduction == "none":
        return losses.reshape(lead)
    total = losses.sum()
    return total if reduction == "sum" else total / divisor


def rounds_chunks(head: HeadInputs, names: Sequence[str], backend: str) -> bool:
    """Whether a chunk of logits is kept in 16 bits."""
    chosen = chosen_backend(backend, head, one_sweep=True)
    return (
        backends.rounds_products(chosen, head.x.dtype, head.x.shape[1])
        and not head.near.on
        and kept_dtype(head.softcap, names, smooth_outputs(names)) is not None
    )


def keeps_one_chunk(
    head: HeadInputs,
    options: LinearLossOptions,
    names: Sequence[str],
    backend: str,
) -> bool:
    """Whether the gradients of one sweep can wait for backward: its one chunk of all rows must be
    within what chunks and a float32 dw would take. Arguments as of `planned_rows`.
    """
    if options.schedule == "two_sweeps" or options.chunk_rows is not None:
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if not any(t is not None and t.requires_grad for t in (head.x, head.w, head.b, head.scale)):
        return False  # nothing waits
    (n, d), v = head.x.shape, head.w.shape[0]
    spared = 4 * d * v if head.w.requires_grad else 0
    most = min(chunk_size(head.x.device).bytes + spared, options.max_workspace_bytes)
    size = torch.bfloat16.itemsize * n * row_stride(v)
    return 0 < size <= most and rounds_chunks(head, names, backend)


def planned_rows(
    head: HeadInputs,
    options: LinearLossOptions,
    names: Sequence[str],
    backend: str,
    num_classes: int | None = None,
) -> int | None:
    """Rows per chunk where this head runs in one sweep, None where in two.

    Args:
        head: checked inputs.
        options: schedule and memory.
        names: statistics.
        backend: who would compute.
        num_classes: as in `swept_losses`. Default: ``None``.
    """
    n, v = head.x.shape[0], num_classes or head.w.shape[0]
    if options.schedule == "two_sweeps":
        return None
    if options.chunk_rows is not None:
        return options.chunk_rows
    rounded = rounds_chunks(head, names, backend)
    rows = one_sweep_rows(
        head.x, v, head.w.requires_grad, options.max_workspace_bytes,
        torch.bfloat16 if rounded else None,
    )  # fmt: skip
    if rows is None and options.schedule == "one_sweep":
        return -(-n // max(1, -(-n // 128))) or 1  # asked for: about 128 rows at a time
    return rows
