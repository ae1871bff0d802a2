"""The primitives of `lossops.reference` by CUDA C++ kernels: csrc/cuda, compiled, no JIT.

    logits_statistics, linear_chunk_*    csrc/cuda/{statistics,gradient,columns}.cu
    linear_statistics, linear_gradient   chunks and slabs of the same
    linear_binary, linear_pair_*         csrc/cuda/pairs.cu, on slabs

Dense products are the vendor's library's (`lossops.gpu_linear`). Sizes come from shapes alone:
nothing waits for the device. There is no near and far here: Triton has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lossops.cuda_rows import add_targets
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
    readable,
)
from lossops.gpu_linear import Kernels
from lossops.gpu_pairs import GpuPrimitives, PairKernels, merged_log_sums

# As in csrc/cuda/{state,logits}.h.
ONE_LOG_SUM, FOUR_LOG_SUMS, MOST_LOG_SUMS, MOST_SLOPES, STATE_WORDS = 4096, 8192, 4, 16, 32
PART = 4096  # logits, 16 for each thread of a block
# As in csrc/cuda/{columns,pairs}.cu; rows that are a part at least, 32 for each warp of a block.
COLUMNS, PART_ROWS = 128, 256
KINDS = ("sigmoid", "hinge", "gumbel", "asymmetric")


def _ops() -> Any:
    return torch.ops.lossops_cuda


def _float(t: Tensor | None) -> Tensor | None:
    """float32 without holes."""
    return None if t is None else t.to(torch.float32).contiguous()


def _parts(r: Tensor) -> int:
    return parts_of(r.shape[0], max(1, r.shape[1] // PART), r.device)


def _column_parts(r: Tensor) -> int:
    """Parts of the rows, each of which blocks of columns sum on their own."""
    return parts_of(-(-r.shape[1] // COLUMNS), r.shape[0] // PART_ROWS, r.device)


def chunk_statistics(
    logits: Logits,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: Sequence[str],
) -> list[Tensor]:
    """Statistics of products in memory, in the order of ``outputs(names)``."""
    r = dense_rows(logits.r)
    kept = Kept.room(names, r.shape[0], target, r.device)
    if r.shape[0] == 0:
        return kept.listed()
    ids = no_columns(target)
    if ids is None and kept.at_target is not None:
        kept.at_target.fill_(-torch.inf)
    taught = None if teacher is None or "teacher" not in names else readable(teacher)
    vector = class_vector if "weighted_sum" in names or taught is not None else None
    parts, sums, wanted, values = _parts(r), log_sums(names), bits(names), kept.values
    states = r.new_empty(parts, STATE_WORDS, r.shape[0], dtype=torch.float32) if parts > 1 else None
    first = len(values) - len(sums)  # of the rows of log-sums
    for start in range(0, max(len(sums), 1), MOST_LOG_SUMS):  # nearly always once
        some = sums[start : start + MOST_LOG_SUMS]
        own = values[: first + len(some)] if start == 0 else torch.empty_like(
            values[: first + len(some)]
        )  # fmt: skip
        flag = 0 if not some else ONE_LOG_SUM if len(some) == 1 else FOUR_LOG_SUMS | ONE_LOG_SUM
        _ops().logits_statistics(
            r, _float(logits.scale), _float(logits.b), logits.softcap, ids, _float(vector), taught,
            wanted | flag, [t for t, _ in some], [limit for _, limit in some], parts, states, own,
            kept.ids, kept.at_target,
        )  # fmt: skip
        if start:
            values[first + start : first + start + len(some)] = own[first:]
        wanted = 0
    return kept.listed()


def _slopes(logits: Logits, spec: Spec) -> tuple[Any, ...]:
    """The arguments that `chunk_gradient` and `column_sums` have in common."""
    ids, _, vector, taught, _, *lists = spec.arguments()
    stats, coefs, log_stats, log_coefs = (list(given) for given in lists)
    sums = log_sums(spec.names)
    wanted = sum(c is not None for c in log_coefs)
    if wanted > MOST_SLOPES:
        raise ValueError(
            f"the CUDA kernels take at most {MOST_SLOPES} log-sums with a coefficient, got "
            f"{wanted}; use backend='triton'"
        )
    return (
        dense_rows(logits.r), _float(logits.scale), _float(logits.b), logits.softcap, ids,
        _float(vector), taught, stats, coefs, [t for t, _ in sums],
        [limit for _, limit in sums], log_stats, log_coefs,
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
    if r.numel() == 0:
        return
    parts = _parts(r) if out.dtype == r.dtype else 1
    _ops().logits_gradient(
        *_slopes(logits, spec), first_class, num_classes or r.shape[1], dense(at_target), unit,
        parts, out,
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
    v, parts = num_classes or logits.r.shape[1], _column_parts(logits.r)
    if parts == 1:
        _ops().column_sums(*_slopes(logits, spec), first_class, v, accumulate, 1, db)
        return
    some = db.new_empty(parts, *db.shape)
    _ops().column_sums(*_slopes(logits, spec), first_class, v, False, parts, some)
    db.copy_(some.sum(0) + db if accumulate else some.sum(0))


def binary(
    logits: Logits,
    ids: Tensor | None,
    weight: Tensor | None,
    kind: str,
    parameters: list[float],
    row_factor: Tensor | None,
    sums: Tensor,
    out: Tensor | None,
) -> None:
    """Sums (N,) of a slab's products (N, v), and dz into ``out``, the same memory, where given."""
    p, q, detached = (*parameters, 0.0, 0.0, 0.0)[:3]
    _ops().binary(
        logits.r, _float(logits.scale), _float(logits.b), ids, _float(weight), KINDS.index(kind),
        p, q, bool(detached), _float(row_factor), sums, out,
    )  # fmt: skip


def pair_columns(logits: Logits, ids: Tensor | None, shift: Tensor, lse: Tensor) -> None:
    """Log-sums (v,) of a slab's columns, into ``shift`` and ``lse``."""
    parts = _column_parts(logits.r)
    found = [shift, lse] if parts == 1 else [shift.new_empty(parts, *shift.shape) for _ in "sl"]
    _ops().pair_columns(logits.r, _float(logits.scale), ids, parts, *found)
    if parts > 1:
        for t, whole in zip((shift, lse), merged_log_sums(*found), strict=True):
            t.copy_(whole)


def pair_gradient(
    logits: Logits,
    ids: Tensor | None,
    row: tuple[Tensor, Tensor, Tensor | None],
    column: tuple[Tensor, Tensor, Tensor | None],
    out: Tensor,
) -> None:
    """dz of a slab's products into ``out``, the same memory."""
    _ops().pair_gradient(logits.r, _float(logits.scale), ids, *row, *column, out)


primitives = GpuPrimitives(
    Kernels(chunk_statistics, chunk_gradient, column_sums, add_targets),
    PairKernels(binary, pair_columns, pair_gradient),
)
