"""Rows of a table by id on a CUDA device: `lossops.reference_rows` in kernels, and sums by class.

Where rows of one class are added up, the pairs of a class and a row are sorted, stably, and a warp
adds up each class in their order (csrc/cuda/scatter.cu): the same bits every time, without float
atomics. Sizes are those of the inputs, so that the device is never waited for: ids may repeat here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lossops import backends, switches


def takes(*tables: Tensor) -> bool:
    """Whether the kernels run on these matrices, or vectors, as they are stored."""
    return all(
        runs_on(t.device, t.dtype) and (t.ndim < 2 or t.stride(-1) == 1 or t.shape[-1] <= 1)
        for t in tables
    )


def runs_on(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels run there, and LOSSOPS_BACKEND asks for no others."""
    wanted = switches.default_backend() in ("auto", "cuda", "triton")
    return wanted and backends.BACKENDS["cuda"].objection(device, dtype) is None


def normalized_rows(table: Tensor, ids: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """w / n (S, D) in the dtype of the table, and n = max(‖w‖, eps) (S,); NaN for no id."""
    rows = table.new_empty(ids.shape[0], table.shape[1])
    norms = table.new_empty(ids.shape[0], dtype=torch.float32)
    torch.ops.lossops_cuda.normalized_rows(table, ids.contiguous(), eps, rows, norms)
    return rows, norms


def normalized_rows_gradient(rows: Tensor, norms: Tensor, gradient: Tensor) -> Tensor:
    """(g - (g·u) u) / n for normalised rows u, (S, D)."""
    found = torch.empty_like(rows)
    gradient = _dense_rows(gradient.to(rows.dtype))
    torch.ops.lossops_cuda.normalized_rows_gradient(rows, norms, gradient, found)
    return found


def sgd_rows(
    table: Tensor,
    velocity: Tensor | None,
    ids: Tensor,
    gradient: Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """One step of SGD on the rows ``ids``; gradients of an id that repeats are added up."""
    ids, order = ids.sort(stable=True)
    gradient = _dense_rows(gradient.to(table.dtype))
    torch.ops.lossops_cuda.sgd_rows(
        table, velocity, ids, order, gradient, lr, momentum, weight_decay
    )


def adamw_rows(
    table: Tensor,
    mean: Tensor,
    square: Tensor,
    count: Tensor,
    ids: Tensor,
    gradient: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW on the rows ``ids``; gradients of an id that repeats are added up."""
    ids, order = ids.sort(stable=True)
    gradient = _dense_rows(gradient.to(table.dtype))
    torch.ops.lossops_cuda.adamw_rows(
        table, mean, square, count, ids, order, gradient, lr, beta1, beta2, eps, weight_decay
    )


def scattered(ids: Tensor, rows: Tensor, table: Tensor, distinct: bool) -> Tensor:
    """Zeros like the table (V, ...) with the sums of ``rows`` (S, ...) at ``ids``.

    Args:
        ids: (S,) int64.
        rows: what is added up in float32 and rounded once.
        table: like what the result is.
        distinct: whether the ids rise strictly, which saves the sort.
    """
    found = torch.zeros_like(table, memory_format=torch.contiguous_format)
    order = None
    if not distinct:
        ids, order = ids.sort(stable=True)
    v, s = table.shape[0], ids.shape[0]
    if table.numel() and s:
        rows = rows.to(table.dtype).reshape(s, -1)
        torch.ops.lossops_cuda.scatter_rows(
            _dense_rows(rows), ids.contiguous(), order, found.view(v, -1)
        )
    return found


def add_targets(
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    w: Tensor,
    target: Tensor,
    value: Tensor,
) -> None:
    """Add dr ``value`` (N, K) at ``target`` (N, K), -1 where there is none.

    dx_i += Σ_k v_ik w_{y_ik}    dw_j += Σ_{(i, k): y_ik = j} v_ik · scale · x_i    db_j += Σ v_ik

    dx (N, D) float32, before the factor scale; dw (V, D) and db (V,) float32. Ids that are no class
    are left out.
    """
    n, k = target.shape
    if n == 0 or k == 0 or w.shape[0] == 0:
        return
    target, value = target.contiguous(), value.float().contiguous()
    if dx is not None:
        torch.ops.lossops_cuda.add_to_rows(dx, _dense_rows(w), target, value)
    if dw is None and db is None:
        return
    ids, order = target.flatten().sort(stable=True)
    torch.ops.lossops_cuda.add_to_classes(
        dw, db, _dense_rows(x), ids, order, value, None if scale is None else scale.float(),
        w.shape[0],
    )  # fmt: skip


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()
