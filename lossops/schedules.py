"""The two schedules: how the logits of a head are swept, chunk by chunk. No autograd here.

one sweep    per chunk of R rows: logits, statistics, loss and coefficients, dz in place, then dx
             and dw. 3 GEMMs, one buffer (R, V), accumulators in float32.
two sweeps   forward keeps the statistics; backward recomputes the tiles, slabs of classes in the
             outer loop, so that each slice of dw is one sum over all rows rounded once. 4 GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lossops.reference import accumulate_dtype

MIB = 2**20
HALF_UNIT = 2.0**14  # of float16, whose largest number is just below 2^16


class ChunkSize(NamedTuple):
    """What a chunk of logits of one sweep should hold; a stated budget, never free memory.

    Attributes:
        bytes: at most, where ``max_workspace_bytes`` allows more.
        rows: at least. Fewer read w too often: the fourth GEMM of two sweeps costs less then.
    """

    bytes: int
    rows: int


# On a CPU 1024 rows of 32,768 classes took 4 % less time than 512. On a GPU a product of R rows has
# R operations a byte of w in half precision, and 295 keep the tensor cores of an H100 busy: at 512
# the products take longer than the bytes. Derived, not timed.
CPU_CHUNK = ChunkSize(136 * MIB, 96)
GPU_CHUNK = ChunkSize(512 * MIB, 512)


def chunk_size(device: torch.device) -> ChunkSize:
    """What suits the device."""
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK


@dataclass(frozen=True)
class LinearLossOptions:
    """How a linear loss is computed; never what it computes.

    Attributes:
        schedule: ``"auto"``, ``"one_sweep"`` (3 GEMMs, a chunk of logits) or ``"two_sweeps"``
            (4 GEMMs, less memory). ``auto`` takes one sweep where the loss and
            ``max_workspace_bytes`` allow it. Default: ``"auto"``.
        max_workspace_bytes: bound on the chunk of logits and the float32 accumulators of half
            precision gradients, in bytes. Default: ``536870912``.
        chunk_rows: rows per chunk of one sweep; None chooses them. Default: ``None``.
        near_target_error: with ``near_threshold="auto"``, the error of dx and of dw that the
            threshold is chosen for: an estimate, relative to their norms, measured on a sample of
            the rows and features. None takes the default threshold. Default: ``None``.
        near_certificate: whether a `NearFarReport` has upper bounds of the errors, at the cost of
            one more pass and V·D² products. Default: ``False``.

    Example:
        >>> import lossops
        >>> lossops.LinearLossOptions(schedule="two_sweeps").max_workspace_bytes
        536870912
    """

    schedule: str = "auto"
    max_workspace_bytes: int = 512 * MIB
    chunk_rows: int | None = None
    near_target_error: float | None = None
    near_certificate: bool = False

    def __post_init__(self) -> None:
        choices = ("auto", "one_sweep", "two_sweeps")
        if self.schedule not in choices:
            raise ValueError(f"schedule must be one of {', '.join(choices)}, got {self.schedule!r}")
        for name in ("max_workspace_bytes", "chunk_rows"):
            value = getattr(self, name)
            if not isinstance(value, int) and (value is not None or name != "chunk_rows"):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if self.max_workspace_bytes <= 0:
            raise ValueError(
                f"max_workspace_bytes must be positive, got {self.max_workspace_bytes}"
            )
        if self.chunk_rows is not None and self.chunk_rows < 1:
            raise ValueError(f"chunk_rows must be None or at least 1, got {self.chunk_rows}")
        if not isinstance(self.near_target_error, float | int | None):
            raise TypeError(
                "near_target_error must be None or a number in (0, 1), got "
                f"{type(self.near_target_error).__name__}"
            )
        if self.near_target_error is not None and not 0 < self.near_target_error < 1:
            raise ValueError(
                f"near_target_error must be None or in (0, 1), got {self.near_target_error}"
            )


class Head(NamedTuple):
    """The arguments every primitive shares; shapes as in `lossops.reference`."""

    x: Tensor
    w: Tensor
    b: Tensor | None
    scale: Tensor | None
    softcap: float
    target: Tensor | None
    class_vector: Tensor | None
    teacher: Tensor | None
    names: Sequence[str]

    def rows(self, rows: slice | Tensor) -> Head:
        """The same head on some of the rows."""
        target = None if self.target is None else self.target[rows]
        teacher = None if self.teacher is None else self.teacher[rows]
        return self._replace(x=self.x[rows], target=target, teacher=teacher)


class Needs(NamedTuple):
    """Which gradients are wanted."""

    dx: bool
    dw: bool
    db: bool
    dscale: bool


class Gradients(NamedTuple):
    """Gradients in the accumulate dtype, None where not wanted; ``dx`` before the scale."""

    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None
    dscale: Tensor | None


RowFunction = Callable[[list[Tensor], "slice | Tensor"], tuple[Tensor, list["Tensor | None"]]]


def kept_dtype(softcap: float, names: Sequence[str], wanted: Sequence[str]) -> torch.dtype | None:
    """How a chunk is kept in 16 bits: exponentials in bfloat16 where they are all that the gradient
    needs of its logits, else logits relative to their largest in float16; None where it is not.

    As ``exponentials_suffice`` and ``logits_may_be_rounded`` in csrc/cpu/linear.cpp.
    """
    if softcap or any(n.startswith("lse<") for n in names):
        return None
    temperatures = [float(n[4:]) for n in names if n.startswith("lse@")]
    linear = {"sumsq", "variance"}.intersection(names)  # dz is a multiple of z
    again = {"entropy", "variance", "below_target"}.intersection(names)  # z a second time
    if "lse" in names and not temperatures and not again and {"lse", "target"}.issuperset(wanted):
        return torch.bfloat16
    absolute = {"softplus", "stable_sum"}.intersection(names)
    relative = temperatures or {"lse", "entropy"}.intersection(names)
    if linear or max(temperatures, default=0.0) > 4 or (absolute and relative):
        return None
    return torch.float16


def one_sweep_rows(
    x: Tensor, v: int, needs_dw: bool, max_bytes: int, dtype: torch.dtype | None = None
) -> int | None:
    """Rows of x (N, D) per chunk of one sweep within ``max_bytes``, None where it does not pay.

    ``dtype`` is that of the chunk, None for the accumulate dtype.
    """
    n, d = x.shape
    acc = accumulate_dtype(x.dtype)
    best = chunk_size(x.device)
    spare = max_bytes
    if x.dtype != acc:  # float32 gradients are themselves outputs, no workspace
        spare -= acc.itemsize * d * (n + (v if needs_dw else 0))
    rows = min(spare, best.bytes) // ((dtype or acc).itemsize * row_stride(v))
    if rows >= n:
        return max(n, 1)
    if rows < best.rows:
        return None
    chunks = -(-n // rows)
    return -(-n // chunks)


def row_stride(v: int) -> int:
    """Row stride of a chunk: room for one more value, of float32 behind an even number of others of
    16 bits, and no power of two.

    Rows 2^k bytes apart share cache sets: the tile of a chunk then evicts itself.
    """
    stride = -(-(v + 3) // 16) * 16
    return stride + 16 if stride % 512 == 0 else stride


def one_sweep(
    head: Head,
    wanted: Sequence[str],
    row_function: RowFunction,
    needs: Needs,
    primitives: Any,
    chunk_rows: int,
    index: Tensor | None = None,
) -> tuple[Tensor, Gradients]:
    """Losses of each row and the gradients of their sum.

    Args:
        head: what shapes the logits; ``names`` are collected for every chunk.
        wanted: outputs that may get a coefficient.
        row_function: statistics and rows of a chunk -> losses (R,) and coefficients.
        needs: which gradients.
        primitives: module of the backend.
        chunk_rows: R.
        index: the rows to compute; the others get loss 0 and no gradient. None: all of them.

    Returns:
        Losses (N,) and gradients in the accumulate dtype.
    """
    x, w = head.x, head.w
    n, d, v = x.shape[0], x.shape[1], w.shape[0]
    acc = accumulate_dtype(x.dtype)
    counted = n if index is None else index.shape[0]
    losses = x.new_zeros(n, dtype=acc)
    wants_dx = needs.dx or needs.dscale
    fresh = torch.zeros if counted < n else torch.empty
    dx = fresh(n, d, dtype=acc, device=x.device) if wants_dx else None
    empty = torch.empty if counted else torch.zeros
    dw = empty(v, d, dtype=acc, device=x.device) if needs.dw else None
    db = empty(v, dtype=acc, device=x.device) if needs.db else None
    dscale = torch.zeros((), dtype=acc, device=x.device) if needs.dscale else None
    rounds = getattr(primitives, "half_products", None)  # of the C++ backend
    rounded = rounds is not None and x.dtype == w.dtype == torch.bfloat16 and rounds(d)
    dtype = (kept_dtype(head.softcap, head.names, wanted) if rounded else None) or acc
    buffer = torch.empty(min(chunk_rows, counted) * row_stride(v), dtype=dtype, device=x.device)
    for start, stop in _chunks(counted, chunk_rows):
        rows = slice(start, stop) if index is None else index[start:stop]
        part = head.rows(rows)
        chunk = buffer.as_strided((stop - start, v), (row_stride(v), 1))
        stats = primitives.linear_chunk_statistics(*part, wanted, chunk)
        losses[rows], coefficients = row_function(stats, rows)
        if not any(needs):
            continue
        dx_part = None
        if dx is not None:
            dx_part = dx[rows] if index is None else dx.new_empty(stop - start, d)
        primitives.linear_chunk_gradient(
            *part, wanted, chunk, stats, coefficients, dx_part, dw, db, start > 0
        )
        if dscale is not None and dx_part is not None:
            dscale += (part.x.to(acc) * dx_part).sum()
        if dx is not None and dx_part is not None and index is not None:
            dx[rows] = dx_part
    return losses, Gradients(dx if needs.dx else None, dw, db, dscale)


def kept_sweep(
    head: Head,
    wanted: Sequence[str],
    row_function: RowFunction,
    primitives: Any,
    index: Tensor | None,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor | None]]:
    """One sweep that ends before its gradients: one chunk of all rows, kept in 16 bits.

    The gradients wait for the upstream factor and are rounded as they are made, so that no float32
    dw is needed. Arguments as of `one_sweep`.

    Returns:
        Losses (N,), the chunk as it lies in memory, and statistics and coefficients of its rows.
    """
    part = head if index is None else head.rows(index)
    n, v = part.x.shape[0], part.w.shape[0]
    dtype = kept_dtype(head.softcap, head.names, wanted)
    assert dtype is not None
    buffer = part.x.new_empty(n * row_stride(v), dtype=dtype)
    stats = primitives.linear_chunk_statistics(*part, wanted, rows_of(buffer, v))
    rows = slice(None) if index is None else index
    found, coefficients = row_function(stats, rows)
    losses = found.new_zeros(head.x.shape[0])
    losses[rows] = found
    return losses, buffer, stats, coefficients


def rows_of(buffer: Tensor, v: int) -> Tensor:
    """The chunk (n, V) in the memory of `kept_sweep`, which has more behind each row."""
    stride = row_stride(v)
    return buffer.as_strided((buffer.numel() // stride, v), (stride, 1))


def kept_gradient(
    head: Head,
    wanted: Sequence[str],
    buffer: Tensor,
    statistics: Sequence[Tensor],
    coefficients: Sequence[Tensor | None],
    needs: Needs,
    primitives: Any,
    index: Tensor | None,
    dtype: torch.dtype,
) -> Gradients:
    """Gradients of what `kept_sweep` left, which is not used up; dw and db in ``dtype``."""
    part = head if index is None else head.rows(index)
    x, w = part.x, part.w
    acc = accumulate_dtype(x.dtype)
    dx = x.new_empty(x.shape, dtype=acc) if needs.dx or needs.dscale else None
    dw = w.new_empty(w.shape, dtype=dtype) if needs.dw else None
    db = w.new_empty(w.shape[0], dtype=dtype) if needs.db else None
    chunk = rows_of(buffer, w.shape[0])
    primitives.linear_chunk_gradient(
        *part, wanted, chunk, statistics, coefficients, dx, dw, db, False
    )
    dscale = (x.to(acc) * dx).sum() if needs.dscale and dx is not None else None
    if dx is not None and index is not None:
        dx = dx.new_zeros(head.x.shape).index_copy_(0, index, dx)
    return Gradients(dx if needs.dx else None, dw, db, dscale)


def two_sweeps_gradient(
    head: Head,
    statistics: Sequence[Tensor],
    coefficients: Sequence[Tensor | None],
    needs: Needs,
    primitives: Any,
) -> Gradients:
    """Gradients from statistics and coefficients, rounded to the dtypes of the inputs."""
    x, w, b, scale = head.x, head.w, head.b, head.scale
    acc = accumulate_dtype(x.dtype)
    dx = torch.empty_like(x, dtype=acc, memory_format=torch.contiguous_format)
    wants_dx = dx if needs.dx or needs.dscale else None
    dw = torch.empty_like(w, memory_format=torch.contiguous_format) if needs.dw else None
    db = torch.empty_like(b) if needs.db and b is not None else None
    primitives.linear_gradient(*head, statistics, coefficients, wants_dx, dw, db)
    dscale = (x.to(acc) * dx).sum() if needs.dscale else None
    if needs.dx and scale is not None:
        dx *= scale.to(acc)
    return Gradients(dx.to(x.dtype) if needs.dx else None, dw, db, dscale)


def _chunks(n: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n, size):
        yield start, min(start + size, n)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast inside: it would round the float32 products of a sweep to half precision."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def power_of_two(total: Tensor) -> Tensor:
    """A power of two at or above total (), at least 2^-112 and at most 2^127, without a sync.

    Neither it nor ``HALF_UNIT`` / it is infinite or 0; 1 where total is no number.
    """
    exponent = torch.frexp(total)[1].clamp(-112, 127)
    return torch.where(total.isfinite(), torch.ldexp(torch.ones_like(total), exponent), 1.0)


def flatten_none(tensors: Sequence[Any], like: Tensor) -> list[Tensor]:
    """Tensors an op can return: an empty one stands for None."""
    return [like.new_empty(0) if t is None else t for t in tensors]
