"""The plot of a run: time and peak extra memory of every rival, two panels per problem."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lossops_bench.figures import Row
from lossops_bench.report import bytes_text, problem_title

__all__ = ["save_plot"]

OURS, OTHERS, WARNING, QUIET = "#0b7a75", "#a9b2b9", "#b8322a", "#6b747b"
CLIP = 3.0
"""A bar longer than this many times the median is cut off, or it would hide all others."""


def save_plot(problems: Sequence[Sequence[Row]], path: Path) -> None:
    """Draw the rows of some problems; the ending of the path chooses the format."""
    shown = [[r for r in rows if r["status"] not in ("unit", "absent")] for rows in problems]
    shown = [rows for rows in shown if rows]
    if not shown:
        raise ValueError(f"no rival ran, so there is nothing to draw in {path}")
    heights = [0.3 * len(rows) + 0.75 for rows in shown]
    figure = Figure(figsize=(10, sum(heights) + 0.2), layout=ConstrainedLayoutEngine(h_pad=0.1))
    grid = figure.subplots(len(shown), 2, squeeze=False, height_ratios=heights)
    for (time, memory), rows in zip(grid, shown, strict=True):
        first, unit = rows[0], rows[0]["unit"].partition(":")[0]
        draw(time, rows, "units", "{:.2f}".format)
        draw(memory, rows, "extra_bytes", bytes_text)
        time.axvline(first["least_units"], color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
        time.set_title(problem_title(first), loc="left", fontsize=10, fontweight="bold")
        time.set_xlabel(
            f"time in {unit}-equivalents (dashed: the work itself, {first['least_units']:g})",
            fontsize=8.5,
            loc="left",
        )
        memory.set_xlabel("peak extra memory", fontsize=8.5, loc="left")
        memory.set_yticklabels([])
    figure.savefig(path, dpi=150)


def draw(axes: Axes, rows: Sequence[Row], key: str, text: Callable[[float], str]) -> None:
    """One bar for each row that is ok and has a value, a word for the others."""
    values = [row[key] for row in rows if row["status"] == "ok" and row[key] is not None]
    end = min(max(values), CLIP * median(values)) if any(values) else 1.0
    end = max(end, rows[0]["least_units"]) if key == "units" else max(values, default=end) or 1.0
    for place, row in enumerate(rows):
        gap, value = 0.012 * end, row[key]
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        style: dict[str, Any] = {"va": "center", "fontsize": 9, "bbox": paper}
        if row["status"] != "ok":
            words = shortened(f"{row['status']}: {row['reason']}")
            if key == "units":
                axes.text(gap, place, words, color=WARNING, style="italic", **style)
        elif value is None:
            axes.text(gap, place, "not measured", color=QUIET, style="italic", **style)
        else:
            ours = row["rival"].startswith("lossops")
            axes.barh(place, min(value, end), height=0.66, color=OURS if ours else OTHERS)
            if value > end:  # the cut
                axes.plot([0.93 * end, 0.95 * end], [place + 0.4, place - 0.4], "w", linewidth=4)
            weight = "bold" if ours else "normal"
            axes.text(min(value, end) + gap, place, text(value), fontweight=weight, **style)
    axes.set_yticks(range(len(rows)), [row["rival"] for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.2 * end)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def shortened(reason: str, width: int = 56) -> str:
    return reason if len(reason) <= width else f"{reason[: width - 1]}…"
