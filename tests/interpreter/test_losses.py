"""Every family end to end with ``backend="triton"`` on CPU tensors, interpreted and checked.

Value and gradients against plain float64, within twice the error of the reference backend in the
same dtype, and the column of the README's table that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import memory
import pytest
import repair
import torch
from conftest import FLOOR, assert_no_worse, make_inputs
from test_docs import README, backend_table, between_markers
from torch import Tensor

import lossops
from lossops import LinearLossOptions, catalogue

assert repair.TARGET.backend == "cuda"
N, V, D = 6, 150, 24
Loss = Callable[..., Tensor]
Y = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1)).index_fill_(
    0, torch.tensor(2), -100
)
IDS = torch.rand(N, V, generator=torch.Generator().manual_seed(2)).topk(3).indices
TWO = LinearLossOptions(schedule="two_sweeps")
CHUNKS = LinearLossOptions(chunk_rows=4)


def log_probs(x: Tensor, w: Tensor, b: Tensor, **options: Any) -> Tensor:
    log_prob, entropy = lossops.linear_log_prob(
        x, w, IDS[:, 0], linear_bias=b, entropy=True, **options
    )
    return log_prob + 0.3 * entropy


def statistics(x: Tensor, w: Tensor, b: Tensor, **options: Any) -> Tensor:
    names = ("target", "lse", "sumsq", "runner_up", "lse@2")
    found = lossops.linear_statistics(x, w, IDS[:, 0], linear_bias=b, names=names, **options)
    return found.log_p + 0.1 * found.sumsq - 0.2 * found.runner_up + found.lse_at(2.0)


def sampled(function: Loss, **more: Any) -> Loss:
    def call(x: Tensor, w: Tensor, b: Tensor, **options: Any) -> Tensor:
        sampler = lossops.samplers.LogUniform(V, 20, seed=3)
        return function(x, w, IDS[:, 0], sampler, linear_bias=b, **more, **options)

    return call


def partial_fc(x: Tensor, w: Tensor, b: Tensor, *, backend: str) -> Tensor:
    """A sample of the classes, normalised rows and a margin; b is not used."""
    margin = lossops.ArcFace()
    head = lossops.PartialFC(
        D, V, sample_rate=0.5, margin=margin, sparse=False, backend=backend, dtype=x.dtype
    )
    return torch.func.functional_call(head, {"weight": w}, (x, IDS[:, 0]))


def biased(function: Loss, *arguments: Any, **more: Any) -> Loss:
    return lambda x, w, b, **options: function(x, w, *arguments, linear_bias=b, **more, **options)


def pairs(function: Loss, **more: Any) -> Loss:
    return lambda x, w, b, **options: function(x, w[:N], 3.0, **more, **options)


LOSSES: dict[str, Loss] = {
    "linear_cross_entropy": biased(lossops.linear_cross_entropy, Y),
    "chunks, smoothing, softcap": biased(
        lossops.linear_cross_entropy, Y, label_smoothing=0.1, softcap=5.0, logit_scale=1.3,
        lse_square_scale=1e-2, options=CHUNKS,
    ),
    "two sweeps": biased(lossops.linear_cross_entropy, Y, options=TWO),
    "near and far": biased(lossops.linear_cross_entropy, Y, near_threshold=2.0**-9),
    "linear_log_prob": log_probs,
    "linear_statistics": statistics,
    "linear_loss": biased(
        lossops.linear_loss, IDS, lambda s: s.lse - s.target.mean(-1), reduction="mean"
    ),
    "cross_entropy": lambda x, w, b, **o: lossops.cross_entropy(x @ w.T + b, Y, **o),
    "spherical, sweep": biased(lossops.linear_spherical_z_loss, Y, mode="sweep"),
    "spherical, gram": biased(lossops.linear_spherical_z_loss, Y, mode="gram"),
    "spherical_loss": lambda x, w, b, **o: lossops.log_taylor_softmax_loss(x @ w.T + b, Y, **o),
    "sigmoid_pairwise_loss": pairs(lossops.sigmoid_pairwise_loss),
    "softmax_pairwise_loss": pairs(lossops.softmax_pairwise_loss),
    "softmax, rows": pairs(lossops.softmax_pairwise_loss, direction="rows"),
    "linear_binary_cross_entropy": biased(lossops.linear_binary_cross_entropy, IDS),
    "linear_asymmetric_loss": biased(lossops.linear_asymmetric_loss, IDS),
    "linear_cosine_contrastive_loss": lambda x, w, b, **o: lossops.linear_cosine_contrastive_loss(
        x, w, IDS, **o
    ),
    "sampled_softmax_loss": sampled(lossops.sampled_softmax_loss),
    "nce_loss": sampled(lossops.nce_loss),
    "negative_sampling_loss": sampled(lossops.negative_sampling_loss),
    "PartialFC": partial_fc,
    "focal": biased(catalogue.linear_focal_loss, Y),
    "stable max": biased(catalogue.linear_stable_max_loss, Y),
    "gumbel": biased(catalogue.linear_gumbel_loss, IDS),
}  # fmt: skip
HALF = ("linear_cross_entropy", "two sweeps", "linear_statistics", "sigmoid_pairwise_loss")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in LOSSES), *((name, torch.bfloat16) for name in HALF)],
    ids=str,
)
def test_a_loss(name: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(N, V, D, dtype, spread=2.0)[:3]
    loss = LOSSES[name]

    def run(backend: str, *tensors: Tensor) -> list[Tensor]:
        used: list[Tensor] = [t.detach().clone().requires_grad_() for t in tensors]
        value = loss(*used, backend=backend)
        total = value.sum() if value.ndim else value
        found = torch.autograd.grad(total, used, allow_unused=True)
        return [value.detach(), *(g for g in found if g is not None)]

    with memory.checked(seed=1):
        ours = run("triton", *inputs)
    theirs, exact = run("reference", *inputs), run("reference", *(t.double() for t in inputs))
    for what, *three in zip(("loss", "dx", "dw", "db"), ours, theirs, exact, strict=False):
        three = [t.to_dense() if t.is_sparse else t for t in three]
        floor = FLOOR[three[0].dtype] * float(three[2].abs().max())
        floor *= 4 if dtype == torch.bfloat16 and what != "loss" else 1  # dz is rounded as well
        assert_no_worse(f"{name} {what}", *three, floor=floor)


def test_the_readme_says_what_is_interpreted() -> None:
    text = README.read_text(encoding="utf-8")
    assert between_markers("backends").search(text)[0].strip() == backend_table()
