"""Each loss of the catalogue beside its plain PyTorch form on stored logits.

One case per loss, made from the two tables, `lossops.catalogue.RECIPES` and
`lossops_bench.dense.DENSE`. The unit of time is our own plain cross-entropy on the same inputs, so
that what a loss costs beyond it can be read off.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lossops_bench.case import Case, Problem, Rival, Tensors, Truth, Unit
from lossops_bench.cases.linear_cross_entropy import CASE as LINEAR
from lossops_bench.cases.linear_cross_entropy import chunk_bytes, cost
from lossops_bench.cases.linear_cross_entropy import make_inputs as linear_inputs
from lossops_bench.dense import DENSE, Draw
from lossops_bench.inputs import tiny
from lossops_bench.rivals import logits_bytes, trial
from lossops_bench.shapes import Shape
from lossops_bench.truth import some, some_classes

__all__ = ["CATALOGUE", "CATALOGUE_LOSSES"]

TOKENS = 64
"""Tokens of a sequence, where a loss takes sequences."""
PART = ":"
"""Between the name of an argument that is a tuple and the position in it."""


def lead(name: str, rows: int) -> tuple[int, ...]:
    """The leading dims of the features: N, or an even number of sequences."""
    if len(DENSE[name].lead) == 1:
        return (rows,)
    tokens = min(TOKENS, rows // 2)
    return (rows // tokens // 2 * 2, tokens)


def make_inputs(name: str, problem: Problem) -> Tensors:
    """Those of cross-entropy, and what the loss needs beside, flat."""
    inputs = linear_inputs(problem)
    shape = problem.shape
    dims = lead(name, shape.rows)
    rows = torch.Size(dims).numel()
    found = {
        "input": inputs["input"][:rows].reshape(*dims, -1),
        "linear_weight": inputs["linear_weight"],
        "target": inputs["target"][:rows].reshape(dims),
    }
    row = DENSE[name]
    if row.extras is None:
        return found
    draw = torch.Generator().manual_seed(problem.seed * 1000 + 7)
    drawn = row.extras(Draw(dims, shape.classes, shape.features, problem.dtype, draw))
    for argument, value in drawn.items():
        if isinstance(value, tuple):
            found |= {f"{argument}{PART}{i}": t for i, t in enumerate(value)}
        else:
            found[argument] = value
    return {argument: t.to(problem.device) for argument, t in found.items()}


def arguments(name: str, inputs: Tensors) -> dict[str, Any]:
    """Own arguments of the loss, tuples put together again."""
    whole: dict[str, Any] = dict(DENSE[name].variants[0])
    tuples: dict[str, list[Tensor]] = {}
    for argument, value in inputs.items():
        if PART in argument:
            tuples.setdefault(argument.partition(PART)[0], []).append(value)
        elif argument not in ("input", "linear_weight", "target"):
            whole[argument] = value
    return whole | {argument: tuple(values) for argument, values in tuples.items()}


def lossops_loss(name: str, **inputs: Tensor) -> Tensor:
    import lossops

    recipe = lossops.catalogue.RECIPES[name]
    first = [inputs[n] for n in ("input", "linear_weight", "target") if n in recipe.positional]
    loss: Tensor = recipe.face(*first, **arguments(name, inputs))
    return loss


def plain(name: str, **inputs: Tensor) -> Tensor:
    x, w, y = (inputs[n] for n in ("input", "linear_weight", "target"))
    row, own = DENSE[name], arguments(name, inputs)
    if row.of_features:
        return row.losses(x, w, y, **own).mean()
    z = x @ w.T
    z = z.float() if z.itemsize < 4 else z
    wide = {n: _upcast(v, z.dtype) for n, v in own.items()}
    return row.losses(z, y, **wide).mean()


def _upcast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple) and all(isinstance(v, Tensor) for v in value):
        return tuple(_upcast(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def truth(name: str, problem: Problem, inputs: Tensors) -> Truth:
    """By autograd in float64."""
    wide = {n: _upcast(t.detach(), torch.float64) for n, t in inputs.items()}
    x, w = wide["input"].requires_grad_(), wide["linear_weight"].requires_grad_()
    loss = plain(name, **wide)
    dx, dw = torch.autograd.grad(loss, (x, w))
    rows = some(len(x), 128, x.device)
    classes = some_classes(inputs["target"].flatten(), len(w), 512)
    return Truth(loss.detach(), {"dx": (rows, dx[rows]), "dw": (classes, dw[classes])})


def truth_flops(name: str, shape: Shape) -> int:
    """A few float64 matrices of all logits, by rows: for sequences, of those."""
    operations = 8 * shape.rows * shape.features * shape.classes
    if DENSE[name].by_feature:
        operations *= shape.features
    return operations * (shape.rows // lead(name, shape.rows)[0])


def cross_entropy(problem: Problem, inputs: Tensors) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Our plain cross-entropy, with the gradients that the mode asks for."""
    rows = inputs["target"].numel()
    given = {
        "input": inputs["input"].detach().reshape(rows, -1),
        "linear_weight": inputs["linear_weight"].detach(),
        "target": inputs["target"].reshape(rows),
    }
    leaves = LINEAR.with_gradients(problem, given)
    lossops = (rival for rival in LINEAR.rivals if rival.name.startswith("lossops-"))
    ours = next(rival for rival in lossops if rival.objection(problem) is None)
    return {ours.name: partial(LINEAR.prepare, ours, problem.mode, leaves)}


def case(name: str) -> Case:
    """The case of one loss."""
    import lossops

    loss = partial(lossops_loss, name)
    inputs = partial(make_inputs, name)
    small = Shape(4, 2, 16)
    drawn = make_inputs(name, Problem(small, torch.float32))
    first = len(drawn["input"])
    return replace(
        LINEAR,
        name=f"catalogue/{name}",
        summary=lossops.catalogue.RECIPES[name].use,
        make_inputs=inputs,
        per_row=tuple(n for n, t in drawn.items() if n != "linear_weight" and len(t) == first),
        truth=partial(truth, name),
        truth_flops=partial(truth_flops, name),
        unit=Unit("CE", cross_entropy, cost),
        rivals=(
            Rival("lossops", "lossops.catalogue", loss, chunk_bytes,
                  objection=partial(_against, loss, inputs)),
            Rival("plain", "PyTorch on stored logits, upcast", partial(plain, name),
                  partial(plain_bytes, name)),
        ),
    )  # fmt: skip


def plain_bytes(name: str, problem: Problem) -> int:
    """Half a dozen float32 matrices of all logits, or of their features."""
    return logits_bytes(8, problem) * (problem.shape.features if DENSE[name].by_feature else 1)


def _against(loss: partial[Tensor], inputs: partial[Tensors], problem: Problem) -> str | None:
    return trial(loss, inputs, tiny(problem))


CATALOGUE_LOSSES = [name for name, row in DENSE.items() if row.leaves is None]
"""Those of a head; losses over pairs are timed by the cases of their own."""
CATALOGUE: dict[str, Callable[[], Case]] = {
    f"catalogue/{name}": partial(case, name) for name in CATALOGUE_LOSSES
}
"""Made when asked for."""
