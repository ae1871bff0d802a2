"""Heads whose classes are spread over the ranks of a process group: the same rows on every rank.

Each rank holds consecutive rows of w and b, in rank order, any number of them, and all of x. What
it computes is the part of its own classes; one exchange of row statistics makes the loss of all
classes, the same bits on every rank. dw and db are this rank's; dx is summed over the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossops.autograd import apply
from lossops.distributed import SummedGradient, from_all
from lossops.inputs import HeadInputs, check_tensor, head_inputs
from lossops.linear import head_statistics
from lossops.shards import Shards, group_rank
from lossops.statistics import RowStatistics


def spread_head(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    logit_scale: float | Tensor | None,
    softcap: float | None,
    class_group: Any,
) -> tuple[HeadInputs, Shards | None]:
    """Checked inputs, and where classes are spread the ranks: by ``class_group``, or a DTensor w.

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


def statistics_of_all(
    head: HeadInputs,
    shards: Shards | None,
    ids: Tensor | None,
    names: tuple[str, ...],
    class_vector: Tensor | None,
    teacher: Tensor | None,
    backend: str,
) -> RowStatistics:
    """Differentiable statistics over the classes of all ranks; ids are of all classes."""
    here = ids if ids is None else local_ids(ids, shards)
    stats = head_statistics(head, here, names, class_vector, teacher, backend)
    if shards is None:
        return stats
    return stats.all_reduce(shards.group, num_classes=shards.counts)


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
