"""Draws of class ids by the CUDA source, on a CPU: bit for bit those of the reference."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from fixtures import built, emulator, loaded, run
from gpu_draws import *  # noqa: F403

import lossops.cuda_draws
from lossops import samplers


@pytest.fixture
def draws(emulator: Callable[[int], None]) -> lossops.cuda_draws.DeviceDraws:
    return lossops.cuda_draws.DeviceDraws(torch.device("cpu"))


@pytest.fixture
def cuda_draws(emulator: Callable[[int], None]) -> ModuleType:
    return lossops.cuda_draws


@pytest.fixture
def shuffle(emulator: Callable[[int], None]) -> Callable[[int], None]:
    return emulator


def test_draws_that_do_not_do_say_so(monkeypatch):
    """On a GPU the process would be lost: the assertion is the device's."""
    unlucky = samplers.LogUniform(40, 20)
    monkeypatch.setattr(unlucky, "_enough", 20)
    with pytest.raises(RuntimeError, match="did not give 20 distinct classes of 40"):
        unlucky(torch.tensor([0]), 0)
