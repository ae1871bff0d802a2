"""Statistics by kernel: of logits that exist, and straight from x and w."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lossops.statistics import is_log_sum, limit, outputs, temperature
from lossops_triton import row
from lossops_triton.chunk import (
    chunk_gradient_kernel,
    chunk_statistics_kernel,
    column_sums_kernel,
    merge_kernel,
)
from lossops_triton.configurations import RICH
from lossops_triton.launch import (
    aligned,
    alike,
    dense,
    dense_rows,
    given,
    misalignment,
    on,
    parts_of,
    warp_size,
)

BLOCK = 4096  # logits a step of a chunk kernel; 16 a thread of 256
WARPS = 8
ROWS, COLUMNS = 32, 128  # a step of a kernel over columns
BITS = {
    "lse": row.LSE, "entropy": row.ENTROPY, "variance": row.VARIANCE, "max": row.MAX,
    "runner_up": row.RUNNER_UP, "below_target": row.BELOW_TARGET, "sum": row.SUM,
    "sumsq": row.SUMSQ, "softplus": row.SOFTPLUS, "stable_sum": row.STABLE_SUM,
    "weighted_sum": row.WEIGHTED_SUM, "teacher": row.TEACHER,
}  # fmt: skip


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
        rows = len(row.FLOAT_ROWS) + log_sums
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
            return self.at_target.sub_(self.values[0].unsqueeze(1))
        if output in row.ID_ROWS:
            return self.ids[row.ID_ROWS.index(output)]
        if output in row.FLOAT_ROWS:
            return self.values[row.FLOAT_ROWS.index(output)]
        order = [name for name in self.names if is_log_sum(name)]
        return self.values[len(row.FLOAT_ROWS) + order.index(output)]


def bits(names: Sequence[str]) -> int:
    """The set of row.py for names of statistics."""
    return sum(BITS[name].value for name in names if name in BITS)


def log_sums(names: Sequence[str]) -> tuple[tuple[float, float], ...]:
    """(temperature, limit) of the log sums among the names."""
    return tuple((temperature(name), limit(name)) for name in names if is_log_sum(name))


def no_columns(target: Tensor | None) -> Tensor | None:
    """None for a target without columns."""
    return None if target is None or not target.shape[1] else target.contiguous()


class Split(NamedTuple):
    """How the classes of a chunk are divided among programs."""

    parts: int
    per_part: int
    block: int
    vector: int

    @staticmethod
    def of(r: Tensor, split: bool, block: int = BLOCK) -> Split:
        n, v = r.shape
        vector = 16 // r.element_size()
        while block > 4 * vector and block >= 2 * v:
            block //= 2
        blocks = max(1, -(-v // block))
        parts = parts_of(n, blocks, r.device) if split else 1
        per_part = -(-blocks // parts) * block
        return Split(max(1, -(-v // per_part)), per_part, block, vector)


def step(r: Tensor, much: bool) -> tuple[int, int]:
    """Logits of a step of a chunk kernel, and warps.

    Where much is done for a logit a thread has one vector of 16 bytes; with 16 logits all
    statistics at once would take every register there is.
    """
    if not much:
        return BLOCK, WARPS
    with on(r.device):
        return warp_size() * WARPS // 2 * (16 // r.element_size()), WARPS // 2


def chunk_statistics(
    logits: Logits,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: Sequence[str],
) -> list[Tensor]:
    """Statistics of products in memory, in the order of ``outputs(names)``."""
    r = dense_rows(logits.r)
    n, v = r.shape
    kept = Kept.room(names, n, target, r.device)
    if n == 0:
        return kept.listed()
    ids = no_columns(target)
    if ids is None and kept.at_target is not None:
        kept.at_target.fill_(-torch.inf)
    flags, sums = bits(names), log_sums(names)
    much = (flags & ~row.LSE.value).bit_count() + len(sums) > RICH
    block, warps = step(r, much)
    split = Split.of(r, True, block)
    floats, numbers = kept.values, kept.ids
    if split.parts > 1:
        rows = row.STATE_ROWS.value + 2 * len(sums)
        floats = torch.empty(split.parts, rows, n, dtype=torch.float32, device=r.device)
        numbers = torch.empty(split.parts, 3, n, dtype=torch.int32, device=r.device)
    taught = None if teacher is None or "teacher" not in names else dense_rows(teacher)
    vector = class_vector if "weighted_sum" in names or taught is not None else None
    with on(r.device):
        chunk_statistics_kernel[(n, split.parts)](
            r, r.stride(0), misalignment(r), logits.scale, dense(logits.b), ids,
            0 if ids is None else ids.shape[1], dense(vector), taught,
            0 if taught is None else taught.stride(0), floats, numbers,
            None if kept.at_target is None else kept.at_target, n, v, logits.softcap,
            split.per_part, FLAGS=flags, LOG_SUMS=sums, SOFTCAP=logits.softcap != 0,
            PARTS=split.parts, BLOCK=split.block, VEC=split.vector, ALIGNED=aligned(r),
            num_warps=warps,
        )  # fmt: skip
        if split.parts > 1:
            merge_states(floats, numbers, kept, flags, sums)
    return kept.listed()


def merge_states(
    floats: Tensor,
    numbers: Tensor,
    kept: Kept,
    flags: int,
    sums: tuple[tuple[float, float], ...],
) -> None:
    """Join the states of parts of the classes, in their order."""
    n, rows = kept.values.shape[1], 64
    merge_kernel[(-(-n // rows),)](
        floats, numbers, kept.values, kept.ids, n, PARTS=floats.shape[0], FLAGS=flags,
        LOG_SUMS=sums, ROWS=rows, num_warps=2,
    )  # fmt: skip


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

    def arguments(self) -> tuple[object, ...]:
        """From the targets to the coefficients of log sums, for a kernel."""
        stat = dict(zip(outputs(self.names), self.statistics, strict=True))
        coef = dict(zip(outputs(self.names), self.coefficients, strict=True))
        every = [name for name in self.names if is_log_sum(name)]
        ids = no_columns(self.target)
        teacher = None if coef.get("teacher") is None else self.teacher
        taught = None if teacher is None else dense_rows(teacher)
        return (
            ids, 0 if ids is None else ids.shape[1], dense(self.class_vector), taught,
            0 if taught is None else taught.stride(0),
            given([stat.get(name) for name in ROW_STATISTICS]),
            given([coef.get(name) for name in ROW_COEFFICIENTS]),
            given([stat[name] for name in every]), given([coef[name] for name in every]),
        )  # fmt: skip


def chunk_gradient(
    logits: Logits,
    spec: Spec,
    out: Tensor,
    *,
    at_target: Tensor | None = None,
    unit: Tensor | None = None,
    first_class: int = 0,
    num_classes: int | None = None,
) -> None:
    """dr (N, n) of products in memory into ``out``, which may be the memory of the products.

    Args:
        logits: of the classes from ``first_class`` on.
        spec: targets among all classes; class vector and teacher of these classes.
        out: (N, n) of any dtype with dense rows; a half-precision view of the first half of each
            row of the products is written behind what is read.
        at_target: (N, K) dr at the targets; 0 where None.
        unit: () what dr is multiplied by before it is rounded.
        first_class: the class of column 0.
        num_classes: V; None for n.
    """
    r = logits.r
    n, v = r.shape
    if n == 0 or v == 0:
        return
    in_place = out.untyped_storage().data_ptr() == r.untyped_storage().data_ptr()
    packed = in_place and out.dtype != r.dtype
    split = Split.of(r, not packed)
    with on(r.device):
        chunk_gradient_kernel[(n, split.parts)](
            r, r.stride(0), misalignment(r), logits.scale, dense(logits.b), *spec.arguments(),
            dense(at_target), unit, out, out.stride(0), v, first_class, num_classes or v,
            logits.softcap, split.per_part, LOG_SUMS=log_sums(spec.names),
            SOFTCAP=logits.softcap != 0, PARTS=split.parts, BLOCK=split.block, VEC=split.vector,
            ALIGNED=aligned(r, out), ALIKE=aligned(r, out) or alike(r, out), IN_PLACE=packed,
            num_warps=WARPS,
        )  # fmt: skip


def column_sums(
    logits: Logits,
    spec: Spec,
    db: Tensor,
    accumulate: bool,
    first_class: int = 0,
    num_classes: int | None = None,
) -> None:
    """Σ over the rows of dr into ``db`` (n,) float32; arguments as of `chunk_gradient`."""
    r = logits.r
    n, v = r.shape
    with on(r.device):
        column_sums_kernel[(triton.cdiv(v, COLUMNS),)](
            r, r.stride(0), logits.scale, dense(logits.b), *spec.arguments(), db, n, v,
            first_class, num_classes or v, logits.softcap, int(accumulate),
            LOG_SUMS=log_sums(spec.names), SOFTCAP=logits.softcap != 0, ROWS=ROWS, BLOCK=COLUMNS,
            num_warps=4,
        )  # fmt: skip
