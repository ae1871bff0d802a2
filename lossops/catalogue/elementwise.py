"""Multi-label losses that are sums over single logits, beside those of `lossops.multilabel`.

`lossops.linear_asymmetric_loss` (``detach_focus`` names its two gradients),
`lossops.linear_cosine_contrastive_loss` and `lossops.linear_binary_cross_entropy` are there; of one
label a row, `linear_one_vs_rest_loss` here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lossops.binary import Binary
from lossops.catalogue.checks import above
from lossops.catalogue.keywords import some
from lossops.catalogue.recipe import composed
from lossops.inputs import head_inputs
from lossops.multilabel import _multi_label

FAMILY = "Multi-label"


@composed(
    family=FAMILY,
    use="long tails: an asymmetric link, no sigmoid",
    statistics="Σ φ(z_j)",
    memory="a tile of logits, 3 GEMMs",
    head=some("linear_bias", "weight", "sample_weight", "reduction", "logit_scale", "backend"),
)
def linear_gumbel_loss(
    input: Tensor,
    linear_weight: Tensor,
    positives: Any,
    head: dict[str, Any],
    *,
    most: float = 10.0,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Gumbel-optimised loss: binary cross-entropy of the probability η = exp(-e^{-z}).

    loss_i = Σ_{j ∉ P_i} a_j (-log(1 - η_ij)) + Σ_{j ∈ P_i} a_j p_j min(e^{-z_ij}, 20)

    a: ``weight``. Logits above ``most`` count as that, with no gradient. The authors also bound
    logits at -4, where the loss of a negative is below 2e-24 and that of a positive is bounded by
    20 before.

    Args:
        positives: class ids (..., K) padded with -1, or any form that
            `lossops.linear_binary_cross_entropy` takes.
        most: largest logit, as in the authors' code. Default: ``10.0``.
        pos_weight: p, weights of positives (V,), no gradient. Default: ``None``.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.randn(2, 8, requires_grad=True), torch.randn(100, 8)
        >>> y = torch.tensor([[3, 7], [5, -1]])
        >>> lossops.catalogue.linear_gumbel_loss(x, w, y).backward()

    Reference:
        Alexandridis, Deng, Nguyen, Luo, Long-tailed Instance Segmentation using Gumbel Optimized
        Loss, arXiv 2207.10936
    """
    above("most", most, 0)
    given = head_inputs(input, linear_weight, head["linear_bias"], head["logit_scale"], None)
    return _multi_label(
        given, positives, Binary("gumbel", float(most)), head["weight"], pos_weight,
        head["sample_weight"], head["reduction"], head["backend"],
    )  # fmt: skip
