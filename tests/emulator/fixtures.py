"""What the tests of CUDA source on a CPU run: the library of ops, and programs.

Every test file imports ``build`` and ``loaded``: whoever asks for the kernels then finds these, not
those that setup.py compiled. (A conftest.py here would hide that of tests/.)
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator

import builder
import pytest
import torch


@pytest.fixture(scope="session")
def build() -> builder.Build:
    """Everything compiled; skipped, with the reason, where that cannot be."""
    sentence = builder.objection()
    if sentence is not None:
        pytest.skip(sentence)
    return builder.Build()


@pytest.fixture(scope="session", autouse=True)
def loaded(build: builder.Build) -> ctypes.CDLL:
    torch.ops.load_library(build.library)
    return ctypes.CDLL(str(build.library))


@pytest.fixture
def emulator(loaded: ctypes.CDLL) -> Iterator[Callable[[int], None]]:
    """torch.ops.lossops_cuda on CPU tensors; call it with a seed to shuffle blocks and threads."""
    yield loaded.lossops_emulator_seed
    loaded.lossops_emulator_seed(0)


@pytest.fixture
def run(build: builder.Build) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run(program, variant, seed, *arguments)``."""

    def run(program: str, variant: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [build.program(program, variant), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return run
