"""The k largest logits of each row, from candidates that come block by block and rank by rank."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TopK(NamedTuple):
    """The largest logits of each row, falling, and their classes; of equal ones the lowest."""

    values: Tensor
    indices: Tensor


def at_most(k: int, num_classes: int) -> int:
    """k, or all classes where these are fewer."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return min(k, num_classes)


def no_candidates(x: Tensor) -> TopK:
    """None yet, for the rows of x."""
    ids = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    return TopK(x.new_empty(len(x), 0), ids)


def best_of(k: int, values: tuple[Tensor, ...], ids: tuple[Tensor, ...]) -> TopK:
    """The k largest of several candidates per row, which stand in the order of their classes.

    torch.topk may take any of those that are equal: whole and sharded would differ.
    """
    z, names = torch.cat(values, 1), torch.cat(ids, 1)
    width = z.shape[1]
    k = min(k, width)
    found, at = z.topk(min(k + 1, width), 1)
    least, at = found[:, k - 1 : k], at[:, :k]
    if k < width and (z.device.type != "cpu" or bool((found[:, k:] == least).any())):
        level = z == least  # as good as the last: the first of them stay
        free = k - (z > least).sum(1, keepdim=True)
        kept = (z >= least) & ~(level & (level.cumsum(1) > free))
        place = torch.arange(width, device=z.device)
        at = torch.where(kept, place, place + width).topk(k, 1, largest=False).values % width
    at = at.sort(1).values
    best, order = z.gather(1, at).sort(dim=1, descending=True, stable=True)
    return TopK(best, names.gather(1, at.gather(1, order)))


def best_of_ranks(best: TopK, k: int, group: Any) -> TopK:
    """The k largest of the candidates of all ranks, for the same rows; k at most all classes."""
    import torch.distributed as dist

    short = (0, k - best.values.shape[1])
    own = TopK(F.pad(best.values, short, value=-torch.inf), F.pad(best.indices, short, value=-1))
    gathered = []
    for t in own:
        parts = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, t.contiguous(), group=group)
        gathered.append(tuple(parts))
    return best_of(k, *gathered)
