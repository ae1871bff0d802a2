"""Draws of class ids on a CUDA device: `lossops.reference_sampling` in kernels, the same ids.

The device is never waited for. Distinct ids are the first S that appear among T draws, where T,
known in advance, is enough with all but certainty (`draws_needed`); how many of them it took is a
number on the device. T is 28,399 for 8,192 of 50,000 log-uniform classes, where a CPU stops after
some 25,700; each of the T takes 41 bytes while ids are sorted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CERTAIN = 30.0
"""Draws do not do with a probability of at most e^-30, 1e-13."""
EXACT = 2**16
"""Classes up to which each counts for itself; beyond, those of like probability together."""
RATIO = math.log(1.02)
"""Log of the largest ratio of probabilities that are taken together."""


class DeviceDraws:
    """The functions of `lossops.reference_sampling`, drawing on a device.

    Args:
        device: where ids are drawn; `lossops.cuda_rows.runs_on` holds for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sample_permuted(self, key: int, count: int, num: int) -> Tensor:
        """π_key(0), ..., π_key(num - 1): distinct ids in [0, count), (num,) int64."""
        ids = self._room(num)
        torch.ops.lossops_cuda.draw_permuted(key, count, ids)
        return ids

    def sample_uniform(self, key: int, count: int, num: int) -> Tensor:
        """Ids in [0, count), (num,), drawn with replacement."""
        ids = self._room(num)
        torch.ops.lossops_cuda.draw_uniform(key, count, ids)
        return ids

    def sample_log_uniform(
        self, key: int, count: int, log2: float, num: int, unique: bool, most: int
    ) -> tuple[Tensor, int | Tensor]:
        """Log-uniform ids (num,), and how many draws they took.

        Args:
            key: names the stream.
            count: V; ids are in [0, V).
            log2: log2(V + 1).
            num: S.
            unique: the first S distinct ids among ``most`` draws; else draws 0, ..., S - 1.
            most: draws to make where ``unique``; the second result is then () int64, -1 where they
                do not do, and ids from where they end on are 0.
        """
        ids = self._room(most if unique else num)
        torch.ops.lossops_cuda.draw_log_uniform(key, count, log2, ids)
        return _first(ids, num) if unique else (ids, num)

    def sample_alias(
        self, key: int, threshold: Tensor, alias: Tensor, num: int, unique: bool, most: int
    ) -> tuple[Tensor, int | Tensor]:
        """Ids (num,) from an alias table (V,) float64, (V,) int64; otherwise as log-uniform."""
        ids = self._room(most if unique else num)
        torch.ops.lossops_cuda.draw_alias(key, threshold, alias, ids)
        return _first(ids, num) if unique else (ids, num)

    def _room(self, num: int) -> Tensor:
        return torch.empty(num, dtype=torch.int64, device=self.device)


def _first(draws: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The first distinct draws (num,), in their order, and how many draws they took."""
    ordered, order = draws.sort(stable=True)
    first = torch.empty_like(draws, dtype=torch.bool)
    torch.ops.lossops_cuda.mark_first(ordered, order, first)
    ids, tries = draws.new_zeros(num), draws.new_full((), -1)
    torch.ops.lossops_cuda.take_first(draws, first, first.cumsum(0), ids, tries)
    return ids, tries


def positions(ids: Tensor, wanted: Tensor) -> Tensor:
    """Where in the rising ``ids`` (S,) each of ``wanted`` (...) stands first, -1 for nowhere."""
    found = torch.empty_like(wanted, memory_format=torch.contiguous_format)
    torch.ops.lossops_cuda.find_positions(ids.contiguous(), wanted.contiguous(), found)
    return found


def hits(drawn: Tensor, target: Tensor) -> Tensor:
    """Whether each of ``drawn`` (N, S) is one of the targets (N, K) of its row, (N, S) bool."""
    hit = torch.empty(drawn.shape, dtype=torch.bool, device=drawn.device)
    torch.ops.lossops_cuda.find_hits(drawn.contiguous(), target.contiguous(), hit)
    return hit


def log_uniform_law(count: int) -> tuple[Tensor, Tensor]:
    """Probabilities (B,) float64 and of how many classes each is the least: see `draws_needed`."""
    ends = list(range(1, min(count, EXACT) + 1))
    while ends[-1] < count:  # log((k + 2) / (k + 1)) is nearly 1 / (k + 1)
        ends.append(min(count, int(ends[-1] * math.exp(RATIO)) + 1))
    end = torch.tensor(ends, dtype=torch.float64)
    p = torch.log1p(1 / end) / math.log(count + 1)
    return p, torch.diff(end, prepend=end.new_zeros(1))


def law_of(probability: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the probabilities (V,) float64 themselves."""
    if probability.shape[0] <= EXACT:
        return probability, torch.ones_like(probability)
    kind = ((probability / probability.min()).log() / RATIO).long()
    count = torch.bincount(kind)
    least = torch.full(count.shape, torch.inf, dtype=torch.float64)
    least.scatter_reduce_(0, kind, probability, "amin")
    some = count > 0
    return least[some], count[some].double()


def draws_needed(law: tuple[Tensor, Tensor], num: int, most: int) -> int:
    """The least T, at most ``most``, of which T draws give ``num`` distinct classes for certain.

    Classes drawn, and classes not drawn, are sums of negatively associated events, so that with
    E of the first and M of the second to be expected

        log P(at most a drawn)        <= -(E - a - a log(E / a))        a = num - 1 < E
        log P(at least c not drawn)   <= -(M - c + c log(c / M))        c = V - num + 1 > M

    and one of the two is to be at most -`CERTAIN`.

    Args:
        law: probabilities, and of how many classes each is the least.
        num: S.
        most: draws that are too many.

    Returns:
        T; ``most`` + 1 where even the expected number of distinct classes is less than S for
        ``most``, so that trying makes no sense.
    """
    p, count = law
    log_missed = torch.log1p(-p.clamp_max(1 - 1e-16))
    a, c = num - 1, float(count.sum()) - num + 1

    def expected(draws: int) -> tuple[float, float]:
        missing = float((count * torch.exp(draws * log_missed)).sum())
        return float(count.sum()) - missing, missing

    def is_enough(draws: int) -> bool:
        drawn, missing = expected(draws)
        if drawn > a and drawn - a - (a * math.log(drawn / a) if a else 0) >= CERTAIN:
            return True
        return missing < c and (missing == 0 or missing - c + c * math.log(c / missing) >= CERTAIN)

    if expected(most)[0] < num - 0.5:
        return most + 1
    low, high = num, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low
