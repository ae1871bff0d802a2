"""Losses over all pairs of two sets of features: sigmoid (SigLIP) and softmax (InfoNCE, CLIP).

    z_ij = t x_i·w_j + b

    sigmoid   L = 1/N Σ_i [Σ_{j ∉ P_i} softplus(z_ij) + Σ_{j ∈ P_i} softplus(-z_ij)]
    softmax   L = 1/N Σ_i 1/|P_i| Σ_{p ∈ P_i} -log e^{z_ip} / Σ_j e^{z_ij},   rows, columns or both

The matrix z (N, M) exists one tile at a time; features are used as given, so normalise them first.
With `batch_group` the rows are spread over processes: see `lossops.distributed`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossops.binary import Binary
from lossops.inputs import (
    HeadInputs,
    check_constant,
    check_tensor,
    checked_options,
    head_inputs,
    row_weight,
)
from lossops.pairs import binary_loss
from lossops.positives import pair_ids, transposed, without
from lossops.reference import accumulate_dtype
from lossops.schedules import LinearLossOptions
from lossops.softmax_pairs import (
    SoftmaxCall,
    SoftmaxTerms,
    both_directions,
    divisor,
    nothing,
    one_direction,
    reduce_both,
)
from lossops.spread import spread_sigmoid, spread_softmax

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
            CSR tensor (N, M), its stored entries; or column ids (N, K) padded with -1.
            Default: ``'diagonal'``.
        weights: of the rows, (N,). Default: ``None``.
        reduction: ``"rows"``, the sum over pairs by the number of rows or by their weights,
            ``"sum"``, or ``"none"`` for (N,). Default: ``'rows'``.
        batch_group: process group over whose ranks rows and columns are spread; ids in
            ``positives`` count the columns of all ranks. Default: ``None``.
        exchange: ``"ring"`` or ``"gather"``, see `lossops.distributed`. Default: ``'ring'``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.

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
        return found if reduction != "rows" else found / divisor(factor.sum())
    return spread_sigmoid(head, bias, positives, factor, reduction, batch_group, exchange, backend)


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
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.

    Returns:
        Scalar, or (N,) for ``reduction="none"``; float32 (float64 for float64 inputs). With
        ``batch_group`` the loss of the whole batch, on every rank.

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a positive outside [0, M).

    Note:
        One direction 3 GEMMs in one sweep; both 4, the sums of rows and columns from the same
        tiles, or 6 with further negatives. Memory O((N + M)·D) and a tile. Deterministic. Under
        ``torch.compile`` columns take the diagonal only.

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
    check_constant("angular_margin", angular_margin)
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
    terms = SoftmaxTerms(decoupled, margin, angular_margin, label_smoothing)
    call = SoftmaxCall(head, terms, u, reduction, options, backend)
    if batch_group is not None:
        return spread_softmax(
            call, batch_group, exchange, direction, positives, exclude, negatives, image_negatives
        )
    ids = pair_ids(positives, n, m, head.x)
    excluded = None if exclude is None else without(pair_ids(exclude, n, m, head.x), ids)
    if not n:
        return (
            nothing(head)
            if reduction != "none"
            else nothing(head).expand(0 if direction == "rows" else m)
        )
    diagonal = isinstance(positives, str)
    if direction == "both" and negatives is None and image_negatives is None:
        return reduce_both(*both_directions(call, ids, excluded, diagonal), reduction)
    parts = []
    if direction != "columns":
        parts.append(one_direction(call, ids, excluded, negatives, reduction))
    if direction != "rows":
        turned = call._replace(head=head._replace(x=head.w, w=head.x))
        back = transposed(ids, m, diagonal=diagonal)[0]
        not_counted = None if excluded is None else transposed(excluded, m)[0]
        parts.append(one_direction(turned, back, not_counted, image_negatives, reduction))
    return parts[0] if len(parts) == 1 else (parts[0] + parts[1]) / 2


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
