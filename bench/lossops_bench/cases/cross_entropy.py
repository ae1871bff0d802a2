"""Cross-entropy of logits that exist already: z (N, V), y (N,). Bound by memory traffic.

The unit is one copy of the logits: training has to read them and write as much gradient.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops_bench.case import Case, Cost, Problem, Rival, Tensors, Truth, Unit
from lossops_bench.inputs import normal, targets, tiny
from lossops_bench.measure import copy_ways
from lossops_bench.rivals import GPU_BACKENDS, logits_bytes, torch_rivals, trial
from lossops_bench.shapes import Shape
from lossops_bench.truth import logits_truth

__all__ = ["CASE"]


def make_inputs(problem: Problem) -> Tensors:
    """Logits ~ N(0, 4), the target's raised by up to 16."""
    shape = problem.shape
    z = normal(shape.rows, shape.classes, 2.0, problem, stream=1)
    y = targets(problem)
    raised = torch.linspace(0, 16, shape.rows, device=z.device, dtype=z.dtype)
    return {"logits": z.scatter_add_(1, y[:, None], raised[:, None]), "target": y}


def truth(problem: Problem, inputs: Tensors) -> Truth:
    return logits_truth(inputs["logits"], inputs["target"])


def truth_flops(shape: Shape) -> int:
    """A float64 exponential takes as long as about 50 operations of a product."""
    return 50 * shape.rows * shape.classes


def cost(problem: Problem) -> Cost:
    """Logits read once, their gradient written once; an exponential counts as one operation."""
    logits = problem.shape.rows * problem.shape.classes
    passes = 2 if problem.mode == "training" else 1
    return Cost(bytes=passes * logits * problem.itemsize, flops=passes * 3 * logits)


def copy_cost(problem: Problem) -> Cost:
    logits = problem.shape.rows * problem.shape.classes
    return Cost(bytes=2 * logits * problem.itemsize, flops=0)


def resident_bytes(problem: Problem) -> int:
    copies = 2 if problem.mode == "training" else 1
    return copies * problem.shape.rows * problem.shape.classes * problem.itemsize


def plain(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float() if logits.itemsize < 4 else logits, target)


def plain_half(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def lossops_loss(backend: str, logits: Tensor, target: Tensor) -> Tensor:
    import lossops

    return lossops.cross_entropy(logits, target, backend=backend)


def inplace_loss(logits: Tensor, target: Tensor) -> Tensor:
    import lossops

    # A view, as a leaf is refused: in a model the logits are the result of the head.
    return lossops.cross_entropy(logits.view_as(logits), target, inplace=True)


def against_lossops(backend: str, problem: Problem) -> str | None:
    return trial(partial(lossops_loss, backend), make_inputs, tiny(problem))


def against_inplace(problem: Problem) -> str | None:
    if problem.mode == "forward":
        return "without a gradient it is the same as the others"
    return trial(inplace_loss, make_inputs, tiny(problem))


def lossops_rival(backend: str, summary: str) -> Rival:
    return Rival(
        f"lossops-{backend}",
        summary,
        partial(lossops_loss, backend),
        partial(logits_bytes, 1),
        objection=partial(against_lossops, backend),
    )


CASE = Case(
    name="cross_entropy",
    summary="cross-entropy of existing logits (N, V); D is not used",
    make_inputs=make_inputs,
    differentiable={"logits": "dz"},
    per_row=("logits", "target"),
    truth=truth,
    truth_flops=truth_flops,
    cost=cost,
    resident_bytes=resident_bytes,
    unit=Unit("copy", partial(copy_ways, "logits"), copy_cost),
    rivals=(
        lossops_rival("cpp", "lossops, C++ backend"),
        *(lossops_rival(*each) for each in GPU_BACKENDS.items()),
        lossops_rival("reference", "lossops, plain PyTorch in chunks"),
        Rival(
            "lossops-inplace",
            "lossops, the gradient in the place of the logits",
            inplace_loss,
            partial(logits_bytes, 0),
            objection=against_inplace,
            consumes=True,
        ),
        *torch_rivals(plain, plain_half),
    ),
)
