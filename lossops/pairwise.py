"""Losses over all pairs of two sets of features: sigmoid (SigLIP) and softmax (InfoNCE, CLIP).

    z_ij = t x_i·w_j + b

    sigmoid   L = 1/N Σ_i [Σ_{j ∉ P_i} softplus(z_ij) + Σ_{j ∈ P_i} softplus(-z_ij)]
    softmax   L = 1/N Σ_i 1/|P_i| Σ_{p ∈ P_i} -log e^{z_ip} / Σ_j e^{z_ij},   rows, columns or both

The matrix z (N, M) exists one tile at a time; features are used as given, so normalise them first.
With `batch_group` the rows are spread over processes: see `lossops.distributed`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops import backends
from lossops.autograd import apply
from lossops.binary import Binary
from lossops.distributed import (
    EXCHANGES,
    GatherRows,
    Peers,
    RingPairStatistics,
    Whole,
    all_agree,
    gather_rows,
    peers,
    ring_binary_loss,
    summed,
    wanting,
)
from lossops.inputs import (
    HeadInputs,
    check_tensor,
    checked_options,
    has_target,
    head_inputs,
    row_weight,
)
from lossops.linear import linear_loss
from lossops.pairs import PairStatistics, binary_loss
from lossops.positives import check_groups, pair_ids, transposed, without
from lossops.reference import accumulate_dtype
from lossops.schedules import LinearLossOptions, without_autocast
from lossops.statistics import RowStatistics

DIRECTIONS = ("both", "rows", "columns")


def sigmoid_pairwise_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    positives: Any = "diagonal",
    weights: Tensor | None = None,
    reduction: str = "rows",
    batch_group: Any = None,
    exchange: str = "ring",
    backend: str = "auto",
) -> Tensor:
    """Sigmoid loss over all pairs, with every gradient from one sweep.

    L = 1/N Σ_ij softplus(-y_ij z_ij),   z_ij = t x_i·w_j + b,   y_ij = 1 for positives, -1 else

    Args:
        image_features: x, (N, D) floating point, used as given.
        text_features: w, (M, D).
        logit_scale: t, a number or a one-element tensor; where log t is a parameter, pass its exp.
        logit_bias: b, a number or a one-element tensor. Default: ``None``.
        positives: ``"diagonal"``; (row ids (N,), column ids (M,)), equal ones positive; a sparse
            CSR tensor (N, M); or column ids (N, K) padded with -1. Default: ``'diagonal'``.
        weights: of the rows, (N,). Default: ``None``.
        reduction: ``"rows"``, the sum over pairs by the number of rows or by their weights,
            ``"sum"``, or ``"none"`` for (N,). Default: ``'rows'``.
        batch_group: process group over whose ranks rows and columns are spread; ids in
            ``positives`` count the columns of all ranks. Default: ``None``.
        exchange: ``"ring"`` or ``"gather"``, see `lossops.distributed`. Default: ``'ring'``.
        backend: ``"auto"``, ``"cpp"`` or ``"reference"``. Default: ``'auto'``.

    Returns:
        Scalar, or (N,) for ``reduction="none"``; float32 (float64 for float64 inputs). With
        ``batch_group`` the loss of the whole batch, on every rank.

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a positive outside [0, M).

    Note:
        3 GEMMs with gradients, 1 without. Memory: a tile of 16 MiB, 4·(N + M)·D bytes for the
        gradients of half-precision features, 8·N·K bytes of positive ids. Deterministic.

    Example:
        >>> import torch, lossops
        >>> x, w = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in "xw")
        >>> log_t, b = torch.tensor(10.0).log().requires_grad_(), torch.tensor(-10.0)
        >>> lossops.sigmoid_pairwise_loss(x, w, log_t.exp(), b).backward()
        >>> log_t.grad.shape
        torch.Size([])

    Reference:
        Zhai, Mustafa, Kolesnikov, Beyer, Sigmoid Loss for Language Image Pre-Training,
        arXiv 2303.15343
    """
    if reduction not in ("rows", "sum", "none"):
        raise ValueError(f"reduction must be one of rows, sum, none, got {reduction!r}")
    head = _pair_inputs(image_features, text_features, logit_scale, batch_group is not None)
    n, m = head.x.shape[0], head.w.shape[0]
    bias = _scalar("logit_bias", logit_bias, head.x)
    u = row_weight(weights, head.lead, head.x, "weights")
    ones = head.x.new_ones(n, dtype=accumulate_dtype(head.x.dtype))
    factor = ones if u is None else u
    loss = Binary("sigmoid")
    if batch_group is None:
        ids = pair_ids(positives, n, m, head.x)
        b = None if bias is None else bias.expand(m)
        found = binary_loss(
            head._replace(b=b), ids, loss, factor=u, reduced=reduction != "none", backend=backend
        )
        return found if reduction != "rows" else found / _divisor(factor.sum())
    if reduction == "none" or factor.requires_grad:
        raise ValueError(
            "batch_group needs reduction 'rows' or 'sum' and weights without gradient, got "
            f"reduction={reduction!r}; reduce the loss or gather the features yourself"
        )
    those = _peers(batch_group, exchange, head, positives)
    head = _joined(head, those)
    ids = _spread_ids(positives, those, head)
    if exchange == "ring":
        chosen = backends.select(backend, head.x.device, head.x.dtype).name
        local = ring_binary_loss(head, bias, ids, factor, loss, those, chosen)
    else:
        everything = apply(GatherRows, head.w, those.columns, those.group)
        b = None if bias is None else bias.expand(everything.shape[0])
        local = binary_loss(
            head._replace(w=everything, b=b), ids, loss, factor=factor, reduced=True,
            backend=backend,
        )  # fmt: skip
    total: Tensor = apply(Whole, local, those)
    return total if reduction == "sum" else total / _divisor(summed(factor.sum(), those.group))


def softmax_pairwise_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    direction: str = "both",
    positives: Any = "diagonal",
    exclude: Any = None,
    negatives: Tensor | None = None,
    image_negatives: Tensor | None = None,
    decoupled: bool = False,
    margin: float = 0.0,
    angular_margin: float = 0.0,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    batch_group: Any = None,
    exchange: str = "ring",
    options: LinearLossOptions | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax loss over pairs (InfoNCE, CLIP), one direction or the mean of both.

    L = 1/N Σ_i 1/|P_i| Σ_{p ∈ P_i} -log e^{z_ip} / Σ_{j ∉ E_i} e^{z_ij},   z_ij = t x_i·w_j

    Args:
        image_features: x, (N, D) floating point, used as given.
        text_features: w, (M, D).
        logit_scale: t, a number or a one-element tensor; 1 / temperature.
        direction: ``"rows"`` ranks the columns of each row, ``"columns"`` the rows of each column,
            ``"both"`` is the mean of the two. Default: ``'both'``.
        positives: P, as in `sigmoid_pairwise_loss`; rows and columns without any do not count.
            Default: ``'diagonal'``.
        exclude: E, pairs in the same forms that are neither positive nor negative, such as two
            items of one class; positives stay. Default: ``None``.
        negatives: further columns (Q, D) for every row, of a queue or mined. Default: ``None``.
        image_negatives: further rows (Q', D) for every column. Default: ``None``.
        decoupled: leave the positives out of the sum. Default: ``False``.
        margin: subtracted from the positive x·w (additive margin). Default: ``0.0``.
        angular_margin: added to the angle of the positive, radians; takes normalised features.
            Default: ``0.0``.
        label_smoothing: part of the target spread evenly over all columns that are not excluded.
            Default: ``0.0``.
        weights: of the rows, (N,); with both directions of the pairs, N = M. Default: ``None``.
        reduction: ``"mean"`` over counted rows by their weights, ``"sum"``, or ``"none"`` for (N,).
            Default: ``'mean'``.
        batch_group: process group over whose ranks rows and columns are spread.
            Default: ``None``.
        exchange: ``"ring"`` (both directions of the diagonal, no further negatives) or
            ``"gather"``. Default: ``'ring'``.
        options: schedule and memory of a single direction. Default: ``None``.
        backend: ``"auto"``, ``"cpp"`` or ``"reference"``. Default: ``'auto'``.

    Returns:
        Scalar, or (N,) for ``reduction="none"``; float32 (float64 for float64 inputs). With
        ``batch_group`` the loss of the whole batch, on every rank.

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a positive outside [0, M).

    Note:
        One direction 3 GEMMs in one sweep; both 4, the sums of rows and columns from the same
        tiles, or 6 with further negatives. Memory O((N + M)·D) and a tile. Deterministic.

    Example:
        >>> import torch, lossops
        >>> x, w = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in "xw")
        >>> z, y = 10 * x @ w.T, torch.arange(4)
        >>> clip = (torch.nn.functional.cross_entropy(z, y)
        ...         + torch.nn.functional.cross_entropy(z.T, y)) / 2
        >>> torch.allclose(lossops.softmax_pairwise_loss(x, w, 10.0), clip)
        True

    Reference:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
        arXiv 2103.00020; Yeh et al., Decoupled Contrastive Learning, arXiv 2110.06848
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be one of mean, sum, none, got {reduction!r}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    for side, name, given in (
        ("rows", "image_negatives", image_negatives), ("columns", "negatives", negatives)
    ):  # fmt: skip
        if direction == side and given is not None:
            raise ValueError(f"direction={side!r} has no use for {name}; leave it out")
    options = None if options is None else checked_options(options)
    head = _pair_inputs(image_features, text_features, logit_scale, batch_group is not None)
    n, m = head.x.shape[0], head.w.shape[0]
    u = row_weight(weights, head.lead, head.x, "weights")
    if u is not None and direction != "rows" and n != m:
        raise ValueError(f"weights of pairs need as many rows as columns, got {n} and {m}")
    if reduction == "none" and direction == "both" and n != m:
        raise ValueError(
            f"reduction='none' of both directions needs as many rows as columns, got {n} and {m}"
        )
    terms = _Terms(decoupled, margin, angular_margin, label_smoothing)
    call = _Call(head, terms, u, reduction, options, backend)
    if batch_group is not None:
        return _spread_softmax(
            call, batch_group, exchange, direction, positives, exclude, negatives, image_negatives
        )
    ids = pair_ids(positives, n, m, head.x)
    excluded = None if exclude is None else without(pair_ids(exclude, n, m, head.x), ids)
    if not n:
        return (
            _nothing(head)
            if reduction != "none"
            else _nothing(head).expand(0 if direction == "rows" else m)
        )
    diagonal = isinstance(positives, str)
    if direction == "both" and negatives is None and image_negatives is None:
        return _reduce_both(*_both(call, ids, excluded, diagonal), reduction)
    parts = []
    if direction != "columns":
        parts.append(_one_direction(call, ids, excluded, negatives, reduction))
    if direction != "rows":
        turned = call._replace(head=head._replace(x=head.w, w=head.x))
        back = transposed(ids, m, diagonal=diagonal)[0]
        not_counted = None if excluded is None else transposed(excluded, m)[0]
        parts.append(_one_direction(turned, back, not_counted, image_negatives, reduction))
    return parts[0] if len(parts) == 1 else (parts[0] + parts[1]) / 2


class _Terms(NamedTuple):
    """What a softmax loss makes of its statistics."""

    decoupled: bool
    margin: float
    angular_margin: float
    label_smoothing: float

    def losses(
        self,
        target: Tensor,
        lse: Tensor,
        shift: Tensor,
        average: Tensor | None,
        kinds: Tensor,
        count: int,
        scale: Tensor,
    ) -> Tensor:
        """Losses (R,) from target logits (R, K) and log-sum (R,), both relative to the shift.

        ``average``: mean logit, relative too. ``kinds`` (R, K): 1 positive, 2 excluded, 0 absent.
        """
        positive, excluded = kinds == 1, kinds == 2
        raw = torch.where(kinds > 0, target, 0.0)
        moved = self._with_margin(raw, shift, scale)
        size = positive.sum(1).clamp_min(1)
        mean = torch.where(positive, moved, 0.0).sum(1) / size
        counted = positive.any(1)
        if self.decoupled:
            total = torch.where(lse == -torch.inf, mean, lse)  # nothing to compare with: loss 0
            loss = total - mean
        else:
            members = torch.where(positive, moved, -torch.inf)
            members = torch.where(counted.unsqueeze(1), members, 0.0)
            among = torch.logsumexp(members, 1)
            # log Σ over all - log Σ over the positives = -log σ(their difference), exact; the rest
            # is 0 for a single positive.
            missed = F.logsigmoid(among - lse)
            total, loss = among - missed, (among - mean) - missed
        if self.label_smoothing and average is not None:
            others = count * average - torch.where(excluded, raw, 0.0).sum(1)
            others = others + torch.where(positive, moved - raw, 0.0).sum(1)
            smooth = total - others / (count - excluded.sum(1)).clamp_min(1)
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * smooth
        return torch.where(counted, loss, 0.0)

    def _with_margin(self, z: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Target logits with the margins, relative to the shift as they were."""
        if self.angular_margin:
            m = self.angular_margin
            cosine = ((z + shift.unsqueeze(1)) / scale).clamp(-1 + 1e-7, 1 - 1e-7)
            turned = cosine * math.cos(m) - (1 - cosine.square()).sqrt() * math.sin(m)
            # Past π the cosine would rise again; there the margin goes on linearly.
            fair = cosine > math.cos(math.pi - m)
            z = z + scale * (torch.where(fair, turned, cosine - m * math.sin(m)) - cosine)
        return z - scale * self.margin if self.margin else z


class _Call(NamedTuple):
    """A checked call: x against w."""

    head: HeadInputs
    terms: _Terms
    weights: Tensor | None
    reduction: str
    options: LinearLossOptions | None
    backend: str

    @property
    def scale(self) -> Tensor:
        """t in the accumulate dtype."""
        assert self.head.scale is not None
        return self.head.scale.to(accumulate_dtype(self.head.x.dtype))


def _one_direction(
    call: _Call,
    ids: Tensor,
    excluded: Tensor | None,
    negatives: Tensor | None,
    reduction: str,
) -> Tensor:
    """Each row against all columns, in one sweep where it is reduced."""
    head, terms = call.head, call.terms
    w = head.w
    if negatives is not None:
        check_tensor("negatives", negatives)
        if negatives.ndim != 2 or negatives.shape[1] != w.shape[1]:
            raise ValueError(
                f"negatives must have shape (Q, {w.shape[1]}), got {tuple(negatives.shape)}"
            )
        w = torch.cat([w, negatives.to(w.dtype)])
    listed, kinds = _with_excluded(ids, excluded)
    scale = call.scale
    counted = has_target(ids).to(scale.dtype)
    u = counted if call.weights is None else counted * call.weights
    smooths = bool(terms.label_smoothing)

    def loss_fn(s: RowStatistics, kinds: Tensor) -> Tensor:
        average = s.relative("average") if smooths else None
        return terms.losses(
            s.relative("target"), s.relative("lse"), s.shift, average, kinds, w.shape[0], scale
        )

    names = ("lse", "target", "sum") if smooths else ("lse", "target")
    moving = terms.margin or terms.angular_margin
    return linear_loss(
        head.x, w, listed, loss_fn, names=names, row_inputs={"kinds": kinds},
        parameters=(scale,) if moving and scale.requires_grad else (), sample_weight=u,
        reduction=reduction, logit_scale=head.scale, options=call.options, backend=call.backend,
    )  # fmt: skip


def _both(
    call: _Call, ids: Tensor, excluded: Tensor | None, diagonal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of rows (N,) and columns (M,) from the same tiles, and their weights."""
    head, terms, scale = call.head, call.terms, call.scale
    n, m = head.x.shape[0], head.w.shape[0]
    listed, kinds = _with_excluded(ids, excluded)
    chosen = backends.select(call.backend, head.x.device, head.x.dtype).name
    shift, lse, column_shift, column_lse, target = apply(
        PairStatistics, head.x, head.w, head.scale, listed, chosen
    )
    rows, columns = transposed(listed, m, diagonal=diagonal and excluded is None)
    at = columns.clamp_min(0)
    moved = shift[rows.clamp_min(0)] - column_shift.unsqueeze(1)  # first: the offsets cancel
    column_target = target.flatten()[at] + moved
    column_kinds = torch.where(columns < 0, 0, kinds.flatten()[at])
    averages: tuple[Tensor | None, Tensor | None] = (None, None)
    if terms.label_smoothing:
        with without_autocast(head.x.device):
            x, w = head.x.to(scale.dtype), head.w.to(scale.dtype)
            averages = (scale * (x @ w.mean(0)) - shift, scale * (w @ x.mean(0)) - column_shift)
    by_row = terms.losses(target, lse, shift, averages[0], kinds, m, scale)
    by_column = terms.losses(
        column_target, column_lse, column_shift, averages[1], column_kinds, n, scale
    )
    u = (kinds == 1).any(1).to(scale.dtype)
    v = (column_kinds == 1).any(1).to(scale.dtype)
    if call.weights is not None:
        u, v = u * call.weights, v * call.weights
    return by_row, by_column, u, v


def _reduce_both(by_row: Tensor, by_column: Tensor, u: Tensor, v: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return (by_row * u + by_column * v) / 2
    rows, columns = (by_row * u).sum(), (by_column * v).sum()
    if reduction == "mean":
        rows, columns = rows / _divisor(u.sum()), columns / _divisor(v.sum())
    return (rows + columns) / 2


def _with_excluded(ids: Tensor, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids (N, K) the sums leave out, and what each is: 1 positive, 2 excluded, 0 absent."""
    kinds = (ids >= 0).to(torch.int8)
    if excluded is None:
        return ids, kinds
    return torch.cat([ids, excluded], 1), torch.cat([kinds, 2 * (excluded >= 0).to(torch.int8)], 1)


def _spread_softmax(
    call: _Call,
    batch_group: Any,
    exchange: str,
    direction: str,
    positives: Any,
    exclude: Any,
    negatives: Tensor | None,
    image_negatives: Tensor | None,
) -> Tensor:
    """The loss of the whole batch from this rank's rows and columns."""
    head = call.head
    if call.reduction == "none" or (call.weights is not None and call.weights.requires_grad):
        raise ValueError(
            "batch_group needs reduction 'mean' or 'sum' and weights without gradient, got "
            f"reduction={call.reduction!r}; reduce the loss or gather the features yourself"
        )
    those = _peers(batch_group, exchange, head, positives, exclude)
    call = call._replace(head=_joined(head, those))
    head = call.head
    plain = direction == "both" and isinstance(positives, str) and exclude is None
    if exchange == "ring":
        if not plain or negatives is not None or image_negatives is not None:
            raise ValueError(
                "exchange='ring' takes direction='both', positives='diagonal' and no excluded or "
                "further negatives; use exchange='gather'"
            )
        return _ring_softmax(call, those)
    if not isinstance(positives, str | tuple | list) or not isinstance(
        exclude, tuple | list | None
    ):
        raise ValueError(
            "batch_group takes positives='diagonal' or groups, and exclude as groups, since a rank "
            f"does not know the pairs of others; got {type(positives).__name__} and "
            f"{type(exclude).__name__}"
        )
    sides = []
    if direction != "columns":
        sides.append((call, those, False, negatives))
    if direction != "rows":
        turned = call._replace(head=head._replace(x=head.w, w=head.x))
        there = those._replace(rows=those.columns, columns=those.rows)
        sides.append((turned, there, True, image_negatives))
    parts = []
    for side, those_here, flipped, more in sides:
        everything = apply(GatherRows, side.head.w, those_here.columns, those_here.group)
        ids = _spread_ids(positives, those_here, side.head, flipped)
        excluded = None
        if exclude is not None:
            excluded = without(_spread_ids(exclude, those_here, side.head, flipped), ids)
        full = side._replace(head=side.head._replace(w=everything))
        local = _nothing(full.head)
        if everything.shape[0]:
            local = local + _one_direction(full, ids, excluded, more, "sum")
        total: Tensor = apply(Whole, local, those)
        if call.reduction == "mean":
            u = has_target(ids).to(local.dtype)
            u = u if call.weights is None else u * call.weights
            total = total / _divisor(summed(u.sum(), those.group))
        parts.append(total)
    return parts[0] if len(parts) == 1 else (parts[0] + parts[1]) / 2


def _ring_softmax(call: _Call, those: Peers) -> Tensor:
    head, scale = call.head, call.scale
    n, m = head.x.shape[0], head.w.shape[0]
    if those.rows != those.columns:
        raise ValueError(
            "exchange='ring' of the softmax loss needs as many rows as columns on every rank, got "
            f"{those.rows} and {those.columns}; use exchange='gather'"
        )
    chosen = backends.select(call.backend, head.x.device, head.x.dtype).name
    shift, lse, column_shift, column_lse, target = apply(
        RingPairStatistics, head.x, head.w, head.scale, those, chosen
    )
    kinds = torch.ones(n, 1, dtype=torch.int8, device=head.x.device)
    averages: tuple[Tensor | None, Tensor | None] = (None, None)
    everything = sum(those.rows)
    if call.terms.label_smoothing:
        with without_autocast(head.x.device):
            x, w = head.x.to(scale.dtype), head.w.to(scale.dtype)
            means = [
                apply(GatherRows, t.sum(0, keepdim=True), [1] * those.size, those.group).sum(0)
                / everything
                for t in (w, x)
            ]
            averages = (scale * (x @ means[0]) - shift, scale * (w @ means[1]) - column_shift)
    at_column = target + (shift - column_shift).unsqueeze(1)
    spec = (kinds, everything, scale)
    by_row = call.terms.losses(target, lse, shift, averages[0], *spec)
    by_column = call.terms.losses(at_column, column_lse, column_shift, averages[1], *spec)
    u = shift.new_ones(n) if call.weights is None else call.weights
    total: Tensor = apply(Whole, ((by_row + by_column) * u).sum() / 2, those)
    if call.reduction == "sum":
        return total
    assert n == m
    return total / _divisor(summed(u.sum(), those.group))


def _pair_inputs(
    image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor, spread: bool
) -> HeadInputs:
    if logit_scale is None:
        raise TypeError("logit_scale must be a number or a one-element tensor, got None")
    for name, t in (("image_features", image_features), ("text_features", text_features)):
        check_tensor(name, t)
        if t.ndim != 2:
            raise ValueError(f"{name} must have shape (rows, D), got {tuple(t.shape)}")
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(
            "image_features and text_features must have the same D, got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    if text_features.shape[0]:
        return head_inputs(image_features, text_features, None, logit_scale, None)
    if not spread:
        raise ValueError("text_features must have at least one row, got shape (0, D)")
    some = text_features.new_zeros(1, text_features.shape[1])  # a last batch may leave a rank none
    head = head_inputs(image_features, some, None, logit_scale, None)
    return head._replace(w=text_features.to(head.w.dtype))


def _scalar(name: str, value: float | Tensor | None, like: Tensor) -> Tensor | None:
    """A number or one-element tensor as () in the accumulate dtype."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return torch.full((), float(value), dtype=accumulate_dtype(like.dtype), device=like.device)
    if value.numel() != 1:
        raise ValueError(f"{name} must be a number or one element, got {tuple(value.shape)}")
    return value.reshape(()).to(accumulate_dtype(like.dtype))


def _nothing(head: HeadInputs) -> Tensor:
    """0, of no rows and columns, connected to both."""
    return (head.x[:0].sum() + head.w[:0].sum()).to(accumulate_dtype(head.x.dtype))


def _divisor(total: Tensor) -> Tensor:
    """What a mean divides by: inf where there is nothing to average."""
    return torch.where(total == 0, torch.inf, total)


def _peers(group: Any, exchange: str, head: HeadInputs, *pairs: Any) -> Peers:
    """The ranks of ``batch_group``, once this rank's groups are known to fit."""
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
    error = None
    try:
        for positives in pairs:
            if isinstance(positives, tuple | list):
                check_groups(positives, head.x.shape[0], head.w.shape[0], head.x)
    except (TypeError, ValueError) as refused:
        error = refused
    return peers(group, head.x, head.w, error)


def _joined(head: HeadInputs, those: Peers) -> HeadInputs:
    """The inputs, wanting gradients where those of any rank do."""
    x, w = (wanting(t, n) for t, n in zip((head.x, head.w), those.needs, strict=True))
    return head._replace(x=x, w=w)


def _spread_ids(positives: Any, those: Peers, head: HeadInputs, flipped: bool = False) -> Tensor:
    """Positive ids (N_r, K) among the columns of all ranks; ``flipped`` groups are of columns."""
    rows, total = those.rows[those.rank], sum(those.columns)
    if isinstance(positives, str):
        local = pair_ids(positives, rows, those.columns[those.rank], head.x)
        return torch.where(local < 0, -1, local + those.first_column)
    if isinstance(positives, tuple | list):
        here, there = reversed(positives) if flipped else positives
        everywhere = gather_rows(there, those.columns, those.group)
        return pair_ids((here, everywhere), rows, total, head.x)
    error, ids = None, head.x.new_empty(0, dtype=torch.int64)
    try:
        ids = pair_ids(positives, rows, total, head.x)
    except (TypeError, ValueError, IndexError) as refused:
        error = refused
    all_agree(error, those, head.x.device)
    return ids
