"""A linear head trained by exact SGD with a spherical loss in O(D²) per example, whatever V is.

    W = T U + 1 ωᵀ,   T (V, D) changes in the rows of the targets only; a step is `lossops.factors`

U drifts from the identity, and rows of T with it: where a singular value of U leaves its range, U
is set aside and a new one starts at I. A row of T stays in the coordinates of the *epoch* it was
last written in (`lossops.class_table`) until it is next touched, or all are rewritten.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from lossops.autograd import apply, differentiable_once
from lossops.class_table import ClassTable
from lossops.factors import (
    Factors,
    Gradient,
    extremes,
    fresh_factors,
    joined,
    refined,
    row_statistics,
    squared_norm,
    step_,
)
from lossops.gram import Statistics, rows_of
from lossops.inputs import check_devices, check_reduction, check_tensor
from lossops.ops import check_target
from lossops.recipes import (
    SphericalLoss,
    log_spherical_losses,
    log_taylor_losses,
    mse_losses,
    z_losses,
)
from lossops.schedules import without_autocast
from lossops.spherical import (
    check_positive,
    reduced_losses,
    spherical_row_losses,
    target_ids,
)
from lossops.topk import TopK, at_most, best_of, best_of_ranks, no_candidates

WATCH_STEPS = 8
"""Steps between two looks at the singular values of U."""
REFINE_STEPS = 64
"""Steps between two Newton steps of its inverse."""
RANGE, MOMENTUM_RANGE = 2.0, 32.0
"""Largest singular value of U or U⁻¹ of an epoch; momentum shrinks half of U by μ in every step."""
LOST = 1e3
"""Where a singular value means that digits were lost before the watch saw it."""
WIDE_ENOUGH = (torch.float32, torch.float64)
P = ParamSpec("P")
R = TypeVar("R")
SMALL = ("factor", "inverse", "offset", "mean", "gram")


class Drift(NamedTuple):
    """How far the small matrices are from what the table says, relative."""

    mean: float
    gram: float
    inverse: float
    smallest: float
    largest: float


def _exactly(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A method without gradients, and in full precision under autocast too."""

    @functools.wraps(method)
    def run(self: Any, *arguments: P.args, **keywords: P.kwargs) -> R:
        with torch.no_grad(), without_autocast(self.watched.device):
            return method(self, *arguments, **keywords)

    return cast("Callable[Concatenate[Any, P], R]", run)


class FactoredSphericalHead(nn.Module):
    """Linear head and spherical loss with exact SGD in O(D²) per example, whatever V is.

    loss = mean_n Σ_k F(z_n,y_nk, Σ_j z_nj, Σ_j z_nj², V),   z = x wᵀ + b

    The weight is no Parameter: `step` is its SGD, of torch's `torch.optim.SGD` in exact
    arithmetic, on the gradients that `backward` left. Several backwards before a step add up.

    Args:
        dim: D.
        num_classes: V.
        loss: ``"z"``, ``"taylor"``, ``"spherical"``, ``"mse"`` or a callable as in
            `lossops.linear_spherical_loss`. Default: ``'z'``.
        a: of the Z-loss, as in `lossops.linear_spherical_z_loss`. Default: ``0.1``.
        b: of the Z-loss. Default: ``10.0``.
        bias: whether there is a bias (V,), trained by the same SGD. Default: ``False``.
        momentum: of SGD; it doubles the table and takes four times the operations.
            Default: ``0.0``.
        weight_decay: of SGD. Default: ``0.0``.
        stabilize: whether to watch the conditioning of U. Default: ``True``.
        class_group: process group over whose ranks the classes are spread in order; every rank
            gets the same input and target. Default: ``None``.
        device: of the weight. Default: ``None``.
        dtype: of the weight, float32 or float64. Default: ``None``.

    Note:
        Memory: V·D in the table (2·V·D with momentum) and, for V classes, at most √(2 V / E)
        matrices of E² and never fewer than 4, E = D, or 2 D with momentum.

    Example:
        >>> import torch, lossops
        >>> head = lossops.FactoredSphericalHead(8, 1000)
        >>> x = torch.randn(32, 8, requires_grad=True)
        >>> loss = head(x, torch.randint(1000, (32,)))
        >>> loss.backward()
        >>> head.step(lr=0.1)
        >>> head.topk(x, 5).indices.shape
        torch.Size([32, 5])

    Reference:
        P. Vincent, A. de Brébisson, X. Bouthillier: Efficient exact gradient update for training
        deep networks with very large sparse targets, arXiv 1412.7091.
    """

    watched: Tensor
    factor: Tensor
    inverse: Tensor
    offset: Tensor
    mean: Tensor
    gram: Tensor

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        loss: str | SphericalLoss = "z",
        a: float = 0.1,
        b: float = 10.0,
        bias: bool = False,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        stabilize: bool = True,
        class_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or num_classes < 1:
            raise ValueError(f"dim and num_classes must be positive, got {dim} and {num_classes}")
        if not 0 <= momentum < 1 or weight_decay < 0:
            raise ValueError(
                "momentum must be in [0, 1) and weight_decay at least 0, "
                f"got {momentum} and {weight_decay}"
            )
        self.dim, self.num_classes, self.bias = dim, num_classes, bias
        self.momentum, self.weight_decay, self.stabilize = momentum, weight_decay, stabilize
        self.loss_name = loss if isinstance(loss, str) else getattr(loss, "__name__", "callable")
        self.loss_fn = _loss_function(loss, a, b)
        self.width = dim + bias  # of w̃
        e = self.width * (2 if momentum else 1)
        like = torch.empty(0, device=device, dtype=dtype)
        if like.dtype not in WIDE_ENOUGH:
            raise TypeError(f"dtype must be float32 or float64, got {like.dtype}")
        self.table = ClassTable(num_classes, e, class_group, like)
        self.register_buffer("watched", like.new_ones(2, e))
        self.steps, self.epochs = 0, 0  # taken, ended
        self._pending: list[Gradient] = []
        self._version = 0
        self._flag: tuple[Tensor, Any] | None = None  # singular values on their way
        for name in SMALL:
            self.register_buffer(name, None)
        self.reset_parameters()

    # State

    def reset_parameters(self) -> None:
        """Weight and bias uniform in ±1/√D, as `torch.nn.Linear`; no velocity."""
        self.table.rows.zero_()
        bound = 1 / math.sqrt(self.dim)
        nn.init.uniform_(self.table.rows[:-1, : self.width], -bound, bound)
        self._restart()

    def load_dense(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take a weight (V, D) and bias (V,), of this rank's classes; no velocity."""
        shape = (self.table.count, self.dim)
        fits = bias is None or bias.shape == shape[:1]
        if weight.shape != shape or (bias is not None) != self.bias or not fits:
            raise ValueError(
                f"weight must have shape {shape}, with a bias only if the head has one "
                f"(bias={self.bias}), got {tuple(weight.shape)} and "
                f"{'a' if bias is not None else 'no'} bias"
            )
        rows = self.table.rows.zero_()
        rows[:-1, : self.dim] = weight.detach()
        if bias is not None:
            rows[:-1, self.dim] = bias.detach()
        self._restart()

    def _restart(self) -> None:
        """The table is the state itself: U = I, and exact moments."""
        self.table.restart()
        self.watched.fill_(1)
        self._flag = None
        self._pending.clear()
        self._version += 1
        moments = self.table.moments(self.table.rows[:-1])
        self._keep(fresh_factors(*moments, self.watched.dtype))

    @property
    def factors(self) -> Factors:
        """U, P, ω, m and G of `lossops.factors`."""
        return Factors(*(getattr(self, name) for name in SMALL))

    def _keep(self, factors: Factors) -> None:
        for name, tensor in zip(SMALL, factors, strict=True):
            setattr(self, name, tensor)

    def get_extra_state(self) -> dict[str, int]:
        """Steps taken and epochs ended."""
        return {"steps": self.steps, "epochs": self.epochs}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """What `get_extra_state` returned."""
        self.steps, self.epochs = state["steps"], state["epochs"]
        self._pending.clear()
        self._version += 1
        self._flag = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves as any module, but mean and Gram matrix stay in float64."""
        wide = {name: getattr(self, name) for name in ("mean", "gram")}
        moved = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in wide.items():
            setattr(self, name, tensor.to(self.watched.device))
        return moved

    @_exactly
    def linear_state_dict(self) -> dict[str, Tensor]:
        """Weight, and bias if there is one, as `torch.nn.Linear.load_state_dict` takes them."""
        state = self._dense_state()
        found = {"weight": state[:, : self.dim].clone()}
        return found | ({"bias": state[:, self.dim].clone()} if self.bias else {})

    @_exactly
    def dense(self, out: Tensor | None = None) -> Tensor:
        """The weight (V, D), of this rank's classes; written to ``out`` where given."""
        out = self.watched.new_empty(self.table.count, self.dim) if out is None else out
        for block in self.table.blocks():
            out[block] = self._state_rows(block)[:, : self.dim]
        return out

    @_exactly
    def rows(self, ids: Tensor) -> Tensor:
        """Rows (..., D) of the weight for class ids (...), without gradient."""
        check_target(torch.where(ids < 0, self.num_classes, ids), self.num_classes)
        state = torch.addmm(self.offset, self.table.gathered(ids.reshape(-1)), self.factor)
        return state[:, : self.dim].reshape(*ids.shape, self.dim)

    def _dense_state(self) -> Tensor:
        """S of this rank's classes, (V, E)."""
        return torch.cat([self._state_rows(block) for block in self.table.blocks()])

    def _state_rows(self, block: slice) -> Tensor:
        """S of a range of this rank's classes, (B, E)."""
        return torch.addmm(self.offset, self.table.current(block), self.factor)

    # Training

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = None,
    ) -> Tensor:
        """Loss of ``input`` (..., D) and ``target`` (...) or (..., K), as the functions'."""
        check_reduction(reduction)
        check_tensor("input", input)
        if not input.is_floating_point() or input.ndim < 1 or input.shape[-1] != self.dim:
            raise ValueError(
                f"input must be floating point of shape (..., {self.dim}), "
                f"got {input.dtype} of shape {tuple(input.shape)}"
            )
        check_devices(input, head=self.watched)
        lead = input.shape[:-1]
        x = input.reshape(-1, self.dim).to(self.watched.dtype)
        if x.dtype not in WIDE_ENOUGH:
            raise TypeError(f"the head must be float32 or float64, got {x.dtype}; use .float()")
        ids = target_ids(target, input, lead, self.num_classes, ignore_index)
        check_target(ids, self.num_classes)
        with without_autocast(x.device):
            # Features may be frozen: the weight, which autograd does not see, wants its gradient.
            anchor = torch.empty(0, requires_grad=True)
            slot: list[Gradient] = []
            found = apply(_HeadStatistics, x, anchor, self, ids, slot)
            own, average, moment = found
            if anchor.requires_grad and own.requires_grad:
                # As a Parameter would: after backward(), not after torch.autograd.grad.
                anchor.register_post_accumulate_grad_hook(lambda _: self._receive(slot))
            losses = spherical_row_losses(self.loss_fn, own, average, moment, ids, self.num_classes)
        losses = losses.to(x.dtype)
        return reduced_losses(losses, ids, sample_weight, reduction, lead, x)

    def _receive(self, slot: list[Gradient]) -> None:
        self._pending.append(slot.pop())

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step of SGD on the gradients since the last; nothing where there are none."""
        if lr * self.weight_decay == 1:
            raise ValueError(
                f"lr * weight_decay must not be 1, which erases the weight, got lr={lr} and "
                f"weight_decay={self.weight_decay}"
            )
        if not self._pending:
            return
        gradient = joined(self._pending)
        self._pending.clear()
        self._version += 1
        with without_autocast(self.watched.device):
            added = step_(
                self.factors, gradient, self.num_classes, lr, self.momentum, self.weight_decay
            )
            self.table.write(
                gradient.ids.flatten(), gradient.base.flatten(0, 1), added.flatten(0, 1)
            )
            self.steps += 1
            if self.stabilize:
                self._watch(self._watch_steps(lr))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients since the last step."""
        self._pending.clear()
        super().zero_grad(set_to_none)

    @_exactly
    def grad_norm(self) -> Tensor:
        """Frobenius norm of the gradient of weight and bias, ()."""
        if not self._pending:
            return self.mean.new_zeros(())
        self._pending = [joined(self._pending)]
        return squared_norm(self._pending[0], self.num_classes).clamp_min(0).sqrt()

    @torch.no_grad()
    def scale_grad(self, factor: float | Tensor) -> None:
        """Multiply the gradients since the last step."""
        scale = torch.as_tensor(factor, dtype=self.mean.dtype, device=self.mean.device)
        self._pending = [g.scaled(scale) for g in self._pending]

    # Conditioning

    def _watch_steps(self, lr: float) -> int:
        """Steps between two looks: before momentum and decay alone shrink U out of its range."""
        shrink = (self.momentum or 1.0) * abs(1 - lr * self.weight_decay)
        if not 0 < shrink < 1:
            return WATCH_STEPS
        limit = MOMENTUM_RANGE if self.momentum else RANGE
        return max(1, min(WATCH_STEPS, int(math.log(limit) / -math.log(shrink))))

    def _watch(self, every: int) -> None:
        """End the epoch where a singular value of U has left its range."""
        if self.steps % REFINE_STEPS == 0:
            self._keep(refined(self.factors))
        if self.steps % every == 0:
            values, self.watched = extremes(self.factors, self.watched, self.steps // every)
            self._flag = _sent(values)
            if self.table.group is not None and self._flag[1] is not None:
                self._flag[1].synchronize()  # all ranks end an epoch at the same step
        if self._flag is None or not (self._flag[1] is None or self._flag[1].query()):
            return
        worst = float(self._flag[0].max())
        self._flag = None
        if not worst < LOST:
            warnings.warn(
                f"the factor of the head reached a condition of {worst:.1e} within "
                f"{every} steps, and digits of the weight are lost; lower the learning rate",
                RuntimeWarning,
                stacklevel=3,
            )
        if not worst < (MOMENTUM_RANGE if self.momentum else RANGE):
            self._end_epoch()

    def _end_epoch(self) -> None:
        """Start again at U = I; rows are brought up to date when they are next touched."""
        self.epochs += 1
        if self.table.full:
            return self.refactor()
        self.table.end_epoch(self.factor, self.offset)
        self._keep(fresh_factors(self.mean, self.gram, self.watched.dtype))
        return None

    @_exactly
    def refactor(self) -> None:
        """Make the table the state itself, U = I, and the moments exact again; O(V E²)."""
        if self._pending:
            raise RuntimeError("refactor() would lose gradients that wait for a step; step() first")
        for block in self.table.blocks():
            self.table.rows[block] = self._state_rows(block)
        self._restart()

    @_exactly
    def check(self) -> Drift:
        """How far mean, Gram matrix and inverse have drifted from the table; O(V E²)."""
        mean, gram = self.table.moments(self._dense_state())
        spread = torch.linalg.matrix_norm(gram)
        values = torch.linalg.svdvals(self.factor.double())
        off = self.factor.double() @ self.inverse.double().T
        off.diagonal().sub_(1.0)
        away = torch.linalg.vector_norm(self.mean - mean) * self.num_classes**0.5
        return Drift(
            mean=float(away / spread.sqrt()),
            gram=float(torch.linalg.matrix_norm(self.gram - gram) / spread),
            inverse=float(torch.linalg.matrix_norm(off)) / len(off) ** 0.5,
            smallest=float(values[-1]),
            largest=float(values[0]),
        )

    # Prediction

    @_exactly
    def topk(self, input: Tensor, k: int) -> TopK:
        """The ``k`` classes of the largest logits, (..., k), over all ranks.

        V D multiply-adds per row, and V D² per call once an epoch has ended, until `refactor`.
        """
        x = rows_of(input.reshape(-1, self.dim), self.offset if self.bias else None,
                    self.watched.dtype)  # fmt: skip
        k, best = at_most(k, self.num_classes), no_candidates(x)
        across = x @ self.factor[:, : self.width].T  # (N, E): logits are t_j of this
        level = x @ self.offset[: self.width]
        for block in self.table.blocks():
            z = torch.addmm(level.unsqueeze(1), across, self.table.current(block).T)
            ids = torch.arange(block.start, block.stop, device=x.device) + self.table.first
            best = best_of(k, (best.values, z), (best.indices, ids.expand(len(x), -1)))
        if self.table.group is not None:
            best = best_of_ranks(best, k, self.table.group)
        lead = (*input.shape[:-1], -1)
        return TopK(best.values.reshape(lead), best.indices.reshape(lead))

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"dim={self.dim}, num_classes={self.num_classes}, loss={self.loss_name!r}, "
            f"bias={self.bias}, momentum={self.momentum}, weight_decay={self.weight_decay}"
        )


class _HeadStatistics(torch.autograd.Function):
    """Statistics of rows x; backward leaves the weight's gradient with the head."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        head: FactoredSphericalHead,
        ids: Tensor,
        slot: list[Gradient],
    ) -> tuple[Any, ...]:
        rows = rows_of(x, x[:0] if head.bias else None, x.dtype, ids)
        base = head.table.gathered(ids.flatten()).unflatten(0, ids.shape)
        found, own, product = row_statistics(head.factors, rows, base, ids >= 0)
        ctx.head, ctx.version, ctx.slot = head, head._version, slot
        ctx.save_for_backward(rows, ids, base, own, product, found.average)
        return tuple(found)

    @staticmethod
    @differentiable_once("FactoredSphericalHead")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, ids, base, own, product, average = ctx.saved_tensors
        head: FactoredSphericalHead = ctx.head
        if ctx.version != head._version:
            raise RuntimeError(
                "the head took a step, or was loaded, between this forward and its backward; "
                "call backward() before step()"
            )
        given = Statistics(*grads)
        target = torch.where(ids >= 0, given.target, 0.0)
        pulled = (own * target.unsqueeze(2)).sum(1)  # (N, E)
        centred = torch.addcmul(pulled, product, 2 * given.moment.unsqueeze(1))
        scalars = (target, given.average, given.moment, average.detach())
        matrices = (pulled.to(rows.dtype), centred.to(rows.dtype))
        ctx.slot[:] = [Gradient(rows.detach(), ids, base, *scalars, *matrices)]
        anchored = torch.empty(0)
        if not ctx.needs_input_grad[0]:
            return None, anchored, None, None, None
        dx = centred[:, : head.dim] + given.average.unsqueeze(1) * head.mean[: head.dim]
        return dx.to(rows.dtype), anchored, None, None, None


def _loss_function(loss: str | SphericalLoss, a: float, b: float) -> SphericalLoss:
    check_positive("a", a)
    named: dict[str, SphericalLoss] = {
        "z": partial(z_losses, a=a, b=b),
        "taylor": log_taylor_losses,
        "spherical": log_spherical_losses,
        "mse": mse_losses,
    }
    if callable(loss):
        return loss
    if loss not in named:
        raise ValueError(f"loss must be callable or one of {', '.join(named)}, got {loss!r}")
    return named[loss]


def _sent(values: Tensor) -> tuple[Tensor, Any]:
    """Values on their way to the host, and the event of their arrival, None on a CPU."""
    if values.device.type == "cpu":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.device.type == "cuda")
    host.copy_(values, non_blocking=True)
    event = torch.Event(values.device)
    event.record()
    return host, event
