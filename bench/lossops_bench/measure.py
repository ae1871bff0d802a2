"""Time: one call on a quiet device, and the units that times are divided by."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

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

    Each way allocates its output when it is prepared, and gives it back with the call. Half
    precision may also go through float32, the fast way on a processor without its instructions;
    where that is twice as fast on one tile, the product in half precision is no way at all.
    """
    x, w = inputs[left].detach(), inputs[right].detach()
    n, v = len(x), len(w)

    def whole() -> Call:
        return partial(torch.mm, x, w.T, out=x.new_zeros(n, v))

    def tiled(classes: Tensor, dtype: torch.dtype) -> Call:
        count = len(classes)
        tile, last = (x.new_zeros(n, k, dtype=dtype) for k in (min(TILE, count), count % TILE))

        def product() -> None:
            rows = x.to(dtype)
            for part in classes.split(TILE):
                out = tile if len(part) == tile.shape[1] else last
                torch.mm(rows, part.to(dtype).T, out=out)

        return product

    def one_tile(dtype: torch.dtype) -> float:
        return min(seconds(tiled(w[:TILE], dtype), problem.device) for _ in range(3))

    upcast = {"mm in float32 tiles": partial(tiled, w, torch.float32)}
    half = x.itemsize < 4
    if half and one_tile(torch.float32) < one_tile(x.dtype) / 2:
        return upcast
    ways = {"mm in tiles": partial(tiled, w, x.dtype)} | (upcast if half else {})
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
