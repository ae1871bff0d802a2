"""Heads whose classes are spread over the ranks of a process group: the same rows on every rank.

Each rank holds consecutive rows of w and b, in rank order, any number of them, and all of x. What
it computes is the part of its own classes; one exchange of row statistics makes the loss of all
classes, the same bits on every rank. dw and db are this rank's; dx is summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lossops.autograd import apply
from lossops.distributed import SummedGradient, from_all, summed
from lossops.inputs import HeadInputs, check_tensor, class_columns, class_weight, head_inputs
from lossops.near_far import NearFar
from lossops.shards import Shards, group_rank
from lossops.statistics import RowStatistics


def spread_head(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    logit_scale: float | Tensor | None,
    softcap: float | None,
    class_group: Any,
    vectors: Mapping[str, Tensor | None] | None = None,
    columns: Mapping[str, Tensor | None] | None = None,
) -> tuple[HeadInputs, Shards | None]:
    """Checked inputs, and where classes are spread the ranks: by ``class_group``, or a DTensor w.

    ``vectors`` (V_r,) and ``columns`` (..., V_r) are those of this rank's classes, by the names of
    the arguments: all ranks raise where one does not fit.

    Raises:
        ValueError, TypeError: arguments that do not fit; where they do not on one rank, a
            RuntimeError on the others. A DTensor that is not sharded by class.
    """
    check_tensor("input", input)
    check_tensor("linear_weight", linear_weight)
    mesh = getattr(linear_weight, "device_mesh", None)
    if mesh is not None:
        group = _group_of(linear_weight)
        if class_group is not None and class_group is not group:
            raise ValueError("class_group must be left out where linear_weight is a DTensor")
        class_group = group
        linear_weight = _local(linear_weight)
    if linear_bias is not None and hasattr(linear_bias, "device_mesh"):
        _group_of(linear_bias, "linear_bias")
        linear_bias = _local(linear_bias)
    if hasattr(input, "device_mesh"):
        input = _replicated(input)
    if class_group is None:
        return head_inputs(input, linear_weight, linear_bias, logit_scale, softcap), None
    rank = group_rank(class_group)
    head, error = None, None
    try:
        head = head_inputs(input, linear_weight, linear_bias, logit_scale, softcap)
        for name, vector in (vectors or {}).items():
            class_weight(vector, head.w.shape[0], head.x, name)
        for name, t in (columns or {}).items():
            if t is None:
                continue
            class_columns(t, head.lead, head.w.shape[0], head.x, name)
            if t.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{name} must not want a gradient with class_group, got requires_grad=True; "
                    "pass .detach()"
                )
    except (TypeError, ValueError) as refused:
        error = refused
    count = 0 if head is None else head.w.shape[0]
    counts = [line[0] for line in from_all([count], error, class_group, linear_weight.device)]
    assert head is not None
    if head.x.requires_grad:
        head = head._replace(x=apply(SummedGradient, head.x, class_group))
    if head.scale is not None and head.scale.requires_grad:
        head = head._replace(scale=apply(SummedGradient, head.scale, class_group))
    return head, Shards(class_group, rank, counts)


def local_ids(ids: Tensor, shards: Shards | None) -> Tensor:
    """Targets among this rank's classes, -1 for others."""
    if shards is None:
        return ids
    inside = (ids >= shards.first) & (ids < shards.end)
    return torch.where(inside, ids - shards.first, -1)


def with_near(head: HeadInputs, near: NearFar, shards: Shards | None) -> HeadInputs:
    """The head with near and far gradients where these are asked for."""
    if shards is not None and near.on:
        raise ValueError("near_threshold is not available with class_group; leave one of them out")
    return head._replace(near=near)


def classes_of_all(head: HeadInputs, shards: Shards | None) -> int:
    """V of all ranks."""
    return head.w.shape[0] if shards is None else sum(shards.counts)


def of_all(stats: RowStatistics, shards: Shards | None) -> RowStatistics:
    """Differentiable statistics over the classes of all ranks, from those of this rank's."""
    if shards is None:
        return stats
    return stats.all_reduce(shards.group, num_classes=shards.counts)


def at_targets(weight: Tensor | None, ids: Tensor | None, shards: Shards | None) -> Tensor | None:
    """Class weights (V_r,) at the targets ids (N, 1), (N,); None without weights or targets."""
    if weight is None or ids is None:
        return None
    here = local_ids(ids, shards)[:, 0]
    own = weight[here.clamp(0, weight.shape[0] - 1)]
    return own if shards is None else summed(torch.where(here < 0, 0.0, own), shards.group)


def sum_of_all(weight: Tensor, shards: Shards | None) -> Tensor:
    """Σ of class weights (V_r,) over the classes of all ranks."""
    return weight.sum() if shards is None else summed(weight.sum(), shards.group)


def _group_of(t: Any, name: str = "linear_weight") -> Any:
    from torch.distributed.tensor import Shard

    if t.device_mesh.ndim != 1 or tuple(t.placements) != (Shard(0),):
        raise ValueError(
            f"{name} as a DTensor must be sharded by class over a mesh of one dimension, "
            f"placements (Shard(dim=0),), got {tuple(t.placements)} over {t.device_mesh.ndim} "
            "dimensions; redistribute it, or pass its local part and class_group"
        )
    return t.device_mesh.get_group()


def _local(t: Any) -> Tensor:
    found: Tensor = t.to_local()
    return found


def _replicated(t: Any) -> Tensor:
    from torch.distributed.tensor import Replicate

    if any(placement != Replicate() for placement in t.placements):
        raise ValueError(
            f"input as a DTensor must be replicated, got placements {tuple(t.placements)}; "
            "redistribute it"
        )
    found: Tensor = t.to_local(grad_placements=t.placements)
    return found
