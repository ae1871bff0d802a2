"""Rows of a large table picked by id, with gradients that hold these rows alone.

What is picked, and its gradient, take O(S D) time and memory whatever V is. A gradient is a sparse
tensor, which torch.optim.SGD, Adagrad and SparseAdam and `lossops.optim` take, or a dense one.

An optimizer that leaves rows behind brings those up to date which are about to be picked: see
`keep_up_to_date`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lossops import backends, cuda_rows, reference_rows
from lossops.autograd import apply, differentiable_once

EPS = 1e-12
"""Rows shorter than this are not normalised, as in torch.nn.functional.normalize."""

_owners: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def keep_up_to_date(table: Tensor, advance: Callable[[Tensor, Tensor | None], None]) -> None:
    """From now on ``advance(table, ids)`` is called before rows of ``table`` are picked here.

    Args:
        table: the parameter.
        advance: a bound method; it lives as long as its object. ``ids`` None stands for all rows.
    """
    _owners[table] = WeakMethod(advance)


def bring_up_to_date(table: Tensor, ids: Tensor | None = None) -> None:
    """Rows ``ids`` of the table, all for None, are what their optimizer means them to be."""
    reference = _owners.get(table)
    advance = None if reference is None else reference()
    if advance is not None:
        advance(table, ids)


def select_rows(
    table: Tensor, ids: Tensor, *, sparse: bool, device: torch.device | None = None
) -> Tensor:
    """table[ids], (S, ...) on ``device``.

    Args:
        table: (V, ...).
        ids: (S,) int64, on any device; repeated ones are added up in the gradient.
        sparse: whether the gradient is a sparse tensor.
        device: of the result; None for that of the table. Default: ``None``.
    """
    ids = ids.to(table.device)
    bring_up_to_date(table, ids)
    rows: Tensor = apply(SelectRows, table, ids, sparse)
    return rows if device is None else rows.to(device)


def select_normalized_rows(
    table: Tensor, ids: Tensor | None, *, sparse: bool, device: torch.device | None = None
) -> Tensor:
    """table[ids] with rows of length 1, (S, D); as `select_rows`.

    Args:
        table: (V, D).
        ids: distinct rising ids; None for all rows.
        sparse: whether the gradient is a sparse tensor.
        device: of the result; None for that of the table. Default: ``None``.
    """
    bring_up_to_date(table, ids)
    ids = torch.arange(table.shape[0], device=table.device) if ids is None else ids
    rows: Tensor = apply(NormalizedRows, table, ids.to(table.device), sparse)
    return rows if device is None else rows.to(device)


def scattered(ids: Tensor, rows: Tensor, table: Tensor, sparse: bool, distinct: bool) -> Tensor:
    """The gradient of ``table`` that has ``rows`` at ``ids``, zero elsewhere."""
    if not sparse and cuda_rows.takes(table):  # where index_add_ would add in order of arrival
        return cuda_rows.scattered(ids, rows, table, distinct)
    if not sparse:
        dense = torch.zeros_like(table, memory_format=torch.contiguous_format)
        return dense.index_add_(0, ids, rows)
    return torch.sparse_coo_tensor(
        ids.unsqueeze(0), rows, table.shape, is_coalesced=distinct, check_invariants=False
    )


class SelectRows(torch.autograd.Function):
    """Rows by id; ids may repeat."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, sparse: bool) -> Tensor:
        # Not saved: it may be brought up to date for other rows before backward.
        ctx.sparse, ctx.like = sparse, table.detach()
        ctx.save_for_backward(ids)
        return table.index_select(0, ids)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # with a graph of its own
            return torch.zeros_like(ctx.like).index_add(0, ids, g), None, None
        return scattered(ids, g, ctx.like, ctx.sparse, distinct=False), None, None


class NormalizedRows(torch.autograd.Function):
    """Normalised rows by distinct rising ids."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, sparse: bool) -> Tensor:
        ctx.sparse, ctx.like = sparse, table.detach()
        rows, norms = primitives(table).normalized_rows(table.detach(), ids, EPS)
        found: Tensor = rows
        ctx.save_for_backward(ids, found, norms)
        return found

    @staticmethod
    @differentiable_once("a head of normalised rows")
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        ids, rows, norms = ctx.saved_tensors
        dw = primitives(rows).normalized_rows_gradient(rows, norms, g)
        return scattered(ids, dw, ctx.like, ctx.sparse, distinct=True), None, None


def primitives(table: Tensor) -> Any:
    """The compiled functions of `lossops.reference_rows` where they run, else those."""
    if cuda_rows.takes(table):
        return cuda_rows
    backend = backends.select("auto", table.device, table.dtype)
    return backend.primitives() if backend.name == "cpp" else reference_rows
