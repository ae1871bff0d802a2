"""Every loss on the backend cuda, in the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fixtures import build, loaded
from gpu_losses import *  # noqa: F403


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
