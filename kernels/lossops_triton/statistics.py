"""Statistics by kernel: of logits that exist, and straight from x and w."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lossops.gpu_layout import (
    Kept,
    Logits,
    Spec,
    bits,
    dense,
    dense_rows,
    log_sums,
    no_columns,
    parts_of,
)
from lossops_triton import row
from lossops_triton.chunk import (
    chunk_gradient_kernel,
    chunk_statistics_kernel,
    column_sums_kernel,
    merge_kernel,
)
from lossops_triton.configurations import RICH
from lossops_triton.launch import aligned, alike, misalignment, on, warp_size

BLOCK = 4096  # logits a step of a chunk kernel; 16 a thread of 256
WARPS = 8
ROWS, COLUMNS = 32, 128  # a step of a kernel over columns


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
    """dr (N, n) of products in memory into ``out``: `lossops.gpu_linear.Kernels`."""
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
