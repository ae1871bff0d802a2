"""Samples of classes for losses over a few of very many.

A draw is a pure function of seed and step: the same on every device and after a restart, and its
cost follows the number of samples, not the number of classes. `lossops.reference_sampling` has the
arithmetic.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lossops import backends, cuda_draws, cuda_rows, reference_sampling
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
        if target is not None:
            check_tensor("target", target)
        device = None if target is None else target.device
        ids, tries = self._draw(stream_key(self.seed, step), device)
        ids = ids.sort().values
        expected = self._log_expected(ids, tries).float()
        if target is None:
            return SampledClasses(ids, expected)
        # What is made on the CPU is sent: a device is never waited for.
        ids, expected = ids.to(device), expected.to(device)
        wanted = target.long()
        known = wanted.clamp(0, self.num_classes - 1)
        log_expected = self._log_expected(known, tries).float()
        return SampledClasses(ids, expected, log_expected, positions(ids, wanted))

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
        key, num = stream_key(self.seed, step), shape[0] * shape[1]
        ids = self._draw_any(key, num, target.device).to(target.device).reshape(shape)
        known = target.long().clamp(0, self.num_classes - 1)
        expected = (self._log_expected(t, self.num_samples).float() for t in (ids, known))
        return SampledClasses(ids, *expected)

    def state_dict(self) -> dict[str, Any]:
        """The step of the next draw."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the sampler of ``state`` was."""
        self.step = int(state["step"])

    # Ids are drawn on the device where the CUDA kernels run there, else on the CPU; how many draws
    # were made for distinct ones is then a number on the device.

    def _draw(self, key: int, device: torch.device | None) -> tuple[Tensor, int | Tensor]:
        raise NotImplementedError

    def _draw_any(self, key: int, num: int, device: torch.device | None) -> Tensor:
        raise NotImplementedError

    def _log_expected(self, ids: Tensor, tries: int | Tensor) -> Tensor:
        raise NotImplementedError


class _Repeating(_Sampler):
    """What samplers share whose draws may repeat an id."""

    unique: bool

    def _draw(self, key: int, device: torch.device | None) -> tuple[Tensor, int | Tensor]:
        num, found = self.num_samples, primitives(device)
        if not self.unique:
            return self._drawn(found, key, num, False, num)
        sentence = (
            f"{_most_draws(num)} draws did not give {num} distinct classes of "
            f"{self.num_classes}; ask for fewer samples, or pass unique=False"
        )
        most = _most_draws(num)
        if isinstance(found, cuda_draws.DeviceDraws):
            if self._enough > most:
                raise RuntimeError(sentence)
            ids, tries = self._drawn(found, key, num, True, self._enough)
            assert isinstance(tries, Tensor)
            torch._assert_async(tries > 0, sentence)
            return ids, tries
        ids, tries = self._drawn(found, key, num, True, most)
        if tries < 0:
            raise RuntimeError(sentence)
        return ids, tries

    def _draw_any(self, key: int, num: int, device: torch.device | None) -> Tensor:
        return self._drawn(primitives(device), key, num, False, num)[0]

    @functools.cached_property
    def _enough(self) -> int:
        """Draws that hold S distinct ids for certain; more than may be made where none do."""
        most = _most_draws(self.num_samples)
        return cuda_draws.draws_needed(self._law(), self.num_samples, most)

    def _law(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _drawn(
        self, draws: Any, key: int, num: int, unique: bool, most: int
    ) -> tuple[Tensor, int | Tensor]:
        raise NotImplementedError


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

    def _draw(self, key: int, device: torch.device | None) -> tuple[Tensor, int | Tensor]:
        ids = primitives(device).sample_permuted(key, self.num_classes, self.num_samples)
        return ids, self.num_samples

    def _draw_any(self, key: int, num: int, device: torch.device | None) -> Tensor:
        ids: Tensor = primitives(device).sample_uniform(key, self.num_classes, num)
        return ids

    def _log_expected(self, ids: Tensor, tries: int | Tensor) -> Tensor:
        log = math.log(self.num_samples / self.num_classes)
        return torch.full(ids.shape, log, dtype=torch.float64, device=ids.device)


class LogUniform(_Repeating):
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

    def _drawn(
        self, draws: Any, key: int, num: int, unique: bool, most: int
    ) -> tuple[Tensor, int | Tensor]:
        v = self.num_classes
        found: tuple[Tensor, int | Tensor] = draws.sample_log_uniform(
            key, v, math.log2(v + 1), num, unique, most
        )
        return found

    def _law(self) -> tuple[Tensor, Tensor]:
        return cuda_draws.log_uniform_law(self.num_classes)

    def _log_expected(self, ids: Tensor, tries: int | Tensor) -> Tensor:
        p = torch.log1p(1 / (ids.double() + 1)) / math.log(self.num_classes + 1)
        return _log_expected(p, tries, self.num_samples)


class Frequency(_Repeating):
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
        cpu = torch.device("cpu")
        self._tables = {cpu: primitives().alias_table(self.probability)}

    def _drawn(
        self, draws: Any, key: int, num: int, unique: bool, most: int
    ) -> tuple[Tensor, int | Tensor]:
        where = draws.device if isinstance(draws, cuda_draws.DeviceDraws) else torch.device("cpu")
        if where not in self._tables:
            self._tables[where] = tuple(t.to(where) for t in self._tables[torch.device("cpu")])
        found: tuple[Tensor, int | Tensor] = draws.sample_alias(
            key, *self._tables[where], num, unique, most
        )
        return found

    def _law(self) -> tuple[Tensor, Tensor]:
        return cuda_draws.law_of(self.probability.cpu())

    def _log_expected(self, ids: Tensor, tries: int | Tensor) -> Tensor:
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
    draws = primitives(targets.device)
    drawn = draws.sample_permuted(key, num_classes, num_samples).to(targets.device)
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


def positions(ids: Tensor, wanted: Tensor) -> Tensor:
    """Where in the rising ``ids`` (S,) each of ``wanted`` (...) stands first, -1 for nowhere."""
    if cuda_rows.runs_on(ids.device):
        return cuda_draws.positions(ids, wanted)
    at = torch.searchsorted(ids, wanted).clamp_max(ids.shape[0] - 1)
    return torch.where(ids[at] == wanted, at, -1)


def primitives(device: torch.device | None = None) -> Any:
    """Draws on the device, by the CUDA kernels; else on the CPU, compiled or in plain PyTorch.

    The ids are the same.
    """
    if device is not None and cuda_rows.runs_on(device):
        return cuda_draws.DeviceDraws(device)
    module = backends.load_cpu_module()
    return reference_sampling if isinstance(module, str) else module


def _log_expected(p: Tensor, tries: int | Tensor, num_samples: int) -> Tensor:
    once = torch.log(p * num_samples)  # as in TensorFlow, for distinct ids too
    if isinstance(tries, int) and tries == num_samples:
        return once
    several = torch.log(-torch.expm1(tries * torch.log1p(-p)))
    return several if isinstance(tries, int) else torch.where(tries == num_samples, once, several)


def _most_draws(num_samples: int) -> int:
    return 1000 * num_samples + 10_000


def _check_at_most(num_samples: int, num_classes: int) -> None:
    if num_samples > num_classes:
        raise ValueError(
            f"num_samples must be at most num_classes, {num_classes}, to be distinct, "
            f"got {num_samples}"
        )
