"""Tiles of the fused kernel by architecture. Derived, not timed: see kernels/README.md.

A row that was timed says so, with the GPU and the date.
"""

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
        registers: a thread may have, for the compiler to keep to; None: as many as it likes.
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
    registers: int | None = None

    def launch(self) -> dict[str, int]:
        """What Triton is told beside the arguments; AMD's compiler knows no bound on registers."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


# Rows of the three tables are rewritten by `lossops-bench tune` on a GPU of theirs.
TILES: dict[str, Tile] = {
    "sm_80": Tile(128, 64, 64, 8, 3, registers=128),
    "sm_86": Tile(128, 64, 64, 8, 3, registers=128),
    "sm_89": Tile(128, 64, 64, 8, 3, registers=128),
    "sm_90": Tile(128, 128, 64, 8, 3, descriptors=True),
    "sm_100": Tile(128, 128, 64, 8, 3, descriptors=True),
    "sm_120": Tile(128, 64, 32, 8, 4, registers=128),
    "gfx942": Tile(128, 128, 32, 8, 2),
    "gfx950": Tile(128, 128, 32, 8, 2),
}
# Softcap or entropy: more registers than the log-sum takes.
RICH_TILES: dict[str, Tile] = {
    "sm_80": Tile(128, 64, 32, 8, 4, registers=128),
    "sm_86": Tile(128, 64, 32, 8, 4, registers=128),
    "sm_89": Tile(128, 64, 32, 8, 4, registers=128),
    "sm_90": Tile(128, 64, 64, 8, 3, blocks=3, descriptors=True, registers=80),
    "sm_100": Tile(128, 64, 64, 8, 3, descriptors=True),
    "sm_120": Tile(64, 64, 64, 8, 3, registers=128),
    "gfx942": Tile(128, 64, 64, 8, 2),
    "gfx950": Tile(128, 64, 64, 8, 2),
}
RICH = 2  # of the things `tile_of` counts; what has more takes the next table
# All statistics at once: a state of twenty numbers a row, kept and made by a thread that has few
# logits. Larger tiles spill.
FULL_TILES: dict[str, Tile] = {
    "sm_80": Tile(64, 32, 64, 8, 3),
    "sm_86": Tile(64, 32, 64, 8, 3),
    "sm_89": Tile(64, 32, 64, 8, 3),
    "sm_90": Tile(64, 32, 64, 8, 3, descriptors=True),
    "sm_100": Tile(64, 32, 64, 8, 3, descriptors=True),
    "sm_120": Tile(64, 32, 64, 8, 3),
    "gfx942": Tile(64, 64, 64, 4, 2),
    "gfx950": Tile(64, 64, 64, 4, 2),
}


def tile_of(x: Tensor, w: Tensor, more: int) -> Tile:
    """The tile for these operands on the current device; an unknown architecture takes sm_80's.

    Args:
        x, w: operands.
        more: how much there is to do for a logit beside the exponential of the log-sum: softcap,
            and every further statistic.
    """
    table = TILES if more == 0 else RICH_TILES if more <= RICH else FULL_TILES
    found = table.get(architecture(), table["sm_80"])
    small = max(16, 1 << (x.shape[1] - 1).bit_length())
    if small < found.bk:
        found = found._replace(bk=small)
    if found.descriptors and not (aligned(x, w) and x.shape[1] >= found.bk):
        found = found._replace(descriptors=False)
    return found
