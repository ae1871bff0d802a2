"""Draws of class ids in plain PyTorch: the specification of csrc/sampling.h, bit for bit.

A draw is a pure function of a 64-bit key. Only integer arithmetic, which wraps, and IEEE sums and
products of float64 are used, so every device draws the same ids.

    word(key, t)   the t-th number of the stream ``key`` (SplitMix64)
    permuted       π_key(k): an unbalanced Feistel network of 6 rounds on 2^b >= V values, walked
                   along its cycle until it falls below V: fewer than 2 steps on average
    log-uniform    floor(2^{u log2(V + 1)}) - 1, so that P(id <= k) = log(k + 2) / log(V + 1)
    alias          id = floor(u V), or alias[id] where u' is not below threshold[id]

Source of the stream: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014;
of the alias tables: Vose, "A linear algorithm for generating random numbers with a given
distribution", 1991.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDS = 6
GOLDEN = 0x9E3779B97F4A7C15
ALL = 2**64 - 1
# (ln 2)^k / k!, k = 10 ... 0
POWER = (
    7.054911620801121e-09, 1.0178086009239696e-07, 1.3215486790144305e-06, 1.5252733804059838e-05,
    0.00015403530393381606, 0.0013333558146428441, 0.009618129107628477, 0.055504108664821576,
    0.2402265069591007, 0.6931471805599453, 1.0,
)  # fmt: skip


def stream_key(*parts: int) -> int:
    """The key of a stream named by integers; streams of other names share nothing with it."""
    key = 0
    for part in parts:
        key = _mix_number(key ^ _mix_number((part + GOLDEN) & ALL))
    return _signed(key)


def sample_permuted(key: int, count: int, num: int) -> Tensor:
    """π_key(0), ..., π_key(num - 1): distinct ids in [0, count), (num,) int64."""
    if not 0 <= num <= count:
        raise ValueError(f"num must be in [0, {count}], got {num}")
    keys = [_word(key, torch.tensor(r)) for r in range(ROUNDS)]
    bits = max(8, (count - 1).bit_length())  # smaller networks are too few of the permutations
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    found = torch.arange(num)
    outside = found.clone()  # where in `found` the walk goes on; all of them at first
    while outside.numel():
        k = found[outside]
        low, high = k & low_mask, k >> low_bits
        for r in range(0, ROUNDS, 2):
            high = high ^ (_mix(keys[r] + low) & high_mask)
            low = low ^ (_mix(keys[r + 1] + high) & low_mask)
        found[outside] = (high << low_bits) | low
        outside = outside[found[outside] >= count]
    return found


def sample_uniform(key: int, count: int, num: int) -> Tensor:
    """Ids in [0, count), (num,), drawn with replacement."""
    return (_uniform(key, torch.arange(num)) * float(count)).long().clamp_max(count - 1)


def sample_log_uniform(
    key: int, count: int, log2: float, num: int, unique: bool, most: int
) -> tuple[Tensor, int]:
    """Log-uniform ids (num,), and how many draws they took, -1 for more than ``most``.

    Args:
        key: names the stream.
        count: V; ids are in [0, V).
        log2: log2(V + 1).
        num: S.
        unique: the first S distinct ids among draws 0, 1, ...; else draws 0, ..., S - 1.
        most: draws to stop at.
    """

    def draw(t: Tensor) -> Tensor:
        ids = _power_of_two(_uniform(key, t) * log2).long() - 1
        return ids.clamp(0, count - 1)

    return _draws(draw, num, unique, most)


def sample_alias(
    key: int, threshold: Tensor, alias: Tensor, num: int, unique: bool, most: int
) -> tuple[Tensor, int]:
    """Ids (num,) from an alias table (V,) float64, (V,) int64; otherwise as the log-uniform."""
    count = threshold.shape[0]

    def draw(t: Tensor) -> Tensor:
        ids = (_uniform(key, 2 * t) * float(count)).long().clamp_max(count - 1)
        return torch.where(_uniform(key, 2 * t + 1) < threshold[ids], ids, alias[ids])

    return _draws(draw, num, unique, most)


def _draws(
    draw: Callable[[Tensor], Tensor], num: int, unique: bool, most: int
) -> tuple[Tensor, int]:
    if not unique:
        return draw(torch.arange(num)), num
    ids = torch.empty(0, dtype=torch.int64)
    while True:
        more = min(max(2 * num, ids.numel()), most - ids.numel())
        ids = torch.cat([ids, draw(torch.arange(ids.numel(), ids.numel() + more))])
        first = _first_appearances(ids)
        if first.numel() >= num:
            tries = int(first[num - 1]) + 1 if num else 0
            return ids[first[:num]], tries
        if ids.numel() >= most:
            return ids[:num], -1


def _first_appearances(ids: Tensor) -> Tensor:
    """Where each id appears first, in order of appearance."""
    ordered, order = ids.sort(stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return order[new].sort().values


def alias_table(probability: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds (V,) float64 and aliases (V,) int64 of a distribution (V,) float64.

    Every column of the table holds its own id with probability ``threshold``, else its alias.
    """
    v = probability.shape[0]
    height = (probability * v).tolist()
    alias = list(range(v))
    small = [i for i, h in enumerate(height) if h < 1.0]
    large = [i for i, h in enumerate(height) if h >= 1.0]
    while small and large:
        low, high = small.pop(), large[-1]
        alias[low] = high
        height[high] -= 1.0 - height[low]
        if height[high] < 1.0:
            small.append(large.pop())
    for i in (*small, *large):  # what rounding left over
        height[i] = 1.0
    return torch.tensor(height, dtype=torch.float64), torch.tensor(alias)


def _word(key: int | Tensor, t: Tensor) -> Tensor:
    return _mix((t + 1) * _signed(GOLDEN) + key)


def _uniform(key: int, t: Tensor) -> Tensor:
    return _shifted(_word(key, t), 11).double() * 2.0**-53


def _power_of_two(x: Tensor) -> Tensor:
    whole = x.long()
    y = (x - whole.double()) - 0.5
    p = torch.full_like(y, POWER[0])
    for c in POWER[1:]:
        p = p * y + c
    power = torch.ones_like(whole).bitwise_left_shift(whole).double()
    found: Tensor = p * 2.0**0.5 * power
    return found


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _mix_number(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & ALL
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & ALL
    return x ^ (x >> 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by of the 64 bits as an unsigned number."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    """The int64 with the low 64 bits of x."""
    x &= ALL
    return x - ALL - 1 if x >> 63 else x
