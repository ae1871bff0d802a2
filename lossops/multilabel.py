"""Losses with several positive classes a row and dense negatives, logits never stored.

    loss_i = n_i Σ_{j ∉ P_i} a_j φ(z_ij) + Σ_{j ∈ P_i} a_j p_j ψ(z_ij)

φ and ψ stand in `lossops.binary`. Positives are sparse; every other class of the V is a negative.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops.binary import Binary
from lossops.inputs import (
    HeadInputs,
    check_constant,
    check_reduction,
    class_weight,
    head_inputs,
    row_weight,
)
from lossops.pairs import binary_loss
from lossops.positives import listed_ids
from lossops.reference import accumulate_dtype


def linear_binary_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    positives: Any,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    logit_scale: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Binary cross-entropy of every class, summed over the classes, with sparse positives.

    loss_i = Σ_{j ∉ P_i} a_j softplus(z_ij) + Σ_{j ∈ P_i} a_j p_j softplus(-z_ij)

    Args:
        input: x, (..., D) floating point.
        linear_weight: w, (V, D).
        positives: class ids (..., K) padded with -1, or ``(crow (N + 1,), col)``, or a sparse CSR
            tensor (N, V).
        linear_bias: b, (V,). Default: ``None``.
        weight: a, class weights (V,), no gradient. Default: ``None``.
        pos_weight: p, weights of positives (V,), no gradient. Default: ``None``.
        sample_weight: row weights (...). Default: ``None``.
        reduction: ``"mean"`` over rows by their weights, ``"sum"`` or ``"none"``.
            Default: ``'mean'``.
        logit_scale: factor of x·w, a number or a one-element tensor. Default: ``None``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a positive outside [0, V).

    Note:
        One sweep of 3 GEMMs (row by row 4), a tile of 16 MiB, 8·N·K bytes of positive ids. Rows
        without positives count. ``torch``'s mean over (N, V) is this one divided by V.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(2, 8), torch.randn(100, 8)
        >>> y = torch.zeros(2, 100)
        >>> y[0, 3] = y[0, 7] = y[1, 5] = 1
        >>> plain = torch.nn.functional.binary_cross_entropy_with_logits(x @ w.T, y)
        >>> ours = lossops.linear_binary_cross_entropy(x, w, torch.tensor([[3, 7], [5, -1]]))
        >>> torch.allclose(ours / 100, plain)
        True
    """
    head = head_inputs(input, linear_weight, linear_bias, logit_scale, None)
    return _multi_label(
        head, positives, Binary("sigmoid"), weight, pos_weight, sample_weight, reduction, backend
    )


def linear_asymmetric_loss(
    input: Tensor,
    linear_weight: Tensor,
    positives: Any,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    logit_scale: float | Tensor | None = None,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    detach_focus: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Asymmetric loss for multi-label classification: easy negatives fade, or vanish.

    φ(z) = -m^γ⁻ log(1 - m), m = max(σ(z) - clip, 0)        ψ(z) = -σ(-z)^γ⁺ log σ(z)

    Args:
        input: x, (..., D) floating point.
        linear_weight: w, (V, D).
        positives: as in `linear_binary_cross_entropy`.
        linear_bias: b, (V,). Default: ``None``.
        weight: class weights (V,), no gradient. Default: ``None``.
        pos_weight: weights of positives (V,), no gradient. Default: ``None``.
        sample_weight: row weights (...). Default: ``None``.
        reduction: ``"mean"`` over rows, ``"sum"`` (the authors') or ``"none"``.
            Default: ``'mean'``.
        logit_scale: factor of x·w, a number or a one-element tensor. Default: ``None``.
        gamma_neg: γ⁻, at least 0. Default: ``4.0``.
        gamma_pos: γ⁺, at least 0. Default: ``1.0``.
        clip: probability below which a negative counts nothing, in [0, 1). Default: ``0.05``.
        detach_focus: whether the factors m^γ⁻ and σ(-z)^γ⁺ are constants of the gradient, as in the
            authors' code. Default: ``True``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a positive outside [0, V).

    Note:
        Cost and memory as `linear_binary_cross_entropy`. The authors bound logarithms at 1e-8; here
        none is needed.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(2, 8, requires_grad=True), torch.randn(100, 8)
        >>> lossops.linear_asymmetric_loss(x, w, torch.tensor([[3, 7], [5, -1]])).backward()
        >>> x.grad.shape
        torch.Size([2, 8])

    Reference:
        Ridnik et al., Asymmetric Loss For Multi-Label Classification, arXiv 2009.14119
    """
    for name, gamma in (("gamma_neg", gamma_neg), ("gamma_pos", gamma_pos)):
        check_constant(name, gamma)
        if not 0 <= gamma < float("inf"):
            raise ValueError(f"{name} must be at least 0 and finite, got {gamma}")
    check_constant("clip", clip)
    if not 0 <= clip < 1:
        raise ValueError(f"clip must be in [0, 1), got {clip}")
    head = head_inputs(input, linear_weight, linear_bias, logit_scale, None)
    loss = Binary("asymmetric", 0.0, float(gamma_neg), float(gamma_pos), float(clip), detach_focus)
    return _multi_label(
        head, positives, loss, weight, pos_weight, sample_weight, reduction, backend
    )


def linear_cosine_contrastive_loss(
    input: Tensor,
    linear_weight: Tensor,
    positives: Any,
    *,
    margin: float = 0.0,
    negative_weight: float = 1.0,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Cosine contrastive loss (SimpleX) with all other classes as negatives.

    loss_i = Σ_{j ∈ P_i} (1 - s_ij)⁺ + μ / (V - |P_i|) Σ_{j ∉ P_i} (s_ij - margin)⁺,  s = cos(x, w)

    Args:
        input: x, (..., D) floating point.
        linear_weight: w, (V, D).
        positives: as in `linear_binary_cross_entropy`.
        margin: cosine above which a negative counts. Default: ``0.0``.
        negative_weight: μ. Default: ``1.0``.
        weight: class weights (V,), no gradient. Default: ``None``.
        sample_weight: row weights (...). Default: ``None``.
        reduction: ``"mean"`` over rows, ``"sum"`` or ``"none"``. Default: ``'mean'``.
        normalize: divide x and w by their norms first; False where they are unit vectors already.
            Default: ``True``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.

    Returns:
        Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a positive outside [0, V).

    Note:
        Cost as `linear_binary_cross_entropy`; normalising takes a copy of x and w and its gradient.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(2, 8, requires_grad=True), torch.randn(100, 8)
        >>> y = torch.tensor([[3, 7], [5, -1]])
        >>> lossops.linear_cosine_contrastive_loss(x, w, y, margin=0.4).backward()
        >>> x.grad.shape
        torch.Size([2, 8])

    Reference:
        Mao et al., SimpleX: A Simple and Strong Baseline for Collaborative Filtering,
        arXiv 2109.12613
    """
    check_constant("margin", margin)
    check_constant("negative_weight", negative_weight)
    if normalize:
        input, linear_weight = _unit(input), _unit(linear_weight)
    head = head_inputs(input, linear_weight, None, None, None)
    return _multi_label(
        head, positives, Binary("hinge", float(margin)), weight, None, sample_weight, reduction,
        backend, negative_weight,
    )  # fmt: skip


def _unit(t: Tensor) -> Tensor:
    """Rows of norm 1, computed in float32 and rounded once."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        return t  # refused, with its name, by the checks that follow
    return F.normalize(t.to(accumulate_dtype(t.dtype)), dim=-1).to(t.dtype)


def _multi_label(
    head: HeadInputs,
    positives: Any,
    loss: Binary,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
    backend: str,
    mean_negative: float | None = None,
) -> Tensor:
    """The loss of checked inputs; ``mean_negative``: μ where negatives are averaged."""
    check_reduction(reduction)
    n, v = head.x.shape[0], head.w.shape[0]
    if isinstance(positives, Tensor) and positives.layout == torch.strided:
        if positives.shape[:-1] != head.lead:
            raise ValueError(
                f"positives must have shape {(*head.lead, 'K')}, padded with -1, got "
                f"{tuple(positives.shape)}"
            )
        positives = positives.reshape(n, positives.shape[-1])
    ids = listed_ids(positives, n, v, head.x)
    u = row_weight(sample_weight, head.lead, head.x)
    a = class_weight(weight, v, head.x)
    p = class_weight(pos_weight, v, head.x, "pos_weight")
    negative_factor = None
    if mean_negative is not None:
        count = (v - (ids >= 0).sum(1)).clamp_min(1)
        negative_factor = mean_negative / count.to(accumulate_dtype(head.x.dtype))
    found = binary_loss(
        head, ids, loss, weight=a, pos_weight=p,
        negative_factor=negative_factor, factor=u, reduced=reduction != "none", backend=backend,
    )  # fmt: skip
    if reduction == "none":
        return found.reshape(head.lead)
    if reduction == "sum":
        return found
    total = found.new_tensor(float(n)) if u is None else u.sum()
    return found / torch.where(total == 0, torch.inf, total)
