"""The rows of all classes, each in the coordinates of the epoch it was written in.

    s_j = t_j A_e + τ_e,   e the epoch of row j;   A_e ← A_e U, τ_e ← τ_e U + ω when an epoch ends

An epoch's end costs E³ per epoch kept; a row pays E² when it is next touched. With a process group
each rank holds a range of the classes, and what a batch needs of them is added up over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lossops.gram import ClassMoments, class_moments, wide_dtype
from lossops.shards import shards_of

BLOCK = 8192
"""Classes at a time where all are visited."""
GATHERED = 64
"""Rows brought up to date at a time where a device takes a matrix for each."""


class ClassTable(nn.Module):
    """Table T (V, E) of this rank's classes, and one row more for what belongs to none of them.

    Args:
        num_classes: V, of all ranks.
        width: E.
        group: process group over whose ranks the classes are spread in order, or None.
        like: its dtype and device are the table's.
    """

    rows: Tensor
    epoch: Tensor
    transforms: Tensor
    shifts: Tensor

    def __init__(self, num_classes: int, width: int, group: Any, like: Tensor) -> None:
        super().__init__()
        self.num_classes, self.group = num_classes, group
        shards = shards_of(num_classes, group)
        self.first, count = shards.first, shards.count
        # So many that making a table of V rows anew costs about as much as their upkeep.
        kept = min(256, max(4, math.isqrt(2 * num_classes // width)))
        epoch = torch.zeros(count + 1, dtype=torch.int16, device=like.device)
        self.register_buffer("rows", like.new_zeros(count + 1, width))
        self.register_buffer("epoch", epoch)
        self.register_buffer("transforms", like.new_zeros(kept, width, width))
        self.register_buffer("shifts", like.new_zeros(kept, width))
        self.live = 0  # transforms in use

    @property
    def count(self) -> int:
        """Classes of this rank."""
        return len(self.rows) - 1

    @property
    def full(self) -> bool:
        """Whether there is no room for another epoch."""
        return self.live == len(self.transforms)

    def get_extra_state(self) -> int:
        """Transforms in use."""
        return self.live

    def set_extra_state(self, state: int) -> None:
        """What `get_extra_state` returned."""
        self.live = state

    def blocks(self) -> Iterator[slice]:
        """Ranges of this rank's rows."""
        for start in range(0, self.count, BLOCK):
            yield slice(start, min(start + BLOCK, self.count))

    def local(self, ids: Tensor) -> Tensor:
        """Rows of the table for class ids; its last row where there is none on this rank."""
        local = ids - self.first
        return torch.where((ids < 0) | (local < 0) | (local >= self.count), self.count, local)

    def gathered(self, ids: Tensor) -> Tensor:
        """Rows (N, E) for class ids (N,) of any rank, in the coordinates of the current epoch."""
        local = self.local(ids)
        found = self.current(local)
        if self.group is None:
            return found
        return self.all_reduce(found.masked_fill((local == self.count).unsqueeze(1), 0.0))

    def write(self, ids: Tensor, base: Tensor, added: Tensor) -> None:
        """Make rows of classes (N,) ``base`` (N, E), then add ``added``, as often as they occur."""
        local = self.local(ids)
        self.rows.index_copy_(0, local, base)
        self.epoch[local] = self.live
        self.rows.index_put_((local,), added, accumulate=True)

    def current(self, rows: slice | Tensor) -> Tensor:
        """Rows of the table in the coordinates of the current epoch, (N, E)."""
        found, epochs = self.rows[rows], self.epoch[rows]
        if not self.live:
            return found
        if isinstance(rows, slice):
            found = found.clone()
        if self.rows.device.type == "cpu":  # few epochs among many rows
            for e in epochs.unique().tolist():
                if e < self.live:
                    stale = (epochs == e).nonzero().squeeze(1)
                    found[stale] = torch.addmm(self.shifts[e], found[stale], self.transforms[e])
            return found
        return self.current_without_sync(found, epochs)

    def current_without_sync(self, found: Tensor, epochs: Tensor) -> Tensor:
        """A matrix gathered for every row, whatever its epoch: nothing is read back."""
        parts = []
        for part, numbers in zip(found.split(GATHERED), epochs.split(GATHERED), strict=True):
            at = numbers.long().clamp_max(self.live - 1)
            moved = torch.baddbmm(
                self.shifts[at].unsqueeze(1), part.unsqueeze(1), self.transforms[at]
            ).squeeze(1)
            parts.append(torch.where((numbers < self.live).unsqueeze(1), moved, part))
        return torch.cat(parts)

    def end_epoch(self, factor: Tensor, offset: Tensor) -> None:
        """Rows of the epoch that ends are, and those of earlier ones become, t U + ω."""
        for e in range(self.live):
            self.transforms[e] = self.transforms[e] @ factor
            self.shifts[e] = self.shifts[e] @ factor + offset
        self.transforms[self.live], self.shifts[self.live] = factor, offset
        self.live += 1

    def restart(self) -> None:
        """All rows are of the current epoch, the only one."""
        self.rows[-1].zero_()
        self.epoch.zero_()
        self.live = 0

    def moments(self, rows: Tensor) -> ClassMoments:
        """Mean and Gram matrix over all ranks of ``rows`` (V, E), this rank's classes."""
        mean, gram = class_moments(rows, None, wide_dtype(rows.device))
        if self.group is None:
            return ClassMoments(mean, gram)
        total = self.all_reduce(mean * self.count) / self.num_classes
        away = mean - total
        return ClassMoments(total, self.all_reduce(gram + self.count * torch.outer(away, away)))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        import torch.distributed as dist

        dist.all_reduce(tensor, group=self.group)
        return tensor
