"""Cross-entropy of a linear head: loss = mean of logsumexp(x wᵀ) − (x wᵀ)_y, from x, w and y.

Training takes the gradients of x and w as well: three products, 6 N D V operations.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops_bench.case import Case, Cost, Problem, Rival, Tensors, Truth, Unit
from lossops_bench.inputs import normal, pulled_features, targets, tiny
from lossops_bench.measure import product_ways
from lossops_bench.rivals import GPU_BACKENDS, torch_rivals, trial
from lossops_bench.shapes import Shape
from lossops_bench.truth import linear_truth

__all__ = ["CASE"]


def make_inputs(problem: Problem) -> Tensors:
    shape = problem.shape
    w = normal(shape.classes, shape.features, shape.features**-0.5, problem, stream=1)
    y = targets(problem)
    return {"input": pulled_features(problem, w, y), "linear_weight": w, "target": y}


def truth(problem: Problem, inputs: Tensors) -> Truth:
    return linear_truth(inputs["input"], inputs["linear_weight"], inputs["target"])


def truth_flops(shape: Shape) -> int:
    return 2 * shape.rows * shape.features * shape.classes


def product_cost(problem: Problem) -> Cost:
    """One product, with logits that count nothing."""
    n, d, v = problem.shape.rows, problem.shape.features, problem.shape.classes
    return Cost(bytes=(n * d + v * d) * problem.itemsize, flops=2 * n * d * v)


def cost(problem: Problem) -> Cost:
    """Three products in training, of which each reads or writes an (N, D) and a (V, D)."""
    one = product_cost(problem)
    products = 3 if problem.mode == "training" else 1
    return Cost(products * one.bytes, products * one.flops)


def resident_bytes(problem: Problem) -> int:
    shape = problem.shape
    copies = 2 if problem.mode == "training" else 1
    return copies * (shape.rows + shape.classes) * shape.features * problem.itemsize


def plain(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(input, linear_weight)  # (N, V)
    return F.cross_entropy(logits.float() if logits.itemsize < 4 else logits, target)


def plain_half(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, linear_weight), target)


def chunked(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(input, linear_weight, target, options=options)


def against_chunked(problem: Problem) -> str | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no LinearCrossEntropyOptions; 2.13 has"


def lossops_loss(backend: str, input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    import lossops

    return lossops.linear_cross_entropy(input, linear_weight, target, backend=backend)


def against_lossops(backend: str, problem: Problem) -> str | None:
    return trial(partial(lossops_loss, backend), make_inputs, tiny(problem))


def schedule(problem: Problem, inputs: Tensors, *, backend: str) -> str:
    """Which of the two schedules lossops takes for these inputs."""
    from lossops.inputs import head_inputs
    from lossops.linear import keeps_one_chunk, planned_rows
    from lossops.schedules import LinearLossOptions

    if problem.mode == "forward":
        return ""
    head = head_inputs(inputs["input"], inputs["linear_weight"], None, None, None)
    plan = (head, LinearLossOptions(), ("lse", "target"), backend)
    rows = head.x.shape[0] if keeps_one_chunk(*plan) else planned_rows(*plan)
    return "two_sweeps" if rows is None else f"one_sweep R={rows}"


def chunk_bytes(problem: Problem) -> int:
    """A float32 gradient of w beside the one returned, and half a GiB of chunk."""
    return 4 * problem.shape.classes * problem.shape.features + 2**29


def lossops_rival(backend: str, summary: str) -> Rival:
    return Rival(
        f"lossops-{backend}",
        summary,
        partial(lossops_loss, backend),
        chunk_bytes,
        objection=partial(against_lossops, backend),
        note=partial(schedule, backend=backend),
    )


CASE = Case(
    name="linear_cross_entropy",
    summary="cross-entropy of a linear head, from features and class vectors",
    make_inputs=make_inputs,
    differentiable={"input": "dx", "linear_weight": "dw"},
    per_row=("input", "target"),
    truth=truth,
    truth_flops=truth_flops,
    cost=cost,
    resident_bytes=resident_bytes,
    unit=Unit("GEMM", partial(product_ways, "input", "linear_weight"), product_cost),
    rivals=(
        lossops_rival("cpp", "lossops, C++ backend"),
        *(lossops_rival(*each) for each in GPU_BACKENDS.items()),
        lossops_rival("reference", "lossops, plain PyTorch in chunks"),
        *torch_rivals(plain, plain_half),
        Rival(
            "torch-chunked",
            "F.linear_cross_entropy, LinearCrossEntropyOptions()",
            chunked,
            chunk_bytes,
            objection=against_chunked,
        ),
    ),
)
