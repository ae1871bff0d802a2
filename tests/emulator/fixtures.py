"""What the tests of CUDA source on a CPU run: the library of ops, and programs.

Every test file imports ``built`` and ``loaded``: whoever asks for the kernels then finds these, not
those that setup.py compiled. (A conftest.py here would hide that of tests/.)
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from typing import NamedTuple

import builder
import pytest
import torch


@pytest.fixture(scope="session")
def built() -> None:
    """Everything is compiled; skipped, with the reason, where that cannot be."""
    sentence = builder.objection()
    if sentence is not None:
        pytest.skip(sentence)
    names = ("faults", *builder.PROGRAMS)
    programs = [builder.program(name, v) for name in names for v in builder.VARIANTS]
    builder.make([builder.library(), *programs])


@pytest.fixture(scope="session", autouse=True)
def loaded(built: None) -> ctypes.CDLL:
    """The library of ops."""
    path = builder.library().target
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


@pytest.fixture
def emulator(loaded: ctypes.CDLL) -> Iterator[Callable[[int], None]]:
    """torch.ops.lossops_cuda on CPU tensors; call it with a seed to shuffle blocks and threads."""
    yield loaded.lossops_emulator_seed
    loaded.lossops_emulator_seed(0)


class Bytes(NamedTuple):
    """What kernels read of a tensor and wrote to it, an access of each thread counted."""

    read: int
    written: int


@pytest.fixture
def traffic(loaded: ctypes.CDLL) -> Callable[..., list[Bytes]]:
    """``traffic(call, *tensors)``: the bytes that a call moves, of each tensor."""

    def traffic(call: Callable[[], object], *tensors: torch.Tensor) -> list[Bytes]:
        for t in tensors:
            loaded.lossops_emulator_watch(*map(ctypes.c_size_t, (t.data_ptr(), t.nbytes)))
        try:
            call()
            read, written = (
                loaded.lossops_emulator_bytes_read,
                loaded.lossops_emulator_bytes_written,
            )
            return [Bytes(read(i), written(i)) for i in range(len(tensors))]
        finally:
            loaded.lossops_emulator_watch_nothing()

    return traffic


@pytest.fixture
def run(built: None) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run(program, variant, seed, *arguments)``."""

    def run(program: str, variant: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [builder.program(program, variant).target, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return run
