"""The device of the GPU tests, and functions on it for tests whose tensors are on the CPU.

Without a GPU the logic of these tests can be tried on what stands in for one: CONTRIBUTING.md has
the commands.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lossops.backends import BACKENDS

DEVICE = torch.device(os.environ.get("LOSSOPS_TEST_DEVICE", "cuda"))
on_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="streams and graphs are CUDA's")


@pytest.fixture
def device() -> torch.device:
    """Where the tensors are."""
    return DEVICE


def needs(name: str) -> str:
    """The backend's name; the test is skipped, with the reason, where it cannot run."""
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    sentence = BACKENDS[name].objection(DEVICE, torch.float32)
    if sentence is not None:
        pytest.skip(f"backend {name!r}: {sentence}")
    return name


def needs_room(gigabytes: int) -> None:
    """The test is skipped where the GPU has less free memory."""
    if DEVICE.type == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(DEVICE)[0] / 1e9
        if free < gigabytes:
            pytest.skip(f"takes {gigabytes} GB of GPU memory, and {free:.0f} are free")


@pytest.fixture(scope="session", params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend of a GPU by name."""
    return needs(request.param)


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """float32 products as they are: TF32 is the caller's choice, not a test's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_device(t: Tensor) -> Tensor:
    """A copy on the device with the same strides, from as odd an address."""
    if any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True)):
        return t.to(DEVICE, copy=True)
    begin = t.data_ptr() % 16 // t.itemsize
    span = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    room = torch.empty(begin + (span if t.numel() else 0), dtype=t.dtype, device=DEVICE)
    return room.as_strided(t.shape, t.stride(), begin).copy_(t)


class Moved:
    """The functions of a module, or of an object, on the device, for tensors on the CPU.

    What a function writes to its arguments is written to those on the CPU.
    """

    def __init__(self, functions: Any) -> None:
        self._functions = functions

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._functions, name)

        def call(*args: Any, **keywords: Any) -> Any:
            pairs: dict[Any, tuple[Tensor, Tensor]] = {}

            def there(t: Any) -> Any:
                if not isinstance(t, Tensor):
                    return t
                same = (t.data_ptr(), t.shape, t.stride(), t.dtype)
                if same not in pairs:
                    pairs[same] = (t, on_device(t))
                return pairs[same][1]

            found = function(*tree_map(there, args), **tree_map(there, keywords))
            for given, used in pairs.values():
                given.copy_(used)
            return tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, found)

        return call
