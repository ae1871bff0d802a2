"""Row statistics: what the engine can collect from each row of logits, and what follows from it.

Every tensor a backend returns but the targets' logits is relative to the row's ``shift`` m, the
largest logit of the negatives (0 where that is not finite): with logits near 1e4 an absolute
float32 ``lse`` would cost 5e-4 of loss, a relative one 1e-6. The targets' logits stay as they are:
far above negatives that are all masked with -1e9 they would lose all digits.

    q_j = exp(z_j - lse), j not a target        z̄ = (Σ_j z_j) / V

``STATISTICS`` is the one table that backends, tests and documentation follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Statistic(NamedTuple):
    """One row statistic: the tensors it yields and what each puts into dz."""

    outputs: tuple[str, ...]
    value: str
    basis: str
    needs: tuple[str, ...] = ()


STATISTICS: dict[str, Statistic] = {
    "target": Statistic(("target",), "z at the target ids", "{y: 1}"),
    "lse": Statistic(("lse",), "log Σ e^{z_j} over the negatives", "q_j"),
    "entropy": Statistic(
        ("mean",), "Σ q_j z_j over the negatives", "q_j (1 + z_j - mean)", ("lse",)
    ),
    "variance": Statistic(
        ("variance",),
        "Σ q_j (z_j - mean)² over the negatives",
        "q_j ((z_j - mean)² + 2 (z_j - mean) - variance)",
        ("entropy",),
    ),
    "max": Statistic(("max", "argmax"), "largest negative and its id", "[j = argmax]"),
    "runner_up": Statistic(
        ("runner_up", "runner_up_index"),
        "second largest negative and its id",
        "[j = runner_up_index]",
        ("max",),
    ),
    "below_target": Statistic(
        ("below_target", "below_target_index"),
        "largest negative below the (first) target and its id",
        "[j = below_target_index]",
        ("target",),
    ),
    "sum": Statistic(("average",), "z̄ over all classes", "1 / V"),
    "sumsq": Statistic(("moment",), "Σ (z_j - z̄)² over all classes", "2 (z_j - z̄)", ("sum",)),
    "softplus": Statistic(("softplus",), "Σ log(1 + e^{z_j}) over the negatives", "σ(z_j)"),
    "stable_sum": Statistic(
        ("stable_sum",),
        "Σ s(z_j) over the negatives, s(z) = 1 + z for z ≥ 0, 1 / (1 - z) below",
        "s'(z_j) = 1 for z_j ≥ 0, s(z_j)² below",
    ),
    "weighted_sum": Statistic(("weighted_sum",), "Σ a_j z_j over all classes", "a_j"),
    "teacher": Statistic(("teacher",), "Σ t_j a_j z_j over all classes", "t_j a_j"),
}
TEMPERATURE = "lse@"  # "lse@2": log Σ e^{2 z_j} over the negatives; its basis is 2 softmax(2 z)_j
FILTERED = "lse<"  # "lse<3": log Σ e^{f_j} over the negatives, f_j = z_j up to 3, 0 above, basis 0

INDEX_OUTPUTS = ("argmax", "runner_up_index", "below_target_index")


def canonical(names: Iterable[str]) -> tuple[str, ...]:
    """The statistics behind ``names`` and what they need, in the order of the table.

    Raises:
        ValueError: a name is not in the table, nor ``"lse@t"`` with a positive number t, nor
            ``"lse<t"`` with a number t.
    """
    wanted: set[str] = set()
    pending = [{"argmax": "max"}.get(name, name) for name in names]
    while pending:
        name = pending.pop()
        if name in wanted:
            continue
        if name in STATISTICS:
            pending.extend(STATISTICS[name].needs)
        elif not is_log_sum(name):
            raise ValueError(
                f"names must be among {', '.join(STATISTICS)} or 'lse@t' with a number t > 0, "
                f"or 'lse<t' with a number t, got {name!r}"
            )
        wanted.add(name)
    return (*(n for n in STATISTICS if n in wanted), *sorted(wanted - STATISTICS.keys()))


def outputs(names: Iterable[str]) -> tuple[str, ...]:
    """Names of the tensors a backend returns for canonical ``names``, ``shift`` first."""
    listed = [o for n in names for o in (STATISTICS[n].outputs if n in STATISTICS else (n,))]
    return ("shift", *listed)


def smooth_outputs(names: Iterable[str]) -> list[str]:
    """Those of them that may have a gradient."""
    return [o for o in outputs(names) if o != "shift" and o not in INDEX_OUTPUTS]


NUMBER = r"\d*\.?\d+(e-?\d+)?"


def is_log_sum(name: str) -> bool:
    """Whether this is ``"lse@t"`` or ``"lse<t"``."""
    if match := re.fullmatch(f"{TEMPERATURE}({NUMBER})", name):
        return float(match[1]) > 0
    return re.fullmatch(f"{FILTERED}-?{NUMBER}", name) is not None


def temperature(name: str) -> float:
    """The factor t of the logits in ``"lse@t"``, 1 in ``"lse<t"``."""
    return float(name.removeprefix(TEMPERATURE)) if name.startswith(TEMPERATURE) else 1.0


def limit(name: str) -> float:
    """The largest logit that ``"lse<t"`` takes as it is; inf in ``"lse@t"``."""
    return float(name.removeprefix(FILTERED)) if name.startswith(FILTERED) else torch.inf


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of each row of logits, stored relative to a row shift.

    ``lse``, ``max``, ``entropy`` of the table are over the **negatives** (all classes but the
    targets; all classes when there is no target). ``logsumexp``, ``log_p``, ``log_1mp`` and
    ``entropy`` here are the usual ones over all classes, computed from shifted values: prefer
    them. Every attribute but the ids is differentiable.

    Attributes:
        values: tensors by output name, each (N,), ``target`` (N,) or (N, K); relative to the
            shift but for ``target``, which would lose its digits far above all negatives.
        num_classes: V.
        class_vector_sum: Σ_j a_j, () or None.
        teacher_sum: Σ_j t_j a_j, (N,) or None.

    Example:
        >>> import torch, lossops
        >>> x, w = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> s = lossops.linear_statistics(x, w, torch.tensor([0, 1]), names=("lse", "target"))
        >>> s.target
        tensor([2., 1.])
        >>> torch.allclose(s.log_p, torch.log_softmax(x @ w.T, 1)[[0, 1], [0, 1]])
        True
    """

    values: Mapping[str, Tensor]
    num_classes: int
    class_vector_sum: Tensor | None = None
    teacher_sum: Tensor | None = None

    def relative(self, output: str) -> Tensor:
        """The stored tensor ``output``, relative to ``shift``; names as in ``STATISTICS``."""
        try:
            value = self.values[output]
            return self._above(value, self.shift) if output == "target" else value
        except KeyError:
            asked = next((n for n, s in STATISTICS.items() if output in s.outputs), output)
            raise AttributeError(
                f"statistic {output!r} was not collected; add names=(..., {asked!r})"
            ) from None

    @property
    def shift(self) -> Tensor:
        """Row shift m (N,), no gradient."""
        return self.values["shift"]

    def _absolute(self, output: str) -> Tensor:
        return self.relative(output) + self.shift

    def _above(self, target: Tensor, level: Tensor) -> Tensor:
        """Targets (N,) or (N, K) minus a level (N,)."""
        return target - (level.unsqueeze(-1) if target.ndim > level.ndim else level)

    @property
    def target(self) -> Tensor:
        """Logit of the target, (N,), or (N, K) with -inf where there is none."""
        self.relative("target")  # where it is missing, the error says what to do
        return self.values["target"]

    @property
    def lse(self) -> Tensor:
        """log Σ e^{z_j} over the negatives, (N,); -inf when there are none."""
        return self._absolute("lse")

    def lse_at(self, t: float) -> Tensor:
        """log Σ e^{t z_j} over the negatives, (N,), for a collected ``"lse@t"``."""
        for name, value in self.values.items():
            if name.startswith(TEMPERATURE) and temperature(name) == t:
                return value + t * self.shift
        raise AttributeError(
            f"statistic 'lse@{t:g}' was not collected; add names=(..., 'lse@{t:g}')"
        )

    def lse_up_to(self, t: float) -> Tensor:
        """log Σ e^{f_j} over the negatives, f_j = z_j up to t and 0 above, (N,), of ``"lse<t"``."""
        for name, value in self.values.items():
            if name.startswith(FILTERED) and limit(name) == t:
                return value + self.shift
        raise AttributeError(
            f"statistic 'lse<{t:g}' was not collected; add names=(..., 'lse<{t:g}')"
        )

    @property
    def max(self) -> Tensor:
        """Largest negative, (N,)."""
        return self._absolute("max")

    @property
    def argmax(self) -> Tensor:
        """Lowest id among the largest negatives, (N,) int64; -1 when there are none."""
        return self.relative("argmax")

    @property
    def runner_up(self) -> Tensor:
        """Second largest negative, (N,)."""
        return self._absolute("runner_up")

    @property
    def runner_up_index(self) -> Tensor:
        """Id of ``runner_up``, (N,) int64; -1 when there is none."""
        return self.relative("runner_up_index")

    @property
    def below_target(self) -> Tensor:
        """Largest negative strictly below the target, (N,); -inf when there is none."""
        return self._absolute("below_target")

    @property
    def below_target_index(self) -> Tensor:
        """Id of ``below_target``, (N,) int64; -1 when there is none."""
        return self.relative("below_target_index")

    @property
    def sum(self) -> Tensor:
        """Σ z_j over all classes, (N,)."""
        return self.num_classes * self._absolute("average")

    @property
    def sumsq(self) -> Tensor:
        """Σ z_j² over all classes, (N,)."""
        return self.moment + self.num_classes * self._absolute("average").square()

    @property
    def moment(self) -> Tensor:
        """Σ (z_j - z̄)² over all classes, (N,): the second moment without cancellation."""
        return self.relative("moment")

    @property
    def softplus(self) -> Tensor:
        """Σ log(1 + e^{z_j}) over the negatives, (N,)."""
        return self.relative("softplus")

    @property
    def stable_sum(self) -> Tensor:
        """Σ s(z_j) over the negatives, (N,), s(z) = 1 + z for z ≥ 0 and 1 / (1 - z) below."""
        return self.relative("stable_sum")

    @property
    def weighted_sum(self) -> Tensor:
        """Σ a_j z_j over all classes, (N,)."""
        relative = self.relative("weighted_sum")
        assert self.class_vector_sum is not None
        return relative + self.shift * self.class_vector_sum

    @property
    def teacher(self) -> Tensor:
        """Σ t_j a_j z_j over all classes, (N,)."""
        relative = self.relative("teacher")
        assert self.teacher_sum is not None
        return relative + self.shift * self.teacher_sum

    @property
    def target_minus_lse(self) -> Tensor:
        """target - lse, (N,): the log-odds of the target, free of the shift."""
        return self._single_target() - self.relative("lse")

    @property
    def log_p(self) -> Tensor:
        """log softmax of the target(s) over all classes, (N,) or (N, K)."""
        if self.target.ndim > self.shift.ndim:
            level, logsumexp = self._with_targets()
            return self._above(self.target, level) - logsumexp.unsqueeze(-1)
        return F.logsigmoid(self.target_minus_lse)

    @property
    def log_1mp(self) -> Tensor:
        """log(1 - p) of the target, (N,), exact when p is close to 1."""
        return F.logsigmoid(-self.target_minus_lse)

    def _single_target(self) -> Tensor:
        target = self.relative("target")
        if target.ndim > self.shift.ndim:
            raise ValueError(
                f"this attribute takes one target per row, got {target.shape[-1]}; "
                "combine `target` and `lse` yourself"
            )
        return target

    @property
    def relative_logsumexp(self) -> Tensor:
        """``logsumexp - shift``, (N,), without the cancellation."""
        lse = self.relative("lse")
        if "target" not in self.values:
            return lse
        if self.target.ndim > self.shift.ndim:
            level, logsumexp = self._with_targets()
            return logsumexp + (level - self.shift)
        return self._joined(self.relative("target"), lse)

    @property
    def logsumexp(self) -> Tensor:
        """log Σ e^{z_j} over all classes, (N,)."""
        lse = self._absolute("lse")
        if "target" not in self.values:
            return lse
        if self.target.ndim > self.shift.ndim:
            level, logsumexp = self._with_targets()
            return logsumexp + level
        return self._joined(self.target, lse)

    def _joined(self, target: Tensor, lse: Tensor) -> Tensor:
        """Of one target and the negatives, relative to whatever both of them are."""
        # Either branch is exact; the one that adds to the larger term never meets inf - inf.
        return torch.where(self.target_minus_lse > 0, target - self.log_p, lse - self.log_1mp)

    def _with_targets(self) -> tuple[Tensor, Tensor]:
        """Of several targets: a level (N,), the largest logit, and logsumexp relative to it."""
        target, shift = self.target, self.shift
        level = torch.maximum(target.detach().amax(-1), shift)
        level = torch.where(level.isfinite(), level, shift)
        others = self.relative("lse") + (shift - level)
        parts = torch.cat([self._above(target, level), others.unsqueeze(-1)], -1)
        return level, torch.logsumexp(parts, -1)

    @property
    def entropy(self) -> Tensor:
        """Entropy of softmax over all classes in nats, (N,)."""
        # H = -p log p + (1 - p)(H_q - log(1 - p)),  H_q = lse - mean
        mean = self.relative("mean")  # first: where it is missing, the error names "entropy"
        h_q = self.relative("lse") - mean
        if "target" not in self.values:
            return h_q
        log_p, log_1mp = self.log_p, self.log_1mp
        return _exp_times(log_p, -log_p) + _exp_times(log_1mp, h_q - log_1mp)

    @property
    def variance(self) -> Tensor:
        """Σ p_j (z_j - Σ p z)² over all classes, (N,): the variance of log p under p."""
        variance = self.relative("variance")
        if "target" not in self.values:
            return variance
        # (1 - p) var_q + p (1 - p) (target - mean_q)²
        log_p, log_1mp = self.log_p, self.log_1mp
        away = self._single_target() - self.relative("mean")
        return _exp_times(log_1mp, variance) + _exp_times_square(log_p + log_1mp, away)

    @staticmethod
    def merge(a: RowStatistics, b: RowStatistics) -> RowStatistics:
        """Statistics of the classes of ``a`` followed by those of ``b``, for the same rows.

        Args:
            a: statistics over V_a classes.
            b: statistics over V_b classes; its ids come back shifted by V_a.

        Returns:
            Statistics over V_a + V_b classes, the same set of names.

        Raises:
            ValueError: the two were collected with different names, or hold ``below_target``.
        """
        if a.values.keys() != b.values.keys():
            raise ValueError(
                f"both sides must hold the same statistics, got {sorted(a.values)} "
                f"and {sorted(b.values)}"
            )
        if "below_target" in a.values:
            raise ValueError(
                "'below_target' cannot be merged: a part without the target cannot tell what lies "
                "below it; collect it over all classes at once"
            )
        return _merge(a, b)

    def all_reduce(
        self, group: Any = None, *, num_classes: Sequence[int] | None = None
    ) -> RowStatistics:
        """Merge over class shards, rank by rank in rank order; gradients reach this rank's part.

        All statistics travel in one exchange, as the bytes they are: every rank then holds the same
        bits.

        Args:
            group: the process group whose ranks hold consecutive class ranges.
                Default: ``None`` (the default group).
            num_classes: V of each rank, where known; else one more exchange. Default: ``None``.
        """
        import torch.distributed as dist

        rank, size = dist.get_rank(group), dist.get_world_size(group)

        def from_all(t: Tensor) -> list[Tensor]:
            parts = [torch.empty_like(t) for _ in range(size)]
            dist.all_gather(parts, t, group=group)
            return parts

        if num_classes is None:
            own = torch.tensor(self.num_classes, device=self.shift.device)
            num_classes = [int(t) for t in from_all(own)]
        given = dict(self.values)
        for name in ("class_vector_sum", "teacher_sum"):
            if (value := getattr(self, name)) is not None:
                given[name] = value.expand_as(self.shift)
        rows = self.shift.shape
        packed = [_as_bytes(t.detach(), rows) for t in given.values()]
        merged: RowStatistics | None = None
        for r, line in enumerate(from_all(torch.cat(packed, -1))):
            pieces = line.split([t.shape[-1] for t in packed], -1)
            part = {
                name: t if r == rank else piece.contiguous().view(t.dtype).reshape(t.shape)
                for (name, t), piece in zip(given.items(), pieces, strict=True)
            }
            vector_sum, teacher_sum = (
                part.pop(name, None) for name in ("class_vector_sum", "teacher_sum")
            )
            found = RowStatistics(part, num_classes[r], vector_sum, teacher_sum)
            merged = found if merged is None else RowStatistics.merge(merged, found)
        assert merged is not None
        return merged


def _as_bytes(t: Tensor, rows: torch.Size) -> Tensor:
    """(*rows, *) as (*rows, bytes)."""
    flat = t.reshape(*rows, -1) if t.numel() else t.new_empty(*rows, *t.shape[len(rows) :])
    # A copy: contiguous() leaves the strides of a single row as they are, and these may be 0.
    return flat.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _exp_times(log_weight: Tensor, value: Tensor) -> Tensor:
    """exp(log_weight) · value, 0 where the weight is 0 and the value infinite."""
    empty = log_weight == -torch.inf
    return torch.where(empty, 0.0, log_weight.exp() * value.masked_fill(empty, 0.0))


def _exp_times_square(log_weight: Tensor, value: Tensor) -> Tensor:
    """exp(log_weight) · value², 0 where the weight is: the square, or its gradient, may be inf."""
    value = torch.where(log_weight.exp() == 0, 0.0, value)
    return log_weight.exp() * value.square()


def _merge(a: RowStatistics, b: RowStatistics) -> RowStatistics:
    sa, sb = a.shift, b.shift
    shift = torch.maximum(sa, sb)
    # A shift of an empty side is 0 by convention and must not raise the merged one; it may, since
    # any finite shift is valid, and one 0 above logits of -200 would only cost accuracy there.
    if "lse" in a.values:
        empty_a, empty_b = a.values["lse"] == -torch.inf, b.values["lse"] == -torch.inf
        shift = torch.where(empty_a, sb, torch.where(empty_b, sa, shift))
    da, db = sa - shift, sb - shift
    va, vb = a.num_classes, b.num_classes
    out: dict[str, Tensor] = {"shift": shift}
    left, right = a.values, b.values
    for name in left:
        la, lb = left[name], right[name]
        if name == "shift" or name in INDEX_OUTPUTS or name in out:
            continue
        if name == "target":
            out[name] = torch.maximum(la, lb)
        elif name == "lse":
            out[name] = logaddexp(la + da, lb + db)
        elif is_log_sum(name):
            t = temperature(name)
            out[name] = logaddexp(la + t * da, lb + t * db)
        elif name == "mean":
            lse = out["lse"]
            weight_a, weight_b = left["lse"] + da - lse, right["lse"] + db - lse
            out[name] = _exp_times(weight_a, la + da) + _exp_times(weight_b, lb + db)
        elif name == "variance":
            lse, away = out["lse"], (left["mean"] + da) - (right["mean"] + db)
            weight_a, weight_b = left["lse"] + da - lse, right["lse"] + db - lse
            out[name] = (
                _exp_times(weight_a, la)
                + _exp_times(weight_b, lb)
                + _exp_times_square(weight_a + weight_b, away)
            )
        elif name in ("max", "runner_up"):
            continue
        elif name == "average":
            out[name] = ((la + da) * va + (lb + db) * vb) / (va + vb)
        elif name == "moment":
            delta = (left["average"] + da) - (right["average"] + db)
            out[name] = la + lb + delta.square() * (va * vb / (va + vb))
        elif name in ("softplus", "stable_sum"):
            out[name] = la + lb
        elif name == "weighted_sum":
            assert a.class_vector_sum is not None
            assert b.class_vector_sum is not None
            out[name] = la + da * a.class_vector_sum + lb + db * b.class_vector_sum
        elif name == "teacher":
            assert a.teacher_sum is not None
            assert b.teacher_sum is not None
            out[name] = la + da * a.teacher_sum + lb + db * b.teacher_sum
    _merge_extremes(out, left, right, da, db, va)
    order = {name: out[name] for name in left}
    return RowStatistics(
        order,
        va + vb,
        _add(a.class_vector_sum, b.class_vector_sum),
        _add(a.teacher_sum, b.teacher_sum),
    )


def _merge_extremes(
    out: dict[str, Tensor],
    left: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    da: Tensor,
    db: Tensor,
    offset: int,
) -> None:
    """Extremes by (value, lowest index); ids of the right side move up by ``offset``."""

    def both(value: str, index: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ib = right[index]
        return (
            left[value] + da,
            left[index],
            right[value] + db,
            torch.where(ib < 0, ib, ib + offset),
        )

    if "max" in left:
        a, ia, b, ib = both("max", "argmax")
        take = (b > a) | (ia < 0)
        out["max"], out["argmax"] = torch.where(take, b, a), torch.where(take, ib, ia)
    if "runner_up" in left:
        a, ia, b, ib = both("max", "argmax")
        a2, ia2, b2, ib2 = both("runner_up", "runner_up_index")
        won = (b > a) | (ia < 0)  # the right side holds the maximum: its runner-up meets our first
        x, ix = torch.where(won, a, a2), torch.where(won, ia, ia2)
        y, iy = torch.where(won, b2, b), torch.where(won, ib2, ib)
        take = (y > x) | (ix < 0)
        out["runner_up"], out["runner_up_index"] = (
            torch.where(take, y, x),
            torch.where(take, iy, ix),
        )


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b) whose gradient is 0, not NaN, where both are -inf."""
    empty = (a == -torch.inf) & (b == -torch.inf)
    return torch.where(empty, -torch.inf, torch.logaddexp(a.masked_fill(empty, 0.0), b))


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a + b
