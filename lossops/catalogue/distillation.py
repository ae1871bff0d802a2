"""Distillation with very many classes: of teacher and student, the logits of neither are stored.

With t and s the log-softmax of the teacher's and the student's logits over the temperature T:

    kl           T² Σ_j e^{t_j} (t_j - s_j)              reverse_kl   T² Σ_j e^{s_j} (s_j - t_j)
    jsd          T² (β KL(t ‖ m) + (1 - β) KL(s ‖ m)),   e^m = β e^t + (1 - β) e^s
    binary_kl    T² Σ_j (softplus(u_j) - u_j / 2 - log 2),   u = (z_s - z_t) / T

A teacher is (features, weight) or (features, weight, bias), whose logits are computed a chunk of
rows at a time; logits (..., V) that exist; or a function that gives those of rows [first, stop),
from a file perhaps. Of its K best classes alone, `linear_top_k_distillation_loss` takes ids and
log-probabilities, and is an ordinary recipe: the rest of the mass is what is left of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lossops import backends
from lossops.catalogue.checks import above, among, between, constant
from lossops.catalogue.chunked import RowLosses, loss_of_logits, refuse_compilers
from lossops.catalogue.keywords import Keywords, without
from lossops.catalogue.powers import log_1m_exp
from lossops.catalogue.recipe import ONE_SWEEP, composed
from lossops.inputs import HeadInputs, check_float, check_tensor, head_inputs
from lossops.linear import linear_loss
from lossops.reference import accumulate_dtype
from lossops.schedules import row_stride, without_autocast
from lossops.statistics import RowStatistics

FAMILY = "Distillation"
SOFT: Keywords = without("weight", "ignore_index", "near_threshold", "class_group")
PAIRED = "two chunks of logits, 3 GEMMs and the teacher's one"
KINDS = ("kl", "reverse_kl", "jsd", "binary_kl")


@composed(
    family=FAMILY,
    use="a teacher with the same classes",
    statistics="logits of a chunk of rows",
    memory=PAIRED,
    head=SOFT,
)
def linear_distillation_loss(
    input: Tensor,
    linear_weight: Tensor,
    teacher: Any,
    head: dict[str, Any],
    *,
    kind: str = "kl",
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """Distillation: a divergence between the softmax of a teacher and that of a student.

    loss = T² Σ_j e^{t_j} (t_j - s_j),   t = log softmax(z_teacher / T), s = log softmax(z / T)

    and for another ``kind``: ``"reverse_kl"`` the same with t and s exchanged; ``"jsd"``
    β KL(t ‖ m) + (1 - β) KL(s ‖ m) with m the mixture; ``"binary_kl"`` a divergence per class,
    Σ_j softplus(u_j) - u_j / 2 - log 2 with u = (z - z_teacher) / T, as of dual heads.

    Args:
        teacher: (features (..., D'), weight (V, D')), with a bias (V,) perhaps; logits (..., V); or
            ``f(first, stop)`` that gives the logits of some of the flattened rows. No gradient.
        kind: ``"kl"``, ``"reverse_kl"``, ``"jsd"`` or ``"binary_kl"``. Default: ``'kl'``.
        temperature: T, above 0; dual heads take 2. Default: ``1.0``.
        beta: β of ``"jsd"``, in (0, 1). Default: ``0.5``.

    Note:
        The logits of R rows of both at a time, 8·R·V bytes: at most 272 MiB, on a GPU twice as
        much, but at least 64 rows. The student's 3 GEMMs and the teacher's one; row by row
        (``reduction="none"``) 1 and 1 more.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 8, requires_grad=True), torch.randn(100, 8)
        >>> teacher = (torch.randn(4, 16), torch.randn(100, 16))
        >>> lossops.catalogue.linear_distillation_loss(x, w, teacher, temperature=2.0).backward()

    Reference:
        Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, arXiv 1503.02531;
        Agarwal et al., On-Policy Distillation of Language Models (jsd), arXiv 2306.13649
    """
    among("kind", kind, KINDS)
    above("temperature", temperature, 0)
    between("beta", beta, 1e-6, 1 - 1e-6)

    def divergence(z: Tensor, zt: Tensor) -> Tensor:
        if kind == "binary_kl":
            u = torch.where(z == zt, 0.0, z - zt) / temperature  # of -inf and -inf, too
            # log((e^{u/2} + e^{-u/2}) / 2) without the cancellation of softplus(u) - u / 2 - log 2
            each = u.abs() / 2 + torch.log1p(torch.expm1(-u.abs()) / 2)
            return temperature**2 * each.sum(1)
        s, t = (z / temperature).log_softmax(1), (zt / temperature).log_softmax(1)
        if kind == "kl":
            found = _kl(t, s)
        elif kind == "reverse_kl":
            found = _kl(s, t)
        else:
            least = torch.finfo(s.dtype).min / 4  # -inf and -inf have a sum, but no gradient
            t, s = t.clamp_min(least), s.clamp_min(least)
            m = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
            found = beta * _kl(t, m) + (1 - beta) * _kl(s, m)
        return temperature**2 * found

    return _against(input, linear_weight, teacher, head, divergence)


@composed(
    family=FAMILY,
    use="self-supervised prototypes",
    statistics="logits of a chunk of rows",
    memory=PAIRED,
    head=SOFT,
)
def linear_dino_loss(
    input: Tensor,
    linear_weight: Tensor,
    teacher: Any,
    head: dict[str, Any],
    *,
    center: Tensor,
    teacher_temperature: float,
    student_temperature: float = 0.1,
) -> Tensor:
    """DINO: cross-entropy with the centred, sharpened softmax of a teacher.

    loss = -Σ_j q_j log softmax(z / τ_s)_j,   q = softmax((z_teacher - c) / τ_t)

    `catalogue.dino_center` moves c, without a product (N, V).

    Args:
        teacher: (features (..., D'), weight (V, D')), with a bias (V,) perhaps; logits (..., V); or
            ``f(first, stop)`` that gives the logits of some of the flattened rows. No gradient.
        center: c, (V,). No gradient.
        teacher_temperature: τ_t; it is scheduled.
        student_temperature: τ_s. Default: ``0.1``.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 8, requires_grad=True), torch.randn(100, 8)
        >>> teacher, c = (torch.randn(4, 8), torch.randn(100, 8)), torch.zeros(100)
        >>> dino = lossops.catalogue.linear_dino_loss
        >>> dino(x, w, teacher, center=c, teacher_temperature=0.04).backward()
        >>> c = lossops.catalogue.dino_center(c, *teacher)

    Reference:
        Caron et al., Emerging Properties in Self-Supervised Vision Transformers, arXiv 2104.14294
    """
    above("teacher_temperature", teacher_temperature, 0)
    above("student_temperature", student_temperature, 0)
    v = linear_weight.shape[0]
    check_float("center", center)
    if center.shape != (v,):
        raise ValueError(f"center must have shape ({v},), got {tuple(center.shape)}")
    c = constant("center", center).to(accumulate_dtype(input.dtype))

    def cross_entropy(z: Tensor, zt: Tensor) -> Tensor:
        q = ((zt - c) / teacher_temperature).softmax(1)
        z = z / student_temperature
        top = z.detach().amax(1, keepdim=True)  # the sums below are of the size of the loss
        return (z - top).logsumexp(1) - (q * (z - top)).sum(1)

    return _against(input, linear_weight, teacher, head, cross_entropy)


@torch.no_grad()
def dino_center(
    center: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    momentum: float = 0.9,
) -> Tensor:
    """The next centre of `linear_dino_loss`, from the mean of the teacher's logits.

    c' = momentum · c + (1 - momentum) · (mean_n x_n) wᵀ,   c where there are no rows

    Args:
        center: c, (V,).
        features: x of the teacher, (..., D').
        weight: w of the teacher, (V, D').
        bias: b of the teacher, (V,). Default: ``None``.
        momentum: in [0, 1]. Default: ``0.9``.

    Returns:
        c', (V,).

    Raises:
        ValueError: momentum outside [0, 1].

    Example:
        >>> import torch, lossops
        >>> lossops.catalogue.dino_center(torch.zeros(3), torch.ones(2, 4), torch.ones(3, 4))
        tensor([0.4000, 0.4000, 0.4000])
    """
    between("momentum", momentum, 0, 1)
    rows = features.to(center.dtype).reshape(-1, features.shape[-1])
    if not rows.shape[0]:
        return center.clone()
    mean = rows.mean(0)
    with without_autocast(center.device):
        logits = weight.to(center.dtype) @ mean
    logits = logits if bias is None else logits + bias.to(center.dtype)
    return momentum * center + (1 - momentum) * logits


@composed(
    family=FAMILY,
    use="a teacher known by its K best classes, from a file or an API",
    statistics=("lse", "target"),
    memory=f"{ONE_SWEEP}, N·K values",
    head=without("weight", "ignore_index", "softcap"),
)
def linear_top_k_distillation_loss(
    input: Tensor,
    linear_weight: Tensor,
    ids: Tensor,
    head: dict[str, Any],
    *,
    log_probs: Tensor,
    tail: str = "bucket",
    temperature: float = 1.0,
) -> Tensor:
    """Distillation from a sparse teacher: its K best log-probabilities, the tail handled.

    loss = T² [Σ_k t_k (log t_k - log p_k) + t_rest (log t_rest - log p_rest)]

    p = softmax(z / T); t_rest = 1 - Σ_k t_k and p_rest = 1 - Σ_k p_k are the mass of all other
    classes, of which p_rest is summed, not subtracted. ``tail="renormalize"`` divides t by its sum
    and leaves the rest out; ``tail="ignore"`` leaves it out as it is.

    Args:
        ids: class ids (..., K), distinct in a row, padded with -1; rows of -1 are ignored.
        log_probs: log t at the temperature T, (..., K). No gradient.
        tail: ``"bucket"``, ``"renormalize"`` or ``"ignore"``. Default: ``'bucket'``.
        temperature: T, above 0. Default: ``1.0``.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(4, 8, requires_grad=True), torch.randn(100, 8)
        >>> best = torch.randn(4, 100).log_softmax(1).topk(5)
        >>> distill = lossops.catalogue.linear_top_k_distillation_loss
        >>> distill(x, w, best.indices, log_probs=best.values).backward()
    """
    among("tail", tail, ("bucket", "renormalize", "ignore"))
    above("temperature", temperature, 0)
    if log_probs.shape != ids.shape:
        raise ValueError(
            f"log_probs must have the shape of ids, {tuple(ids.shape)}, got "
            f"{tuple(log_probs.shape)}"
        )
    scale, bias = head["logit_scale"], head["linear_bias"]
    cooled = {
        **head,
        "logit_scale": (1.0 if scale is None else scale) / temperature,
        "linear_bias": None if bias is None else bias / temperature,
    }
    given = (
        constant("log_probs", log_probs)
        .to(accumulate_dtype(input.dtype))
        .masked_fill(ids < 0, -torch.inf)
    )

    def loss_fn(s: RowStatistics, t: Tensor) -> Tensor:
        if tail == "renormalize":
            total = t.logsumexp(1, keepdim=True)
            t = t - torch.where(total == -torch.inf, 0.0, total)
        present = t > -torch.inf
        log_t = torch.where(present, t, 0.0)
        log_p = torch.where(present, s.log_p, 0.0)
        loss = torch.where(present, log_t.exp() * (log_t - log_p), 0.0).sum(1)
        if tail == "bucket":
            mass = t.logsumexp(1)
            # A row that sums to 1 up to rounding has no tail.
            inside = (mass < -8 * torch.finfo(mass.dtype).eps) & (s.relative("lse") > -torch.inf)
            log_rest = log_1m_exp(torch.where(inside, mass, -1.0))
            others = torch.where(inside, s.relative("lse") - s.relative_logsumexp, 0.0)
            loss = loss + torch.where(inside, log_rest.exp() * (log_rest - others), 0.0)
        return temperature**2 * loss

    return linear_loss(input, linear_weight, ids, loss_fn, row_inputs={"t": given}, **cooled)


def _kl(t: Tensor, s: Tensor) -> Tensor:
    """Σ_j e^{t_j} (t_j - s_j), 0 where e^t is 0, (R,)."""
    p = t.exp()
    return (p * torch.where(p == 0, 0.0, t - s)).sum(1)


def _against(
    input: Tensor,
    linear_weight: Tensor,
    teacher: Any,
    head: Mapping[str, Any],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The reduced loss of the student's and the teacher's logits, chunk by chunk."""
    refuse_compilers()
    student = head_inputs(
        input, linear_weight, head["linear_bias"], head["logit_scale"], head["softcap"]
    )
    logits_of = _teacher(teacher, student, head["backend"])

    def losses(chunk: slice) -> RowLosses:
        taught = logits_of(chunk)

        def block(z: Tensor, rows: slice) -> Tensor:
            with torch.no_grad():
                zt = taught(rows)
            return loss(z, zt)

        return block

    return loss_of_logits(student, losses, head)


Logits = Callable[[slice], Tensor]


def _teacher(teacher: Any, student: HeadInputs, backend: str) -> Callable[[slice], Logits]:
    """Of the rows of a chunk, logits of some of them in the accumulate dtype, no gradient."""
    n, v, acc = student.x.shape[0], student.w.shape[0], accumulate_dtype(student.x.dtype)
    if isinstance(teacher, Tensor):
        if teacher.shape != (*student.lead, v):
            raise ValueError(
                f"teacher logits must have shape {(*student.lead, v)}, got {tuple(teacher.shape)}"
            )
        flat = constant("teacher", teacher).reshape(n, v)
        return lambda chunk: lambda rows: flat[rows].to(acc)
    if callable(teacher):
        return lambda chunk: lambda rows: _given(teacher(rows.start, rows.stop), rows, v).to(acc)
    if not isinstance(teacher, tuple | list) or len(teacher) not in (2, 3):
        raise TypeError(
            "teacher must be logits, (features, weight) or (features, weight, bias), or a function "
            f"of (first, stop), got {type(teacher).__name__}"
        )
    if len(teacher) == 3 and teacher[2] is None:  # the bias of a layer without one
        teacher = teacher[:2]
    for t in teacher:
        check_float("each tensor of teacher", t)
    features, weight, *more = (constant("each tensor of teacher", t) for t in teacher)
    given = head_inputs(features, weight, more[0] if more else None, None, None)
    if given.lead != student.lead or given.w.shape[0] != v:
        raise ValueError(
            f"teacher must have the rows {tuple(student.lead)} and {v} classes of the student, got "
            f"features {tuple(features.shape)} and weight {tuple(weight.shape)}"
        )
    primitives = backends.select(backend, given.x.device, given.x.dtype).primitives()

    def of_chunk(chunk: slice) -> Logits:
        size, dtype = chunk.stop - chunk.start, accumulate_dtype(given.x.dtype)
        buffer = given.x.new_empty(size * row_stride(v), dtype=dtype)
        z = buffer.as_strided((size, v), (row_stride(v), 1))
        with without_autocast(given.x.device):
            primitives.linear_chunk_statistics(
                given.x[chunk], given.w, given.b, None, 0.0, None, None, None, [], [], z
            )
        return lambda rows: z[rows.start - chunk.start : rows.stop - chunk.start].to(acc)

    return of_chunk


def _given(logits: Tensor, rows: slice, v: int) -> Tensor:
    check_tensor(f"what teacher({rows.start}, {rows.stop}) gives", logits)
    if logits.shape != (rows.stop - rows.start, v):
        raise ValueError(
            f"teacher({rows.start}, {rows.stop}) must give logits of shape "
            f"{(rows.stop - rows.start, v)}, got {tuple(logits.shape)}"
        )
    return constant("what teacher gives", logits)
