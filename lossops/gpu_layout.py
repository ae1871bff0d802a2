"""What GPU kernels take and leave in memory, the same in Triton and CUDA C++; sizes of launches.

A set of statistics is a set of bits. What a kernel finds of N rows lies in rows of a float32 matrix
(`FLOAT_ROWS`, then the log-sums in the order of their names) and of an int64 matrix (`ID_ROWS`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lossops.statistics import is_log_sum, limit, outputs, temperature

BITS = {
    name: 1 << number
    for number, name in enumerate((
        "lse", "entropy", "variance", "max", "runner_up", "below_target", "sum", "sumsq",
        "softplus", "stable_sum", "weighted_sum", "teacher",
    ))
}  # fmt: skip
FLOAT_ROWS = (
    "shift", "lse", "mean", "variance", "max", "runner_up", "below_target", "average", "moment",
    "softplus", "stable_sum", "weighted_sum", "teacher",
)  # fmt: skip
ID_ROWS = ("argmax", "runner_up_index", "below_target_index")
READABLE = (torch.float32, torch.float16, torch.bfloat16)  # of a teacher


class Logits(NamedTuple):
    """Products r (N, V) in memory, and the map from them to z."""

    r: Tensor
    b: Tensor | None = None
    scale: Tensor | None = None
    softcap: float = 0.0


class Kept(NamedTuple):
    """Where a kernel puts what it finds, and how a statistic is taken from there."""

    names: tuple[str, ...]
    values: Tensor  # (rows, N) float32
    ids: Tensor  # (3, N) int64
    at_target: Tensor | None  # (N, K)

    @staticmethod
    def room(names: Sequence[str], n: int, target: Tensor | None, device: torch.device) -> Kept:
        log_sums = sum(is_log_sum(name) for name in names)
        rows = len(FLOAT_ROWS) + log_sums
        at_target = None
        if "target" in names and target is not None:
            at_target = torch.empty(target.shape, dtype=torch.float32, device=device)
        return Kept(
            tuple(names),
            torch.empty(rows, n, dtype=torch.float32, device=device),
            torch.empty(3, n, dtype=torch.int64, device=device),
            at_target,
        )

    def listed(self) -> list[Tensor]:
        """In the order of ``outputs(names)``."""
        return [self._of(name) for name in outputs(self.names)]

    def _of(self, output: str) -> Tensor:
        if output == "target":
            assert self.at_target is not None
            return self.at_target
        if output in ID_ROWS:
            return self.ids[ID_ROWS.index(output)]
        if output in FLOAT_ROWS:
            return self.values[FLOAT_ROWS.index(output)]
        order = [name for name in self.names if is_log_sum(name)]
        return self.values[len(FLOAT_ROWS) + order.index(output)]


def bits(names: Sequence[str]) -> int:
    """The set for names of statistics."""
    return sum(BITS[name] for name in names if name in BITS)


def log_sums(names: Sequence[str]) -> tuple[tuple[float, float], ...]:
    """(temperature, limit) of the log sums among the names."""
    return tuple((temperature(name), limit(name)) for name in names if is_log_sum(name))


def no_columns(target: Tensor | None) -> Tensor | None:
    """None for a target without columns."""
    return None if target is None or not target.shape[1] else target.contiguous()


ROW_STATISTICS = (
    "shift", "lse", "mean", "variance", "average", "argmax", "runner_up_index",
    "below_target_index",
)  # fmt: skip
ROW_COEFFICIENTS = (
    "lse", "mean", "variance", "softplus", "stable_sum", "average", "moment", "weighted_sum",
    "teacher", "max", "runner_up", "below_target",
)  # fmt: skip


class Spec(NamedTuple):
    """What a gradient is made of, as in `lossops.reference`."""

    target: Tensor | None
    class_vector: Tensor | None
    teacher: Tensor | None
    names: Sequence[str]
    statistics: Sequence[Tensor]
    coefficients: Sequence[Tensor | None]

    def arguments(self) -> tuple[Any, ...]:
        """From the targets to the coefficients of log sums, for a kernel."""
        stat = dict(zip(outputs(self.names), self.statistics, strict=True))
        coef = dict(zip(outputs(self.names), self.coefficients, strict=True))
        every = [name for name in self.names if is_log_sum(name)]
        ids = no_columns(self.target)
        teacher = None if coef.get("teacher") is None else self.teacher
        taught = None if teacher is None else readable(teacher)
        return (
            ids, 0 if ids is None else ids.shape[1], dense(self.class_vector), taught,
            0 if taught is None else taught.stride(0),
            given([stat.get(name) for name in ROW_STATISTICS]),
            given([coef.get(name) for name in ROW_COEFFICIENTS]),
            given([stat[name] for name in every]), given([coef[name] for name in every]),
        )  # fmt: skip


def dense_rows(t: Tensor) -> Tensor:
    """A matrix whose rows are dense: t itself, or a copy."""
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def readable(teacher: Tensor) -> Tensor:
    """A teacher as kernels read it: dense rows, and of other dtypes a copy in float32."""
    return dense_rows(teacher if teacher.dtype in READABLE else teacher.to(torch.float32))


def dense(t: Tensor | None) -> Tensor | None:
    """A tensor without holes: t itself, or a copy."""
    return None if t is None else t.contiguous()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Blocks of threads that run at once are a multiple of it; 2 where there is no GPU."""
    if device.type != "cuda":
        return 2
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def parts_of(rows: int, units: int, device: torch.device, blocks: int = 4) -> int:
    """Into how many parts the classes are split, so that ``blocks`` programs a multiprocessor run.

    A function of the sizes and the device alone: the same parts, the same bits.
    """
    wanted = blocks * multiprocessors(device)
    return max(1, min(units, wanted // max(rows, 1)))


def given(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Row vectors for a kernel, dense."""
    return tuple(dense(t) for t in tensors)
