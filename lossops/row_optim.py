"""Optimizers of tables of which a step touches a few rows: time and traffic follow these rows.

A gradient is a sparse tensor (what `lossops.PartialFC` and `lossops.sampled_softmax_loss` give) or
a dense one, whose rows are then all touched.

What becomes of a row that a step does not touch is ``skipped``. ``"lazy"``: nothing; its momentum
and weight decay wait until it is drawn. ``"exact"``: what dense SGD would do. With no gradient one
step maps a row w and its velocity v to

    (w, v) ← M (w, v),   M = (1 - ηλ   -ημ)
                             (  λ        μ)

(without momentum v stays as it is), so that k skipped steps are one product of k matrices, applied
when the row is next picked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lossops import cuda_rows
from lossops.files import StateTensors
from lossops.rows import keep_up_to_date, primitives

SKIPPED = ("lazy", "exact")


class RowSGD(torch.optim.Optimizer):
    """SGD with momentum and weight decay on the rows of a step.

    g ← g + λ w      v ← μ v + g      w ← w - η v

    Args:
        params: parameters (V, D), or groups of them.
        lr: η.
        momentum: μ in [0, 1). Default: ``0.0``.
        weight_decay: λ. Default: ``0.0``.
        skipped: what becomes of rows without a gradient: ``"lazy"`` or ``"exact"``, whose iterates
            are those of dense SGD; rows are then brought up to date before lossops picks them, and
            by `refresh`. Default: ``'lazy'``.
        state_dir: directory for the velocities, in memory-mapped files; None keeps them in memory.
            They begin as zeros and go on from a `state_dict`, whatever the files hold. Ranks of a
            ``class_group`` may share it, of which another optimizer's files are refused.
            Default: ``None``.

    Note:
        State: V·D velocities where there is momentum; with ``"exact"`` 4·V bytes and at most 4 MiB
        of steps that rows may have missed: every 65,536 of them all rows are brought up to date. A
        step reads and writes the touched rows once.

    Example:
        >>> import torch, lossops
        >>> w = torch.nn.Parameter(torch.randn(1000, 8))
        >>> optimizer = lossops.optim.RowSGD([w], lr=0.1, momentum=0.9, skipped="exact")
        >>> sampler = lossops.samplers.Uniform(1000, 20)
        >>> x, y = torch.randn(4, 8), torch.tensor([3, 1, 4, 1])
        >>> lossops.sampled_softmax_loss(x, w, y, sampler).backward()
        >>> optimizer.step()
        >>> optimizer.refresh()  # all rows as dense SGD would have them now
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        skipped: str = "lazy",
        *,
        state_dir: str | Path | None = None,
    ) -> None:
        self._tensors = StateTensors(state_dir)
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "skipped": skipped,
        }  # fmt: skip
        self._products = WeakTensorKeyDictionary()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the options of a group may be its own."""
        group = {**self.defaults, **param_group}
        _check_at_least_zero(lr=group["lr"], weight_decay=group["weight_decay"])
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}")
        if group["skipped"] not in SKIPPED:
            raise ValueError(
                f"skipped must be one of {', '.join(SKIPPED)}, got {group['skipped']!r}"
            )
        super().add_param_group(param_group)
        self._follow()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the rows that have a gradient."""
        loss = _evaluated(closure)
        for number, group, p in _parameters(self):
            if p.grad is None:
                continue
            ids, rows = touched_rows(p)
            state = self._state(number, group, p)
            if group["skipped"] == "exact":
                self._advance(p, ids)
            velocity = state.get("momentum_buffer") if group["momentum"] else None
            primitives(p).sgd_rows(
                p, velocity, ids, rows, float(group["lr"]), group["momentum"],
                group["weight_decay"],
            )  # fmt: skip
            if group["skipped"] == "exact":
                self._record(p, group, ids)
        return loss

    @torch.no_grad()
    def refresh(self) -> None:
        """All rows, and their velocities, become what dense SGD would have made them."""
        for _, group, p in _parameters(self):
            if group["skipped"] == "exact":
                self._advance(p, None)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; ``steps`` of a parameter are the matrices M of the steps so far."""
        found: dict[str, Any] = super().state_dict()
        for number, _, p in _parameters(self):
            if p in self._products:  # torch hands out its own dicts of state
                steps = self._products[p].steps
                found["state"][number] = {**found["state"][number], "steps": steps}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        steps = {n: s["steps"] for n, s in state_dict["state"].items() if "steps" in s}
        rest = {n: {k: t for k, t in state.items() if k != "steps"}
                for n, state in state_dict["state"].items()}  # fmt: skip
        super().load_state_dict({**state_dict, "state": rest})
        _restore(self, rest, self._tensors)
        for number, _, p in _parameters(self):
            self.set_steps(p, steps.get(number, torch.zeros(0, 2, 2)))
        self._follow()

    def __getstate__(self) -> dict[str, Any]:
        steps = [self.steps(p) for _, _, p in _parameters(self)]
        return {**super().__getstate__(), "state_dir": self._tensors.directory, "steps": steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        steps = state.pop("steps", None)
        if steps is not None:  # of a copy; torch calls this for a loaded state as well
            self._tensors = StateTensors(state.pop("state_dir"))
            self._products = WeakTensorKeyDictionary()
        super().__setstate__(state)
        if steps is not None:
            for number, _, p in _parameters(self):
                self.set_steps(p, steps[number])
            self._follow()

    def row_state(self, p: Tensor) -> dict[str, Tensor]:
        """The state of ``p`` that has a row for each of its rows, made where there is none yet."""
        return self._state(*_place(self, p), p)

    def steps(self, p: Tensor) -> Tensor:
        """M of each step that rows of ``p`` may have missed, (T, 2, 2) float64, T < 65,536."""
        products: StepProducts | None = self._products.get(p)
        if products is not None:
            return products.steps
        return torch.zeros(0, 2, 2, dtype=torch.float64)

    def set_steps(self, p: Tensor, steps: Tensor) -> None:
        """What `steps` returned."""
        self._products.pop(p, None)
        if len(steps):
            self._products[p] = StepProducts(steps)

    def _state(self, number: int, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if group["momentum"] and "momentum_buffer" not in state:
            state["momentum_buffer"] = self._tensors.zeros_like(p, number, "momentum_buffer")
        if group["skipped"] == "exact" and "known" not in state:
            state["known"] = torch.zeros(p.shape[0], dtype=torch.int32, device=p.device)
        return state

    def _follow(self) -> None:
        for _, group, p in _parameters(self):
            if group["skipped"] == "exact":
                keep_up_to_date(p, self._advance)

    def _record(self, p: Tensor, group: dict[str, Any], ids: Tensor) -> None:
        """Note what this step does to rows without a gradient, and who had one."""
        if p not in self._products:
            self._products[p] = StepProducts()
        lr, mu, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        to_v = [decay, mu] if mu else [0.0, 1.0]  # as in torch, a velocity waits while μ is 0
        self._products[p].append([[1 - lr * decay, -lr * mu], to_v])
        self.state[p]["known"][ids] = len(self._products[p])
        if len(self._products[p]) >= STEPS:  # no row has missed any, and they are forgotten
            self._advance(p, None)
            self.set_steps(p, self._products[p].steps[:0])
            self.state[p]["known"].zero_()

    @torch.no_grad()
    def _advance(self, p: Tensor, ids: Tensor | None) -> None:
        """Rows ``ids``, all for None, after the steps they have missed."""
        if p not in self._products:
            return
        state, products = self.state[p], self._products[p]
        known, velocity = state["known"], state.get("momentum_buffer")
        ids = torch.arange(p.shape[0], device=p.device) if ids is None else ids
        for some in ids[known[ids] < len(products)].split(BLOCK):
            since, at = known[some].long().cpu().unique(return_inverse=True)
            to_w, to_v = products.since(since)[at].to(p.device).unsqueeze(3).unbind(1)
            w = p[some].double()
            v = torch.zeros_like(w) if velocity is None else velocity[some].double()
            p[some] = (to_w[:, 0] * w + to_w[:, 1] * v).to(p.dtype)
            if velocity is not None:
                velocity[some] = (to_v[:, 0] * w + to_v[:, 1] * v).to(p.dtype)
            known[some] = len(products)


BLOCK = 65536
"""Rows brought up to date at a time."""
STEPS = 65536
"""Steps remembered at most, 64 bytes each; the same number whatever V is, so that all ranks of a
head forget them at once."""


class RowAdamW(torch.optim.Optimizer):
    """AdamW on the rows of a step; other rows and their state wait.

    m ← β₁ m + (1 - β₁) g      v ← β₂ v + (1 - β₂) g²      k ← k + 1
    w ← (1 - η λ) w - η m̂ / (√v̂ + ε),   m̂ = m / (1 - β₁ᵏ),   v̂ = v / (1 - β₂ᵏ)

    k counts the steps of each row, so that its moments are corrected by as many as it has seen.

    Args:
        params: parameters (V, D), or groups of them.
        lr: η. Default: ``0.001``.
        betas: (β₁, β₂). Default: ``(0.9, 0.999)``.
        eps: ε. Default: ``1e-08``.
        weight_decay: λ. Default: ``0.01``.
        state_dir: as in `RowSGD`. Default: ``None``.

    Note:
        State: 2·V·D moments and 4·V bytes. A step reads and writes the touched rows once.

    Example:
        >>> import torch, lossops
        >>> w = torch.nn.Parameter(torch.randn(1000, 8))
        >>> optimizer = lossops.optim.RowAdamW([w], lr=1e-2)
        >>> y = torch.tensor([3, 1, 4, 1])
        >>> sampler = lossops.samplers.Uniform(1000, 20)
        >>> lossops.sampled_softmax_loss(torch.randn(4, 8), w, y, sampler).backward()
        >>> optimizer.step()

    Reference:
        Loshchilov, Hutter, "Decoupled weight decay regularization", 2019, arXiv 1711.05101.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        state_dir: str | Path | None = None,
    ) -> None:
        self._tensors = StateTensors(state_dir)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the options of a group may be its own."""
        group = {**self.defaults, **param_group}
        _check_at_least_zero(**{n: group[n] for n in ("lr", "eps", "weight_decay")})
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas must be in [0, 1), got {group['betas']}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the rows that have a gradient."""
        loss = _evaluated(closure)
        for number, group, p in _parameters(self):
            if p.grad is None:
                continue
            state = self._state(number, p)
            ids, rows = touched_rows(p)
            primitives(p).adamw_rows(
                p, state["exp_avg"], state["exp_avg_sq"], state["count"], ids, rows,
                float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"],
            )  # fmt: skip
        return loss

    def row_state(self, p: Tensor) -> dict[str, Tensor]:
        """The state of ``p`` that has a row for each of its rows, made where there is none yet."""
        return self._state(_place(self, p)[0], p)

    def _state(self, number: int, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = self._tensors.zeros_like(p, number, name)
            state["count"] = torch.zeros(p.shape[0], dtype=torch.int32, device=p.device)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        super().load_state_dict(state_dict)
        _restore(self, state_dict["state"], self._tensors)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state_dir": self._tensors.directory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "state_dir" in state:  # of a copy; torch calls this for a loaded state as well
            self._tensors = StateTensors(state.pop("state_dir"))
        super().__setstate__(state)


def _restore(
    optimizer: torch.optim.Optimizer, saved: dict[int, Any], tensors: StateTensors
) -> None:
    """Counts as they were saved, and the rest in files where it is to be there.

    torch takes all state to the dtype of its parameter, and into memory.
    """
    for number, _, p in _parameters(optimizer):
        for name, value in saved.get(number, {}).items():
            if not isinstance(value, Tensor):
                continue
            if value.is_floating_point():
                state = optimizer.state[p]
                state[name] = tensors.keep(state[name], p, number, name)
            else:
                optimizer.state[p][name] = value.to(p.device, copy=True)


def touched_rows(p: Tensor) -> tuple[Tensor, Tensor]:
    """Rising distinct ids (S,) and gradients (S, D) of the rows that have one.

    As they were given where the CUDA kernels take them: these sort, and add up ids that repeat,
    while the number of distinct ids would have to be waited for.

    Raises:
        ValueError: a parameter that is no table of rows, or a gradient that has none.
    """
    grad = p.grad
    assert grad is not None
    if p.ndim != 2:
        raise ValueError(
            f"parameters must have shape (V, D), got {tuple(p.shape)}; give others to torch.optim"
        )
    if grad.is_sparse and grad.sparse_dim() != 1:
        raise ValueError(
            "a sparse gradient must hold whole rows, sparse_dim 1, got one of single values, "
            f"sparse_dim {grad.sparse_dim()}; pass grad.to_dense().to_sparse(1)"
        )
    if not grad.is_sparse:
        return torch.arange(p.shape[0], device=p.device), grad
    if primitives(p) is cuda_rows:
        return grad._indices()[0], grad._values()
    grad = coalesced(p)
    return grad.indices()[0].contiguous(), grad.values()


def coalesced(p: Tensor) -> Tensor:
    """The sparse gradient of p, from now on with rising distinct ids."""
    grad = p.grad
    assert grad is not None
    if grad.is_coalesced():
        return grad
    ids = grad._indices()[0]
    # autograd forgets that a gradient is coalesced; on a CPU a look is cheaper than the sort.
    if grad.device.type == "cpu" and grad.sparse_dim() == 1 and bool((ids[1:] > ids[:-1]).all()):
        p.grad = torch.sparse_coo_tensor(
            grad._indices(), grad._values(), grad.shape, is_coalesced=True, check_invariants=False
        )
    else:
        p.grad = grad.coalesce()
    assert p.grad is not None
    return p.grad


class StepProducts:
    """Products of the matrices of consecutive steps, the last one leftmost.

    Level l holds those of 2^l steps each; any run of steps is a product of at most 2 log T of them.
    """

    def __init__(self, steps: Tensor | None = None) -> None:
        self.count = 0
        self.levels: list[Tensor] = []
        if steps is not None:
            self.count = len(steps)
            level = steps.detach().cpu().double().clone()
            while len(level):
                self.levels.append(level)
                even = len(level) // 2 * 2
                level = _matrix_product(level[1:even:2], level[0:even:2])

    def __len__(self) -> int:
        return self.count

    @property
    def steps(self) -> Tensor:
        """The matrices themselves, (T, 2, 2) float64."""
        return self.levels[0][: self.count].clone()

    def append(self, matrix: list[list[float]]) -> None:
        """One more step."""
        product = torch.tensor(matrix, dtype=torch.float64)
        self.count += 1
        for level in range(self.count.bit_length()):
            if self.count % 2**level:
                return
            at = self.count // 2**level - 1
            if level:
                below = self.levels[level - 1]
                product = _matrix_product(below[2 * at + 1], below[2 * at])
            if level == len(self.levels):
                self.levels.append(product.new_zeros(4, 2, 2))
            if at == len(self.levels[level]):
                grown = torch.cat([self.levels[level], self.levels[level].new_zeros(at, 2, 2)])
                self.levels[level] = grown
            self.levels[level][at] = product

    def since(self, first: Tensor) -> Tensor:
        """Products of the steps from ``first`` (U,) on, (U, 2, 2)."""
        at = first.clone()
        found = torch.eye(2, dtype=torch.float64).expand(len(at), 2, 2).clone()

        def take(level: int, which: Tensor) -> None:
            some = which.nonzero().squeeze(1)
            if some.numel():
                found[some] = _matrix_product(self.levels[level][at[some] >> level], found[some])
                at[some] += 2**level

        for level in range(len(self.levels)):  # up to where longer runs begin
            take(level, ((at >> level) & 1 == 1) & (at + 2**level <= self.count))
        for level in reversed(range(len(self.levels))):
            take(level, at + 2**level <= self.count)
        return found


def _matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """a b of matrices (..., 2, 2), the same bits in any batch: a GEMM may round by its size."""
    return a[..., :1] * b[..., :1, :] + a[..., 1:] * b[..., 1:, :]


def _parameters(optimizer: torch.optim.Optimizer) -> list[tuple[int, dict[str, Any], Tensor]]:
    """Number, group and parameter, as state_dict numbers them."""
    pairs = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    return [(number, group, p) for number, (group, p) in enumerate(pairs)]


def _place(optimizer: torch.optim.Optimizer, p: Tensor) -> tuple[int, dict[str, Any]]:
    """Number and group of a parameter."""
    for number, group, q in _parameters(optimizer):
        if q is p:
            return number, group
    raise ValueError("p must be one of the optimizer's parameters, got another tensor")


def _evaluated(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _check_at_least_zero(**numbers: float) -> None:
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"{name} must be at least 0, got {number}")
