"""Every loss on the backend triton, in the interpreter."""

from __future__ import annotations

from typing import Any

import memory
import pytest
from gpu_losses import *  # noqa: F403


@pytest.fixture(scope="session")
def backend() -> str:
    """Its name."""
    return "triton"


@pytest.fixture
def launches() -> Any:
    """What runs is watched."""
    return memory.launches
