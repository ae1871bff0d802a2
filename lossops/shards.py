"""Classes spread over the ranks of a process group: each holds a range of them, in rank order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_groups: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def mark_spread(t: Tensor, group: Any) -> None:
    """Note that each rank of the group holds other rows of what ``t`` is a part of."""
    _groups[t] = group


def spread_group(t: Tensor) -> Any:
    """The group over whose ranks ``t`` is spread, None for no group."""
    return _groups.get(t)


@dataclass(frozen=True)
class Shards:
    """The ranks, and how many classes each holds.

    Attributes:
        group: the process group, or None for a single process.
        rank: this process's.
        counts: classes of each rank.
    """

    group: Any
    rank: int
    counts: list[int]

    @property
    def count(self) -> int:
        """Classes of this rank."""
        return self.counts[self.rank]

    @property
    def first(self) -> int:
        """This rank's first class."""
        return sum(self.counts[: self.rank])

    @property
    def end(self) -> int:
        """One past this rank's last class."""
        return self.first + self.count


def group_rank(group: Any) -> int:
    """This process's rank in the group; a ValueError where there is none."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "class_group needs an initialised process group; call "
            "torch.distributed.init_process_group first, or leave class_group=None"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("class_group must be a group this process belongs to")
    return rank


def shards_of(num_classes: int, group: Any) -> Shards:
    """Ranges of ceil(V / R) classes, the last ones shorter, as torch.chunk and DTensor have them.

    Raises:
        ValueError: a rank without a class, or no process group.
    """
    if group is None:
        return Shards(None, 0, [num_classes])
    import torch.distributed as dist

    rank, size = group_rank(group), dist.get_world_size(group)
    share = -(-num_classes // size)
    counts = [max(0, min(share, num_classes - r * share)) for r in range(size)]
    if not counts[-1]:
        raise ValueError(
            f"class_group has {size} ranks for {num_classes} classes, {share} on each, so that the "
            "last one has none; use fewer"
        )
    return Shards(group, rank, counts)
