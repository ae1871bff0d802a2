"""Rows by id and draws of class ids in CUDA on a real device: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gpu_device import DEVICE, Moved, device, needs
from gpu_draws import *  # noqa: F403
from gpu_rows import *  # noqa: F403

import lossops.cuda_draws
import lossops.cuda_rows

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda() -> None:
    """All of these are kernels of that backend."""
    needs("cuda")


@pytest.fixture
def cuda_rows() -> Moved:
    return Moved(lossops.cuda_rows)


@pytest.fixture
def cuda_draws() -> Moved:
    return Moved(lossops.cuda_draws)


@pytest.fixture
def draws() -> Moved:
    return Moved(lossops.cuda_draws.DeviceDraws(DEVICE))


@pytest.fixture
def shuffle() -> Callable[[int], None]:
    """A GPU has its own order."""
    return lambda seed: None
