"""Optimizers for large heads: tables of which a step touches few rows, and factored heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lossops.distributed import summed
from lossops.factored import FactoredSphericalHead
from lossops.reference import accumulate_dtype
from lossops.row_optim import RowAdamW, RowSGD, coalesced
from lossops.shards import spread_group

__all__ = ["FactoredSGD", "RowAdamW", "RowSGD", "clip_grad_norm_"]


class FactoredSGD(torch.optim.Optimizer):
    """SGD of a `lossops.FactoredSphericalHead`, for learning-rate schedulers and training loops.

    Momentum and weight decay are the head's own.

    Args:
        head: the head.
        lr: learning rate.

    Example:
        >>> import torch, lossops
        >>> head = lossops.FactoredSphericalHead(8, 1000)
        >>> optimizer = lossops.optim.FactoredSGD(head, lr=0.1)
        >>> schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)
        >>> head(torch.randn(32, 8), torch.randint(1000, (32,))).backward()
        >>> optimizer.step()
        >>> schedule.step()
    """

    def __init__(self, head: FactoredSphericalHead, lr: float) -> None:
        if not isinstance(head, FactoredSphericalHead):
            raise TypeError(f"head must be a FactoredSphericalHead, got {type(head).__name__}")
        if lr < 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        self.head = head
        super().__init__([head.table.rows], {"lr": lr})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the head."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.head.step(float(self.param_groups[0]["lr"]))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the head's gradients since its last step."""
        self.head.zero_grad(set_to_none)


def clip_grad_norm_(
    parameters: Tensor | FactoredSphericalHead | Iterable[Tensor | FactoredSphericalHead],
    max_norm: float,
) -> Tensor:
    """Scale gradients so that their joint norm is at most ``max_norm``; as torch's, and more.

    norm = √(Σ ‖∂L/∂p‖²),   every gradient times min(1, max_norm / (norm + 1e-6))

    Sparse gradients, which torch's refuses, cost what their rows do. The norm of the centres of a
    `lossops.PartialFC` with a ``class_group`` is that of all ranks' centres, one exchange: ranks
    that clipped by their own would scale the backbone's gradients differently. Where the norm is
    inf or NaN finite gradients become 0: a scaler leaves out the step of the optimizer alone whose
    gradients overflowed, and that of the others must do no harm.

    Args:
        parameters: tensors with a ``grad``, and factored heads, whose norm costs N² E operations.
        max_norm: the largest norm.

    Returns:
        The norm before, ().

    Raises:
        ValueError: a negative ``max_norm``. TypeError: neither a tensor nor a head.

    Example:
        >>> import torch, lossops
        >>> head = lossops.FactoredSphericalHead(8, 1000)
        >>> body = torch.nn.Linear(4, 8)
        >>> head(body(torch.randn(32, 4)), torch.randint(1000, (32,))).backward()
        >>> norm = lossops.optim.clip_grad_norm_([*body.parameters(), head], max_norm=1e-3)
        >>> bool(head.grad_norm() <= 1e-3)
        True
    """
    if max_norm < 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}")
    if isinstance(parameters, Tensor | FactoredSphericalHead):
        parameters = [parameters]
    listed: list[Any] = list(parameters)
    for p in listed:
        if not isinstance(p, Tensor | FactoredSphericalHead):
            raise TypeError(
                f"parameters must be tensors and factored heads, got {type(p).__name__}; "
                "of a module pass *module.parameters()"
            )
    heads = [p for p in listed if isinstance(p, FactoredSphericalHead)]
    tables = [p for p in listed if isinstance(p, Tensor)]
    grads = [_values(p) for p in tables if p.grad is not None]
    norms = [n for p in tables if (n := _norm(p)) is not None]
    norms += [h.grad_norm() for h in heads]
    if not norms:
        return torch.zeros(())
    squares = [n.to(norms[0].device, torch.float64).square() for n in norms]
    norm: Tensor = torch.stack(squares).sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp_max(1.0).nan_to_num(0.0)
    for g in grads:
        g.mul_(factor.to(g.device, accumulate_dtype(g.dtype)))
    for h in heads:
        h.scale_grad(factor)
    return norm


def _norm(p: Tensor) -> Tensor | None:
    """Norm of the gradient, (), over all ranks where it is spread; None where there is none."""
    group = spread_group(p)
    if p.grad is None and group is None:
        return None
    if p.grad is None:
        norm = torch.zeros((), dtype=accumulate_dtype(p.dtype), device=p.device)
    else:
        # Half precision ends at 65504, which the norm of its gradients may pass.
        g = _values(p)
        norm = torch.linalg.vector_norm(g, dtype=accumulate_dtype(g.dtype))
    return norm if group is None else summed(norm.square(), group).sqrt()


def _values(p: Tensor) -> Tensor:
    """The gradient, or the values of a sparse one, each class's rows added up first."""
    assert p.grad is not None
    return coalesced(p).values() if p.grad.is_sparse else p.grad
