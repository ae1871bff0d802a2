"""The plot of a run: cost and peak extra memory of every rival, one line of panels per problem."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lossops_bench.figures import Row
from lossops_bench.report import bytes_text, problem_title

__all__ = ["save_plot"]

OURS, OTHERS, BAD = "#0b7a75", "#9aa5ad", "#c0392b"


def save_plot(problems: Sequence[Sequence[Row]], path: Path) -> None:
    """Write a picture; the ending of the path chooses its format."""
    shown = [[row for row in rows if row["status"] != "unit"] for rows in problems]
    heights = [0.34 * len(rows) + 0.9 for rows in shown]
    figure = Figure(figsize=(10, sum(heights) + 0.3), layout="constrained")
    figure.get_layout_engine().set(hspace=0.04, wspace=0.04)
    grid = figure.subplots(len(shown), 2, squeeze=False, height_ratios=heights)
    for (cost, memory), rows in zip(grid, shown, strict=True):
        unit = rows[0]["unit"].partition(":")[0]
        _bars(cost, rows, [row["units"] for row in rows], "{:.2f}".format)
        _bars(memory, rows, [row["extra_bytes"] for row in rows], bytes_text)
        memory.set_yticklabels([])
        cost.set_title(problem_title(rows[0]), loc="left", fontsize=10, fontweight="bold")
        cost.set_xlabel(f"time in {unit}-equivalents", fontsize=9)
        memory.set_xlabel("peak extra memory", fontsize=9)
    figure.savefig(path, dpi=150)


def _bars(axes: Any, rows: Sequence[Row], values: Sequence[float | None], text: Any) -> None:
    """Horizontal bars, best at the eye's start: the order of the rows, from the top."""
    top = max((value for value in values if value is not None), default=1.0) or 1.0
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        ours = row["rival"].startswith("lossops")
        usable = value is not None and row["status"] == "ok"
        if usable:
            axes.barh(place, value, height=0.68, color=OURS if ours else OTHERS)
        label = text(value) if usable else row["status"] if row["status"] != "ok" else "–"
        axes.text(
            (value if usable else 0) + 0.015 * top,
            place,
            label,
            va="center",
            fontsize=9,
            color="black" if usable else BAD,
            fontweight="bold" if ours and usable else "normal",
        )
    axes.set_yticks(range(len(rows)), [row["rival"] for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * top)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
