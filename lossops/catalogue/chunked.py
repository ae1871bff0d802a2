"""Losses of whole rows of logits, a chunk of rows at a time: for what no row statistic can say.

    loss = Σ_n u_n F(z_n),   z = softcap(scale · x wᵀ + b)

The logits of R rows are one product into a buffer (R, V). F is plain PyTorch on blocks of these
rows; autograd gives dz of a block, which takes its place in the buffer, and the backend's
primitives turn that into dx and dw, as the ``teacher`` term whose basis is dz itself. 3 GEMMs, the
buffer and what F allocates for a block; distillation has the teacher's logits in a second buffer.
Compilers are refused.

R is as large as for any other loss: 128 rows of (1024, 65536) took 2.1 times as long as 512, in
plain cross-entropy as here, since every chunk reads w and reads and writes dw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lossops import backends
from lossops.autograd import apply, differentiable_once
from lossops.catalogue.checks import constant
from lossops.class_parallel import at_targets
from lossops.inputs import (
    HeadInputs,
    check_reduction,
    checked_options,
    class_weight,
    has_target,
    near_request,
    row_weight,
)
from lossops.linear import row_factors
from lossops.ops import check_target
from lossops.reference import accumulate_dtype
from lossops.schedules import (
    LinearLossOptions,
    chunk_size,
    row_stride,
    without_autocast,
)

Optional = Tensor | None
RowLosses = Callable[[Tensor, slice], Tensor]
"""Losses (B,) of the logits (B, V) of some rows, differentiable in the logits."""
ChunkLosses = Callable[[slice], RowLosses]
"""F of the rows of a chunk, which may compute what all of its blocks need."""
DZ = ["teacher"]
BLOCK = 2**21
"""Logits that F sees at once, 8 MiB: a dozen temporaries stay in the last-level cache, or near."""
MIN_ROWS = 64
"""Fewer would read w too often, whatever is to fit."""


def chunked_loss(
    head: HeadInputs,
    losses: ChunkLosses,
    factors: Tensor,
    *,
    reduced: bool,
    options: LinearLossOptions | None,
    backend: str,
) -> Tensor:
    """Σ_n u_n F(z_n), or each of them (N,); gradients of x, w, b and scale, not of factors.

    Args:
        head: checked inputs.
        losses: F.
        factors: u, (N,).
        reduced: whether a sum is wanted; its gradients come with it.
        options: ``chunk_rows`` and memory.
        backend: who computes logits and products.
    """
    opts = checked_options(options)
    near_request(None, opts)  # there is none here
    rows = opts.chunk_rows or _planned_rows(head, opts.max_workspace_bytes)
    chosen = backends.select(backend, head.x.device, head.x.dtype)
    call = _Call(losses, head.softcap, rows, chosen.primitives())
    found: Tensor = apply(
        ChunkedLoss, head.x, head.w, head.b, head.scale, factors.detach(), call, reduced
    )
    return found


def refuse_compilers() -> None:
    """Raise while a graph is traced, before what else would fail there in other words."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "a loss over chunks of logits does not go into a graph; call it outside of the "
            "compiled function, on its features"
        )


def loss_of_logits(
    given: HeadInputs, losses: ChunkLosses, head: Mapping[str, Any], ids: Optional = None
) -> Tensor:
    """The loss of F with the weights and the reduction among the head keywords of a face.

    Args:
        given: checked inputs.
        losses: F; of ignored rows it sees logits of 0.
        head: ``sample_weight``, ``weight`` where there is one, ``reduction``, ``options``,
            ``backend``.
        ids: targets (N, 1), -1 for ignored rows; None where all count. Default: ``None``.
    """
    check_reduction(head["reduction"])
    x, v = given.x, given.w.shape[0]
    weights = row_weight(head["sample_weight"], given.lead, x)
    if weights is not None:
        weights = constant("sample_weight", weights)
    check_target(ids, v)
    at = at_targets(class_weight(head.get("weight"), v, x), ids, None)
    u, divisor = row_factors(ids, weights, at, x)
    factors = x.new_ones(x.shape[0], dtype=accumulate_dtype(x.dtype)) if u is None else u
    if ids is not None:
        factors = torch.where(has_target(ids), factors, 0.0)

    def counted(chunk: slice) -> RowLosses:
        of_rows = losses(chunk)

        def block(z: Tensor, rows: slice) -> Tensor:
            return of_rows(z if ids is None else torch.where(ids[rows] >= 0, z, 0.0), rows)

        return block

    found: Tensor = chunked_loss(
        given,
        counted,
        factors,
        reduced=head["reduction"] != "none",
        options=head["options"],
        backend=head["backend"],
    )
    if head["reduction"] == "none":
        return found.reshape(given.lead)
    return found if head["reduction"] == "sum" else found / divisor


def _planned_rows(head: HeadInputs, max_bytes: int) -> int:
    """Rows whose buffer fits, with another one for a teacher, in chunks of the same size."""
    n, v = head.x.shape[0], head.w.shape[0]
    row_bytes = accumulate_dtype(head.x.dtype).itemsize * row_stride(v)
    most = min(max_bytes // 2, chunk_size(head.x.device).bytes) // row_bytes
    chunks = -(-n // max(most, MIN_ROWS))
    return -(-n // max(1, chunks)) or 1


class _Call:
    """F, and how its rows are swept."""

    def __init__(self, losses: ChunkLosses, softcap: float, rows: int, primitives: Any) -> None:
        self.losses, self.softcap, self.rows = losses, softcap, rows
        self.primitives = primitives

    def run(
        self,
        tensors: Sequence[Any],
        factors: Tensor,
        upstream: Optional,
        needs: Sequence[bool],
    ) -> tuple[Tensor, list[Optional]]:
        """u F of all rows, and the gradients of its sum with ``upstream`` (N,) for u."""
        x, w, b, scale = tensors
        n, v, acc = x.shape[0], w.shape[0], accumulate_dtype(x.dtype)
        like = {"dtype": acc, "device": x.device}
        found = torch.zeros(n, **like)
        wants_dx = needs[0] or needs[3]
        dx = torch.zeros(x.shape, **like) if wants_dx else None
        dw = torch.zeros(w.shape, **like) if needs[1] else None
        db = torch.zeros(v, **like) if needs[2] else None
        buffer = torch.empty(min(self.rows, n) * row_stride(v), **like)
        for first in range(0, n, self.rows):
            rows = slice(first, min(first + self.rows, n))
            size = rows.stop - first
            chunk = buffer.as_strided((size, v), (row_stride(v), 1))
            head = (x[rows], w, b, scale)
            shift = self.primitives.linear_chunk_statistics(
                *head, self.softcap, None, None, None, [], [], chunk
            )[0]
            self.blocks(chunk, rows, factors, upstream, found)
            if upstream is None or not any(needs):
                continue
            ones = torch.ones(size, **like)
            self.primitives.linear_chunk_gradient(
                *head, 0.0, None, None, chunk, DZ, DZ, chunk, [shift, torch.zeros_like(ones)],
                [None, ones], None if dx is None else dx[rows], dw, db, True,
            )  # fmt: skip
        dscale = None
        if needs[3] and dx is not None:
            dscale = (x.to(acc) * dx).sum().reshape(scale.shape)
        if dx is not None and scale is not None:
            dx *= scale.to(acc)
        return found, [dx if needs[0] else None, dw, db, dscale]

    def blocks(
        self, chunk: Tensor, rows: slice, factors: Tensor, upstream: Optional, found: Tensor
    ) -> None:
        """F of a chunk, block by block: u F into ``found``, and dz before the softcap into z."""
        losses = self.losses(rows)
        size = max(1, BLOCK // chunk.shape[1])
        for first in range(rows.start, rows.stop, size):
            some = slice(first, min(first + size, rows.stop))
            part = chunk[some.start - rows.start : some.stop - rows.start]
            with torch.enable_grad():
                z = part.detach().requires_grad_(upstream is not None)
                each = losses(z, some)
            found[some] = factors[some] * each.detach()
            if upstream is None:
                continue
            (dz,) = torch.autograd.grad(each, z, upstream[some])
            if self.softcap:
                dz = dz * (1 - (part / self.softcap).square())
            part.copy_(dz)


class ChunkedLoss(torch.autograd.Function):
    """A sum with its gradients ready, or losses by row, whose backward sweeps again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Optional,
        scale: Optional,
        factors: Tensor,
        call: _Call,
        reduced: bool,
    ) -> Tensor:
        ctx.call, ctx.reduced, ctx.needs = call, reduced, list(ctx.needs_input_grad[:4])
        ready: list[Optional] = [None] * 4
        with without_autocast(x.device):
            upstream = factors if reduced and any(ctx.needs) else None
            found, ready = call.run((x, w, b, scale), factors, upstream, ctx.needs)
        ctx.save_for_backward(x, w, b, scale, factors, *(ready if reduced else []))
        return found.sum() if reduced else found

    @staticmethod
    @differentiable_once("a loss over chunks of logits")
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, w, b, scale, factors, *ready = ctx.saved_tensors
        if not ctx.reduced:
            with without_autocast(x.device):
                ready = ctx.call.run((x, w, b, scale), factors, g * factors, ctx.needs)[1]
            g = g.new_ones(())
        given = zip(ready, (x, w, b, scale), strict=True)
        back = [None if t is None else (g * t).to(like.dtype) for t, like in given]
        return (*back, None, None, None)
