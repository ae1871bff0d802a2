"""Softmax over cosines with a margin on the target: z = s cos θ, of the target s ψ(cos θ).

The margins ψ stand in `lossops.margins`; a sample of the classes is `lossops.PartialFC`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lossops.catalogue.heads import FAMILY
from lossops.catalogue.keywords import Keywords, without
from lossops.catalogue.recipe import ONE_SWEEP, composed
from lossops.linear import linear_loss
from lossops.margins import ArcFace, CombinedMargin, CosFace, Margin
from lossops.multilabel import _unit
from lossops.statistics import RowStatistics

COSINES: Keywords = without("linear_bias", "logit_scale", "softcap")
UNIT = f"{ONE_SWEEP}, unit copies of x and w and their gradients"


@composed(
    family=FAMILY,
    use="verification, retrieval: an additive margin of cosines",
    statistics=("lse", "target"),
    memory=UNIT,
    head=COSINES,
)
def linear_cos_face_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    scale: float = 64.0,
    margin: float = 0.4,
    filter_above: float | None = None,
) -> Tensor:
    """CosFace: softmax over cosines, the target's reduced by a margin.

    loss = -log e^{s (c_y - m)} / (e^{s (c_y - m)} + Σ_{j ≠ y} e^{s c_j}),   c = cos(x, w)

    A sample of the classes, or classes over ranks: `lossops.PartialFC`.

    Args:
        scale: s. Default: ``64.0``.
        margin: m. Default: ``0.4``.
        filter_above: other classes with a larger cosine get the logit 0 and no gradient; None for
            none. Default: ``None``.

    Reference:
        Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, arXiv 1801.09414
    """
    return _margin_softmax(input, linear_weight, target, head,
                           CosFace(scale, margin, filter_above))  # fmt: skip


@composed(
    family=FAMILY,
    use="verification, retrieval: an angular margin",
    statistics=("lse", "target"),
    memory=UNIT,
    head=COSINES,
)
def linear_arc_face_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    scale: float = 64.0,
    margin: float = 0.5,
    straight_through: bool = False,
    filter_above: float | None = None,
    guard: bool = True,
) -> Tensor:
    """ArcFace: softmax over cosines, the target's angle widened by a margin.

    loss = -log e^{s cos(θ_y + m)} / (e^{s cos(θ_y + m)} + Σ_{j ≠ y} e^{s cos θ_j})

    Where θ_y + m > π the target's cosine becomes cos θ_y - m sin m, a line that goes on falling.
    The authors' PyTorch code has no such line and passes the gradient straight through,
    dz_y/dcos θ_y = s: ``straight_through=True, guard=False``.

    Args:
        scale: s. Default: ``64.0``.
        margin: m, in [0, π). Default: ``0.5``.
        straight_through: the authors' gradient in place of the true one. Default: ``False``.
        filter_above: other classes with a larger cosine get the logit 0 and no gradient; None for
            none. Default: ``None``.
        guard: whether the line is there. Default: ``True``.

    Reference:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition,
        arXiv 1801.07698
    """
    own = ArcFace(scale, margin, straight_through, filter_above, guard)
    return _margin_softmax(input, linear_weight, target, head, own)


@composed(
    family=FAMILY,
    use="all three margins at once",
    statistics=("lse", "target"),
    memory=UNIT,
    head=COSINES,
)
def linear_combined_margin_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    head: dict[str, Any],
    *,
    scale: float = 64.0,
    m1: float = 1.0,
    m2: float = 0.3,
    m3: float = 0.2,
    straight_through: bool = False,
    filter_above: float | None = None,
) -> Tensor:
    """Combined margin: the target's angle times m1 plus m2, its cosine minus m3.

    loss = -log e^{s ψ} / (e^{s ψ} + Σ_{j ≠ y} e^{s cos θ_j}),   ψ = cos(m1 θ_y + m2) - m3

    Args:
        scale: s. Default: ``64.0``.
        m1: at least 1. Default: ``1.0``.
        m2: in [0, π). Default: ``0.3``.
        m3: taken from the cosine. Default: ``0.2``.
        straight_through: take ψ' = 1 for the true derivative. Default: ``False``.
        filter_above: other classes with a larger cosine get the logit 0 and no gradient; None for
            none. Default: ``None``.

    Reference:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition,
        arXiv 1801.07698
    """
    own = CombinedMargin(scale, m1, m2, m3, straight_through, filter_above)
    return _margin_softmax(input, linear_weight, target, head, own)


def _margin_softmax(
    input: Tensor, linear_weight: Tensor, target: Tensor, head: dict[str, Any], margin: Margin
) -> Tensor:
    scale, most = margin.scale, margin.filter_above
    name = "lse" if most is None else f"lse<{most * scale:.9g}"

    def loss_fn(s: RowStatistics) -> Tensor:
        moved = scale * margin(s.target / scale) - s.shift
        return -F.logsigmoid(moved - s.relative(name))

    return linear_loss(
        _unit(input), _unit(linear_weight), target, loss_fn, names=(name, "target"),
        logit_scale=scale, **head,
    )  # fmt: skip
