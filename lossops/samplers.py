"""Samples of classes for losses over a few of very many.

A draw is a pure function of seed and step: the same on every device and after a restart, and its
cost follows the number of samples, not the number of classes. `lossops.reference_sampling` has the
arithmetic.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lossops import backends, reference_sampling
from lossops.inputs import check_tensor
from lossops.reference_sampling import stream_key

__all__ = ["Frequency", "LogUniform", "SampledClasses", "Uniform"]


class SampledClasses(NamedTuple):
    """Classes drawn for one step, in rising order, and how often each was to be expected.

    Attributes:
        ids: class ids, (S,) int64; repeated where the sampler draws with replacement.
        log_expected: log of the expected number of times each is drawn, (S,) float32.
        target_log_expected: the same of the targets, in the target's shape; None without targets.
        target_position: where in ``ids`` each target stands first, -1 where it was not drawn;
            None without targets.

    Example:
        >>> import torch, lossops
        >>> sampler = lossops.samplers.Uniform(1000, 4, seed=1)
        >>> drawn = sampler(torch.tensor([7, 8]))
        >>> drawn.ids.shape, drawn.target_position.shape
        (torch.Size([4]), torch.Size([2]))
    """

    ids: Tensor
    log_expected: Tensor
    target_log_expected: Tensor | None = None
    target_position: Tensor | None = None


class _Sampler:
    """What samplers share: the step, and what a call returns."""

    def __init__(self, num_classes: int, num_samples: int, seed: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        self.num_classes, self.num_samples, self.seed = num_classes, num_samples, seed
        self.step = 0

    def __call__(self, target: Tensor | None = None, step: int | None = None) -> SampledClasses:
        """Draw classes, for the targets (...) of a batch; ids outside [0, V) are no targets.

        Args:
            target: class ids, any shape, int64. Default: ``None``.
            step: which draw; None takes ``self.step`` and moves it on. Default: ``None``.
        """
        if step is None:
            step, self.step = self.step, self.step + 1
        ids, tries = self._draw(stream_key(self.seed, step))
        ids = ids.sort().values
        expected = self._log_expected(ids, tries).float()
        if target is None:
            return SampledClasses(ids, expected)
        check_tensor("target", target)
        # All of it is made on the CPU and sent: a device is never waited for.
        ids, expected = ids.to(target.device), expected.to(target.device)
        known = target.long().clamp(0, self.num_classes - 1)
        at = torch.searchsorted(ids, known).clamp_max(ids.shape[0] - 1)
        position = torch.where((ids[at] == known) & (known == target), at, -1)
        return SampledClasses(ids, expected, self._log_expected(known, tries).float(), position)

    def per_row(self, target: Tensor, step: int | None = None) -> SampledClasses:
        """Classes of its own for every row, drawn with replacement.

        Args:
            target: class ids (N,) or (N, K), int64.
            step: as in a call. Default: ``None``.

        Returns:
            As of a call, ``ids`` and ``log_expected`` (N, S), without positions.
        """
        if step is None:
            step, self.step = self.step, self.step + 1
        check_tensor("target", target)
        shape = (target.shape[0], self.num_samples)
        ids = self._draw_any(stream_key(self.seed, step), shape[0] * shape[1]).reshape(shape)
        ids = ids.to(target.device)
        known = target.long().clamp(0, self.num_classes - 1)
        expected = (self._log_expected(t, self.num_samples).float() for t in (ids, known))
        return SampledClasses(ids, *expected)

    def state_dict(self) -> dict[str, Any]:
        """The step of the next draw."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the sampler of ``state`` was."""
        self.step = int(state["step"])

    def _draw(self, key: int) -> tuple[Tensor, int]:
        raise NotImplementedError

    def _draw_any(self, key: int, num: int) -> Tensor:
        raise NotImplementedError

    def _log_expected(self, ids: Tensor, tries: int) -> Tensor:
        raise NotImplementedError

    def _drawn(self, found: tuple[Tensor, int], most: int) -> tuple[Tensor, int]:
        if found[1] < 0:
            raise RuntimeError(
                f"{most} draws did not give {self.num_samples} distinct classes of "
                f"{self.num_classes}; ask for fewer samples, or pass unique=False"
            )
        return found


class Uniform(_Sampler):
    """Distinct classes, every set of them equally likely; O(S) whatever V is.

    E(k) = S / V: the ids are π(0), ..., π(S - 1) for a permutation π of [0, V) named by seed and
    step, of which only these values are computed.

    Args:
        num_classes: V.
        num_samples: S, at most V.
        seed: names the sequence of draws. Default: ``0``.

    Example:
        >>> import lossops
        >>> sampler = lossops.samplers.Uniform(10_000_000, 3)
        >>> bool((sampler(step=5).ids == sampler(step=5).ids).all())
        True
    """

    def __init__(self, num_classes: int, num_samples: int, *, seed: int = 0) -> None:
        super().__init__(num_classes, num_samples, seed)
        _check_at_most(num_samples, num_classes)

    def _draw(self, key: int) -> tuple[Tensor, int]:
        ids = primitives().sample_permuted(key, self.num_classes, self.num_samples)
        return ids, self.num_samples

    def _draw_any(self, key: int, num: int) -> Tensor:
        ids: Tensor = primitives().sample_uniform(key, self.num_classes, num)
        return ids

    def _log_expected(self, ids: Tensor, tries: int) -> Tensor:
        log = math.log(self.num_samples / self.num_classes)
        return torch.full(ids.shape, log, dtype=torch.float64, device=ids.device)


class LogUniform(_Sampler):
    """Classes in order of falling frequency, drawn as Zipf's law has it.

    P(k) = log((k + 2) / (k + 1)) / log(V + 1)
    E(k) = S P(k) where S draws are taken, 1 - (1 - P(k))^T where T > S for S distinct classes

    The semantics of TensorFlow's ``log_uniform_candidate_sampler``.

    Args:
        num_classes: V; class 0 the most frequent one.
        num_samples: S, at most V where ``unique``.
        unique: draw until S distinct classes are found. Default: ``True``.
        seed: names the sequence of draws. Default: ``0``.

    Example:
        >>> import lossops
        >>> drawn = lossops.samplers.LogUniform(50_000, 1000)()
        >>> bool((drawn.ids < 1000).sum() > 200)
        True
    """

    def __init__(
        self, num_classes: int, num_samples: int, *, unique: bool = True, seed: int = 0
    ) -> None:
        super().__init__(num_classes, num_samples, seed)
        self.unique = unique
        if unique:
            _check_at_most(num_samples, num_classes)

    def _draw(self, key: int) -> tuple[Tensor, int]:
        return self._found(key, self.num_samples, self.unique)

    def _draw_any(self, key: int, num: int) -> Tensor:
        return self._found(key, num, False)[0]

    def _found(self, key: int, num: int, unique: bool) -> tuple[Tensor, int]:
        v, most = self.num_classes, _most_draws(num)
        found = primitives().sample_log_uniform(key, v, math.log2(v + 1), num, unique, most)
        return self._drawn(found, most)

    def _log_expected(self, ids: Tensor, tries: int) -> Tensor:
        p = torch.log1p(1 / (ids.double() + 1)) / math.log(self.num_classes + 1)
        return _log_expected(p, tries, self.num_samples)


class Frequency(_Sampler):
    """Classes drawn in proportion to given counts, by an alias table: O(1) a draw, 16·V bytes.

    P(k) = counts_k / Σ counts;   E(k) as in `LogUniform`

    Args:
        counts: (V,), all positive.
        num_samples: S.
        unique: draw until S distinct classes are found. Default: ``False``.
        seed: names the sequence of draws. Default: ``0``.

    Example:
        >>> import torch, lossops
        >>> sampler = lossops.samplers.Frequency(torch.tensor([1.0, 1e9, 1.0]), 5)
        >>> sampler().ids
        tensor([1, 1, 1, 1, 1])
    """

    def __init__(
        self, counts: Tensor, num_samples: int, *, unique: bool = False, seed: int = 0
    ) -> None:
        check_tensor("counts", counts)
        if counts.ndim != 1 or not counts.numel():
            raise ValueError(f"counts must have shape (V,), got {tuple(counts.shape)}")
        wide = counts.detach().cpu().double()
        if not bool((wide > 0).all() & wide.isfinite().all()):
            raise ValueError(
                "counts must be positive and finite, since a target that is never drawn has no "
                "log of its expected count; add one to each"
            )
        super().__init__(counts.shape[0], num_samples, seed)
        self.unique = unique
        if unique:
            _check_at_most(num_samples, self.num_classes)
        self.probability = wide / wide.sum()
        self._threshold, self._alias = primitives().alias_table(self.probability)

    def _draw(self, key: int) -> tuple[Tensor, int]:
        return self._found(key, self.num_samples, self.unique)

    def _draw_any(self, key: int, num: int) -> Tensor:
        return self._found(key, num, False)[0]

    def _found(self, key: int, num: int, unique: bool) -> tuple[Tensor, int]:
        table, most = (self._threshold, self._alias), _most_draws(num)
        found = primitives().sample_alias(key, *table, num, unique, most)
        return self._drawn(found, most)

    def _log_expected(self, ids: Tensor, tries: int) -> Tensor:
        if self.probability.device != ids.device:
            self.probability = self.probability.to(ids.device)
        return _log_expected(self.probability[ids], tries, self.num_samples)


def sample_keeping(targets: Tensor, num_classes: int, num_samples: int, key: int) -> Tensor:
    """The targets and as many other classes, uniformly, as make up ``num_samples``; rising ids.

    The first of π(0), π(1), ... that are no targets. Every size is known beforehand, so that no
    device is waited for: two sorts of N + S ids.

    Args:
        targets: ids (N,), at most S distinct ones; those below 0 are none.
        num_classes: V.
        num_samples: S, at most V.
        key: names the draw.
    """
    drawn = primitives().sample_permuted(key, num_classes, num_samples).to(targets.device)
    n = targets.shape[0]
    ids = torch.cat([torch.where(targets < 0, num_classes, targets), drawn])
    ordered, order = ids.sort(stable=True)  # a target before the same id drawn
    new = ordered < num_classes
    new[1:] &= ordered[1:] != ordered[:-1]
    kept = torch.empty_like(new).scatter_(0, order, new)
    kept[n:] &= kept[n:].cumsum(0) <= num_samples - kept[:n].sum()
    places = kept.gather(0, order)
    at = torch.where(places, places.cumsum(0) - 1, num_samples)
    return ids.new_empty(num_samples + 1).scatter_(0, at, ordered)[:num_samples]


def primitives() -> Any:
    """The compiled draws, or those of `lossops.reference_sampling`: the same ids."""
    module = backends.load_cpu_module()
    return reference_sampling if isinstance(module, str) else module


def _log_expected(p: Tensor, tries: int, num_samples: int) -> Tensor:
    if tries == num_samples:  # as in TensorFlow, for distinct ids too
        return torch.log(p * tries)
    return torch.log(-torch.expm1(tries * torch.log1p(-p)))


def _most_draws(num_samples: int) -> int:
    return 1000 * num_samples + 10_000


def _check_at_most(num_samples: int, num_classes: int) -> None:
    if num_samples > num_classes:
        raise ValueError(
            f"num_samples must be at most num_classes, {num_classes}, to be distinct, "
            f"got {num_samples}"
        )
