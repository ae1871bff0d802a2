"""The spherical family: losses of a row's target logits, the sum of its logits and that of squares.

    loss_n = F(t, s, q, V),   t = z_ny,   s = Σ_j z_nj,   q = Σ_j z_nj²

No exponential runs over the classes, so s and q come from D×D matrices (`lossops.gram`) at a cost
without the product N V, and with plain SGD the whole step without V (`lossops.factored`).

With μ = s / V and σ² = q / V - μ²:

    Z              (1/a) log(1 + exp(a (b - (t - μ) / σ)))
    log-Taylor     log(V + s + q / 2) - log(1 + t + t² / 2)
    log-spherical  log(q + V ε) - log(t² + ε)
    squared error  q - 2 t + 1

F runs in float64 on (R,) vectors: σ² and the squares of large logits then lose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossops import backends, gram
from lossops.autograd import LogitsStatistics, apply
from lossops.inputs import (
    check_devices,
    check_reduction,
    check_tensor,
    checked_options,
    class_ids,
    flat_logits,
    has_target,
    head_inputs,
    row_weight,
)
from lossops.linear import linear_loss, reduced, row_factors
from lossops.recipes import (
    SphericalLoss,
    log_spherical_losses,
    log_taylor_losses,
    mse_losses,
    z_losses,
)
from lossops.reference import accumulate_dtype
from lossops.schedules import LinearLossOptions, without_autocast
from lossops.statistics import RowStatistics, canonical, outputs

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class _LogitsKeywords(TypedDict, total=False):
        sample_weight: Tensor | None
        reduction: str
        ignore_index: int | None
        backend: str

    class _HeadKeywords(_LogitsKeywords, total=False):
        linear_bias: Tensor | None
        mode: str
        options: LinearLossOptions | None


MODES = ("auto", "gram", "sweep")
NAMES = canonical(("target", "sum", "sumsq"))


def linear_spherical_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    loss_fn: SphericalLoss,
    *,
    parameters: Sequence[Tensor] = (),
    linear_bias: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    mode: str = "auto",
    options: LinearLossOptions | None = None,
    backend: str = "auto",
) -> Tensor:
    """Any loss of the target logit, the sum and the sum of squares of the logits.

    loss = Σ_n s_n Σ_k F(z_n,y_nk, Σ_j z_nj, Σ_j z_nj², V) / Σ_n s_n,   s = sample_weight

    Args:
        input: x, (..., D) floating point.
        linear_weight: w, (V, D).
        target: class ids (...), or (..., K) padded with -1, int64. The losses of several targets
            of a row add up; rows without any are ignored.
        loss_fn: F, ``loss_fn(target, sum, sumsq, num_classes) -> (R,)`` on float64 vectors (R,).
        parameters: tensors ``loss_fn`` closes over that want a gradient. Default: ``()``.
        linear_bias: b, (V,). Default: ``None``.
        sample_weight: row weights, (...). Default: ``None``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. Default: ``'mean'``.
        ignore_index: target id of ignored rows; None means -100. Default: ``None``.
        mode: ``"gram"`` (D×D matrices, no logits), ``"sweep"`` (tiles of logits), or ``"auto"``:
            gram where N V >= D (N + V), which is where it takes fewer operations: for many
            classes from about D rows on. Default: ``'auto'``.
        options: schedule and memory of the sweep. Default: ``None``.
        backend: of the sweep: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Gram mode takes V D² + N D² multiply-adds forward and twice that backward, and in memory
        float64 matrices of D², copies of 1,024 rows and, for half precision, 4·V·D bytes for dw.

    Example:
        >>> import torch, lossops
        >>> def squared(target, sum, sumsq, num_classes):  # (Σ_j z_j² - 2 z_y + 1) / V
        ...     return (sumsq - 2 * target + 1) / num_classes
        >>> x, w = torch.randn(16, 8, requires_grad=True), torch.randn(100, 8)
        >>> lossops.linear_spherical_loss(x, w, torch.randint(100, (16,)), squared).backward()
        >>> x.grad.shape
        torch.Size([16, 8])

    Reference:
        P. Vincent, A. de Brébisson, X. Bouthillier: Efficient exact gradient update for training
        deep networks with very large sparse targets, arXiv 1412.7091.
    """
    check_reduction(reduction)
    checked_options(options)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    head = head_inputs(input, linear_weight, linear_bias, None, None)
    (n, d), v = head.x.shape, head.w.shape[0]
    ids = target_ids(target, input, head.lead, v, ignore_index)
    backends.select(backend, head.x.device, head.x.dtype)  # a name that is wrong is so in any mode
    row_losses = partial(spherical_row_losses, loss_fn)
    if mode == "gram" or (mode == "auto" and n * v >= d * (n + v)):
        own, average, moment, *_ = apply(GramStatistics, head.x, head.w, head.b, ids)
        losses = row_losses(own, average, moment, ids, v)
        losses = losses.to(accumulate_dtype(head.x.dtype))
        return reduced_losses(losses, ids, sample_weight, reduction, head.lead, head.x)

    def of_statistics(stats: RowStatistics, ids: Tensor) -> Tensor:
        return _from_statistics(row_losses, stats, ids)

    flat = None if sample_weight is None else row_weight(sample_weight, head.lead, head.x)
    loss = linear_loss(
        head.x, head.w, ids, of_statistics, names=NAMES, row_inputs={"ids": ids},
        parameters=parameters, linear_bias=head.b, sample_weight=flat, reduction=reduction,
        options=options, backend=backend,
    )  # fmt: skip
    return loss.reshape(head.lead) if reduction == "none" else loss


def spherical_loss(
    logits: Tensor,
    target: Tensor,
    loss_fn: SphericalLoss,
    *,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`linear_spherical_loss` on logits that exist already, classes in the last dim.

    loss = Σ_n s_n Σ_k F(z_n,y_nk, Σ_j z_nj, Σ_j z_nj², V) / Σ_n s_n,   s = sample_weight

    Args:
        logits: z, (..., V) floating point.
        target: class ids (...), or (..., K) padded with -1, int64.
        loss_fn: F, ``loss_fn(target, sum, sumsq, num_classes) -> (R,)`` on float64 vectors (R,).
        sample_weight: row weights, (...). Default: ``None``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. Default: ``'mean'``.
        ignore_index: target id of ignored rows; None means -100. Default: ``None``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Memory beyond the logits: their gradient. Deterministic.

    Example:
        >>> import torch, lossops
        >>> z = torch.tensor([[2.0, -1.0, 0.5, 3.0, -2.5, 0.0]])
        >>> lossops.spherical_loss(z, torch.tensor([0]), lambda t, s, q, v: q - 2 * t + 1)
        tensor(17.5000)
    """
    check_reduction(reduction)
    z = flat_logits(logits)
    lead, v = logits.shape[:-1], z.shape[1]
    ids = target_ids(target, logits, lead, v, ignore_index)
    chosen = backends.select(backend, z.device, z.dtype, backends.ONE_SWEEP).name
    found = apply(LogitsStatistics, z, ids, None, None, list(NAMES), chosen)
    stats = RowStatistics(dict(zip(outputs(NAMES), found, strict=True)), v)
    losses = _from_statistics(partial(spherical_row_losses, loss_fn), stats, ids)
    return reduced_losses(losses, ids, sample_weight, reduction, lead, z)


def linear_spherical_z_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    a: float | Tensor = 0.1,
    b: float | Tensor = 10.0,
    **keywords: Unpack[_HeadKeywords],
) -> Tensor:
    """Z-loss of a linear head: softplus of the target's standard score among the row's logits.

    loss_n = (1/a) log(1 + exp(a (b - (z_ny - μ_n) / σ_n))),   μ, σ² mean and variance of the row

    Invariant to scale and shift of the logits; its gradient sums to zero over the classes and is
    orthogonal to the logits. Other keywords are those of `linear_spherical_loss`.

    Args:
        input: x, (..., D) floating point.
        linear_weight: w, (V, D).
        target: class ids (...), or (..., K) padded with -1, int64.
        a: sharpness, positive; a number or a tensor (), differentiable. Default: ``0.1``.
        b: the score at which the loss turns flat; a number or a tensor (), differentiable. The
            largest of V normal scores is about √(2 log V), 5 for a million classes: with 10 and
            a = 0.1 a target that has overtaken all others is still pulled. Default: ``10.0``.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Cost, memory and accumulation as `linear_spherical_loss`. Deterministic.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(16, 8, requires_grad=True), torch.randn(100, 8)
        >>> lossops.linear_spherical_z_loss(x, w, torch.randint(100, (16,))).backward()
        >>> bool((x.grad * x).sum(1).abs().max() < 1e-5)  # a longer x changes nothing
        True

    Reference:
        A. de Brébisson, P. Vincent: The Z-loss, a shift and scale invariant classification loss
        belonging to the spherical family, arXiv 1604.08859.
    """
    loss_fn = partial(z_losses, a=check_positive("a", a), b=b)
    return linear_spherical_loss(
        input, linear_weight, target, loss_fn, parameters=_learnt(a, b), **keywords
    )


def spherical_z_loss(
    logits: Tensor,
    target: Tensor,
    *,
    a: float | Tensor = 0.1,
    b: float | Tensor = 10.0,
    **keywords: Unpack[_LogitsKeywords],
) -> Tensor:
    """`linear_spherical_z_loss` on logits that exist already.

    loss_n = (1/a) log(1 + exp(a (b - (z_ny - μ_n) / σ_n)))

    Other keywords are those of `spherical_loss`.

    Args:
        logits: z, (..., V) floating point.
        target: class ids (...), or (..., K) padded with -1, int64.
        a: sharpness, positive. Default: ``0.1``.
        b: the score at which the loss turns flat. Default: ``10.0``.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Memory beyond the logits: their gradient. Deterministic.

    Example:
        >>> import torch, lossops
        >>> z = torch.tensor([[2.0, -1.0, 0.5, 3.0, -2.5, 0.0]])
        >>> lossops.spherical_z_loss(z, torch.tensor([0]), a=1.0, b=0.0)
        tensor(0.3364)
    """
    return spherical_loss(
        logits, target, partial(z_losses, a=check_positive("a", a), b=b), **keywords
    )


def linear_log_taylor_softmax_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, **keywords: Unpack[_HeadKeywords]
) -> Tensor:
    """Negative log of the Taylor softmax of a linear head.

    loss_n = log Σ_j (1 + z_nj + z_nj²/2) - log(1 + z_ny + z_ny²/2)

    Keywords are those of `linear_spherical_loss`.

    Args:
        input: x, (..., D) floating point.
        linear_weight: w, (V, D).
        target: class ids (...), or (..., K) padded with -1, int64.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Cost, memory and accumulation as `linear_spherical_loss`. Deterministic.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(16, 8), torch.randn(100, 8)
        >>> lossops.linear_log_taylor_softmax_loss(x, w, torch.randint(100, (16,))).shape
        torch.Size([])

    Reference:
        A. de Brébisson, P. Vincent: An exploration of softmax alternatives belonging to the
        spherical loss family, arXiv 1511.05042.
    """
    return linear_spherical_loss(input, linear_weight, target, log_taylor_losses, **keywords)


def log_taylor_softmax_loss(
    logits: Tensor, target: Tensor, **keywords: Unpack[_LogitsKeywords]
) -> Tensor:
    """`linear_log_taylor_softmax_loss` on logits that exist already.

    loss_n = log Σ_j (1 + z_nj + z_nj²/2) - log(1 + z_ny + z_ny²/2)

    Keywords are those of `spherical_loss`.

    Args:
        logits: z, (..., V) floating point.
        target: class ids (...), or (..., K) padded with -1, int64.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Memory beyond the logits: their gradient. Deterministic.

    Example:
        >>> import torch, lossops
        >>> z = torch.tensor([[2.0, -1.0, 0.5, 3.0, -2.5, 0.0]])
        >>> lossops.log_taylor_softmax_loss(z, torch.tensor([0]))
        tensor(1.2947)
    """
    return spherical_loss(logits, target, log_taylor_losses, **keywords)


def linear_log_spherical_softmax_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    eps: float | Tensor = 0.1,
    **keywords: Unpack[_HeadKeywords],
) -> Tensor:
    """Negative log of the spherical softmax of a linear head.

    loss_n = log Σ_j (z_nj² + ε) - log(z_ny² + ε)

    Other keywords are those of `linear_spherical_loss`.

    Args:
        input: x, (..., D) floating point.
        linear_weight: w, (V, D).
        target: class ids (...), or (..., K) padded with -1, int64.
        eps: ε, positive; a number or a tensor (), differentiable. It bounds the loss of a target
            at 0 by log(V + Σ_j z_j² / ε). Default: ``0.1``.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Cost, memory and accumulation as `linear_spherical_loss`. Deterministic.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(16, 8), torch.randn(100, 8)
        >>> lossops.linear_log_spherical_softmax_loss(x, w, torch.randint(100, (16,))).shape
        torch.Size([])

    Reference:
        A. de Brébisson, P. Vincent: An exploration of softmax alternatives belonging to the
        spherical loss family, arXiv 1511.05042.
    """
    loss_fn = partial(log_spherical_losses, eps=check_positive("eps", eps))
    return linear_spherical_loss(
        input, linear_weight, target, loss_fn, parameters=_learnt(eps), **keywords
    )


def log_spherical_softmax_loss(
    logits: Tensor,
    target: Tensor,
    *,
    eps: float | Tensor = 0.1,
    **keywords: Unpack[_LogitsKeywords],
) -> Tensor:
    """`linear_log_spherical_softmax_loss` on logits that exist already.

    loss_n = log Σ_j (z_nj² + ε) - log(z_ny² + ε)

    Other keywords are those of `spherical_loss`.

    Args:
        logits: z, (..., V) floating point.
        target: class ids (...), or (..., K) padded with -1, int64.
        eps: ε, positive. Default: ``0.1``.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Memory beyond the logits: their gradient. Deterministic.

    Example:
        >>> import torch, lossops
        >>> z = torch.tensor([[2.0, -1.0, 0.5, 3.0, -2.5, 0.0]])
        >>> lossops.log_spherical_softmax_loss(z, torch.tensor([0]))
        tensor(1.6383)
    """
    loss_fn = partial(log_spherical_losses, eps=check_positive("eps", eps))
    return spherical_loss(logits, target, loss_fn, **keywords)


def linear_spherical_mse_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, **keywords: Unpack[_HeadKeywords]
) -> Tensor:
    """Squared distance of the logits of a linear head to the one-hot target.

    loss_n = Σ_j (z_nj - [j = y_n])² = Σ_j z_nj² - 2 z_ny + 1

    Keywords are those of `linear_spherical_loss`.

    Args:
        input: x, (..., D) floating point.
        linear_weight: w, (V, D).
        target: class ids (...), or (..., K) padded with -1, int64.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Cost, memory and accumulation as `linear_spherical_loss`. Deterministic.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(16, 8), torch.randn(100, 8)
        >>> lossops.linear_spherical_mse_loss(x, w, torch.randint(100, (16,))).shape
        torch.Size([])

    Reference:
        P. Vincent, A. de Brébisson, X. Bouthillier: Efficient exact gradient update for training
        deep networks with very large sparse targets, arXiv 1412.7091.
    """
    return linear_spherical_loss(input, linear_weight, target, mse_losses, **keywords)


def spherical_mse_loss(
    logits: Tensor, target: Tensor, **keywords: Unpack[_LogitsKeywords]
) -> Tensor:
    """`linear_spherical_mse_loss` on logits that exist already.

    loss_n = Σ_j (z_nj - [j = y_n])²

    Keywords are those of `spherical_loss`.

    Args:
        logits: z, (..., V) floating point.
        target: class ids (...), or (..., K) padded with -1, int64.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Memory beyond the logits: their gradient. Deterministic.

    Example:
        >>> import torch, lossops
        >>> z = torch.tensor([[2.0, -1.0, 0.5, 3.0, -2.5, 0.0]])
        >>> lossops.spherical_mse_loss(z, torch.tensor([0]))
        tensor(17.5000)
    """
    return spherical_loss(logits, target, mse_losses, **keywords)


class GramStatistics(torch.autograd.Function):
    """Centred target, average and moment of each row from class moments, float64."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, ids: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.ops.lossops.gram_statistics(x, w, b, ids)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output[3:])
        ctx.mark_non_differentiable(*output[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, w, b, ids, mean, matrix = ctx.saved_tensors
        given, needs = list(grads[:3]), list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Views: where x was made from w, a gradient by w itself would go through x as well.
            x, w, b = x.view_as(x), w.view_as(w), None if b is None else b.view_as(b)
            with without_autocast(x.device):
                values = gram.reference_statistics(x, w, b, ids)
                wanted = [t for t, need in zip((x, w, b), needs, strict=True) if need]
                once = iter(torch.autograd.grad(values, wanted, given, create_graph=True))
            return (*(next(once) if need else None for need in needs), None)
        found = torch.ops.lossops.gram_gradient(x, w, b, ids, mean, matrix, given, needs)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), None)


def target_ids(
    target: Tensor, input: Tensor, lead: torch.Size, num_classes: int, ignore_index: int | None
) -> Tensor:
    """Ids (N, K), -1 where there is none, for a target (...) or (..., K) beside ``input``."""
    check_devices(input, target=target)
    return class_ids(target, lead, num_classes, ignore_index, several=True)


def spherical_row_losses(
    loss_fn: SphericalLoss,
    target: Tensor,
    average: Tensor,
    moment: Tensor,
    ids: Tensor,
    num_classes: int,
) -> Tensor:
    """Losses (R,), wide, from the centred target (R, K), average (R,) and moment (R,)."""
    r, k = ids.shape
    counted = ids >= 0
    # What is not counted feeds F the statistics of random logits: it may have no slope at zeros.
    t = torch.where(counted, target + average.unsqueeze(1), 1.0)
    s = torch.where(counted, (average * num_classes).unsqueeze(1), 0.0)
    q = moment + num_classes * average.square()
    q = torch.where(counted, q.unsqueeze(1), float(num_classes))
    found = loss_fn(t.flatten(), s.flatten(), q.flatten(), num_classes)
    check_tensor("what loss_fn returns", found)
    if found.shape != (r * k,):
        raise ValueError(
            f"loss_fn must return one loss per row, shape {(r * k,)}, got {tuple(found.shape)}"
        )
    return torch.where(counted, found.reshape(r, k), 0.0).sum(1)


def _from_statistics(
    row_losses: Callable[..., Tensor], stats: RowStatistics, ids: Tensor
) -> Tensor:
    """Losses (R,) in the accumulate dtype from statistics relative to their row shift."""
    wide = gram.wide_dtype(ids.device)
    values = {name: value.to(wide) for name, value in stats.values.items()}
    average = values["average"] + values["shift"]
    target = values["target"].reshape(ids.shape) - average.unsqueeze(1)
    found: Tensor = row_losses(target, average, values["moment"], ids, stats.num_classes)
    return found.to(stats.shift.dtype)


def reduced_losses(
    losses: Tensor,
    ids: Tensor,
    sample_weight: Tensor | None,
    reduction: str,
    lead: torch.Size,
    x: Tensor,
) -> Tensor:
    """Losses (N,) weighted by row and reduced as asked; rows without a target do not count."""
    u, divisor = row_factors(ids, row_weight(sample_weight, lead, x), None, x)
    if u is not None:
        losses = torch.where(has_target(ids), losses * u, 0.0)
    return reduced(losses, divisor, reduction, lead)


def _learnt(*values: float | Tensor | None) -> tuple[Tensor, ...]:
    return tuple(v for v in values if isinstance(v, Tensor))


def check_positive(name: str, value: float | Tensor) -> float | Tensor:
    """``value``, refused where it is a number that is not positive; tensors are not read."""
    if not isinstance(value, Tensor) and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value
