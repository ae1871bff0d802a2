"""The k largest logits of each row, from candidates that come block by block and rank by rank."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TopK(NamedTuple):
    """The largest logits of each row, falling, and their classes."""

    values: Tensor
    indices: Tensor


def no_candidates(x: Tensor) -> TopK:
    """None yet, for the rows of x."""
    ids = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    return TopK(x.new_empty(len(x), 0), ids)


def best_of(k: int, values: tuple[Tensor, ...], ids: tuple[Tensor, ...]) -> TopK:
    """The k largest of several candidates per row."""
    z, names = torch.cat(values, 1), torch.cat(ids, 1)
    found, at = z.topk(min(k, z.shape[1]), 1)
    return TopK(found, names.gather(1, at))


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
