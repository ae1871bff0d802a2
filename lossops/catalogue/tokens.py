"""Objectives of tokens: masked diffusion, unlearning to uniform, edit-invariance, membership.

None stores logits. Those that need log-probabilities themselves take `lossops.linear_statistics`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossops.catalogue.checks import among, between
from lossops.catalogue.keywords import some
from lossops.catalogue.preferences import FAMILY, over_sequences
from lossops.catalogue.recipe import ONE_SWEEP, TWO_SWEEPS, composed, recipe
from lossops.cross_entropy import linear_cross_entropy
from lossops.inputs import check_float, is_ignored
from lossops.linear import linear_statistics
from lossops.reference import accumulate_dtype
from lossops.statistics import RowStatistics


@composed(
    family=FAMILY,
    use="masked (absorbing) diffusion over tokens",
    statistics=("lse", "target"),
    memory=ONE_SWEEP,
    head=some(
        "linear_bias",
        "logit_scale",
        "softcap",
        "near_threshold",
        "class_group",
        "options",
        "backend",
    ),
)
def linear_masked_diffusion_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    masked: Tensor,
    level: Tensor | None = None,
    rate: Tensor | None = None,
    kind: str = "lambda",
) -> Tensor:
    """Denoising cross-entropy of masked tokens, weighted by the time of the noise.

    loss = mean over sequences of a_i Σ_{t masked} -log p(y_it)

    a = 1 / λ (``"lambda"``: the level is λ, the expected part of masked tokens), dσ / (e^σ - 1)
    (``"t"``: the level is σ, the rate dσ) or T / k (``"k"``: k tokens of T are masked).

    Args:
        input: x, (..., T, D) floating point.
        target: class ids (..., T), int64, of the clean tokens.
        masked: which tokens are masked, (..., T) bool; the others cost nothing.
        level: λ or σ of each sequence, (...). Default: ``None``.
        rate: dσ of each sequence, (...). Default: ``None``.
        kind: ``"lambda"``, ``"t"`` or ``"k"``. Default: ``'lambda'``.

    Returns:
        Scalar; float32 (float64 for float64 inputs).

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(2, 5, 8, requires_grad=True), torch.randn(100, 8)
        >>> y, level = torch.randint(100, (2, 5)), torch.tensor([0.5, 0.9])
        >>> masked = torch.rand(2, 5) < level.unsqueeze(1)
        >>> loss = lossops.catalogue.linear_masked_diffusion_loss
        >>> loss(x, w, y, masked=masked, level=level).backward()

    Reference:
        Ou et al., Your Absorbing Discrete Diffusion Secretly Models the Conditional Distributions
        of Clean Data, arXiv 2406.03736
    """
    among("kind", kind, ("lambda", "t", "k"))
    if masked.shape != target.shape or masked.dtype != torch.bool:
        raise ValueError(
            f"masked must be bool of shape {tuple(target.shape)}, got {masked.dtype} "
            f"{tuple(masked.shape)}"
        )
    needed = {"lambda": {"level": level}, "t": {"level": level, "rate": rate}, "k": {}}[kind]
    for name, given in needed.items():
        if given is None:
            raise ValueError(f"kind={kind!r} needs {name}, got None; pass {name}=")
        check_float(name, given)
        if given.shape != masked.shape[:-1]:
            raise ValueError(
                f"{name} must have shape {tuple(masked.shape[:-1])}, one value per sequence, got "
                f"{tuple(given.shape)}"
            )
    acc = accumulate_dtype(input.dtype)
    if kind == "k":
        count = masked.sum(-1)
        factor = masked.shape[-1] / torch.where(count == 0, torch.inf, count.to(acc))
    else:
        assert level is not None
        factor = 1 / level.to(acc)
        if rate is not None and kind == "t":
            factor = rate.to(acc) / torch.expm1(level.to(acc))
    weights = factor.unsqueeze(-1).expand(masked.shape)
    total: Tensor = linear_cross_entropy(
        input, linear_weight, target.masked_fill(~masked, -100), sample_weight=weights,
        reduction="sum", **head,
    )  # fmt: skip
    return total / max(1, factor.numel())


@recipe(
    family=FAMILY, use="unlearning: predictions back to uniform", names=("lse", "target", "sum")
)
def linear_uniform_kl_loss(s: RowStatistics) -> Tensor:
    """Divergence of the uniform distribution from the prediction.

    loss = KL(uniform ‖ p) = logsumexp z - z̄ - log V

    The target says which rows count and, with ``weight``, how much. As retain loss of ULD: 5 times
    this on the data to keep, beside cross-entropy on the data to forget.

    Reference:
        Ji et al., Reversing the Forget-Retain Objectives: An Efficient LLM Unlearning Framework
        from Logit Difference, arXiv 2406.08607
    """
    most = torch.log(s.shift.new_tensor(float(s.num_classes)))
    return s.relative_logsumexp - s.relative("average") - most


@composed(
    family=FAMILY,
    use="references that may be shifted or reordered in part",
    statistics=("lse", "target"),
    head=some("linear_bias", "reduction", "logit_scale", "softcap", "options", "backend"),
    memory=f"{TWO_SWEEPS}, N·T ids and log-probabilities and a few temporaries",
)
def linear_edit_invariant_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    ngrams: tuple[int, ...],
    floor: float = -20.0,
    gumbel: bool = False,
) -> Tensor:
    """Edit-invariant sequence loss: every n-gram of the reference may come out at any position.

    loss_i = -mean_n mean_s Σ_t a_ts G_ts,   G_ts = 1/n Σ_{k < n} log p_{t+k}(y_{s+k})

    a = softmax of G over the positions t. Log-probabilities are floored. The authors' code adds
    Gumbel noise to G inside that softmax, ``gumbel=True``, and trains on a weighted sum of this and
    cross-entropy.

    Args:
        input: x, (B, T, D) floating point.
        target: class ids (B, T), int64; all count.
        ngrams: lengths n, each in [1, T]; they are tuned.
        floor: least log-probability, with no gradient below. Default: ``-20.0``.
        gumbel: whether a is sampled with Gumbel noise. Default: ``False``.

    Returns:
        Scalar, or (B,) for ``reduction="none"``; float32 (float64 for float64 inputs).

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(2, 5, 8, requires_grad=True), torch.randn(100, 8)
        >>> y = torch.randint(100, (2, 5))
        >>> lossops.catalogue.linear_edit_invariant_loss(x, w, y, ngrams=(1, 2)).backward()

    Reference:
        Liu et al., Don't Take It Literally: An Edit-Invariant Sequence Loss for Text Generation,
        arXiv 2106.15078
    """
    if input.ndim != 3 or target.shape != input.shape[:2]:
        raise ValueError(
            f"input must have shape (B, T, D) and target (B, T), got {tuple(input.shape)} and "
            f"{tuple(target.shape)}"
        )
    length = input.shape[1]
    if not ngrams or not all(1 <= n <= length for n in ngrams):
        raise ValueError(f"ngrams must be lengths in [1, {length}], got {ngrams}")
    log_p = _all_log_probs(input, linear_weight, target, head).clamp_min(floor)  # (B, T, T)
    losses = torch.zeros_like(log_p[:, 0, 0])
    for n in ngrams:
        count = length - n + 1
        shifted = [log_p[:, k : k + count, k : k + count] for k in range(n)]
        g = torch.stack(shifted).mean(0)
        noise = -torch.empty_like(g).exponential_().log() if gumbel else 0.0
        losses = losses - ((g + noise).softmax(1) * g).sum(1).mean(1) / len(ngrams)
    return over_sequences(losses, head["reduction"])


def _all_log_probs(
    input: Tensor, linear_weight: Tensor, target: Tensor, head: dict[str, Any]
) -> Tensor:
    """log p_t(y_s) of every position and every token of its sequence, (B, T, T)."""
    shaping = {n: v for n, v in head.items() if n != "reduction"}
    length = target.shape[1]
    # Of several targets -1 would be none; here every one is a token.
    ids = target.masked_fill(target < 0, linear_weight.shape[0])
    ids = ids.unsqueeze(1).expand(-1, length, -1)
    s = linear_statistics(input, linear_weight, ids, names=("lse",), **shaping)
    # A token given twice counts once, where it is first.
    first = (target.unsqueeze(2) == target.unsqueeze(1)).int().argmax(2)  # (B, T)
    return s.log_p.gather(2, first.unsqueeze(1).expand(-1, length, -1))


@torch.no_grad()
def min_k_scores(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    k: float,
    normalized: bool = False,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Min-K% and Min-K%++: how likely a text was in the training data, from its rarest tokens.

    score = mean of the smallest ⌊k T⌋ of log p(y_t), or of (log p(y_t) - μ_t) / σ_t

    μ and σ: mean and deviation of log p under p itself, over the classes; 0 where σ is 0. ⌊k T⌋ is
    as in the authors' code; of a text so short that it is 0, one token is taken.

    Args:
        input: x, (..., T, D) floating point.
        linear_weight: w, (V, D).
        target: class ids (..., T), int64.
        k: part of the counted tokens, in (0, 1].
        normalized: whether the scores are those of Min-K%++. Default: ``False``.
        linear_bias: b, (V,). Default: ``None``.
        ignore_index: target id of what is no token; None means -100. Default: ``None``.
        logit_scale: factor of x·w. Default: ``None``.
        softcap: logits become softcap·tanh(z / softcap). Default: ``None``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.

    Returns:
        Scores (...), higher for texts that were seen, NaN of a text without tokens; float32
        (float64 for float64 inputs).

    Raises:
        ValueError: k outside (0, 1].

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(2, 5, 8), torch.randn(100, 8)
        >>> lossops.catalogue.min_k_scores(x, w, torch.randint(100, (2, 5)), k=0.2).shape
        torch.Size([2])

    Reference:
        Shi et al., Detecting Pretraining Data from Large Language Models, arXiv 2310.16789;
        Zhang et al., Min-K%++: Improved Baseline for Detecting Pre-Training Data from Large
        Language Models, arXiv 2404.02936
    """
    between("k", k, 1e-9, 1)
    s = linear_statistics(
        input, linear_weight, target, names=("variance",) if normalized else ("lse",),
        linear_bias=linear_bias, ignore_index=ignore_index, logit_scale=logit_scale,
        softcap=softcap, backend=backend,
    )  # fmt: skip
    score = s.log_p
    if normalized:
        spread = s.variance > 0  # a token that is certain is as likely as its mean
        deviation = torch.where(spread, s.variance, 1.0).sqrt()
        score = torch.where(spread, (score + s.entropy) / deviation, 0.0)  # μ = -entropy
    counted = ~is_ignored(target, ignore_index)
    ordered = score.masked_fill(~counted, torch.inf).sort(-1).values
    exact = counted.sum(-1, keepdim=True).double() * k + 1e-6  # 1e-6: 0.29 · 100 is 29
    number = exact.floor().clamp_min(1)
    taken = torch.arange(score.shape[-1], device=score.device) < number
    total = torch.where(taken, ordered, 0.0).sum(-1) / number.squeeze(-1).to(ordered.dtype)
    return torch.where(counted.any(-1), total, torch.nan)
