"""What a benchmark case is: inputs, rivals, a float64 truth and a model of its cost.

A case is one `Case` value in its own file under `cases/`; everything else is generic. Its
functions live at module level, because memory is measured in fresh processes that import them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lossops_bench.shapes import Shape

__all__ = ["Case", "Cost", "Mode", "Problem", "Rival", "Tensors", "Truth", "Unit"]

Mode = Literal["training", "forward"]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """One measurement's setting; the inputs follow from it alone."""

    shape: Shape
    dtype: torch.dtype
    mode: Mode = "training"
    device: str = "cpu"
    threads: int = 1
    seed: int = 0

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Cost:
    """The least a perfect implementation moves and computes, the same for all rivals."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Truth:
    """The float64 answer: the loss, and for each gradient some of its rows, `(ids, values)`."""

    loss: Tensor  # ()
    gradients: dict[str, tuple[Tensor, Tensor]]


def _no_objection(problem: Problem) -> str | None:
    return None


def _no_note(problem: Problem, inputs: Tensors) -> str:
    return ""


@dataclass(frozen=True)
class Rival:
    """One implementation of a case's mean loss."""

    name: str
    summary: str
    loss: Callable[..., Tensor]
    """Called with the case's inputs by name; returns the mean loss, differentiable."""
    workspace: Callable[[Problem], int]
    """Rough bytes beyond inputs and gradients; decides only whether a run fits in memory."""
    objection: Callable[[Problem], str | None] = _no_objection
    """Why it cannot run, in a sentence, or None."""
    note: Callable[[Problem, Tensors], str] = _no_note
    """How it ran, e.g. the schedule that was chosen."""
    compiles: bool = False
    """It compiles for the shape on its first call, which is then no part of any measurement."""
    consumes: bool = False
    """It overwrites its inputs: every call gets copies of its own, made before the clock starts."""


@dataclass(frozen=True)
class Unit:
    """The unit of cost: the fastest of several ways to do the one operation everyone needs."""

    name: str
    ways: Callable[[Problem, Tensors], dict[str, Callable[[], Callable[[], object]]]]
    """By name; each prepares what it writes to and returns the call to time."""
    cost: Callable[[Problem], Cost]


@dataclass(frozen=True)
class Case:
    """An entry of the benchmark."""

    name: str
    summary: str
    make_inputs: Callable[[Problem], Tensors]
    """Seeded by the problem."""
    differentiable: dict[str, str]
    """The inputs whose gradients training mode computes, and what to call the gradients."""
    per_row: tuple[str, ...]
    """The inputs whose first dimension is N."""
    truth: Callable[[Problem, Tensors], Truth]
    truth_flops: Callable[[Shape], int]
    """Float64 operations of `truth`, which decide on how many rows it is affordable."""
    cost: Callable[[Problem], Cost]
    resident_bytes: Callable[[Problem], int]
    """Bytes of the inputs and their gradients; decides only whether a run fits in memory."""
    unit: Unit
    rivals: tuple[Rival, ...]
    in_parts: bool = False
    """Whether the loss is a mean over rows, so that parts of the rows add up to it."""
    baseline: str = "plain"
    """The rival whose errors are the budget of the others."""

    def rival(self, name: str) -> Rival:
        for rival in self.rivals:
            if rival.name == name:
                return rival
        known = ", ".join(rival.name for rival in self.rivals)
        raise ValueError(f"{self.name} has no rival {name!r}; it has {known}")

    def with_gradients(self, problem: Problem, inputs: Tensors) -> Tensors:
        """The inputs as fresh leaves that require the gradients the problem's mode needs."""
        training = problem.mode == "training"
        return {
            name: value.detach().requires_grad_(training and name in self.differentiable)
            for name, value in inputs.items()
        }

    def prepare(self, rival: Rival, mode: Mode, inputs: Tensors) -> Callable[[], Tensors]:
        """A `call` that leaves the inputs as they are."""
        if rival.consumes:
            inputs = {
                k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in inputs.items()
            }
        return partial(self.call, rival, mode, inputs)

    def call(self, rival: Rival, mode: Mode, inputs: Tensors) -> Tensors:
        """The loss, and in training mode the gradients by their names."""
        if mode == "forward":
            with torch.no_grad():
                return {"loss": rival.loss(**inputs)}
        loss = rival.loss(**inputs)
        leaves = [inputs[name] for name in self.differentiable]
        gradients = torch.autograd.grad(loss, leaves)
        named = zip(self.differentiable.values(), gradients, strict=True)
        return {"loss": loss.detach(), **dict(named)}

    def first_rows(self, inputs: Tensors, rows: int) -> Tensors:
        """The same problem on its first rows, as views."""
        return self.rows(inputs, 0, rows)

    def rows(self, inputs: Tensors, first: int, stop: int) -> Tensors:
        """The same problem on some of its rows, as views; leaves stay leaves where they are cut."""
        return {
            k: v[first:stop].detach().requires_grad_(v.requires_grad) if k in self.per_row else v
            for k, v in inputs.items()
        }
