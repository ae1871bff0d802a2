"""Losses over all pairs of two towers' features: sigmoid (SigLIP) and softmax (CLIP).

    z_ij = t x_i·w_j + b     sigmoid: 1/N Σ_ij softplus(-y_ij z_ij), y = 1 on the diagonal, else -1
                             softmax: cross-entropy of the rows and of the columns of z, averaged

N images and V texts; pair i is the diagonal. t = 10 and b = -10, as training begins. Training takes
the gradients of both features, of t and of b: three products, 6 N D V operations.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops_bench.case import Case, Problem, Rival, Tensors, Truth, Unit
from lossops_bench.cases.linear_cross_entropy import (
    cost,
    product_cost,
    resident_bytes,
    truth_flops,
)
from lossops_bench.inputs import normal, tiny
from lossops_bench.measure import product_ways
from lossops_bench.rivals import GPU_BACKENDS, torch_rivals, trial
from lossops_bench.truth import some

__all__ = ["SIGMOID", "SOFTMAX"]

SCALE, BIAS = 10.0, -10.0


def make_inputs(loss: str, problem: Problem) -> Tensors:
    """Unit vectors; those of a pair have a cosine near 0.7."""
    n, d, v = problem.shape.rows, problem.shape.features, problem.shape.classes
    w = normal(v, d, 1.0, problem, stream=1)
    x = normal(n, d, 1.0, problem, stream=2)
    common = min(n, v)
    x[:common] += w[:common]
    wide = torch.promote_types(problem.dtype, torch.float32)
    for features in (x, w):
        for block in features.split(2**16):
            block.copy_(F.normalize(block.to(wide), dim=1))
    scalar = partial(torch.full, (1,), dtype=wide, device=problem.device)
    inputs = {"image_features": x, "text_features": w, "logit_scale": scalar(fill_value=SCALE)}
    if loss == "softmax":
        return inputs
    ids = torch.arange(n, device=problem.device)  # by number: parts of the rows keep theirs
    positives = torch.where(ids < v, ids, -1).unsqueeze(1)
    return inputs | {"logit_bias": scalar(fill_value=BIAS), "positives": positives}


def truth(loss: str, problem: Problem, inputs: Tensors) -> Truth:
    """In float64, a slab of rows at a time; columns' sums first where the loss has them."""
    x, w, t = (value.detach().double() for value in [*inputs.values()][:3])
    b = inputs["logit_bias"].detach().double() if loss == "sigmoid" else 0.0
    rows, columns = some(len(x), 128, x.device), some(len(w), 1024, x.device)
    lse, pairs = x.new_full((len(w),), -torch.inf), min(len(x), len(w))
    if loss == "softmax":
        for part in x.split(256):
            lse = torch.logaddexp(lse, (t * (part @ w.T)).logsumexp(0))
    total, dt, db = x.new_zeros(()), x.new_zeros(1), x.new_zeros(1)
    dx, dw = torch.zeros_like(x[rows]), torch.zeros_like(w[columns])
    first = 0
    for part in x.split(256):
        ids = torch.arange(first, first + len(part), device=x.device)
        s = part @ w.T  # (256, V)
        y = ids.unsqueeze(1) == torch.arange(len(w), device=x.device)
        if loss == "sigmoid":
            signed = torch.where(y, -1.0, 1.0) * (t * s + b)
            total += F.softplus(signed).sum()
            dz = torch.where(y, -1.0, 1.0) * torch.sigmoid(signed) / len(x)
        else:
            z, own = t * s, (ids < pairs).unsqueeze(1)
            counted = (ids < pairs).nonzero().squeeze(1)
            total += ((z.logsumexp(1)[counted] + lse[ids[counted]]) / 2 - z[y]).sum()
            columns_p = torch.where(torch.arange(len(w), device=x.device) < pairs, 1.0, 0.0)
            by_row, by_column = z.softmax(1) * own, (z - lse).exp() * columns_p
            dz = ((by_row + by_column) / 2 - y.double()) / pairs
        dt += (dz * s).sum()
        db += dz.sum() if loss == "sigmoid" else 0
        dw += t * dz[:, columns].T @ part
        inside = (rows >= first) & (rows < first + len(part))
        dx[inside] = t * dz[rows[inside] - first] @ w
        first += len(part)
    gradients = {"dx": (rows, dx), "dw": (columns, dw), "dt": (torch.tensor([0]), dt)}
    if loss == "sigmoid":
        gradients["db"] = (torch.tensor([0]), db)
    return Truth(total / (len(x) if loss == "sigmoid" else pairs), gradients)


def plain_sigmoid(
    upcast: bool, image_features: Tensor, text_features: Tensor, logit_scale: Tensor,
    logit_bias: Tensor, positives: Tensor,
) -> Tensor:  # fmt: skip
    x, b = (
        image_features * logit_scale.to(image_features.dtype),
        logit_bias.to(image_features.dtype),
    )
    z = torch.addmm(b.expand(len(text_features)), x, text_features.T)
    z = z.float() if upcast and z.itemsize < 4 else z
    y = torch.full_like(z, -1.0)
    y.scatter_(1, positives.clamp_min(0), torch.where(positives < 0, -1.0, 1.0).to(z.dtype))
    return -F.logsigmoid(y * z).sum() / len(z)


def plain_softmax(
    upcast: bool, image_features: Tensor, text_features: Tensor, logit_scale: Tensor
) -> Tensor:
    z = (image_features * logit_scale.to(image_features.dtype)) @ text_features.T
    z = z.float() if upcast and z.itemsize < 4 else z
    pairs = min(z.shape)
    y = torch.arange(pairs, device=z.device)
    return (F.cross_entropy(z[:pairs], y) + F.cross_entropy(z.T[:pairs], y)) / 2


def lossops_sigmoid(
    backend: str, image_features: Tensor, text_features: Tensor, logit_scale: Tensor,
    logit_bias: Tensor, positives: Tensor,
) -> Tensor:  # fmt: skip
    import lossops

    return lossops.sigmoid_pairwise_loss(
        image_features, text_features, logit_scale, logit_bias, positives=positives,
        backend=backend,
    )  # fmt: skip


def lossops_softmax(
    backend: str, image_features: Tensor, text_features: Tensor, logit_scale: Tensor
) -> Tensor:
    import lossops

    return lossops.softmax_pairwise_loss(
        image_features, text_features, logit_scale, backend=backend
    )


LOSSES = {
    "sigmoid": (plain_sigmoid, lossops_sigmoid),
    "softmax": (plain_softmax, lossops_softmax),
}


def little(problem: Problem) -> int:
    """float32 gradients of both features beside those returned, and some tiles."""
    shape = problem.shape
    return 4 * (shape.rows + shape.classes) * shape.features + 2**26


def lossops_rival(loss: str, backend: str, summary: str) -> Rival:
    call = partial(LOSSES[loss][1], backend)
    objection = partial(_against, loss, call)
    return Rival(f"lossops-{backend}", summary, call, little, objection=objection)


def _against(loss: str, call: partial[Tensor], problem: Problem) -> str | None:
    return trial(call, partial(make_inputs, loss), tiny(problem))


def case(loss: str, summary: str, gradients: dict[str, str]) -> Case:
    return Case(
        name=f"{loss}_pairwise",
        summary=summary,
        make_inputs=partial(make_inputs, loss),
        differentiable={"image_features": "dx", "text_features": "dw", **gradients},
        per_row=("image_features", "positives"),
        truth=partial(truth, loss),
        truth_flops=truth_flops,
        cost=cost,
        resident_bytes=resident_bytes,
        in_parts=loss == "sigmoid",
        unit=Unit("GEMM", partial(product_ways, "image_features", "text_features"), product_cost),
        rivals=(
            lossops_rival(loss, "cpp", "lossops, C++ backend"),
            *(lossops_rival(loss, *each) for each in GPU_BACKENDS.items()),
            lossops_rival(loss, "reference", "lossops, plain PyTorch in tiles"),
            *torch_rivals(*(partial(LOSSES[loss][0], upcast) for upcast in (True, False))),
        ),
    )  # fmt: skip


SIGMOID = case(
    "sigmoid", "sigmoid loss over all pairs of N images and V texts",
    {"logit_scale": "dt", "logit_bias": "db"},
)  # fmt: skip
SOFTMAX = case(
    "softmax", "softmax loss over rows and columns of N images and N texts", {"logit_scale": "dt"}
)
