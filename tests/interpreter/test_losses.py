"""Every loss on the backend triton, in the interpreter."""

from __future__ import annotations

from typing import Any

import memory
import pytest
import torch
from gpu_losses import *  # noqa: F403
from gpu_losses import NEAR, Launches, check


@pytest.fixture(scope="session")
def backend() -> str:
    """Its name."""
    return "triton"


@pytest.fixture
def launches() -> Any:
    """What runs is watched."""
    return memory.launches


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_near_and_far(backend: str, launches: Launches, device: torch.device, kind: str) -> None:
    check(backend, launches, "near", NEAR, kind, device)
