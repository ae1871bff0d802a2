"""What `lossops-bench ring` has its processes do: one pairwise loss with its gradients, measured.

rank r of P: features x (N/P, D), w (N/P, D) → loss of all N² pairs → gradients of x, w, t, b
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import lossops
from lossops_bench.case import Tensors
from lossops_bench.memory import Prepared, measure

__all__ = ["Configuration", "Part", "Rank", "Work", "worker"]

TINY = 32
"""Rows per process of a first problem, which nobody measures: it loads libraries and connects."""
SCALE = {"sigmoid": 10.0, "softmax": 1 / 0.07}
BIAS = -10.0


@dataclass(frozen=True)
class Work:
    """What every configuration does: the same global batch, so many times."""

    loss: str
    batch: int  # N
    dim: int  # D
    dtype: torch.dtype
    repeats: int
    seed: int = 0


@dataclass(frozen=True)
class Configuration:
    """Who does it. One process exchanges nothing; plain PyTorch can only gather."""

    processes: int  # P
    exchange: str = ""
    plain: bool = False

    @property
    def name(self) -> str:
        return "plain" if self.plain else "lossops"

    def __str__(self) -> str:
        if self.processes == 1:
            return f"{self.name}, 1 process"
        return f"{self.name}, {self.processes} processes, {self.exchange}"


@dataclass(frozen=True)
class Part:
    """What one process found."""

    results: Tensors  # loss, and the gradients of x (N/P, D), w (N/P, D), t and b
    seconds: list[float]  # of the clock, one per step
    cpu_seconds: float  # of all these steps
    extra_bytes: int
    memory_method: str


def worker(
    number: int, configuration: Configuration, work: Work, folder: str, timeout: float
) -> None:
    """A process from start to end; leaves its `Part` in ``folder``, as a dictionary."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/ranks",
        rank=number,
        world_size=configuration.processes,
        timeout=timedelta(seconds=timeout),
    )
    torch.save(asdict(measured(Rank(number, configuration, work))), Path(folder) / f"{number}.pt")
    dist.barrier()  # who leaves early breaks the connections of the others
    dist.destroy_process_group()


@dataclass(frozen=True)
class Rank:
    """One process of a configuration; a call prepares its step, as `memory.measure` wants it."""

    number: int
    configuration: Configuration
    work: Work

    def __call__(self) -> Prepared:
        self.step(self.inputs(TINY * self.configuration.processes))
        inputs = self.inputs(self.work.batch)
        dist.barrier()
        return partial(self.step, inputs), inputs.values()

    def inputs(self, batch: int) -> Tensors:
        """This rank's rows of features of length 1, alike within a pair; scale and bias."""
        draw = torch.Generator().manual_seed(self.work.seed)
        shape, dtype = (batch, self.work.dim), self.work.dtype
        common, *own = (torch.randn(shape, generator=draw) for _ in range(3))  # (N, D) each
        rows = (F.normalize(common + each).to(dtype) for each in own)
        x, w = (each.chunk(self.configuration.processes)[self.number].clone() for each in rows)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = {"x": x, "w": w, "t": torch.tensor(SCALE[self.work.loss], dtype=wide)}
        if self.work.loss == "sigmoid":
            inputs["b"] = torch.tensor(BIAS, dtype=wide)
        return inputs

    def step(self, inputs: Tensors) -> Tensors:
        """The loss, and the gradient of every input under its name."""
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        loss = self.loss()(*leaves.values())
        gradients = torch.autograd.grad(loss, [*leaves.values()])
        return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}

    def loss(self) -> Callable[..., Tensor]:
        """Of x, w, t and, for the sigmoid loss, b."""
        plain: dict[str, Callable[..., Tensor]] = {
            "sigmoid": plain_sigmoid,
            "softmax": plain_softmax,
        }
        ours: dict[str, Callable[..., Tensor]] = {
            "sigmoid": lossops.sigmoid_pairwise_loss,
            "softmax": lossops.softmax_pairwise_loss,
        }
        if self.configuration.plain:
            return plain[self.work.loss]
        function = ours[self.work.loss]
        if self.configuration.processes == 1:
            return function
        exchange = self.configuration.exchange
        return partial(function, batch_group=dist.group.WORLD, exchange=exchange)


def measured(rank: Rank) -> Part:
    """Memory of the first step, then time of the others, all processes side by side."""
    reading = measure(rank)
    inputs, seconds, results = rank.inputs(rank.work.batch), [], {}
    dist.barrier()
    before = cpu_seconds()
    for _ in range(rank.work.repeats):
        started = time.perf_counter()
        results = rank.step(inputs)
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    return Part(results, seconds, cpu_seconds() - before, reading.extra_bytes, reading.method)


def cpu_seconds() -> float:
    """What all threads of this process took of the processors so far, in the kernel too."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def plain_sigmoid(x: Tensor, w: Tensor, t: Tensor, b: Tensor) -> Tensor:
    """This rank's rows of Σ softplus(-y (t x·w + b)) · P/N, y = 1 on the diagonal, -1 elsewhere."""
    every = gathered(w)  # (N, D)
    z = t * (x @ every.T) + b  # (N/P, N)
    sign = torch.full_like(z, -1.0)
    sign.diagonal(first_row(x)).fill_(1.0)
    return -F.logsigmoid(sign * z).sum() / len(x)


def plain_softmax(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    """The mean of both cross-entropies of this rank's rows, x among all w and w among all x."""
    every = gathered(w)  # (N, D)
    z = t * (x @ every.T)  # (N/P, N)
    other = z.T if len(x) == len(every) else t * (w @ gathered(x).T)
    target = first_row(x) + torch.arange(len(x))
    return (F.cross_entropy(z, target) + F.cross_entropy(other, target)) / 2


def first_row(x: Tensor) -> int:
    """The number of this rank's first row among those of all ranks."""
    return dist.get_rank() * len(x)


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, (N, D)."""
    return Gather.apply(rows) if dist.get_world_size() > 1 else rows


class Gather(torch.autograd.Function):
    """All ranks' rows; backward sums over the ranks, and each takes the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()].clone()
