"""The kernels of Triton and CUDA on logits and pairs, on a real device: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
from gpu_device import Moved, backend, full_precision
from gpu_kernels import *  # noqa: F403

from lossops.backends import BACKENDS

pytestmark = pytest.mark.gpu
# Tensors of 8 GB, which the CPU has without touching them.
for each in [value for name, value in globals().items() if "more_than_2_31" in name]:
    pytest.mark.slow(each)


@pytest.fixture(scope="session")
def module(backend: str) -> Moved:
    """The backend, for tensors on the CPU."""
    return Moved(BACKENDS[backend].primitives())


@pytest.fixture(scope="session")
def kernels(backend: str) -> Moved:
    return Moved(BACKENDS[backend].primitives().kernels)


@pytest.fixture
def shuffled() -> Callable[[int | None], AbstractContextManager[None]]:
    """A GPU has its own order."""
    return lambda seed: nullcontext()
