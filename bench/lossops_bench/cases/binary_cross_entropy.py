"""Binary cross-entropy of every class, five positives a row: extreme multi-label classification.

loss = 1/N Σ_i [Σ_j softplus(z_ij) - Σ_{j ∈ P_i} z_ij],   z = x wᵀ
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops_bench.case import Problem, Rival, Tensors, Truth
from lossops_bench.cases.linear_cross_entropy import CASE as LINEAR
from lossops_bench.cases.linear_cross_entropy import make_inputs as linear_inputs
from lossops_bench.inputs import log_uniform, tiny
from lossops_bench.rivals import GPU_BACKENDS, torch_rivals, trial
from lossops_bench.truth import some, some_classes

__all__ = ["CASE"]

POSITIVES = 5


def make_inputs(problem: Problem) -> Tensors:
    """Features pulled to one of their positives; classes drawn twice count once."""
    inputs = linear_inputs(problem)
    draw = torch.Generator().manual_seed(problem.seed * 1000 + 3)
    size = (problem.shape.rows, POSITIVES - 1)
    others = log_uniform(size, problem.shape.classes, draw).to(problem.device)
    positives = torch.cat([inputs.pop("target").unsqueeze(1), others], 1)
    return inputs | {"positives": positives}


def labels(positives: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """(N, V), 1 at the positives."""
    y = torch.zeros(len(positives), classes, dtype=dtype, device=positives.device)
    return y.scatter_(1, positives, 1.0)


def truth(problem: Problem, inputs: Tensors) -> Truth:
    """In float64, a slab of rows at a time."""
    x, w = (inputs[name].detach().double() for name in ("input", "linear_weight"))
    positives, total = inputs["positives"], x.new_zeros(())
    rows, classes = some(len(x), 128, x.device), some_classes(positives.flatten(), len(w), 512)
    dx, dw, first = torch.zeros_like(x[rows]), torch.zeros_like(w[classes]), 0
    for part, ids in zip(x.split(256), positives.split(256), strict=True):
        z, y = part @ w.T, labels(ids, len(w), x.dtype)  # (256, V)
        total += F.binary_cross_entropy_with_logits(z, y, reduction="sum")
        dz = (torch.sigmoid(z) - y) / len(x)
        dw += dz[:, classes].T @ part
        inside = (rows >= first) & (rows < first + len(part))
        dx[inside] = dz[rows[inside] - first] @ w
        first += len(part)
    return Truth(total / len(x), {"dx": (rows, dx), "dw": (classes, dw)})


def plain(upcast: bool, input: Tensor, linear_weight: Tensor, positives: Tensor) -> Tensor:
    z = input @ linear_weight.T
    z = z.float() if upcast and z.itemsize < 4 else z
    y = labels(positives, len(linear_weight), z.dtype)
    return F.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(z)


def lossops_loss(backend: str, input: Tensor, linear_weight: Tensor, positives: Tensor) -> Tensor:
    import lossops

    return lossops.linear_binary_cross_entropy(input, linear_weight, positives, backend=backend)


def little(problem: Problem) -> int:
    """float32 gradients beside those returned, and some tiles."""
    return 4 * (problem.shape.rows + problem.shape.classes) * problem.shape.features + 2**26


def lossops_rival(backend: str, summary: str) -> Rival:
    loss = partial(lossops_loss, backend)
    return Rival(f"lossops-{backend}", summary, loss, little, objection=partial(_against, loss))


def _against(loss: partial[Tensor], problem: Problem) -> str | None:
    return trial(loss, make_inputs, tiny(problem))


CASE = replace(
    LINEAR,
    name="linear_binary_cross_entropy",
    summary="binary cross-entropy of all classes of a linear head, five positives a row",
    make_inputs=make_inputs,
    per_row=("input", "positives"),
    truth=truth,
    rivals=(
        lossops_rival("cpp", "lossops, C++ backend"),
        *(lossops_rival(*each) for each in GPU_BACKENDS.items()),
        lossops_rival("reference", "lossops, plain PyTorch in tiles"),
        *torch_rivals(partial(plain, True), partial(plain, False)),
    ),
)
