"""Arguments that the faces of many recipes share: their types, defaults and words, once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lossops.schedules import LinearLossOptions


class Keyword(NamedTuple):
    """One keyword-only argument of a face."""

    annotation: Any
    default: Any
    words: str


Keywords = Mapping[str, Keyword]

HEAD: Keywords = {
    "linear_bias": Keyword(Tensor | None, None, "b, (V,)."),
    "weight": Keyword(Tensor | None, None, "class weights, (V,), no gradient."),
    "sample_weight": Keyword(Tensor | None, None, "row weights, (...)."),
    "reduction": Keyword(str, "mean", '``"mean"`` (over Σ of the weights), ``"sum"``, ``"none"``.'),
    "ignore_index": Keyword(int | None, None, "target id of ignored rows; None means -100."),
    "logit_scale": Keyword(
        float | Tensor | None, None, "factor of x·w, a number or a one-element tensor."
    ),
    "softcap": Keyword(float | None, None, "logits become softcap·tanh(z / softcap)."),
    "near_threshold": Keyword(
        float | str | None,
        None,
        "near and far gradients, as in `lossops.linear_loss`; None for exact ones.",
    ),
    "class_group": Keyword(
        Any,
        None,
        "process group whose ranks hold consecutive classes, as in `lossops.linear_loss`; what is "
        "given by class is that of this rank's.",
    ),
    "options": Keyword(LinearLossOptions | None, None, "schedule and memory."),
    "backend": Keyword(
        str, "auto", '``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.'
    ),
}
"""What `lossops.linear_loss` takes, too."""

POSITIONAL = {
    "input": "x, (..., D) floating point.",
    "linear_weight": "w, (V, D).",
    "target": "class ids (...), int64.",
}

FACE = 'Scalar, or (...) for ``reduction="none"``; float32 (float64 for float64 inputs).'
NOTE = """\
Accumulated in float32, float64 for float64 inputs; same bits for same inputs and threads."""
RAISES = "ValueError, TypeError: arguments that do not fit. IndexError: a target outside [0, V)."


def some(*names: str) -> Keywords:
    """Those of `HEAD` by name, in its order."""
    return {name: keyword for name, keyword in HEAD.items() if name in names}


def without(*names: str) -> Keywords:
    """`HEAD` but for some."""
    return {name: keyword for name, keyword in HEAD.items() if name not in names}
