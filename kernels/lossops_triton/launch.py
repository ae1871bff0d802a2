"""What every launch needs: the device, its size, and arguments in a form a kernel can read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches inside go to the device, whichever is current."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def architecture() -> str:
    """The key of a table of configurations, of the current device: sm_90, gfx942.

    It is the target of Triton's driver: what kernels are compiled for. sm_80 where there is none.
    """
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:
        return "sm_80"
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


def warp_size() -> int:
    """Threads of a warp of the current device."""
    return 64 if architecture().startswith("gfx9") else 32


def float32_precision() -> str:
    """What ``tl.dot`` must be told for products that are float32 as they are.

    On sm_100 Triton 3.7.1 makes TF32 of "ieee" without a word (tcgen05.mma kind::tf32); three TF32
    products keep 22 bits. AMD's compiler knows only "ieee", and keeps it.
    """
    return "tf32x3" if architecture().startswith("sm_10") else "ieee"


def aligned(*tensors: Tensor) -> bool:
    """Whether every row of every matrix begins at a multiple of 16 bytes."""
    return all(
        t.data_ptr() % 16 == 0 and (t.stride(0) * t.element_size() % 16 == 0 or t.shape[0] <= 1)
        for t in tensors
    )


def alike(t: Tensor, u: Tensor) -> bool:
    """Whether every row of one matrix begins as far from a multiple of 16 bytes as the other's."""
    size = t.element_size()
    return (
        size == u.element_size()
        and (t.data_ptr() - u.data_ptr()) % 16 == 0
        and ((t.stride(0) - u.stride(0)) * size % 16 == 0 or t.shape[0] <= 1)
    )


def misalignment(t: Tensor) -> int:
    """Elements between the 16-byte boundary before the first one and it."""
    return t.data_ptr() % 16 // t.element_size()
