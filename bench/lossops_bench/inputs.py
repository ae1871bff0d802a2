"""Seeded inputs shared by cases: features, class vectors and targets as of a language model.

    w ~ N(0, 1/D)      y log-uniform over the classes, as words are      x = n + c w_y,  n ~ N(0, 1)

The pull c is uniform in [0, 2 ln V], so that rows run from hopeless to certain: a benchmark on
plain noise would never see a confident row.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from lossops_bench.case import Problem

__all__ = ["log_uniform", "normal", "pulled_features", "targets", "tiny"]


def normal(rows: int, columns: int, std: float, problem: Problem, stream: int) -> Tensor:
    """(rows, columns) ~ N(0, std²), drawn a few rows at a time: a float32 copy may not fit."""
    generator = torch.Generator().manual_seed(problem.seed * 1000 + stream)
    out = torch.empty(rows, columns, dtype=problem.dtype)
    for block in out.split(max(1, 2**22 // columns)):
        block.copy_(torch.randn(block.shape, generator=generator).mul_(std))
    return out.to(problem.device)


def targets(problem: Problem) -> Tensor:
    """(N,) class ids, log-uniform: class 0 takes about 1/16 of the rows, most classes none."""
    generator = torch.Generator().manual_seed(problem.seed * 1000)
    return log_uniform((problem.shape.rows,), problem.shape.classes, generator).to(problem.device)


def log_uniform(size: tuple[int, ...], classes: int, generator: torch.Generator) -> Tensor:
    """Class ids of any size: id i has a probability near 1 / (i + 1) log V, as by Zipf's law."""
    u = torch.rand(size, generator=generator, dtype=torch.float64)
    ids = (u * math.log(classes + 1)).exp().long() - 1
    return ids.clamp_(0, classes - 1)


def pulled_features(problem: Problem, w: Tensor, y: Tensor) -> Tensor:
    """(N, D) features of which each has its own share of its target's class vector."""
    shape = problem.shape
    x = normal(shape.rows, shape.features, 1.0, problem, stream=2)
    pull = torch.linspace(0, 2 * math.log(shape.classes), shape.rows, device=x.device)
    return x.add_(w[y] * pull.to(x.dtype)[:, None])


def tiny(problem: Problem) -> Problem:
    """A problem that runs in milliseconds through the same code, to wake libraries up."""
    shape = problem.shape
    small = replace(shape, rows=min(shape.rows, 64), features=min(shape.features, 64), classes=1000)
    return replace(problem, shape=small)
