"""The kernels of Triton and CUDA on logits and pairs, on a real device: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from gpu_device import Moved, backend, full_precision, needs_room
from gpu_kernels import *  # noqa: F403
from gpu_kernels import EVERYTHING, PLAIN, Case, check
from numpy import ndarray

from lossops.backends import BACKENDS

pytestmark = pytest.mark.gpu
for far in [value for name, value in globals().items() if "more_than_2_31" in name]:
    pytest.mark.slow(far)


@pytest.fixture(scope="session")
def module(backend: str) -> Moved:
    """The backend, for tensors on the CPU."""
    return Moved(BACKENDS[backend].primitives())


@pytest.fixture(scope="session")
def kernels(backend: str) -> Moved:
    return Moved(BACKENDS[backend].primitives().kernels)


far_on_the_cpu = huge  # noqa: F405


@pytest.fixture
def huge(far_on_the_cpu: ndarray) -> ndarray:
    """Memory that the CPU has without touching it, and that a GPU has to have."""
    needs_room(12)
    return far_on_the_cpu


@pytest.fixture
def shuffled() -> Callable[[int | None], AbstractContextManager[None]]:
    """A GPU has its own order."""
    return lambda seed: nullcontext()


@pytest.mark.parametrize("names", [EVERYTHING, PLAIN], ids=["everything", "exponentials"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_the_classes(module: Moved, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    """Rows whose classes are split among blocks, with states that are merged."""
    check(module, Case(2, 4, 20_011, 2, dtype, names=names, bias=True))
