"""Rows spread over several processes: the ring, the gather, and what DDP makes of a gradient.

Each rank holds N_r rows of x and M_r of w, any number of either. A loss over all pairs visits every
block (x of one rank, w of another) once:

* **ring**: w travels from rank to rank in pieces of some rows, one step ahead of the products; what
  a piece collects on the way (its gradient, or the log-sums of its columns) follows one step behind
  and ends where the piece came from. Beside its own rows a rank holds two pieces of w and three of
  what they collect.
* **gather**: every rank receives all of w; the gradients are summed over the ranks.

Every rank returns the loss of the whole batch. Its gradients are those of that loss times the
number of ranks: DDP's mean over the ranks is then exactly the gradient of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lossops.autograd import apply, differentiable_once, like_scale
from lossops.binary import Binary
from lossops.inputs import HeadInputs
from lossops.pair_ops import inner, primitives
from lossops.reference import accumulate_dtype
from lossops.schedules import without_autocast
from lossops.statistics import logaddexp

EXCHANGES = ("ring", "gather")
PIECE = 1024
"""Rows of w that travel at once, as many as a tile of them needs; on a GPU eight times as many."""
Optional = Tensor | None
Block = list[Tensor]
Visit = Callable[[int, int, Block], Block]
Merge = Callable[[Block, Block], Block]


class Peers(NamedTuple):
    """A process group, how many rows each rank holds, and which inputs want gradients anywhere."""

    group: Any
    rank: int
    rows: list[int]
    columns: list[int]
    needs: tuple[bool, bool]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.rows)

    @property
    def first_column(self) -> int:
        """Where this rank's columns begin among all of them."""
        return sum(self.columns[: self.rank])


def peers(group: Any, x: Tensor, w: Tensor, error: Exception | None) -> Peers:
    """Learns what every rank holds and wants; one small all-gather and one sync.

    Where a rank has an ``error`` all raise: the others would wait for it in vain.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "batch_group needs an initialised process group; call "
            "torch.distributed.init_process_group first, or leave batch_group=None"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("batch_group must be a group this process belongs to")
    wants = [torch.is_grad_enabled() and t.requires_grad for t in (x, w)]
    listed = from_all([x.shape[0], w.shape[0], *wants], error, group, x.device)
    rows, columns, x_wants, w_wants = (list(column) for column in zip(*listed, strict=True))
    return Peers(group, rank, rows, columns, (any(x_wants), any(w_wants)))


def all_agree(error: Exception | None, those: Peers, device: torch.device) -> None:
    """Raise on every rank where there is an error on one."""
    from_all([], error, those.group, device)


def from_all(
    numbers: list[Any], error: Exception | None, group: Any, device: torch.device
) -> list[list[int]]:
    """The numbers of every rank; one small all-gather and one sync.

    Where a rank has an ``error`` all raise: the others would wait for it in vain.
    """
    mine = torch.tensor([error is not None, *numbers], dtype=torch.int64, device=device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    listed: list[list[int]] = torch.stack(found).tolist()
    if error is not None:
        raise error
    failed = [rank for rank, line in enumerate(listed) if line[0]]
    if failed:
        raise RuntimeError(f"the arguments were refused on rank {failed[0]} of the process group")
    return [line[1:] for line in listed]


def wanting(t: Tensor, wanted: bool) -> Tensor:
    """``t``, as a leaf that wants a gradient where some other rank's does and this one's not.

    An empty part of a last batch may come from no encoder; its rank takes part in the backward.
    """
    return t.detach().requires_grad_() if wanted and not t.requires_grad else t


def ring(
    block: Block,
    those: Peers,
    collected: Sequence[tuple[tuple[int, ...], torch.dtype]],
    visit: Visit,
    merge: Merge,
) -> Block:
    """Visits the blocks of all ranks, piece by piece; returns what this rank's own collected.

    Args:
        block: this rank's tensors, each (M_r, ...), to be shown to every rank.
        those: the ranks; ``columns`` are the M_r.
        collected: trailing shape and dtype of the tensors that ``visit`` returns, with the rows of
            its piece.
        visit: ``visit(owner, first, piece)``, rows [first, ...) of the owner's block, computing
            while the next piece arrives.
        merge: of what a piece collected before and here.
    """
    own = those.columns[those.rank]
    home = [block[0].new_empty(own, *shape, dtype=dtype) for shape, dtype in collected]
    size = PIECE if block[0].device.type == "cpu" else 8 * PIECE
    for first in range(0, max(*those.columns, 1), size):
        counts = [min(max(count - first, 0), size) for count in those.columns]
        piece = [t[first : first + size].contiguous() for t in block]
        back = _piece_around(piece, counts, first, those, collected, visit, merge)
        for t, part in zip(home, back, strict=True):
            t[first : first + size] = part
    return home


def _piece_around(
    piece: Block,
    counts: Sequence[int],
    first: int,
    those: Peers,
    collected: Sequence[tuple[tuple[int, ...], torch.dtype]],
    visit: Visit,
    merge: Merge,
) -> Block:
    """One piece of every rank goes around; returns what this rank's collected."""
    size, rank = those.size, those.rank
    to, source = (rank - 1) % size, (rank + 1) % size

    def exchange(outgoing: Block, arriving: Block, tag: int) -> list[Any]:
        def operation(call: Any, t: Tensor, peer: int) -> Any:
            return dist.P2POp(call, t, group=those.group, group_peer=peer, tag=tag)

        sent = [operation(dist.isend, t.contiguous(), to) for t in outgoing if t.numel()]
        return sent + [operation(dist.irecv, t, source) for t in arriving if t.numel()]

    def start(operations: list[Any]) -> list[Any]:
        return dist.batch_isend_irecv(operations) if operations else []

    def room(count: int) -> Block:
        return [piece[0].new_empty(count, *shape, dtype=dtype) for shape, dtype in collected]

    current, carried = piece, room(0)
    outgoing: Block
    arriving: Block
    following: Block
    for step in range(size):
        owner = (rank + step) % size
        outgoing, arriving, following = [], [], []
        if step + 1 < size:
            outgoing = current
            arriving = [t.new_empty(counts[(owner + 1) % size], *t.shape[1:]) for t in current]
        if step:
            following = room(counts[owner])
        works = start([*exchange(outgoing, arriving, 1), *exchange(carried, following, 2)])
        found = visit(owner, first, current)
        for work in works:
            work.wait()
        carried = merge(following, found) if step else found
        current = arriving
    if size == 1:
        return carried
    back = room(counts[rank])
    for work in start(exchange(carried, back, 2)):
        work.wait()
    return back


class Whole(torch.autograd.Function):
    """Σ over the ranks of a local part; its gradient is ``size`` times that of the part."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, those: Peers) -> Tensor:
        ctx.size = those.size
        return summed(local, those.group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return ctx.size * g, None


class ScaledGradient(torch.autograd.Function):
    """t itself, whose gradient is ``factor`` times what it would be."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return ctx.factor * g, None


class SummedGradient(torch.autograd.Function):
    """t itself, the same on every rank; its gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    @differentiable_once("a loss over several processes")
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return summed(g.to(accumulate_dtype(g.dtype)), ctx.group).to(g.dtype), None


def summed(t: Tensor, group: Any) -> Tensor:
    """Σ over the ranks, without gradient."""
    total = t.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def gather_rows(t: Tensor, counts: Sequence[int], group: Any) -> Tensor:
    """Rows of all ranks in rank order, without gradient."""
    most = max(counts)
    own = t.new_zeros(most, *t.shape[1:])
    own[: t.shape[0]] = t
    parts = [torch.empty_like(own) for _ in counts]
    dist.all_gather(parts, own, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class GatherRows(torch.autograd.Function):
    """Rows of all ranks; their gradients come back summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, counts: list[int], group: Any) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return gather_rows(t, counts, group)

    @staticmethod
    @differentiable_once("a loss over several processes")
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        rank = dist.get_rank(ctx.group)
        first = sum(ctx.counts[:rank])
        total = g.to(accumulate_dtype(g.dtype)).contiguous()
        total = total.clone() if total.data_ptr() == g.data_ptr() else total
        dist.all_reduce(total, group=ctx.group)
        return total[first : first + ctx.counts[rank]].to(g.dtype), None, None


class RingBinaryLoss(torch.autograd.Function):
    """Σ_i f_i loss_i over this rank's rows and all columns, with gradients for all ranks' loss.

    The first backward gives the buffers of its sweep away; a later one goes around again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        scale: Optional,
        bias: Optional,
        ids: Tensor,
        factor: Tensor,
        loss: Binary,
        those: Peers,
        needs: list[bool],
        backend: str,
    ) -> Tensor:
        inputs = (x, w, bias, scale)
        ctx.spec = (ids, factor, loss, those, needs, backend)
        losses, ctx.gradients = _binary_around(inputs, *ctx.spec)
        ctx.save_for_backward(*inputs)
        return (losses * factor).sum()

    @staticmethod
    @differentiable_once("a loss over several processes")
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        inputs, needs = ctx.saved_tensors, ctx.spec[4]
        gradients = ctx.gradients or _binary_around(inputs, *ctx.spec)[1]
        ctx.gradients = None
        dx, dw, dbias, dscale = (
            gradient.mul_(g).to(t.dtype).reshape(t.shape) if need else None
            for gradient, need, t in zip(gradients, needs, inputs, strict=True)
        )
        return (dx, dw, dscale, dbias, *(None,) * 6)


def _binary_around(
    inputs: Sequence[Any],
    ids: Tensor,
    factor: Tensor,
    loss: Binary,
    those: Peers,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, list[Any]]:
    """Losses (N_r,), and gradients of x, w, bias and scale, in the accumulate dtype."""
    x, w, bias, scale = inputs
    acc = accumulate_dtype(x.dtype)
    losses = x.new_zeros(x.shape[0], dtype=acc)
    dx = torch.zeros(x.shape, dtype=acc, device=x.device) if needs[0] else None
    dbias, dscale = x.new_zeros((), dtype=acc), x.new_zeros((), dtype=acc)

    def visit(owner: int, at: int, piece: Block) -> Block:
        (wb,) = piece
        first = sum(those.columns[:owner]) + at
        inside = (ids >= first) & (ids < first + wb.shape[0])
        target = torch.where(inside, ids - first, -1)
        b = None if bias is None else bias.expand(wb.shape[0])
        if not wb.shape[0]:
            return [wb.new_empty(wb.shape, dtype=acc)] if needs[1] else []
        found, dx_part, dw_part, db_part, dscale_part = torch.ops.lossops.linear_binary_loss(
            x, wb, b, scale, target, None, None, None, factor, loss.kind, loss.numbers, needs,
            backend,
        )  # fmt: skip
        losses.add_(found)
        if dx is not None:
            dx.add_(dx_part)
        if needs[2]:
            dbias.add_(db_part.sum())
        if needs[3]:
            dscale.add_(dscale_part)
        return [dw_part] if needs[1] else []

    collected = [((w.shape[1],), acc)] if needs[1] else []
    with without_autocast(x.device):
        home = ring([w], those, collected, visit, _add_blocks)
        if dx is not None and scale is not None:
            dx *= scale.to(acc)
    return losses, [dx, home[0] if needs[1] else None, dbias, dscale]


def _add_blocks(before: Block, here: Block) -> Block:
    return [a.add_(b) for a, b in zip(before, here, strict=True)]


class RingPairStatistics(torch.autograd.Function):
    """Log-sums over all ranks of this rank's rows and columns; the pairs (i, i) are the targets."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, scale: Optional, those: Peers, backend: str
    ) -> tuple[Tensor, ...]:
        acc = accumulate_dtype(x.dtype)
        n = x.shape[0]
        empty = x.new_full((n,), -torch.inf, dtype=acc)
        rows: Block = [torch.zeros_like(empty), empty]
        target = x.new_empty(n, 1, dtype=acc)

        def visit(owner: int, at: int, piece: Block) -> Block:
            (wb,) = piece
            ids = _diagonal(x, at, wb) if owner == those.rank else None
            if not n or not wb.shape[0]:
                nothing = wb.new_full((wb.shape[0],), -torch.inf, dtype=acc)
                return [torch.zeros_like(nothing), nothing]
            shift, lse, *columns, own = torch.ops.lossops.linear_pair_statistics(
                x, wb, scale, ids, backend
            )
            if ids is not None:
                here = slice(at, at + wb.shape[0])
                target[here] = (own + shift.unsqueeze(1))[here]
            rows[:] = _merge_sums(rows, [shift, lse])
            return list(columns)

        with without_autocast(x.device):
            columns = ring([w], those, [((), acc), ((), acc)], visit, _merge_sums)
        target -= rows[0].unsqueeze(1)
        ctx.those, ctx.backend = those, backend
        ctx.save_for_backward(x, w, scale, *rows, *columns)
        ctx.mark_non_differentiable(rows[0], columns[0])
        ctx.set_materialize_grads(False)
        return (*rows, *columns, target)

    @staticmethod
    @differentiable_once("a loss over several processes")
    def backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        x, w, scale, shift, lse, column_shift, column_lse = ctx.saved_tensors
        those: Peers = ctx.those
        acc = accumulate_dtype(x.dtype)
        by_row, by_column, at = grads[1], grads[3], grads[4]
        needs = ctx.needs_input_grad[:3]
        n = x.shape[0]
        wants_dx, wants_dw = needs[0] or needs[2], those.needs[1]
        dx = torch.zeros(x.shape, dtype=acc, device=x.device)
        part = torch.empty_like(dx) if wants_dx else None
        given = torch.zeros_like(column_lse) if by_column is None else by_column

        def visit(owner: int, first: int, piece: Block) -> Block:
            wb, shift_b, lse_b, by_column_b = piece
            ids = _diagonal(x, first, wb) if owner == those.rank else None
            dw = torch.zeros(wb.shape, dtype=acc, device=x.device) if wants_dw else None
            if n and wb.shape[0]:
                nothing = x.new_empty(n, 0, dtype=acc)
                primitives(ctx.backend, x).linear_pair_gradient(
                    x, wb, scale, ids, [shift, lse, shift_b, lse_b, nothing],
                    [by_row, by_column_b, None if ids is None else at], part, dw,
                )  # fmt: skip
                if part is not None:
                    dx.add_(part)
            return [] if dw is None else [dw]

        with without_autocast(x.device):
            block = [w, column_shift, column_lse, given]
            collected = [((w.shape[1],), acc)] if wants_dw else []
            home = ring(block, those, collected, visit, _add_blocks)
            dscale = inner(x, dx) if needs[2] else None
            if scale is not None:
                dx *= scale.to(acc)
        return (
            dx.to(x.dtype) if needs[0] else None,
            home[0].to(w.dtype) if needs[1] else None,
            like_scale(dscale, scale),
            None,
            None,
        )


def _diagonal(x: Tensor, first: int, piece: Tensor) -> Tensor:
    """Where this rank's pairs (i, i) stand in a piece of its own columns, (N, 1), -1 outside."""
    ids = torch.arange(x.shape[0], device=x.device) - first
    return torch.where((ids >= 0) & (ids < piece.shape[0]), ids, -1).unsqueeze(1)


def _merge_sums(a: Block, b: Block) -> Block:
    """[shift, log-sum relative to it] of two parts."""
    (shift_a, lse_a), (shift_b, lse_b) = a, b
    shift = torch.where(
        lse_a == -torch.inf,
        shift_b,
        torch.where(lse_b == -torch.inf, shift_a, torch.maximum(shift_a, shift_b)),
    )
    return [shift, logaddexp(lse_a + shift_a - shift, lse_b + shift_b - shift)]


def ring_binary_loss(
    head: HeadInputs,
    bias: Optional,
    ids: Tensor,
    factor: Tensor,
    loss: Binary,
    those: Peers,
    backend: str,
) -> Tensor:
    """This rank's Σ f loss over all columns; its gradients are those of the sum over ranks."""
    inputs = (head.x, head.w, bias, head.scale)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]
    needs[1] = those.needs[1]
    found: Tensor = apply(
        RingBinaryLoss, head.x, head.w, head.scale, bias, ids, factor, loss, those, needs, backend
    )
    return found
