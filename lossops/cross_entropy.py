"""Cross-entropy over many classes, from a linear head or from logits that exist.

    loss_n = -log softmax(z_n)[y_n],  z = softcap · tanh((logit_scale · x wᵀ + b) / softcap)

with class weights, label smoothing, class probabilities as targets and a penalty on logsumexp²;
the formulas and their gradients are in `lossops.recipes`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions

from lossops import backends, reference
from lossops.autograd import (
    KeptCrossEntropy,
    LinearCrossEntropy,
    LogitsGradientInPlace,
    LogitsStatistics,
    apply,
)
from lossops.class_parallel import (
    at_targets,
    classes_of_all,
    local_ids,
    of_all,
    spread_head,
    sum_of_all,
    with_near,
)
from lossops.distributed import summed
from lossops.inputs import (
    HeadInputs,
    check_devices,
    check_number,
    check_reduction,
    check_tensor,
    checked_options,
    class_columns,
    class_ids,
    class_weight,
    flat_logits,
    head_inputs,
    near_request,
    row_weight,
)
from lossops.linear import (
    check_two_sweeps,
    chosen_backend,
    keeps_one_chunk,
    planned_rows,
    reduced,
    row_factors,
    statistics_of_all,
    swept_losses,
    teacher_sums,
)
from lossops.near_far import NearFarReport
from lossops.ops import check_target
from lossops.recipes import (
    CrossEntropyTerms,
    cross_entropy_losses,
    overall_argmax,
)
from lossops.reference import accumulate_dtype
from lossops.schedules import LinearLossOptions, without_autocast
from lossops.shards import Shards
from lossops.statistics import INDEX_OUTPUTS, RowStatistics, canonical
from lossops.statistics import outputs as statistic_outputs

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class _LogitsKeywords(TypedDict, total=False):
        weight: Tensor | None
        sample_weight: Tensor | None
        reduction: str
        ignore_index: int | None
        label_smoothing: float
        lse_square_scale: float
        backend: str

    class _HeadKeywords(_LogitsKeywords, total=False):
        linear_bias: Tensor | None
        logit_scale: float | Tensor | None
        softcap: float | None
        near_threshold: float | str | None
        class_group: Any
        options: Any

    class _LogProbKeywords(TypedDict, total=False):
        linear_bias: Tensor | None
        logit_scale: float | Tensor | None
        softcap: float | None
        ignore_index: int | None
        near_threshold: float | str | None
        class_group: Any
        options: LinearLossOptions | None
        backend: str


OUTPUTS = ("logsumexp", "log_prob", "entropy", "argmax", "correct", "near_far")


class CrossEntropyOutput(NamedTuple):
    """Loss and the outputs asked for, each of the target's shape; None where not asked.

    Example:
        >>> import torch, lossops
        >>> z = torch.tensor([[2.0, -1.0, 0.5]])
        >>> found = lossops.cross_entropy(z, torch.tensor([0]), outputs=("argmax", "correct"))
        >>> found.argmax, found.correct, found.entropy
        (tensor([0]), tensor([True]), None)
    """

    loss: Tensor
    logsumexp: Tensor | None = None
    log_prob: Tensor | None = None
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    correct: Tensor | None = None
    near_far: NearFarReport | None = None


@overload
def linear_cross_entropy(  # type: ignore[overload-overlap]
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    outputs: tuple[()] = ...,
    **keywords: Unpack[_HeadKeywords],
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    outputs: Collection[str],
    **keywords: Unpack[_HeadKeywords],
) -> CrossEntropyOutput: ...


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float | Tensor | None = None,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    near_threshold: float | str | None = None,
    class_group: Any = None,
    options: Any = None,
    backend: str = "auto",
    outputs: Collection[str] = (),
) -> Tensor | CrossEntropyOutput:
    """Cross-entropy of a linear head, the logits never stored as a whole.

    loss = Σ_n s_n [(1 - ε) a_y (-log p_n,y) + ε mean_j a_j (-log p_nj) + λ logsumexp_n²] / Σ_n u_n
    s = sample_weight, a = weight, u_n = s_n a_y, λ = lse_square_scale; 1 for weights not given

    A superset of ``torch.nn.functional.linear_cross_entropy``: any call there works here, except
    that the loss of half-precision inputs is float32, and 0 where all rows are ignored.

    Args:
        input: x, (..., D) floating point.
        linear_weight: w, (V, D); (V, d_1, ..., d_K, D), of PyTorch's keywords, stores the logits.
        target: class ids (...), int64, or class probabilities (..., V), floating point. Where
            these, or class weights beside them, want a gradient, all logits are stored.
        linear_bias: b, (V,). Default: ``None``.
        weight: class weights, (V,), of this rank's classes where there is a ``class_group``;
            differentiable beside class probabilities. Default: ``None``.
        sample_weight: row weights, (...), differentiable. Default: ``None``.
        reduction: ``"mean"`` (over Σ u_n), ``"sum"`` or ``"none"``. Default: ``'mean'``.
        ignore_index: target id of ignored rows; None means -100. Default: ``None``.
        label_smoothing: ε in [0, 1]. Default: ``0.0``.
        logit_scale: factor of x·w, a number or a one-element tensor, differentiable.
            Default: ``None``.
        softcap: logits become softcap·tanh(z / softcap). Default: ``None``.
        lse_square_scale: factor of the squared logsumexp over all classes (the "z-loss" of
            language models); class weights leave it alone. Default: ``0.0``.
        near_threshold: None for exact gradients. A number τ: entries of dz above τ times the
            factors of their row (in two sweeps, the largest of all rows) are exact, the others
            enter by their sums over rows and columns;
            `docs/near_far.md` has the errors. ``"auto"`` is 2⁻¹², or what
            ``options.near_target_error`` asks for. Rows whose gradient would not be good that way
            get the exact one. The loss is exact in any case. Default: ``None``.
        class_group: process group whose ranks hold consecutive classes, in w and b, and the same
            input and target (ids of all classes; of probabilities, which want no gradient here,
            the columns of their own classes); the loss, and dx, are those of all classes on every
            rank. A DTensor w sharded by class names its group itself. Default: ``None``.
        options: `LinearLossOptions`; PyTorch's own are accepted and ignored. Default: ``None``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.
        outputs: further results of the same pass, among ``logsumexp``, ``log_prob``, ``entropy``
            (differentiable; two sweeps), ``argmax``, ``correct``; ``near_far``, a
            `lossops.NearFarReport` of what the gradients were (one sweep). Default: ``()``.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 inputs). With
        ``outputs`` a `CrossEntropyOutput`.

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Extra memory, in bytes, beyond inputs and gradients: one sweep a chunk of logits of at most
        136 MiB, and 4·D·(N + V) of accumulators for half precision or one chunk of as much in their
        stead, all within ``max_workspace_bytes``; two sweeps 4·N·D for dx of half precision and
        tiles of at most about 64 MiB. Near and far gradients take at most 16·N·D + V·N / 8 + 64·V
        more (57 MiB at N = 4096, D = 1024, V = 65,536), N counting at most 8192 rows in the second.
        Same bits for the same inputs, threads and build.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
        >>> loss = lossops.linear_cross_entropy(x, w, torch.tensor([3, 1, 4, -100]))
        >>> loss.backward()
        >>> w.grad.shape
        torch.Size([100, 8])
    """
    check_reduction(reduction)
    _check_outputs(outputs)
    check_tensor("linear_weight", linear_weight)
    check_tensor("target", target)
    opts = checked_options(None if isinstance(options, LinearCrossEntropyOptions) else options)
    if linear_weight.ndim > 2:
        extras = {
            "sample_weight": sample_weight, "logit_scale": logit_scale, "softcap": softcap,
            "lse_square_scale": lse_square_scale or None, "near_threshold": near_threshold,
            "class_group": class_group, "outputs": outputs or None,
            "schedule": None if opts.schedule == "auto" else opts.schedule,
        }  # fmt: skip
        return _k_dimensional(
            input, linear_weight, target, linear_bias, extras, weight=weight, reduction=reduction,
            ignore_index=ignore_index, label_smoothing=label_smoothing, backend=backend,
        )  # fmt: skip
    head, shards = spread_head(
        input, linear_weight, linear_bias, logit_scale, softcap, class_group, {"weight": weight},
        {"target probabilities": target if target.is_floating_point() else None},
    )  # fmt: skip
    near = near_request(near_threshold, opts, "near_far" in outputs)
    head = with_near(head, near, shards)
    if "near_far" in outputs and not head.near.on:
        raise ValueError("outputs 'near_far' needs near_threshold, got None")
    if _differentiates(target, weight):
        if head.near.on:
            raise ValueError(
                "near_threshold is not available with target probabilities that want a gradient, "
                "nor class weights beside them; detach these or leave it out"
            )
        if opts.schedule == "one_sweep":
            raise ValueError(
                "schedule='one_sweep' needs target probabilities, and class weights beside them, "
                "without gradient; use schedule='auto'"
            )
        return _through_reference(
            head, target, weight, sample_weight, reduction, ignore_index, label_smoothing,
            lse_square_scale, outputs, backend,
        )  # fmt: skip
    task = _Task.build(
        target, head.lead, head.w.shape[0], head, weight, sample_weight, ignore_index,
        label_smoothing, lse_square_scale, outputs, shards,
    )  # fmt: skip
    diff = (head.x, head.w, head.b, head.scale)
    wants = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in diff)
    single = (
        reduction != "none"
        and not set(outputs) & {"logsumexp", "log_prob", "entropy"}
        and not any(t is not None and t.requires_grad for t in task.terms)
    )
    classes = None if shards is None else max(shards.counts)
    rows = None
    if wants and single:
        plan = (task.names, backend)
        if shards is None and keeps_one_chunk(head, opts, *plan):
            total, argmax, *_ = apply(
                KeptCrossEntropy, *diff, task.ids, task.class_vector, task.teacher, *task.terms,
                head.softcap, list(task.names), chosen_backend(backend, head, one_sweep=True),
            )  # fmt: skip
            loss = total if reduction == "sum" else total / task.divisor
            return task.finish(loss, None, argmax if "max" in task.names else None, outputs)
        rows = planned_rows(head, opts, *plan, classes)
    chosen = chosen_backend(backend, head, one_sweep=rows is not None)
    if opts.schedule == "one_sweep" and wants and rows is None:
        raise ValueError(
            "schedule='one_sweep' needs reduction 'mean' or 'sum', no differentiable outputs and "
            "weights without gradient; use schedule='auto'"
        )
    if shards is not None and rows is not None and not {"argmax", "correct"} & set(outputs):
        total = _one_sweep_of_shards(head, shards, task, opts, chosen)
        loss = total if reduction == "sum" else total / task.divisor
        return task.finish(loss, None, None, outputs)
    if shards is None and rows is not None:
        total, argmax, *_, report = apply(
            LinearCrossEntropy, *diff, task.ids, task.class_vector, task.teacher, *task.terms,
            head.softcap, list(task.names), [t is not None and t.requires_grad for t in diff],
            rows, chosen, head.near,
        )  # fmt: skip
        loss = total if reduction == "sum" else total / task.divisor
        best = argmax if "max" in task.names else None
        return task.finish(loss, None, best, outputs, report if head.near.on else None)
    if "near_far" in outputs:
        raise ValueError(
            "outputs 'near_far' tells of gradients computed with the loss, in one sweep: it needs "
            "inputs that want a gradient, reduction 'mean' or 'sum', no outputs that are "
            "differentiable, and schedule 'auto' or 'one_sweep' with room for a chunk of logits"
        )
    spec = (task.ids, task.names, task.class_vector, task.teacher)
    stats = statistics_of_all(head, shards, *spec, chosen)
    return task.reduce(stats, reduction, outputs)


def _one_sweep_of_shards(
    head: HeadInputs, shards: Shards, task: _Task, options: LinearLossOptions, backend: str
) -> Tensor:
    """Σ of the losses in one sweep; the ranks meet once per chunk of rows."""
    a, t = task.class_vector, task.teacher
    vector_sum = None if a is None else a.sum()
    sums = None if t is None else teacher_sums(t, a, accumulate_dtype(head.x.dtype))

    def losses(values: Sequence[Tensor], rows: slice | Tensor, _: Sequence[Tensor]) -> Tensor:
        named = dict(zip(statistic_outputs(task.names), values, strict=True))
        taught = None if sums is None else sums[rows]
        stats = RowStatistics(named, head.w.shape[0], vector_sum, taught)
        return task.losses(of_all(stats, shards), rows)

    here = task.ids if task.ids is None else local_ids(task.ids, shards)
    return swept_losses(
        head, here, task.names, losses, class_vector=a, teacher=t, reduced=True, options=options,
        backend=backend, counted=task.ids, num_classes=max(shards.counts),
    )  # fmt: skip


@overload
def cross_entropy(  # type: ignore[overload-overlap]
    logits: Tensor,
    target: Tensor,
    *,
    outputs: tuple[()] = ...,
    inplace: bool = ...,
    **keywords: Unpack[_LogitsKeywords],
) -> Tensor: ...


@overload
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    outputs: Collection[str],
    inplace: bool = ...,
    **keywords: Unpack[_LogitsKeywords],
) -> CrossEntropyOutput: ...


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    backend: str = "auto",
    outputs: Collection[str] = (),
    inplace: bool = False,
) -> Tensor | CrossEntropyOutput:
    """Cross-entropy on logits that exist already, classes in the last dim.

    The formula is that of `linear_cross_entropy`, z = logits.

    Args:
        logits: z, (..., V) floating point.
        target: class ids (...), int64, or class probabilities (..., V).
        weight: class weights, (V,). Default: ``None``.
        sample_weight: row weights, (...), differentiable. Default: ``None``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. Default: ``'mean'``.
        ignore_index: target id of ignored rows; None means -100. Default: ``None``.
        label_smoothing: ε in [0, 1]. Default: ``0.0``.
        lse_square_scale: factor of the squared logsumexp. Default: ``0.0``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.
        outputs: as in `linear_cross_entropy`, but for ``near_far``. Default: ``()``.
        inplace: overwrite ``logits`` with their gradient, which then needs no memory and allows
            one backward; for contiguous non-leaf ``logits``, a scalar loss. Default: ``False``.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 logits). With
        ``outputs`` a `CrossEntropyOutput`.

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Accumulated in float32 (float64 for float64 logits), same bits for same inputs and threads.
        Memory beyond the logits: their gradient, or with ``inplace`` nothing of their size.

    Example:
        >>> import torch, lossops
        >>> z = torch.tensor([[2.0, -1.0, 0.5, 3.0, -2.5, 0.0]])
        >>> lossops.cross_entropy(z, torch.tensor([0]))
        tensor(1.4201)
    """
    check_reduction(reduction)
    _check_outputs(outputs)
    if "near_far" in outputs:
        raise ValueError(
            "outputs 'near_far' is of linear_cross_entropy; logits have exact gradients"
        )
    check_tensor("target", target)
    z = flat_logits(logits)
    lead, v = logits.shape[:-1], z.shape[1]
    head = HeadInputs(z, z, None, None, 0.0, lead)
    if _differentiates(target, weight):
        if inplace:
            raise ValueError(
                "inplace=True does not differentiate target probabilities, nor class weights "
                "beside them; detach them"
            )
        return _through_reference(
            head, target, weight, sample_weight, reduction, ignore_index, label_smoothing,
            lse_square_scale, outputs, backend, logits=True,
        )  # fmt: skip
    task = _Task.build(
        target, lead, v, head, weight, sample_weight, ignore_index, label_smoothing,
        lse_square_scale, outputs,
    )  # fmt: skip
    chosen = backends.select(backend, z.device, z.dtype, backends.ONE_SWEEP).name
    spec = (task.ids, task.class_vector, task.teacher)
    if inplace:
        _check_inplace(logits, z, reduction, outputs, task.terms)
    if inplace and torch.is_grad_enabled() and logits.requires_grad:
        total, argmax = apply(
            LogitsGradientInPlace, z, *spec, *task.terms, list(task.names), chosen
        )
        loss = total if reduction == "sum" else total / task.divisor
        return task.finish(loss, None, argmax, outputs)
    found = apply(LogitsStatistics, z, *spec, list(task.names), chosen)
    values = dict(zip(statistic_outputs(task.names), found, strict=True))
    return task.reduce(RowStatistics(values, v), reduction, outputs)


class _Task(NamedTuple):
    """One cross-entropy call: what to collect, the row factors of its terms, the divisor."""

    ids: Tensor | None  # (N, 1), -1 where ignored
    teacher: Tensor | None  # (N, V)
    class_vector: Tensor | None  # (V,)
    names: tuple[str, ...]
    terms: CrossEntropyTerms
    divisor: Tensor
    lead: torch.Size

    @staticmethod
    def build(
        target: Tensor,
        lead: torch.Size,
        v: int,
        head: HeadInputs,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        ignore_index: int | None,
        label_smoothing: float,
        lse_square_scale: float,
        outputs: Collection[str],
        shards: Shards | None = None,
    ) -> _Task:
        """``v`` and ``weight`` are of this rank's classes, ``target`` of all."""
        check_number("label_smoothing", label_smoothing)
        check_number("lse_square_scale", lse_square_scale)
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        x, eps = head.x, label_smoothing
        check_devices(x, target=target)
        a = class_weight(weight, v, x, differentiable=target.is_floating_point())
        rows = row_weight(sample_weight, lead, x)
        ones = x.new_ones(x.shape[0], dtype=accumulate_dtype(x.dtype))
        each = ones if rows is None else rows
        smooth = lse = taught = nll = teacher = ids = None
        every = v if shards is None else sum(shards.counts)
        if eps:
            smooth = each * eps if a is None else each * (eps / every)
            # A tensor of its own: a compiler takes no tensor twice.
            lse = each * eps if a is None else smooth * sum_of_all(a, shards)
        if target.is_floating_point():
            if ignore_index is not None:
                raise ValueError(
                    f"ignore_index applies to class ids, got {ignore_index} with class "
                    "probabilities; give those rows sample_weight 0"
                )
            teacher = class_columns(target, lead, v, x, "target probabilities")
            total = teacher_sums(teacher, a, ones.dtype)
            if shards is not None:
                total = summed(total, shards.group)
            taught = each * (1 - eps)
            lse = taught * total if lse is None else lse + taught * total
            _, divisor = row_factors(None, rows, None, x)
        else:
            ids = class_ids(target, lead, every, ignore_index)
            if shards is not None:
                check_target(ids, every)
            u, divisor = row_factors(ids, rows, at_targets(a, ids, shards), x)
            nll = (ones if u is None else u) * (1 - eps)
        square = each * lse_square_scale if lse_square_scale else None
        names = ["lse", "target"] if ids is not None else ["lse", "teacher"]
        if eps:
            names.append("sum" if a is None else "weighted_sum")
        if {"argmax", "correct"} & set(outputs):
            names.append("max")
        if "entropy" in outputs:
            names.append("entropy")
        used = a if "weighted_sum" in names or teacher is not None else None
        terms = CrossEntropyTerms(nll, lse, smooth, taught, square)
        return _Task(ids, teacher, used, canonical(names), terms, divisor, lead)

    def reduce(
        self, stats: RowStatistics, reduction: str, outputs: Collection[str]
    ) -> Tensor | CrossEntropyOutput:
        """The loss, and outputs, from differentiable statistics of all rows."""
        values = dict(stats.values)
        argmax = None
        if "argmax" in values:
            argmax = overall_argmax(values, self.ids)
        losses = self.losses(stats)
        if self.ids is not None:
            values["target"] = torch.where(self.ids[:, 0] >= 0, values["target"].squeeze(1), 0.0)
        loss = reduced(losses, self.divisor, reduction, self.lead)
        return self.finish(loss, RowStatistics(values, stats.num_classes), argmax, outputs)

    def losses(self, stats: RowStatistics, rows: slice | Tensor = slice(None)) -> Tensor:
        """Losses of some rows from their differentiable statistics, 0 where ignored."""
        terms = self.terms.rows(rows)
        if self.ids is None:
            return cross_entropy_losses(stats, terms)
        active = self.ids[rows, 0] >= 0
        values = {**stats.values, "target": stats.values["target"].squeeze(1)}
        # Every statistic: a NaN weight of an ignored row must not reach a coefficient either.
        single = {n: t if n in INDEX_OUTPUTS else torch.where(active, t, 0.0)
                  for n, t in values.items()}  # fmt: skip
        found = cross_entropy_losses(RowStatistics(single, stats.num_classes), terms)
        return torch.where(active, found, 0.0)

    def finish(
        self,
        loss: Tensor,
        stats: RowStatistics | None,
        argmax: Tensor | None,
        outputs: Collection[str],
        report: Tensor | None = None,
    ) -> Tensor | CrossEntropyOutput:
        """The loss alone, or with the outputs asked for in the target's shape."""
        if not outputs:
            return loss
        found: dict[str, Any] = {}
        if report is not None:
            found["near_far"] = NearFarReport(*report.unbind())
        if argmax is not None:
            found["argmax"] = argmax.reshape(self.lead)
            if self.ids is not None:
                found["correct"] = (argmax == self.ids[:, 0]).reshape(self.lead)
        if stats is not None:
            if "logsumexp" in outputs:
                found["logsumexp"] = self._all_classes(stats, "logsumexp")
            if "entropy" in outputs:
                found["entropy"] = self._all_classes(stats, "entropy")
            if "log_prob" in outputs and self.ids is not None:
                active = self.ids[:, 0] >= 0
                found["log_prob"] = torch.where(active, stats.log_p, 0.0).reshape(self.lead)
        if (missing := set(outputs) - found.keys()) and self.ids is None:
            raise ValueError(
                f"outputs {sorted(missing)} need class ids as targets, got probabilities"
            )
        return CrossEntropyOutput(loss, **{n: t for n, t in found.items() if n in outputs})

    def _all_classes(self, stats: RowStatistics, name: str) -> Tensor:
        """logsumexp or entropy over all classes, of ignored rows (dummy targets) too."""
        value: Tensor = getattr(stats, name)
        if self.ids is not None:
            rest = RowStatistics({k: t for k, t in stats.values.items() if k != "target"},
                                 stats.num_classes)  # fmt: skip
            value = torch.where(self.ids[:, 0] >= 0, value, getattr(rest, name))
        return value.reshape(self.lead)


def _check_outputs(outputs: Collection[str]) -> None:
    if not isinstance(outputs, Collection):
        raise TypeError(f"outputs must be a list of names, got {type(outputs).__name__}")
    if isinstance(outputs, str) or not set(outputs) <= set(OUTPUTS):
        raise ValueError(f"outputs must be names among {', '.join(OUTPUTS)}, got {outputs!r}")


def _differentiates(target: Tensor, weight: Tensor | None) -> bool:
    """Whether class probabilities, or class weights beside them, want a gradient."""
    wanted = target.requires_grad or (isinstance(weight, Tensor) and weight.requires_grad)
    return target.is_floating_point() and wanted and torch.is_grad_enabled()


def _through_reference(
    head: HeadInputs,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
    lse_square_scale: float,
    outputs: Collection[str],
    backend: str,
    logits: bool = False,
) -> Tensor | CrossEntropyOutput:
    """Class probabilities, or weights, that want a gradient: plain autograd on stored logits."""
    backends.select(backend, head.x.device, head.x.dtype)  # its objections, as elsewhere
    v = head.w.shape[1] if logits else head.w.shape[0]
    task = _Task.build(
        target, head.lead, v, head, weight, sample_weight, ignore_index, label_smoothing,
        lse_square_scale, outputs,
    )  # fmt: skip
    with without_autocast(head.x.device):
        z = head.x if logits else reference.linear_logits(*head[:5])
    found = reference.logits_statistics(z, None, task.class_vector, task.teacher, task.names)
    values = dict(zip(statistic_outputs(task.names), found, strict=True))
    return task.reduce(RowStatistics(values, v), reduction, outputs)


def _k_dimensional(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    extras: Mapping[str, object],
    **keywords: Any,
) -> Tensor:
    """Weights (V, d_1, ..., d_K, D): a softmax over V at each place, on stored logits."""
    if given := [name for name, value in extras.items() if value is not None]:
        raise ValueError(
            f"{', '.join(given)} needs linear_weight of shape (V, D), got "
            f"{tuple(linear_weight.shape)}"
        )
    check_tensor("input", input)
    if input.ndim != 2:
        raise ValueError(
            "input must have shape (N, D) where linear_weight has shape (V, d_1, ..., d_K, D), "
            f"got {tuple(input.shape)} and {tuple(linear_weight.shape)}"
        )
    places = linear_weight.shape[:-1]
    if linear_bias is not None:
        check_tensor("linear_bias", linear_bias)
        if linear_bias.shape != places:
            raise ValueError(
                f"linear_bias must have shape {tuple(places)}, got {tuple(linear_bias.shape)}"
            )
        linear_bias = linear_bias.reshape(-1)
    head = head_inputs(input, linear_weight.flatten(0, -2), linear_bias, None, None)
    with without_autocast(head.x.device):
        z = reference.linear_logits(*head[:5]).unflatten(1, places)
    if target.is_floating_point() and target.ndim > 1:
        target = target.movedim(1, -1)
    loss: Tensor = cross_entropy(z.movedim(1, -1), target, **keywords)
    return loss


def _check_inplace(
    logits: Tensor,
    z: Tensor,
    reduction: str,
    outputs: Collection[str],
    terms: CrossEntropyTerms,
) -> None:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        raise ValueError(
            "inplace=True is not available under torch.compile and torch.func; leave it out there"
        )
    if logits.requires_grad and logits.is_leaf and torch.is_grad_enabled():
        raise ValueError("inplace=True would overwrite a leaf that wants a gradient; pass a result")
    overlaps = z.shape[0] > 1 and z.stride(0) < z.shape[1]  # expanded rows share their memory
    if z.data_ptr() != logits.data_ptr() or z.stride(-1) != 1 or overlaps:
        raise ValueError(f"inplace=True needs contiguous logits, got strides {logits.stride()}")
    if reduction == "none" or set(outputs) - {"argmax", "correct"}:
        raise ValueError(
            "inplace=True needs reduction 'mean' or 'sum' and no differentiable outputs, got "
            f"reduction={reduction!r}, outputs={tuple(outputs)}"
        )
    if any(t is not None and t.requires_grad for t in terms):
        raise ValueError("inplace=True does not differentiate weights; detach them")


@overload
def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    entropy: Literal[False] = ...,
    **keywords: Unpack[_LogProbKeywords],
) -> Tensor: ...


@overload
def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    entropy: Literal[True],
    **keywords: Unpack[_LogProbKeywords],
) -> tuple[Tensor, Tensor]: ...


def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    softcap: float | None = None,
    entropy: bool = False,
    ignore_index: int | None = None,
    near_threshold: float | str | None = None,
    class_group: Any = None,
    options: LinearLossOptions | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of its row, differentiable.

    log p_n = z_n,y - logsumexp(z_n)      H_n = -Σ_j p_nj log p_nj

    Args:
        input: x, (..., D) floating point.
        linear_weight: w, (V, D).
        target: class ids (...), int64.
        linear_bias: b, (V,). Default: ``None``.
        logit_scale: factor of x·w (1 / temperature), a number or a one-element tensor.
            Default: ``None``.
        softcap: logits become softcap·tanh(z / softcap). Default: ``None``.
        entropy: also return the entropy in nats. Default: ``False``.
        ignore_index: target id of ignored rows, whose results are 0; None means -100.
            Default: ``None``.
        near_threshold: as in `linear_cross_entropy`; what a row is held against is the largest
            coefficient of all rows. Default: ``None``.
        class_group: as in `linear_cross_entropy`. Default: ``None``.
        options: how it is computed. Default: ``None``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.

    Returns:
        (...) float32 (float64 for float64 inputs), or ``(log_prob, entropy)``.

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Two sweeps, 4 GEMMs with gradients, 1 without; no (N, V) tensor.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 8), torch.randn(100, 8)
        >>> lossops.linear_log_prob(x, w, torch.tensor([3, 1, 4, 1])).shape
        torch.Size([4])
    """
    names = ("lse", "target", "entropy") if entropy else ("lse", "target")
    head, shards = spread_head(input, linear_weight, linear_bias, logit_scale, softcap, class_group)
    check_two_sweeps(head, options)
    head = with_near(head, near_request(near_threshold, checked_options(options)), shards)
    v = classes_of_all(head, shards)
    ids = class_ids(target, head.lead, v, ignore_index)
    check_devices(head.x, target=target)
    if shards is not None:
        check_target(ids, v)
    stats = statistics_of_all(head, shards, ids, canonical(names), None, None, backend)
    active = ids[:, 0] >= 0
    values = {n: t if n == "shift" else torch.where(active, t.reshape(active.shape), 0.0)
              for n, t in stats.values.items()}  # fmt: skip
    rows = RowStatistics(values, stats.num_classes)
    log_prob = torch.where(active, rows.log_p, 0.0).reshape(head.lead)
    if not entropy:
        return log_prob
    return log_prob, torch.where(active, rows.entropy, 0.0).reshape(head.lead)
