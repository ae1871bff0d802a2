"""What a multiprocessor has, and how many programs fit it.

NVIDIA: the tables of CUDA's occupancy calculator (cuda_occupancy.h). AMD: the instruction set
manuals of CDNA 3 and 4, a compute unit of four SIMDs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

KIB = 1024


class Device(NamedTuple):
    """A multiprocessor of an architecture.

    Attributes:
        warps, blocks: that may live on it.
        shared, shared_of_block: bytes of shared memory, and those one block may have.
        matrix: how the matrix instructions begin that its tensor cores are there for.
    """

    warps: int
    blocks: int
    shared: int
    shared_of_block: int
    matrix: str


DEVICES = {
    "sm_80": Device(64, 32, 164 * KIB, 163 * KIB, "HMMA"),
    "sm_86": Device(48, 16, 100 * KIB, 99 * KIB, "HMMA"),
    "sm_89": Device(48, 24, 100 * KIB, 99 * KIB, "HMMA"),
    "sm_90": Device(64, 32, 228 * KIB, 227 * KIB, "HGMMA"),
    "sm_100": Device(64, 32, 228 * KIB, 227 * KIB, "UTCHMMA"),
    "sm_120": Device(48, 24, 100 * KIB, 99 * KIB, "HMMA"),
    "gfx942": Device(32, 32, 64 * KIB, 64 * KIB, "v_mfma"),
    "gfx950": Device(32, 32, 160 * KIB, 160 * KIB, "v_mfma"),
}
NVIDIA_REGISTERS = 65536  # of a multiprocessor, 256 at a time to a warp, warps by fours
NVIDIA_RESERVED = KIB  # of shared memory, for each block
TENSOR_COLUMNS = 512  # of tensor memory, sm_100
AMD_REGISTERS = 512  # of a lane of a SIMD, vector and accumulation together, by eights
SIMDS = 4


class Occupancy(NamedTuple):
    """Programs that run at once on a multiprocessor, their share of its warps, what stops more."""

    blocks: int
    share: float
    limit: str


def occupancy(
    architecture: str, warps: int, registers: int, shared: int, tensor_columns: int = 0
) -> Occupancy:
    """Of a program of so many warps, registers a thread and bytes of shared memory."""
    device = DEVICES[architecture]
    if shared > device.shared_of_block:
        return Occupancy(0, 0.0, f"shared memory {shared} > {device.shared_of_block}")
    if architecture.startswith("gfx"):
        waves = min(device.warps // SIMDS, AMD_REGISTERS // (8 * math.ceil(max(registers, 1) / 8)))
        limits = {"registers": waves * SIMDS // warps}
        if shared:
            limits["shared memory"] = device.shared // shared
    else:
        of_warp = 256 * math.ceil(max(registers, 1) * 32 / 256)
        block = 128 * math.ceil((shared + NVIDIA_RESERVED) / 128)
        limits = {
            "registers": NVIDIA_REGISTERS // of_warp // 4 * 4 // warps,
            "shared memory": device.shared // block,
        }
        if tensor_columns:
            limits["tensor memory"] = TENSOR_COLUMNS // tensor_columns
    limits["warps"] = device.warps // warps
    limits["blocks"] = device.blocks
    blocks = min(limits.values())
    reached = [name for name, most in limits.items() if most == blocks]
    return Occupancy(blocks, blocks * warps / device.warps, ", ".join(reached))
