"""Cycles and bytes of a tile of the fused kernel, from documents and from what it compiles to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lossops_bench.kernels.report import Row
from lossops_triton.configurations import FULL_TILES, RICH_TILES, TILES, Tile

FEATURES = 2048


class Rates(NamedTuple):
    """A multiprocessor in a cycle.

    Attributes:
        operations: of half-precision products with float32 sums.
        functions: exponentials and the like.
        instructions: of a warp; four schedulers, of AMD's each holds its 16 lanes for four cycles.
    """

    operations: int
    functions: int
    instructions: int = 4


# Operations: the vendors' peak over multiprocessors and clock. A100 312 TFLOP/s of 108 at 1.41 GHz;
# RTX 3090 71 of 82 at 1.695; H100 SXM 989 of 132 at 1.83; B200 2250 of 148 at 1.85; RTX 5090 209.5
# of 170 at 2.41; MI300X 1307 of 304 at 2.1; MI355X 2516 of 256 at 2.4. Functions: the table of
# arithmetic instructions of the CUDA programming guide; CDNA 3 a quarter of its 64 lanes, CDNA 4
# twice that by its white paper.
RATES = {
    "sm_80": Rates(2048, 16),
    "sm_86": Rates(512, 16),
    "sm_90": Rates(4096, 16),
    "sm_100": Rates(8192, 16),
    "sm_120": Rates(512, 16),
    "gfx942": Rates(2048, 16, 1),
    "gfx950": Rates(4096, 32, 1),
}
CASES = {
    "fused": TILES,
    "fused, softcap": RICH_TILES,
    "fused, entropy": RICH_TILES,
    "fused, every statistic": FULL_TILES,
}


def table(rows: Iterable[Row]) -> str:
    """A Markdown table, a line for each of ``CASES`` and architecture."""
    head = [
        "kernel", "", "tile", "products", "MUFU", "issue", "bytes a cycle", "blocks",
    ]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        name = row.facts.architecture
        if row.case in CASES and name in RATES:
            cells = [row.case, name, *_cells(row, CASES[row.case][name], RATES[name])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(row: Row, tile: Tile, rates: Rates) -> list[str]:
    logits = tile.bm * tile.bn
    facts = row.facts
    products = 2 * logits * FEATURES / rates.operations
    functions = logits * row.functions / rates.functions
    epilogue = facts.main - (facts.inner[0] if facts.inner else 0)
    issue = epilogue * facts.warps / rates.instructions
    loaded = 2 * (tile.bm + tile.bn) * FEATURES / products
    return [
        f"{tile.bm}×{tile.bn}×{tile.bk}",
        f"{products:,.0f}",
        f"{functions:,.0f}",
        f"{issue:,.0f}",
        f"{loaded:.0f}",
        str(facts.blocks),
    ]
