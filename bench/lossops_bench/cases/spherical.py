"""Z-loss of a dense linear head: softplus of the target's standard score among a row's logits.

    loss = mean of (1/a) log(1 + exp(a (b - (z_y - μ) / σ))),   z = x wᵀ,   a = 1, b = 0

The logits are not needed: μ and σ follow from sums over classes of w and w wᵀ.
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops_bench.case import Cost, Problem, Rival, Tensors, Truth
from lossops_bench.cases.linear_cross_entropy import CASE as LINEAR
from lossops_bench.inputs import tiny
from lossops_bench.rivals import logits_bytes, trial
from lossops_bench.truth import some, some_classes

__all__ = ["CASE"]


def truth(problem: Problem, inputs: Tensors) -> Truth:
    """In float64, a slab of rows at a time."""
    x, w = (inputs[name].detach().double() for name in ("input", "linear_weight"))
    y, total = inputs["target"], x.new_zeros(())
    rows, classes = some(len(x), 128, x.device), some_classes(y, len(w), 512)
    leaf = x[rows].requires_grad_()
    (dx,) = torch.autograd.grad(moments(leaf, w, y[rows]).sum() / len(x), leaf)
    dw = x.new_zeros(len(classes), x.shape[1])
    for part, ids in zip(x.split(128), y.split(128), strict=True):
        z = part @ w.T  # (128, V)
        deviation, mean = torch.std_mean(z, 1, correction=0, keepdim=True)
        scores = (z - mean) / deviation
        own = scores.gather(1, ids.unsqueeze(1))
        total += F.softplus(-own).sum()
        slope = torch.sigmoid(-own) / (len(w) * deviation)
        dz = slope * (1 + own * scores[:, classes] - len(w) * (ids.unsqueeze(1) == classes))
        dw += dz.T @ part
    return Truth(total / len(x), {"dx": (rows, dx), "dw": (classes, dw / len(x))})


def moments(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Losses (N,) from the mean and standard deviation of all logits."""
    z = x @ w.T
    z = z.float() if z.itemsize < 4 else z
    deviation, mean = torch.std_mean(z, 1, correction=0)
    return F.softplus(-(z.gather(1, y.unsqueeze(1)).squeeze(1) - mean) / deviation)


def standard(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return moments(input, linear_weight, target).mean()


def sums(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    z = input @ linear_weight.T
    z = z.float() if z.itemsize < 4 else z
    own, v = z.gather(1, target.unsqueeze(1)).squeeze(1), z.shape[1]
    return _from_sums(own, z.sum(1), z.square().sum(1), v)


def three_lines(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """What a reader of the paper would write, with autograd: squares of uncentred float32 sums."""
    sum = input @ linear_weight.sum(0)
    sumsq = ((input @ (linear_weight.T @ linear_weight)) * input).sum(1)
    own = (input * linear_weight[target]).sum(1)
    return _from_sums(own, sum, sumsq, len(linear_weight))


def _from_sums(own: Tensor, sum: Tensor, sumsq: Tensor, v: int) -> Tensor:
    mean = sum / v
    return F.softplus(-(own - mean) / (sumsq / v - mean.square()).sqrt()).mean()


def lossops_loss(mode: str, input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    import lossops

    return lossops.linear_spherical_z_loss(input, linear_weight, target, a=1.0, b=0.0, mode=mode)


def cost(problem: Problem) -> Cost:
    """Gram mode: half a product of (D, V) by (V, D) forward and a whole one backward."""
    d, v = problem.shape.features, problem.shape.classes
    training = problem.mode == "training"
    flops = (3 if training else 1) * v * d * d
    return Cost((3 if training else 1) * v * d * problem.itemsize, flops)


def little(problem: Problem) -> int:
    """A float32 gradient of w and some matrices of D²."""
    return 4 * problem.shape.features * (problem.shape.classes + 64 * problem.shape.features)


def lossops_rival(mode: str, summary: str) -> Rival:
    loss = partial(lossops_loss, mode)
    objection = partial(_against, loss)
    return Rival(f"lossops-{mode}", summary, loss, little, objection=objection)


def _against(loss: partial[Tensor], problem: Problem) -> str | None:
    return trial(loss, LINEAR.make_inputs, tiny(problem))


CASE = replace(
    LINEAR,
    name="spherical",
    summary="Z-loss of a linear head: Gram matrices, tiles and all logits",
    truth=truth,
    cost=cost,
    rivals=(
        lossops_rival("gram", "lossops, from D×D matrices"),
        lossops_rival("sweep", "lossops, in tiles of logits"),
        Rival("plain", "PyTorch, sums and squares of all logits", sums, partial(logits_bytes, 4)),
        Rival("plain-std", "PyTorch, std_mean of all logits", standard, partial(logits_bytes, 4)),
        Rival("three-lines", "PyTorch, xᵀ(wᵀw)x with autograd", three_lines, little),
    ),
)
