"""Every loss on the backend cuda, in the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from fixtures import built, loaded
from gpu_losses import *  # noqa: F403
from gpu_losses import NEAR, D, N, V

import lossops
from lossops import backends


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


def test_auto_takes_another_backend_for_near_and_far(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no Triton, the reference."""
    for name in ("cpp", "triton"):
        absent = replace(backends.BACKENDS[name], objection=lambda device, dtype: "absent")
        monkeypatch.setitem(backends.BACKENDS, name, absent)
    x, w, y = torch.randn(N, D), torch.randn(V, D), torch.arange(N)
    found, expected = (
        lossops.linear_cross_entropy(x, w, y, near_threshold=1e-3, backend=name)
        for name in ("auto", "reference")
    )
    assert torch.equal(found, expected)
    assert backends.select("auto", x.device, x.dtype).name == backend


def test_auto_takes_another_backend_where_the_kernels_cannot_run(
    loaded: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library without code for the GPU, or with a runtime that its driver is too old for."""

    def refuse(index: int) -> None:
        raise RuntimeError(f"check_kernels, ops.cpp:1, no kernel image\nof {index}")

    torch.ops.lossops_cuda.check_kernels(0)  # the emulator's run everywhere
    monkeypatch.setattr(torch.ops.lossops_cuda, "check_kernels", refuse)
    monkeypatch.setattr(backends, "_capability_objection", lambda device: None)
    absent = replace(backends.BACKENDS["triton"], objection=lambda device, dtype: "absent")
    monkeypatch.setitem(backends.BACKENDS, "triton", absent)
    gpu = torch.device("cuda:7")
    assert backends.select("auto", gpu, torch.float32, backends.ONE_SWEEP).name == "reference"
    with pytest.raises(ValueError, match=r"cannot run on cuda:7 \(no kernel image\); rebuild"):
        backends.select("cuda", gpu, torch.float32)
    backends._kernels_objection.cache_clear()
