"""Tiles of the fused kernel by architecture. Derived, not timed: see kernels/README.md."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lossops_triton.launch import aligned, architecture


class Tile(NamedTuple):
    """How `fused_statistics_kernel` is launched.

    Attributes:
        bm, bn, bk: rows, classes and features of a tile.
        warps, stages: of a program, and of its loads in flight.
        blocks: programs that fit a multiprocessor; the classes are split to fill them.
        descriptors: whether tiles are loaded by TMA; rows must begin at multiples of 16 bytes.
        flatten: whether the two loops are one to the compiler, so that a tile's first loads are in
            flight while the last one's exponentials are computed.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    blocks: int = 2
    descriptors: bool = False
    flatten: bool = False


TILES: dict[str, Tile] = {
    "sm_80": Tile(128, 128, 32, 8, 4),
    "sm_86": Tile(128, 128, 32, 8, 3),
    "sm_89": Tile(128, 128, 32, 8, 3),
    "sm_90": Tile(128, 128, 64, 8, 3, descriptors=True),
    "sm_100": Tile(128, 128, 64, 8, 3, descriptors=True),
    "sm_120": Tile(128, 128, 32, 8, 3),
    "gfx942": Tile(128, 128, 64, 8, 2),
    "gfx950": Tile(128, 128, 64, 8, 2),
}


def tile_of(x: Tensor, w: Tensor) -> Tile:
    """The tile for these operands on their device; an unknown architecture takes sm_80's."""
    found = TILES.get(architecture(x.device), TILES["sm_80"])
    d = x.shape[1]
    small = max(16, 1 << (d - 1).bit_length())
    if small < found.bk:
        found = found._replace(bk=small)
    if found.descriptors and not (aligned(x, w) and d >= found.bk):
        found = found._replace(descriptors=False)
    return found
