"""Every loss on the backend cuda, in the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fixtures import built, loaded
from gpu_losses import *  # noqa: F403
from gpu_losses import NEAR, D, N, V


@pytest.fixture(scope="session")
def backend(loaded: ctypes.CDLL) -> str:
    """Its name."""
    return "cuda"


@pytest.fixture
def launches(loaded: ctypes.CDLL) -> Any:
    """How many kernels were launched."""

    @contextmanager
    def launches() -> Iterator[list[int]]:
        seen: list[int] = []
        before = loaded.lossops_emulator_launches()
        yield seen
        seen += range(loaded.lossops_emulator_launches() - before)

    return launches


def test_near_and_far_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="no kernels for near_threshold"):
        NEAR(torch.ones(N, D), torch.ones(V, D), torch.ones(V), backend=backend)
