"""The primitives of losses over pairs for a GPU, on slabs of classes: `lossops.gpu_linear`.

Products into float32, kernels on them, then the two products of the gradients.

    binary             one kernel takes the sums of a row's negatives and leaves dz in their place:
                       3 GEMMs, one read and one write a logit
    row and column     log-sums of rows by the chunk's kernel, of columns by one of their own: two
    log-sums           reads; then dz in place from both: 4 GEMMs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossops.gpu_layout import Logits, given, no_columns
from lossops.gpu_linear import LinearPrimitives, Sweep, can_pack, inside, slabs
from lossops.reference_pairs import target_logits


@dataclass(frozen=True)
class PairKernels:
    """What a backend does with products in memory.

    Attributes:
        binary: (logits, ids, weight, kind, parameters, row_factor, sums, out): Σ a φ(z) over a
            row's negatives, and where ``out`` is given factor · a · φ'(z) there.
        columns: (logits, ids, shift, lse): log-sums of the negatives of each column.
        gradient: (logits, ids, row, column, out): dz from both log-sums; row and column hold
            shift, lse and coefficient or None.
    """

    binary: Callable[..., None]
    columns: Callable[..., None]
    gradient: Callable[..., None]


@dataclass(frozen=True)
class GpuPrimitives(LinearPrimitives):
    """All primitives of a backend: those of `lossops.reference_pairs`, too."""

    pairs: PairKernels

    def linear_binary(
        self,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        scale: Tensor | None,
        target: Tensor | None,
        weight: Tensor | None,
        kind: str,
        parameters: list[float],
        row_factor: Tensor | None,
        at_target: Tensor | None,
        dx: Tensor | None,
        dw: Tensor | None,
        db: Tensor | None,
    ) -> Tensor:
        """Σ_{j ∉ P_i} a_j φ(z_ij), (N,), and the gradients of Σ_i f_i of them, in one sweep."""
        wants = not (dx is None and dw is None and db is None)
        sweep = Sweep(self.kernels.add_targets, x, w, scale, target, at_target, dx, dw, db)
        sums = [x.new_zeros(x.shape[0], dtype=torch.float32)]
        for tile, buffer in slabs(x, w):
            # What db is the sum of is not rounded.
            out = _room(buffer, x.dtype if db is None else buffer.dtype) if wants else None
            own = torch.empty_like(sums[0])
            self.pairs.binary(
                Logits(buffer, None if b is None else b[tile], scale),
                None if target is None else no_columns(inside(target, tile)),
                None if weight is None else weight[tile], kind, parameters, row_factor, own, out,
            )  # fmt: skip
            sums.append(own)
            if out is not None:
                sweep.add(tile, out, None, None if db is None else out.sum(0))
        sweep.finish()
        return torch.stack(sums).sum(0)

    def linear_pair_statistics(
        self, x: Tensor, w: Tensor, scale: Tensor | None, target: Tensor | None
    ) -> list[Tensor]:
        """Log-sums of the negatives by row and by column, from one sweep."""
        n, v = x.shape[0], w.shape[0]
        column_shift = torch.zeros(v, dtype=torch.float32, device=x.device)
        column_lse = torch.full_like(column_shift, -torch.inf)
        none = torch.zeros(n, dtype=torch.float32, device=x.device)
        shifts, sums = [none], [none - torch.inf]
        for tile, buffer in slabs(x, w):
            ids = None if target is None else no_columns(inside(target, tile))
            logits = Logits(buffer, None, scale)
            # The names have no target: its logits are taken apart, in float32.
            shift, lse = self.kernels.statistics(logits, ids, None, None, ("lse",))
            shifts.append(shift)
            sums.append(lse)
            self.pairs.columns(logits, ids, column_shift[tile], column_lse[tile])
        shift, lse = merged_log_sums(torch.stack(shifts), torch.stack(sums))
        at = x.new_empty(n, 0, dtype=torch.float32)
        if target is not None and target.shape[1]:
            at = target_logits(x, w, None, scale, target) - shift.unsqueeze(1)
            at = at.masked_fill(target < 0, -torch.inf)
        return [shift, lse, column_shift, column_lse, at]

    def linear_pair_gradient(
        self,
        x: Tensor,
        w: Tensor,
        scale: Tensor | None,
        target: Tensor | None,
        statistics: Sequence[Tensor],
        coefficients: Sequence[Tensor | None],
        dx: Tensor | None,
        dw: Tensor | None,
    ) -> None:
        """Gradients from both log-sums."""
        shift, lse, column_shift, column_lse, _ = (t.contiguous() for t in statistics)
        by_row, by_column, at_target = given(coefficients)
        sweep = Sweep(self.kernels.add_targets, x, w, scale, target, at_target, dx, dw, None)
        for tile, buffer in slabs(x, w):
            ids = None if target is None else no_columns(inside(target, tile))
            out = _room(buffer, x.dtype)
            columns = (
                column_shift[tile], column_lse[tile], None if by_column is None else by_column[tile]
            )  # fmt: skip
            logits = Logits(buffer, None, scale)
            self.pairs.gradient(logits, ids, (shift, lse, by_row), columns, out)
            sweep.add(tile, out, None, None)
        sweep.finish()


def merged_log_sums(shift: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and log-sum of the union of P disjoint sets from those of each, (P, ...)."""
    top = shift.masked_fill(lse == -torch.inf, -torch.inf).amax(0)
    whole = torch.where(top.isfinite(), top, 0.0)
    return whole, (lse + (shift - whole)).logsumexp(0)


def _room(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """Where dz of a slab goes: over its products, in bfloat16 where these multiply as such."""
    if dtype == torch.bfloat16 and can_pack(buffer):
        return buffer.view(dtype)[:, : buffer.shape[1]]
    return buffer
