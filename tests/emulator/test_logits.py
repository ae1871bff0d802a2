"""The CUDA kernels on logits and pairs in the emulator, every access watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from fixtures import built, emulator, loaded
from gpu_kernels import *  # noqa: F403

import lossops.cuda
from lossops.gpu_linear import Kernels


@pytest.fixture(scope="session")
def module(loaded: Any) -> Any:
    """The backend."""
    return lossops.cuda


@pytest.fixture(scope="session")
def kernels(module: Any) -> Kernels:
    return lossops.cuda.kernels


@pytest.fixture
def shuffled(
    emulator: Callable[[int], None],
) -> Callable[[int | None], AbstractContextManager[None]]:
    """Blocks and threads of a launch in another order."""

    @contextmanager
    def shuffled(seed: int | None) -> Iterator[None]:
        emulator(0 if seed is None else 1 + seed)
        yield
        emulator(0)

    return shuffled
