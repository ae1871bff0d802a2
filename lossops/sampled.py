"""Losses over a sample of the classes, with the semantics of TensorFlow.

    z_j = scale · x·w_j + b_j - log E(j)     E(j): how often class j is to be expected in a sample

The logits of the sample are swept like those of any head, a tile at a time; only the rows of w that
were drawn, and those of the targets, are read and get a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops import cuda_draws, cuda_rows
from lossops.autograd import apply
from lossops.binary import Binary, softplus
from lossops.inputs import (
    HeadInputs,
    check_devices,
    check_float,
    check_reduction,
    check_tensor,
    class_ids,
    has_target,
    row_head,
    row_weight,
)
from lossops.linear import reduced, row_factors, swept_losses
from lossops.ops import check_target
from lossops.pairs import binary_loss
from lossops.reference import accumulate_dtype, logsumexp, row_blocks
from lossops.rows import select_rows
from lossops.samplers import SampledClasses, positions
from lossops.schedules import LinearLossOptions, without_autocast
from lossops.statistics import canonical, outputs

Sampler = Callable[[Tensor], SampledClasses]
GATHERED = 2**22
"""Values of w gathered at once for negatives of each row, 16 MiB of float32."""


def sampled_softmax_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    sampler: Sampler | SampledClasses,
    *,
    linear_bias: Tensor | None = None,
    subtract_log_q: bool = True,
    remove_accidental_hits: bool = True,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None,
    sparse: bool = True,
    options: LinearLossOptions | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax cross-entropy over the targets of a row and a sample of the classes.

    loss_n = log(Σ_t e^{z_nt} + Σ_s e^{z_ns}) - mean_t z_nt,   z_nj = x_n·w_j + b_j - log E(j)

    t runs over the targets of row n, s over the sample, without those that are targets of the row
    where ``remove_accidental_hits``. Its expected gradient approaches that of the full softmax as
    the sample grows; without ``subtract_log_q`` it approaches that of another distribution.

    Args:
        input: x, (..., D) floating point.
        linear_weight: w, (V, D), on any device.
        target: class ids (...), or (..., K) padded with -1, int64.
        sampler: of `lossops.samplers`, called with the target; or classes drawn before, ``ids``
            (S,) for all rows or (N, S) with classes for each of the N rows.
        linear_bias: b, (V,). Default: ``None``.
        subtract_log_q: whether -log E(j) is in the logits. Default: ``True``.
        remove_accidental_hits: whether sampled targets are no negatives. Default: ``True``.
        sample_weight: row weights, (...), differentiable. Default: ``None``.
        reduction: ``"mean"`` (over Σ sample_weight of rows that count), ``"sum"`` or ``"none"``.
            Default: ``'mean'``.
        ignore_index: target id of ignored rows; None means -100. Default: ``None``.
        logit_scale: factor of x·w, a number or a one-element tensor, differentiable.
            Default: ``None``.
        sparse: whether the gradients of w and b are sparse tensors, for torch.optim.SGD, Adagrad,
            SparseAdam and `lossops.optim`; dense ones take V·D values. Default: ``True``.
        options: schedule and memory. Default: ``None``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Memory beyond inputs, in values: 3 (S + N) D for the rows and their gradients, and a chunk
        of N S logits; with classes for each row (S' + N) D for the S' distinct ones, and N S.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 8), torch.randn(1000, 8, requires_grad=True)
        >>> sampler = lossops.samplers.LogUniform(1000, 20)
        >>> lossops.sampled_softmax_loss(x, w, torch.tensor([3, 1, 4, 1]), sampler).backward()
        >>> w.grad.is_sparse
        True

    Reference:
        Jean, Cho, Memisevic, Bengio, On Using Very Large Target Vocabulary for Neural Machine
        Translation, arXiv 1412.2007
    """
    call = _Call.of(
        input, linear_weight, target, sampler, linear_bias, subtract_log_q,
        remove_accidental_hits, sample_weight, reduction, ignore_index, logit_scale, sparse,
    )  # fmt: skip
    u = [] if call.weights is None else [call.weights]
    if call.columns is None:
        each = _softmax_of_rows(call)
        return reduced(each if not u else each * u[0], call.divisor, reduction, call.lead)
    names = canonical(["lse"] if call.hits is None else ["lse", "target"])
    columns = call.columns
    if call.repeats is not None:  # a class drawn k times counts k e^z
        columns = columns._replace(b=_plus(columns.b, call.repeats.to(call.positive.dtype).log()))

    def losses(values: Sequence[Tensor], rows: slice | Tensor, given: Sequence[Tensor]) -> Tensor:
        named = dict(zip(outputs(names), values, strict=True))
        present = call.ids[rows] >= 0
        z = (given[0] - named["shift"].unsqueeze(1)).masked_fill(~present, -torch.inf)
        found = _softmax_losses(z, named["lse"], present)
        return found if len(given) == 1 else found * given[1]

    found = swept_losses(
        columns, call.hits, names, losses, row_tensors=[call.positive, *u],
        reduced=reduction != "none", options=options, backend=backend, counted=call.ids,
    )  # fmt: skip
    if reduction == "none":
        return found.reshape(call.lead)
    return found if reduction == "sum" else found / call.divisor


def nce_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    sampler: Sampler | SampledClasses,
    *,
    linear_bias: Tensor | None = None,
    subtract_log_q: bool = True,
    remove_accidental_hits: bool = False,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None,
    sparse: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Noise-contrastive estimation: each logit alone tells targets from sampled classes.

    loss_n = Σ_t [log(1 + e^{z_nt}) - z_nt / T_n] + Σ_s log(1 + e^{z_ns})

    with z as in `sampled_softmax_loss` and T_n targets in row n, each with the label 1 / T_n, as
    TensorFlow's ``nce_loss`` has it.

    Args:
        input: x, (..., D) floating point.
        linear_weight: w, (V, D), on any device.
        target: class ids (...), or (..., K) padded with -1, int64.
        sampler: as in `sampled_softmax_loss`.
        linear_bias: b, (V,). Default: ``None``.
        subtract_log_q: whether -log E(j) is in the logits. Default: ``True``.
        remove_accidental_hits: whether sampled targets are no negatives. Default: ``False``.
        sample_weight: row weights, (...). Default: ``None``.
        reduction: ``"mean"`` (over Σ sample_weight of rows that count), ``"sum"`` or ``"none"``.
            Default: ``'mean'``.
        ignore_index: target id of ignored rows; None means -100. Default: ``None``.
        logit_scale: factor of x·w, a number or a one-element tensor. Default: ``None``.
        sparse: as in `sampled_softmax_loss`. Default: ``True``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Loss and gradients in one visit of each tile of logits; memory as `sampled_softmax_loss`.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 8), torch.randn(1000, 8, requires_grad=True)
        >>> sampler = lossops.samplers.LogUniform(1000, 20)
        >>> lossops.nce_loss(x, w, torch.tensor([3, 1, 4, 1]), sampler).backward()

    Reference:
        Gutmann, Hyvärinen, Noise-contrastive Estimation: A New Estimation Principle for
        Unnormalized Statistical Models, 2010
    """
    call = _Call.of(
        input, linear_weight, target, sampler, linear_bias, subtract_log_q,
        remove_accidental_hits, sample_weight, reduction, ignore_index, logit_scale, sparse,
    )  # fmt: skip
    present = call.ids >= 0
    share = present.sum(1, keepdim=True).clamp_min(1)
    z = call.positive
    positives = torch.where(present, softplus(z) - z / share, 0.0).sum(1)
    factor = has_target(call.ids).to(z.dtype) if call.weights is None else call.weights
    if call.columns is None:
        assert call.negative is not None
        each = factor * (positives + softplus(call.negative).sum(1))
        return reduced(each, call.divisor, reduction, call.lead)
    none = None if call.hits is None else factor.new_zeros(call.columns.w.shape[0])
    negatives = binary_loss(
        call.columns, call.hits, Binary(), weight=call.repeats, pos_weight=none, factor=factor,
        reduced=reduction != "none", backend=backend,
    )  # fmt: skip
    if reduction == "none":
        return (negatives + factor * positives).reshape(call.lead)
    total = negatives + (factor * positives).sum()
    return total if reduction == "sum" else total / call.divisor


def negative_sampling_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    sampler: Sampler | SampledClasses,
    *,
    linear_bias: Tensor | None = None,
    remove_accidental_hits: bool = False,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None,
    sparse: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Negative sampling of word2vec: `nce_loss` with logits as they are.

    loss_n = -log σ(x_n·w_y + b_y) + Σ_s log(1 + e^{x_n·w_s + b_s})   for one target y

    Args:
        input: x, (..., D) floating point.
        linear_weight: w, (V, D), on any device.
        target: class ids (...), or (..., K) padded with -1, int64.
        sampler: as in `sampled_softmax_loss`.
        linear_bias: b, (V,). Default: ``None``.
        remove_accidental_hits: as in `nce_loss`. Default: ``False``.
        sample_weight: row weights, (...). Default: ``None``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. Default: ``'mean'``.
        ignore_index: target id of ignored rows; None means -100. Default: ``None``.
        logit_scale: factor of x·w, a number or a one-element tensor. Default: ``None``.
        sparse: as in `sampled_softmax_loss`. Default: ``True``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V).

    Note:
        Loss and gradients in one visit of each tile of logits; memory as `sampled_softmax_loss`.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 8), torch.randn(1000, 8, requires_grad=True)
        >>> sampler = lossops.samplers.Frequency(torch.rand(1000) + 0.1, 5)
        >>> y = torch.tensor([3, 1, 4, 1])
        >>> lossops.negative_sampling_loss(x, w, y, sampler.per_row(y)).backward()

    Reference:
        Mikolov and others, Distributed Representations of Words and Phrases and their
        Compositionality, arXiv 1310.4546
    """
    return nce_loss(
        input, linear_weight, target, sampler, linear_bias=linear_bias, subtract_log_q=False,
        remove_accidental_hits=remove_accidental_hits, sample_weight=sample_weight,
        reduction=reduction, ignore_index=ignore_index, logit_scale=logit_scale, sparse=sparse,
        backend=backend,
    )  # fmt: skip


class _Call(NamedTuple):
    """What the losses here share: logits of the targets, and columns or logits of the negatives."""

    ids: Tensor  # (N, K), -1 where there is none
    lead: torch.Size
    positive: Tensor  # z of the targets (N, K)
    columns: HeadInputs | None  # the sample as a head (S, D), for classes shared by all rows
    hits: Tensor | None  # where in the sample the targets are, (N, K)
    repeats: Tensor | None  # how often each class of the sample was drawn, (S,)
    negative: Tensor | None  # z of each row's own negatives (N, S)
    weights: Tensor | None  # (N,), 0 where ignored
    divisor: Tensor

    @staticmethod
    def of(
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        sampler: Sampler | SampledClasses,
        linear_bias: Tensor | None,
        subtract_log_q: bool,
        remove_accidental_hits: bool,
        sample_weight: Tensor | None,
        reduction: str,
        ignore_index: int | None,
        logit_scale: float | Tensor | None,
        sparse: bool,
    ) -> _Call:
        check_reduction(reduction)
        check_float("linear_weight", linear_weight)
        check_tensor("target", target)
        head = row_head(input, linear_weight, linear_bias, logit_scale)
        check_devices(input, target=target)
        v, acc = linear_weight.shape[0], accumulate_dtype(head.x.dtype)
        lead = input.shape[:-1]
        ids = class_ids(target, lead, v, ignore_index, several=True)
        check_target(ids, v)
        # A NaN in an ignored row must not reach a loss or a gradient.
        counted = has_target(ids)
        head = head._replace(x=torch.where(counted.unsqueeze(1), head.x, 0.0))
        weights = row_weight(sample_weight, lead, input)
        weights = None if weights is None else torch.where(counted, weights, 0.0)
        _, divisor = row_factors(ids, weights, None, head.x)
        found = sampler if isinstance(sampler, SampledClasses) else sampler(ids)
        drawn, log_expected = _checked(found, ids.shape[0], v, input)
        if subtract_log_q and found.target_log_expected is None:
            raise ValueError(
                "sampler must give target_log_expected where subtract_log_q=True, got None; "
                "draw with the targets, or pass subtract_log_q=False"
            )
        per_row = drawn.ndim == 2
        repeats = None
        sampled = drawn
        if per_row:
            sampled, at = torch.unique(drawn, return_inverse=True)
        else:
            sampled, log_expected, repeats = _distinct(drawn, log_expected)
        wanted = ids.clamp_min(0).flatten()
        at_target = torch.arange(wanted.shape[0], device=ids.device).reshape(ids.shape)
        if ids.device.type == "cpu":  # elsewhere their number would have to be waited for
            wanted, at_target = torch.unique(ids.clamp_min(0), return_inverse=True)
        picked = torch.cat([sampled, wanted])
        rows = select_rows(linear_weight, picked, sparse=sparse, device=input.device)
        parts = rows.to(head.x.dtype).split([sampled.shape[0], wanted.shape[0]])
        biases: tuple[Tensor | None, ...] = (None, None)
        if linear_bias is not None:
            bias = select_rows(linear_bias, picked, sparse=sparse, device=input.device).to(acc)
            biases = bias.split([sampled.shape[0], wanted.shape[0]])
        positive = _logits(head, parts[1], biases[1], at_target)
        if subtract_log_q:
            assert found.target_log_expected is not None
            expected = found.target_log_expected
            if expected.numel() != ids.numel():
                raise ValueError(
                    f"target_log_expected must have a value per target, {tuple(ids.shape)}, got "
                    f"{tuple(expected.shape)}"
                )
            expected = expected.reshape(ids.shape).to(acc)
            positive = positive - torch.where(ids < 0, 0.0, expected)
        if per_row:
            negative = _logits(head, parts[0], biases[0], at)
            if subtract_log_q:
                negative = negative - log_expected.to(acc)
            if remove_accidental_hits:
                negative = negative.masked_fill(_hits(drawn, ids), -torch.inf)
            return _Call(ids, lead, positive, None, None, None, negative, weights, divisor)
        column_bias = biases[0]
        if subtract_log_q:
            column_bias = _plus(column_bias, -log_expected.to(acc))
        columns = HeadInputs(head.x, parts[0], column_bias, head.scale, 0.0, lead)
        hits = positions(sampled, ids) if remove_accidental_hits else None
        return _Call(ids, lead, positive, columns, hits, repeats, None, weights, divisor)


def _checked(found: Any, rows: int, v: int, input: Tensor) -> tuple[Tensor, Tensor]:
    """Sampled ids (S,) or (N, S) and their log expected counts, rising where shared."""
    if not isinstance(found, SampledClasses):
        raise TypeError(f"sampler must give SampledClasses, got {type(found).__name__}")
    ids, expected = found.ids, found.log_expected
    check_devices(input, ids=ids, log_expected=expected)
    if ids.shape != expected.shape or ids.ndim not in (1, 2) or not ids.shape[-1]:
        raise ValueError(
            "ids of the sample must have shape (S,) or (N, S), and log_expected the same, got "
            f"{tuple(ids.shape)} and {tuple(expected.shape)}"
        )
    if ids.ndim == 2 and ids.shape[0] != rows:
        raise ValueError(f"ids of the sample must have {rows} rows, got {ids.shape[0]}")
    if ids.device.type == "cpu" and ids.numel():
        low, high = (int(t) for t in torch.aminmax(ids))
        if low < 0 or high >= v:
            raise IndexError(f"ids of the sample must be in [0, {v}), got some in [{low}, {high}]")
    if ids.ndim == 2:
        return ids, expected
    ordered, order = ids.sort()
    return ordered, expected[order]


def _distinct(ids: Tensor, expected: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Distinct ids, their log expected counts, how often each was drawn (None for once).

    A device that would have to be waited for keeps the repeats, drawn 0 times.
    """
    new = torch.ones_like(ids, dtype=torch.bool)
    new[1:] = ids[1:] != ids[:-1]
    if ids.device.type == "cpu" and bool(new.all()):
        return ids, expected, None
    counts = torch.searchsorted(ids, ids, right=True) - torch.searchsorted(ids, ids)
    counts = torch.where(new, counts, 0)
    if ids.device.type == "cpu":
        return ids[new], expected[new], counts[new]
    return ids, expected, counts


def _hits(drawn: Tensor, ids: Tensor) -> Tensor:
    """Whether each of ``drawn`` (N, S) is one of the targets (N, K) of its row."""
    if cuda_rows.runs_on(drawn.device):
        return cuda_draws.hits(drawn, ids)
    return (drawn.unsqueeze(2) == ids.unsqueeze(1)).any(2)


def _plus(bias: Tensor | None, more: Tensor) -> Tensor:
    return more if bias is None else bias + more


def _softmax_losses(z: Tensor, lse: Tensor, present: Tensor) -> Tensor:
    """log(Σ_t e^{z_t} + e^{lse}) - mean_t z_t of the targets present, (R,)."""
    if z.shape[1] == 1:
        return torch.where(present[:, 0], -F.logsigmoid(z[:, 0] - lse), 0.0)
    total = torch.logsumexp(torch.cat([z, lse.unsqueeze(1)], 1), 1, keepdim=True)
    counts = present.sum(1).clamp_min(1)
    return torch.where(present, total - z, 0.0).sum(1) / counts


def _softmax_of_rows(call: _Call) -> Tensor:
    assert call.negative is not None
    present = call.ids >= 0
    z = call.positive.masked_fill(~present, -torch.inf)
    return _softmax_losses(z, logsumexp(call.negative), present)


def _logits(head: HeadInputs, rows: Tensor, bias: Tensor | None, at: Tensor) -> Tensor:
    """scale · x_n · rows[at_nk] + bias[at_nk], (N, K), in the accumulate dtype."""
    z: Tensor = apply(IndexedProducts, head.x, rows, at)
    with without_autocast(head.x.device):
        if head.scale is not None:
            z = z * head.scale.to(z.dtype)
        return z if bias is None else z + bias[at]


class IndexedProducts(torch.autograd.Function):
    """x_n · rows[at_nk], (N, K); the rows are gathered by blocks, again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(x, rows, at)
        acc = accumulate_dtype(x.dtype)
        z = x.new_empty(at.shape, dtype=acc)
        for some in _blocks(at, x):
            z[some] = (x[some].to(acc).unsqueeze(1) * rows[at[some]].to(acc)).sum(2)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, rows, at = ctx.saved_tensors
        if torch.is_grad_enabled():  # with a graph of its own
            dx = (g.unsqueeze(2) * rows[at].to(g.dtype)).sum(1)
            each = (g.unsqueeze(2) * x.to(g.dtype).unsqueeze(1)).flatten(0, 1)
            drows = torch.zeros_like(rows, dtype=g.dtype).index_add(0, at.flatten(), each)
            return dx.to(x.dtype), drows.to(rows.dtype), None
        drows = torch.zeros_like(rows, dtype=g.dtype)
        if cuda_rows.takes(x, rows):
            sums = x.new_zeros(x.shape, dtype=g.dtype)
            cuda_rows.add_targets(sums, drows, None, x, None, rows, at, g)
            return sums.to(x.dtype), drows.to(rows.dtype), None
        dx = torch.empty_like(x)
        for some in _blocks(at, x):
            weights = g[some].unsqueeze(2)
            dx[some] = (weights * rows[at[some]].to(g.dtype)).sum(1).to(x.dtype)
            each = weights * x[some].to(g.dtype).unsqueeze(1)
            drows.index_add_(0, at[some].flatten(), each.flatten(0, 1))
        return dx, drows.to(rows.dtype), None


def _blocks(at: Tensor, x: Tensor) -> Iterator[slice]:
    yield from row_blocks(at.shape[0], at.shape[1] * x.shape[1], GATHERED)
