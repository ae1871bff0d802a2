"""Checks and layouts shared by every public function: what comes in, as the engine takes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lossops.near_far import DEFAULT_THRESHOLD, NearFar
from lossops.reference import accumulate_dtype
from lossops.schedules import LinearLossOptions

REDUCTIONS = ("mean", "sum", "none")
LEAST_SOFTCAP = 1e-30
"""Below it, and above 1 / it, quotients of float32 logits by it are no numbers."""


class HeadInputs(NamedTuple):
    """Checked inputs of a linear head: x (N, D), w (V, D), b (V,), scale (), softcap 0 for none.

    ``near`` says whether its gradients are near and far ones.
    """

    x: Tensor
    w: Tensor
    b: Tensor | None
    scale: Tensor | None
    softcap: float
    lead: torch.Size
    near: NearFar = NearFar()


def head_inputs(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    logit_scale: float | Tensor | None,
    softcap: float | None,
) -> HeadInputs:
    """Check, apply autocast, bring to one dtype, flatten leading dims.

    Raises:
        TypeError: an argument that is not a tensor, or not floating point.
        ValueError: shapes, devices or options that do not fit.
    """
    _check_shapes(input, linear_weight, linear_bias)
    if softcap is not None:
        check_constant("softcap", softcap)
        if not LEAST_SOFTCAP <= softcap <= 1 / LEAST_SOFTCAP:
            raise ValueError(
                f"softcap must be None or in [{LEAST_SOFTCAP:g}, {1 / LEAST_SOFTCAP:g}], "
                f"got {softcap}"
            )
    scale = _scale(logit_scale, input)
    check_devices(input, linear_weight=linear_weight, linear_bias=linear_bias, logit_scale=scale)
    dtype = _common_dtype(input, linear_weight, linear_bias)
    lead = input.shape[:-1]
    x = input.to(dtype).reshape(lead.numel(), input.shape[-1])
    b = None if linear_bias is None else linear_bias.to(dtype)
    return HeadInputs(x, linear_weight.to(dtype), b, scale, float(softcap or 0.0), lead)


def row_head(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    logit_scale: float | Tensor | None,
) -> HeadInputs:
    """As `head_inputs`, for a weight of which only rows are used: it stays as and where it is."""
    _check_shapes(input, linear_weight, linear_bias)
    scale = _scale(logit_scale, input)
    check_devices(input, logit_scale=scale)
    lead = input.shape[:-1]
    dtype = _common_dtype(input, linear_weight, linear_bias)
    x = input.to(dtype).reshape(lead.numel(), input.shape[-1])
    return HeadInputs(x, linear_weight, linear_bias, scale, 0.0, lead)


def _check_shapes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    for name, t in (("input", input), ("linear_weight", linear_weight)):
        check_float(name, t)
    if linear_weight.ndim != 2 or input.ndim < 1 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            "linear_weight must have shape (V, D) with D the last dim of input, got input "
            f"{tuple(input.shape)} and linear_weight {tuple(linear_weight.shape)}"
        )
    v = linear_weight.shape[0]
    if v == 0:
        raise ValueError("linear_weight must have at least one class, got shape (0, D)")
    if linear_bias is not None:
        check_float("linear_bias", linear_bias)
        if linear_bias.shape != (v,):
            raise ValueError(f"linear_bias must have shape ({v},), got {tuple(linear_bias.shape)}")


def near_request(
    threshold: float | str | None, options: LinearLossOptions, report: bool = False
) -> NearFar:
    """What ``near_threshold`` and the options ask for; ``report``: whether there is one."""
    error = options.near_target_error
    if threshold is None:
        if error is not None:
            raise ValueError(
                f"options.near_target_error={error} needs near_threshold='auto', got None"
            )
        if options.near_certificate:
            raise ValueError("options.near_certificate needs near_threshold, got None")
        return NearFar()
    if options.near_certificate and not report:
        raise ValueError(
            "options.near_certificate needs outputs=('near_far',) of linear_cross_entropy, the "
            "report that has them"
        )
    if not isinstance(threshold, float | int | str):
        raise TypeError(
            "near_threshold must be None, 'auto' or a number in (0, 1), "
            f"got {type(threshold).__name__}"
        )
    if threshold == "auto":
        return NearFar(DEFAULT_THRESHOLD, error or 0.0, options.near_certificate)
    if isinstance(threshold, str) or not 0 < threshold < 1:
        raise ValueError(
            f"near_threshold must be None, 'auto' or a number in (0, 1), got {threshold!r}"
        )
    if error is not None:
        raise ValueError(
            f"options.near_target_error={error} chooses the threshold itself; pass "
            f"near_threshold='auto', not {threshold}"
        )
    return NearFar(float(threshold), 0.0, options.near_certificate)


def class_ids(
    target: Tensor,
    lead: torch.Size,
    num_classes: int,
    ignore_index: int | None,
    *,
    several: bool = False,
) -> Tensor:
    """Target ids as (N, K) int64, -1 where there is none; what is out of range becomes V.

    With ``several``, a target of shape (..., K) is padded with -1 and a repeated id counts once.
    """
    check_tensor("target", target)
    if target.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"target must hold integer class ids, got {target.dtype}")
    check_index("ignore_index", ignore_index)
    ids = target.to(torch.int64)
    if several and target.ndim == len(lead) + 1 and target.shape[:-1] == lead:
        if ignore_index is not None:
            raise ValueError(
                f"ignore_index is of one target per row, got {ignore_index} with a target of shape "
                f"{tuple(target.shape)}; rows whose ids are all -1 are ignored"
            )
        if not target.shape[-1]:
            raise ValueError(
                f"target must have at least one column, got shape {tuple(target.shape)}; "
                "pad with -1"
            )
        ids = ids.reshape(-1, target.shape[-1])
        return distinct(torch.where(ids < -1, num_classes, ids))
    if target.shape != lead:
        raise ValueError(
            f"target must have shape {tuple(lead)} (input without its last dim), "
            f"got {tuple(target.shape)}"
        )
    ids = ids.reshape(-1, 1)
    known = torch.where(ids < 0, num_classes, ids)
    return torch.where(is_ignored(ids, ignore_index), -1, known)


def distinct(ids: Tensor) -> Tensor:
    """Ids (..., K) with -1 in place of those that stand before in their row."""
    ordered, order = ids.sort(dim=-1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again.scatter_(-1, order[..., 1:], ordered[..., 1:] == ordered[..., :-1])
    return torch.where(again, -1, ids)


def is_ignored(target: Tensor, ignore_index: int | None) -> Tensor:
    """Which ids are that of ignored rows, -100 for None."""
    return target == (-100 if ignore_index is None else ignore_index)


def has_target(ids: Tensor) -> Tensor:
    """Which rows of ids (N, K) have a target at all, (N,)."""
    return (ids[:, 0] if ids.shape[1] == 1 else ids.amax(1)) >= 0


def counted_rows(ids: Tensor | None) -> Tensor | None:
    """The rows (R,) that have a target, None for all; on a CPU, where looking costs no sync."""
    if ids is None or ids.device.type != "cpu":
        return None
    counted = has_target(ids).nonzero().squeeze(1)
    return counted if counted.shape[0] < ids.shape[0] else None


def flat_logits(logits: Tensor) -> Tensor:
    """Checked logits as (N, V)."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 1:
        raise TypeError(
            "logits must be a floating point tensor (..., V), got "
            f"{logits.dtype if isinstance(logits, Tensor) else type(logits).__name__}"
        )
    if logits.shape[-1] == 0:
        raise ValueError("logits must have at least one class, got shape (..., 0)")
    return logits.reshape(-1, logits.shape[-1])


def class_weight(
    weight: Tensor | None,
    num_classes: int,
    like: Tensor,
    name: str = "weight",
    *,
    differentiable: bool = False,
) -> Tensor | None:
    """Class weights (V,) checked, in the accumulate dtype of ``like``."""
    if weight is None:
        return None
    check_float(name, weight)
    if weight.shape != (num_classes,):
        raise ValueError(f"{name} must have shape ({num_classes},), got {tuple(weight.shape)}")
    if weight.requires_grad and torch.is_grad_enabled() and not differentiable:
        raise ValueError(f"{name} is not differentiated; pass {name}.detach()")
    check_devices(like, **{name: weight})
    return weight.to(accumulate_dtype(like.dtype))


def class_columns(t: Tensor, lead: torch.Size, num_classes: int, like: Tensor, name: str) -> Tensor:
    """Values (..., V) of rows and classes checked, flattened to (N, V)."""
    check_tensor(name, t)
    if t.shape != (*lead, num_classes):
        raise ValueError(f"{name} must have shape {(*lead, num_classes)}, got {tuple(t.shape)}")
    check_devices(like, **{name: t})
    return t.reshape(-1, num_classes)


def row_weight(
    weight: Tensor | None, lead: torch.Size, like: Tensor, name: str = "sample_weight"
) -> Tensor | None:
    """Row weights flattened to (N,), in the accumulate dtype of ``like``."""
    if weight is None:
        return None
    check_float(name, weight)
    if weight.shape != lead:
        raise ValueError(
            f"{name} must have shape {tuple(lead)} (input without its last dim), "
            f"got {tuple(weight.shape)}"
        )
    check_devices(like, **{name: weight})
    return weight.reshape(-1).to(accumulate_dtype(like.dtype))


def check_reduction(reduction: str) -> None:
    """Raise a ValueError for an unknown reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_devices(input: Tensor, **others: Tensor | None) -> None:
    """Raise unless all are tensors, or None, on the device of ``input``."""
    for name, t in others.items():
        if t is None:
            continue
        check_tensor(name, t)
        if t.device != input.device:
            raise ValueError(
                f"{name} must be on the device of input, {input.device}, got {t.device}"
            )


def check_tensor(name: str, t: object) -> None:
    """Raise a TypeError for what is not a tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")


def check_number(name: str, value: object) -> None:
    """Raise a TypeError for what is no number, nor a tensor that holds one."""
    if not isinstance(value, float | int) and not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_constant(name: str, value: object) -> None:
    """Raise for what is no number, or a tensor that wants a gradient which it would not get."""
    check_number(name, value)
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must be a number, it is not differentiated, got a tensor that wants a "
            "gradient; detach it"
        )


def check_index(name: str, value: object) -> None:
    """Raise a TypeError for what is neither None nor an integer."""
    if not isinstance(value, int | None) and not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer or None, got {type(value).__name__}")


def checked_options(options: LinearLossOptions | None) -> LinearLossOptions:
    """The options given, or the default ones."""
    if not isinstance(options, LinearLossOptions | None):
        raise TypeError(f"options must be LinearLossOptions or None, got {type(options).__name__}")
    return options or LinearLossOptions()


def check_float(name: str, t: object) -> None:
    """Raise a TypeError for what is not a floating point tensor."""
    check_tensor(name, t)
    assert isinstance(t, Tensor)
    if not t.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {t.dtype}")


def _scale(logit_scale: float | Tensor | None, input: Tensor) -> Tensor | None:
    if logit_scale is None:
        return None
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1:
            raise ValueError(
                f"logit_scale must be a number or one element, got {tuple(logit_scale.shape)}"
            )
        return logit_scale.reshape(())
    check_number("logit_scale", logit_scale)
    dtype = accumulate_dtype(input.dtype)
    return torch.full((), float(logit_scale), dtype=dtype, device=input.device)


def _common_dtype(x: Tensor, w: Tensor, b: Tensor | None) -> torch.dtype:
    """Autocast's dtype where it is on (float64 stays), else the widest of the three."""
    device = x.device.type
    available = torch.amp.is_autocast_available(device)
    if available and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    dtype = torch.promote_types(x.dtype, w.dtype)
    return dtype if b is None else torch.promote_types(dtype, b.dtype)
