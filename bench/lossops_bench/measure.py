"""Time: one call on a quiet device, and the units that times are divided by."""

import time
from collections.abc import Callable
from functools import partial

import torch

from lossops_bench.case import Problem, Tensors
from lossops_bench.machine import free_bytes

__all__ = ["TILE", "copy_ways", "product_ways", "seconds"]

TILE = 2048
"""Classes in a tile of the tiled product."""

Call = Callable[[], object]


def seconds(call: Call, device: str) -> float:
    """The wall time of one call, with the work it left on the device."""
    _finish_work(device)
    start = time.perf_counter()
    call()
    _finish_work(device)
    return time.perf_counter() - start


def product_ways(
    left: str, right: str, problem: Problem, inputs: Tensors
) -> dict[str, Callable[[], Call]]:
    """The GEMM-equivalent: x (N, D) by wᵀ (D, V), whole and in tiles, into outputs that exist.

    Each way allocates its output when it is prepared, and gives it back with the call.
    """
    x, w = inputs[left].detach(), inputs[right].detach()
    n, v = len(x), len(w)

    def whole() -> Call:
        return partial(torch.mm, x, w.T, out=x.new_zeros(n, v))

    def tiled() -> Call:
        tile, last = x.new_zeros(n, min(TILE, v)), x.new_zeros(n, v % TILE)

        def product() -> None:
            for part in w.split(TILE):
                torch.mm(x, part.T, out=tile if len(part) == tile.shape[1] else last)

        return product

    ways = {"mm in tiles": tiled}
    if n * v * problem.itemsize < free_bytes(problem.device):
        ways["mm"] = whole
    return ways


def copy_ways(name: str, problem: Problem, inputs: Tensors) -> dict[str, Callable[[], Call]]:
    """One copy of a tensor into memory that exists."""
    source = inputs[name].detach()
    return {f"of the {name}": lambda: partial(torch.zeros_like(source).copy_, source)}


def _finish_work(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
