"""Which pairs are positive, in every form a user gives it, as the engine takes it: padded ids.

ids (N, K) int64 holds the positive columns of each row, -1 where there are fewer than K. They take
8·N·K bytes; K is the longest row, found by one host sync on a GPU where groups or sparse pairs are
given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossops.inputs import check_devices, check_tensor, class_ids

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def pair_ids(
    positives: Any, rows: int, columns: int, like: Tensor, *, first_column: int = 0
) -> Tensor:
    """Positive columns of each row, (N, K).

    Args:
        positives: ``"diagonal"``; a pair of group ids (N,) and (M,), equal ones positive, negative
            ones in no group; a sparse CSR tensor (N, M); or ids (N, K) padded with -1.
        rows: N.
        columns: M.
        like: a tensor on the device of the inputs.
        first_column: the column of the diagonal in row 0. Default: ``0``.
    """
    if isinstance(positives, str):
        if positives != "diagonal":
            raise ValueError(
                "positives must be 'diagonal', a pair of group ids, a sparse CSR tensor or ids "
                f"(N, K), got {positives!r}"
            )
        ids = torch.arange(rows, device=like.device) + first_column
        return torch.where(ids < columns, ids, -1).unsqueeze(1)
    if isinstance(positives, tuple | list):
        check_groups(positives, rows, columns, like)
        return from_groups(positives[0], positives[1])
    check_tensor("positives", positives)
    if positives.layout == torch.sparse_csr:
        if tuple(positives.shape) != (rows, columns):
            raise ValueError(
                f"positives must have shape {(rows, columns)}, got {tuple(positives.shape)}"
            )
        return listed_ids((positives.crow_indices(), positives.col_indices()), rows, columns, like)
    return listed_ids(positives, rows, columns, like)


def check_groups(positives: Any, rows: int, columns: int, like: Tensor) -> None:
    """Raise unless these are group ids of the rows and of the columns."""
    if len(positives) != 2:
        raise ValueError(
            "positives as groups must be (row ids (N,), column ids (M,)), got "
            f"{len(positives)} items"
        )
    names, sizes = ("row ids", "column ids"), (rows, columns)
    for name, group, size in zip(names, positives, sizes, strict=True):
        _check_integers(f"positives {name}", group)
        if group.shape != (size,):
            raise ValueError(
                f"positives {name} must have shape ({size},), got {tuple(group.shape)}"
            )
    check_devices(like, row_ids=positives[0], column_ids=positives[1])


def listed_ids(positives: Any, rows: int, columns: int, like: Tensor) -> Tensor:
    """Positive columns of each row, (N, K), from ids (N, K) or ``(crow (N + 1,), col)``."""
    if isinstance(positives, Tensor) and positives.layout == torch.sparse_csr:
        positives = (positives.crow_indices(), positives.col_indices())
    if isinstance(positives, tuple | list):
        if len(positives) != 2:
            raise ValueError(
                f"positives must be ids (N, K) or (crow, col), got {len(positives)} items"
            )
        crow, col = positives
        _check_integers("positives crow", crow)
        _check_integers("positives col", col)
        check_devices(like, crow=crow, col=col)
        if crow.shape != (rows + 1,) or col.ndim != 1:
            raise ValueError(
                f"positives (crow, col) must have shapes ({rows + 1},) and (P,), got "
                f"{tuple(crow.shape)} and {tuple(col.shape)}"
            )
        if crow.device.type == "cpu" and (crow[0] != 0 or crow[-1] != col.shape[0]):
            raise ValueError(
                f"positives crow must run from 0 to the {col.shape[0]} entries of col, got "
                f"{int(crow[0])} to {int(crow[-1])}"
            )
        positives = from_csr(crow.long(), col.long())
    check_tensor("positives", positives)
    if positives.layout != torch.strided:
        raise ValueError(
            f"positives must be dense or sparse CSR, got {positives.layout}; "
            "convert them with .to_sparse_csr()"
        )
    _check_integers("positives", positives)
    check_devices(like, positives=positives)
    if positives.ndim != 2 or positives.shape[0] != rows:
        raise ValueError(
            f"positives must have shape ({rows}, K), padded with -1, got {tuple(positives.shape)}"
        )
    if not positives.shape[1]:
        return torch.full((rows, 1), -1, device=like.device)
    check_range(positives, columns)
    return class_ids(positives, torch.Size([rows]), columns, None, several=True)


def check_range(ids: Tensor, columns: int) -> None:
    """Raise an IndexError for ids outside [-1, M) of a CPU tensor; other devices are not synced."""
    if ids.device.type != "cpu" or not ids.numel() or torch.compiler.is_compiling():
        return
    low, high = (int(t) for t in torch.aminmax(ids))
    if low < -1 or high >= columns:
        raise IndexError(
            f"positives must be in [0, {columns}), or -1 for none, got {low if low < -1 else high}"
        )


def from_csr(crow: Tensor, col: Tensor) -> Tensor:
    """ids (N, K) of the rows of a sparse matrix."""
    rows, counts = crow.shape[0] - 1, crow.diff()
    longest = max(1, int(counts.max())) if rows else 1
    at = crow[:-1, None] + torch.arange(longest, device=col.device)
    inside = at < crow[1:, None]
    if not col.numel():
        return torch.full((rows, longest), -1, device=col.device)
    return torch.where(inside, col[at.clamp_max(col.shape[0] - 1)], -1)


def from_groups(row_ids: Tensor, column_ids: Tensor) -> Tensor:
    """ids (N, K) of the columns in the group of each row; negative ids are in no group."""
    ordered, order = column_ids.long().sort(stable=True)
    wanted = row_ids.long()
    low = torch.searchsorted(ordered, wanted)
    high = torch.searchsorted(ordered, wanted, right=True)
    high = torch.where(wanted < 0, low, high)
    longest = max(1, int((high - low).max())) if row_ids.shape[0] else 1
    at = low[:, None] + torch.arange(longest, device=low.device)
    if not order.numel():
        return torch.full((row_ids.shape[0], longest), -1, device=low.device)
    return torch.where(at < high[:, None], order[at.clamp_max(order.shape[0] - 1)], -1)


def transposed(ids: Tensor, columns: int, *, diagonal: bool = False) -> tuple[Tensor, Tensor]:
    """Positive rows of each column, (M, K'), and where in ids.flatten() each stands, -1 padded.

    Known to be the ``diagonal``, they take neither a sort nor a host sync.
    """
    n, k = ids.shape
    if diagonal:
        rows = pair_ids("diagonal", columns, n, ids)
        return rows, rows
    if torch.compiler.is_compiling():
        raise ValueError(
            "under torch.compile only positives='diagonal' can be turned into rows of columns, "
            "since their number depends on the data; pass direction='rows', or do not compile"
        )
    flat = ids.flatten()
    order = torch.where(flat < 0, columns, flat).argsort(stable=True)
    counts = torch.bincount(flat[flat >= 0], minlength=columns)
    crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    entries = from_csr(crow, order[: int(crow[-1])])
    return torch.where(entries < 0, -1, entries // k), entries


def without(others: Tensor, ids: Tensor) -> Tensor:
    """``others`` (N, K') without those that are in ids (N, K) of their row."""
    known = torch.zeros_like(others, dtype=torch.bool)
    for column in ids.unbind(1):
        known |= others == column.unsqueeze(1)
    return torch.where(known, -1, others)


def _check_integers(name: str, t: object) -> None:
    check_tensor(name, t)
    assert isinstance(t, Tensor)
    if t.dtype not in INTEGERS:
        raise TypeError(f"{name} must hold integers, got {t.dtype}")
