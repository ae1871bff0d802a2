"""The heads that `heads` times and `race` trains, each with its loss, its SGD and its top classes.

    x (N, D), y (N,) → loss → backward → step: the weight moves by -lr times its gradient

Classes are sorted by falling frequency, which `adaptive` needs and the others ignore.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

import lossops
from lossops_bench.demo_train import HeadLoss, plain_linear_cross_entropy

__all__ = ["CONTENDERS", "Contender", "Head", "contender"]

CUTOFFS = (2000, 20_000, 200_000)
"""Where the clusters of `adaptive` begin: those of the example in its paper, arXiv 1609.04309."""


SAMPLES = 4096
"""Classes that `sampled` draws for a step, a quarter of all where these are few."""


class Head(Protocol):
    """What every contender can do."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss, differentiable in x (N, D)."""

    def step(self) -> None:
        """After backward: one step of plain SGD."""

    def top(self, x: Tensor, k: int) -> Tensor:
        """The ids (N, k) of the best classes, the best first."""


class SGDHead:
    """A module with Parameters, whose gradients live from backward to the end of the step."""

    def __init__(self, module: nn.Module, lr: float) -> None:
        self.sgd = torch.optim.SGD(module.parameters(), lr)

    def step(self) -> None:
        self.sgd.step()
        self.sgd.zero_grad()


class DenseHead(SGDHead):
    """A weight (V, D) with a gradient of its own size, whatever the loss."""

    def __init__(self, dim: int, classes: int, lr: float, *, loss: HeadLoss) -> None:
        self.linear = nn.Linear(dim, classes, bias=False)
        self.linear_loss = loss
        super().__init__(self.linear, lr)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear_loss(x, self.linear.weight, y)

    def top(self, x: Tensor, k: int) -> Tensor:
        z: Tensor = self.linear(x)  # (N, V)
        return z.topk(k).indices


class SampledHead:
    """A weight (V, D) of which a step reads and writes the rows of its sample and its targets."""

    def __init__(self, dim: int, classes: int, lr: float) -> None:
        self.linear = nn.Linear(dim, classes, bias=False)
        samples = max(1, min(SAMPLES, classes // 4))
        self.sampler = lossops.samplers.LogUniform(classes, samples)
        self.sgd = lossops.optim.RowSGD(self.linear.parameters(), lr)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return lossops.sampled_softmax_loss(x, self.linear.weight, y, self.sampler)

    def step(self) -> None:
        self.sgd.step()
        self.sgd.zero_grad()

    def top(self, x: Tensor, k: int) -> Tensor:
        z: Tensor = self.linear(x)  # (N, V)
        return z.topk(k).indices


class AdaptiveHead(SGDHead):
    """PyTorch's adaptive softmax: rare classes in clusters of fewer features."""

    def __init__(self, dim: int, classes: int, lr: float) -> None:
        cutoffs = [cutoff for cutoff in CUTOFFS if cutoff < classes] or [max(1, classes // 4)]
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(dim, classes, cutoffs)
        super().__init__(self.softmax, lr)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.softmax(x, y).loss
        return loss

    def top(self, x: Tensor, k: int) -> Tensor:
        log_p: Tensor = self.softmax.log_prob(x)  # (N, V)
        return log_p.topk(k).indices


class FactoredHead:
    """A weight V U + 1 ωᵀ: the step costs O(D²) per row, whatever the number of classes."""

    def __init__(self, dim: int, classes: int, lr: float, *, loss: str, **options: float) -> None:
        self.factored = lossops.FactoredSphericalHead(dim, classes, loss=loss, **options)
        self.lr = lr

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.factored(x, y)
        return loss

    def step(self) -> None:
        self.factored.step(self.lr)

    def top(self, x: Tensor, k: int) -> Tensor:
        ids: Tensor = self.factored.topk(x, k)[1]
        return ids


@dataclass(frozen=True)
class Contender:
    """A head by name, what it needs, and how fast it should learn."""

    name: str
    summary: str
    make: Callable[[int, int, float], Head]
    """From D, V and the learning rate."""
    lr: float
    """The learning rate in `race`."""
    held: int = 1
    """Float32 matrices (V, D) it holds between steps, when small ones are left out."""
    passing: int = 1
    """Such matrices that a step allocates and gives back."""
    logits: int = 0
    """Matrices (N, V) that a step allocates and gives back."""

    def bytes(self, rows: int, dim: int, classes: int) -> tuple[int, int]:
        """Held between steps, and taken for the time of a step."""
        passing = self.passing * dim + self.logits * rows
        return 4 * classes * dim * self.held, 4 * classes * passing


# Learning rates by 22 seconds each at the default sizes on two cores: of 3, 10, 30 and 100 for the
# Z-loss and 1, 3 and 10 for both kinds of softmax the best at most k, on the held-out sample that
# the race reports. Neighbours were within a point of it, except for the full softmax, which got 75
# steps. The others take those of the same losses; squared error shrinks U to nothing above its own.
_ALL = (
    Contender(
        "factored-z",
        "Z-loss on a factored weight (arXiv 1412.7091, 1604.08859)",
        partial(FactoredHead, loss="z"),
        lr=30.0,
    ),
    Contender(
        "factored-z-sharp",
        "the same with a = 1 and b = 5",
        partial(FactoredHead, loss="z", a=1.0, b=5.0),
        lr=30.0,
    ),
    Contender(
        "factored-mse",
        "squared error to one-hot targets on a factored weight",
        partial(FactoredHead, loss="mse"),
        lr=0.01,
    ),
    Contender(
        "softmax",
        "nn.Linear and F.cross_entropy",
        partial(DenseHead, loss=plain_linear_cross_entropy),
        lr=3.0,
        logits=3,
    ),
    Contender(
        "adaptive",
        "nn.AdaptiveLogSoftmaxWithLoss",
        AdaptiveHead,
        lr=3.0,
        held=0,
        passing=0,
    ),
    Contender(
        "sampled",
        "lossops.sampled_softmax_loss, 4096 log-uniform classes, and lossops.optim.RowSGD",
        SampledHead,
        lr=3.0,
        passing=0,
    ),
    Contender(
        "softmax-lossops",
        "lossops.linear_cross_entropy",
        partial(DenseHead, loss=lossops.linear_cross_entropy),
        lr=3.0,
    ),
    Contender(
        "gram-z",
        "Z-loss on a dense weight, its statistics from the Gram matrix",
        partial(DenseHead, loss=partial(lossops.linear_spherical_z_loss, mode="gram")),
        lr=30.0,
    ),
)
CONTENDERS = {each.name: each for each in _ALL}


def contender(name: str) -> Contender:
    """Look a contender up.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in CONTENDERS:
        raise ValueError(f"a head must be one of {', '.join(CONTENDERS)}; got {name!r}")
    return CONTENDERS[name]
