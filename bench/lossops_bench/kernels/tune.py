"""`lossops-bench tune`: time candidate tiles of the fused kernel on this GPU, and keep the fastest.

The tables of kernels/lossops_triton/configurations.py have a row for each architecture. A run
rewrites the rows of the GPU it ran on, with its name and the date, and no other.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import typer

from lossops.statistics import STATISTICS, canonical
from lossops_triton import configurations, fused
from lossops_triton.configurations import FULL_TILES, RICH_TILES, TILES, Tile
from lossops_triton.launch import architecture

Timer = Callable[[Tile], float]

ROWS, CLASSES = 8192, 65536
FEATURES = (1024, 4096)
# What takes the place of a row must be faster by more than two runs differ.
MARGIN = 0.02


class Workload(NamedTuple):
    """What a table is timed on."""

    table: str
    tiles: dict[str, Tile]
    names: tuple[str, ...]
    softcap: float = 0.0


EVERY = tuple(
    name
    for name in canonical(STATISTICS)
    if name not in ("below_target", "teacher", "weighted_sum")
)
WORKLOADS = (
    Workload("TILES", TILES, canonical(("target", "lse"))),
    Workload("RICH_TILES", RICH_TILES, canonical(("target", "entropy")), 30.0),
    Workload("FULL_TILES", FULL_TILES, EVERY),
)


def candidates(current: Tile) -> list[Tile]:
    """The row itself, then others: sizes, depths, warps, with and without a bound on registers."""
    listed = [current]
    for bm, bn in ((128, 256), (256, 128), (128, 128), (128, 64), (64, 128), (64, 64), (64, 32)):
        for bk, stages in ((64, 3), (64, 4), (32, 4), (32, 2), (64, 2)):
            for warps in (4, 8):
                logits = bm * bn // (32 * warps)
                if 8 <= logits <= 128:
                    listed.append(current._replace(bm=bm, bn=bn, bk=bk, stages=stages, warps=warps))
    if current.registers is not None or current.descriptors:
        listed += [one._replace(registers=None) for one in listed]
    return list(dict.fromkeys(listed))


def variants(tile: Tile) -> list[Tile]:
    """The tile itself, then other divisions of the classes, and its two loops as one."""
    listed = [tile, *(tile._replace(blocks=blocks) for blocks in (1, 2, 3, 4))]
    return list(dict.fromkeys([*listed, tile._replace(flatten=not tile.flatten)]))


def fastest(tiles: Sequence[Tile], timer: Timer) -> tuple[Tile, float]:
    """The fastest and its seconds; the first stays where none is faster by more than ``MARGIN``."""
    seconds = {tile: timer(tile) for tile in tiles}
    best = min(tiles, key=seconds.__getitem__)
    first = tiles[0]
    if seconds[best] >= seconds[first] * (1 - MARGIN):
        best = first
    return best, seconds[best]


def written(tile: Tile) -> str:
    """As in the tables: the first five by position, the others where they are not the default."""
    sizes = [str(size) for size in tile[:5]]
    others = [
        f"{name}={getattr(tile, name)!r}"
        for name, default in Tile._field_defaults.items()
        if getattr(tile, name) != default
    ]
    return f"Tile({', '.join(sizes + others)})"


def rewritten(source: str, table: str, key: str, tile: Tile, note: str) -> str:
    """The source of configurations.py with one row of one table in another's place, or added."""
    found = re.search(rf"^{table}: dict\[str, Tile\] = \{{\n(.*?)^\}}", source, re.M | re.S)
    if found is None:
        raise ValueError(f"configurations.py must have the table {table}")
    lines = found[1].splitlines()
    row = f'    "{key}": {written(tile)},  # {note}'
    if len(row) > 100:
        row = f'    # {note}\n    "{key}": {written(tile)},'
    at = [i for i, line in enumerate(lines) if line.strip().startswith(f'"{key}":')]
    if not at:
        lines.append(row)
    else:
        start = at[0] - (at[0] > 0 and lines[at[0] - 1].strip().startswith("#"))
        lines[start : at[0] + 1] = [row]
    return source[: found.start(1)] + "\n".join(lines) + "\n" + source[found.end(1) :]


def on_this_gpu(workload: Workload) -> Timer:
    """Seconds of the fused kernel with a tile, over all ``FEATURES``; inf where it cannot run."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    def inputs(d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.randn(ROWS, d, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(CLASSES, d, device="cuda", dtype=torch.bfloat16) / d**0.5
        return x, w, torch.randint(CLASSES, (ROWS, 1), device="cuda")

    problems = [inputs(d) for d in FEATURES]

    def seconds(tile: Tile) -> float:
        def run(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> object:
            return fused.fused_statistics(
                x, w, None, None, workload.softcap, y, None, None, workload.names
            )

        with mock.patch.object(fused, "tile_of", return_value=tile):
            try:
                return sum(
                    do_bench(lambda one=one: run(*one), quantiles=[0.5]) / 1e3 for one in problems
                )
            except OutOfResources:
                return float("inf")

    return seconds


def tune(
    key: str,
    note: str,
    source: str,
    timer: Callable[[Workload], Timer],
    workloads: Iterable[Workload] = WORKLOADS,
) -> str:
    """The source with the fastest tiles of an architecture in all tables."""
    for workload in workloads:
        current = workload.tiles.get(key, workload.tiles["sm_80"])
        seconds_of = timer(workload)
        best, _ = fastest(candidates(current), seconds_of)
        best, seconds = fastest(variants(best), seconds_of)
        typer.echo(f"{workload.table}: {written(best)}, {seconds * 1e3:.3f} ms")
        if best != current or key not in workload.tiles:
            source = rewritten(source, workload.table, key, best, note)
    return source


def tune_this_gpu(write: bool) -> None:
    """Time the candidates on the current GPU, and rewrite configurations.py if asked."""
    path = Path(configurations.__file__)
    note = f"timed on {torch.cuda.get_device_name()}, {datetime.date.today().isoformat()}"
    source = tune(architecture(), note, path.read_text(), on_this_gpu)
    if write:
        path.write_text(source)
