"""The library's own launches, compiled for a device that is not there.

Inside `pretending` Triton believes in a device of the architecture. Launch code runs as it is, on
CPU tensors of any content; each launch is specialised by Triton itself (divisibility, ones, None,
constants) and compiled, but nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from lossops_bench.kernels.devices import DEVICES, NVIDIA_REGISTERS

MULTIPROCESSORS = 132  # for libraries that ask


class Launch(NamedTuple):
    """A launch that was compiled: the kernel's name, its keyword arguments, what came of it."""

    name: str
    options: dict[str, Any]
    kernel: CompiledKernel


def target_of(architecture: str) -> GPUTarget:
    """Triton's name of an architecture: sm_90, gfx942."""
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64)


class StandIn:
    """Answers what Triton asks its driver before a launch."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return target_of(self.architecture)

    def get_current_device(self) -> str:
        """A device of its own: Triton keeps what it compiled by device."""
        return self.architecture

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """All configurations take as long: an autotuner keeps its first."""
        return lambda call, **options: [1.0, 1.0, 1.0]

    @property
    def utils(self) -> StandIn:
        return self

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {
            "max_shared_mem": DEVICES[self.architecture].shared_of_block,
            "multiprocessor_count": MULTIPROCESSORS,
            "max_num_regs": NVIDIA_REGISTERS,
            "warpSize": target_of(self.architecture).warp_size,
        }


@contextmanager
def pretending(architecture: str) -> Iterator[list[Launch]]:
    """Launches inside are compiled for the architecture and listed, and do not run."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(self.__name__, options, kernel))
        return kernel

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(StandIn(architecture))
    try:
        with mock.patch.object(JITFunction, "run", compile_only), _torch_agrees(architecture):
            yield launches
    finally:
        driver._active = before


@contextmanager
def _torch_agrees(architecture: str) -> Iterator[None]:
    """What other libraries ask torch.cuda has the same answers."""
    nvidia = architecture.startswith("sm_")
    capability = divmod(int(architecture.removeprefix("sm_")), 10) if nvidia else (9, 4)
    properties = mock.Mock(
        multi_processor_count=MULTIPROCESSORS, major=capability[0], minor=capability[1],
        shared_memory_per_multiprocessor=DEVICES[architecture].shared, total_memory=80 << 30,
    )  # fmt: skip
    answers = {
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: architecture,
        "current_device": lambda: 0,
        "is_available": lambda: True,
    }
    hip = None if nvidia else "6.4"
    with mock.patch.multiple(torch.cuda, **answers), mock.patch.object(torch.version, "hip", hip):
        yield
