"""What the two towers measured: the table on the screen, the CSV and the curves."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter
from rich.table import Table

from lossops_bench.race_report import COLOURS
from lossops_bench.report import plain_table
from lossops_bench.towers_train import KS, Point, Retrieval, Runner, TowersOptions

Both = tuple[Retrieval, Retrieval]
"""Docstring → code and code → docstring."""

QUERIES = ("docstring", "code")
OVERLAP, UNTRAINED = "overlap", "untrained"
"""Without any training: by common words, and by the towers' first weights."""


def found(point: Point) -> Both:
    return point.by_doc, point.by_code


def write_points(path: Path, runners: Sequence[Runner]) -> None:
    """One line per loss, evaluation and direction."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        recalls = (f"recall@{k}" for k in KS)
        writer.writerow(
            ["loss", "seconds", "step", "training_loss", "t", "b", "query", *recalls, "mrr"]
        )
        for runner in runners:
            for p in runner.points:
                state = [runner.name, p.seconds, p.step, p.loss, p.scale, p.bias]
                for query, each in zip(QUERIES, found(p), strict=True):
                    writer.writerow([*state, query, *each.recall.values(), each.mrr])


def towers_table(
    runners: Sequence[Runner], overlap: Both, options: TowersOptions, candidates: int
) -> Table:
    """What each loss found at the end, by docstring and by code, and how it got there."""
    table = plain_table(
        f"N={options.batch:,} D={options.dim}, {amount(options)}: recall@k in %, "
        f"{candidates:,} held-out pairs"
    )
    for heading in ("loss", "query"):
        table.add_column(heading, no_wrap=True)
    for heading in (*(f"R@{k}" for k in KS), "MRR", "ms", "steps", "loss", "t", "b"):
        table.add_column(heading, justify="right", no_wrap=True)

    def add(name: str, both: Both, training: Sequence[str] = (), style: str = "") -> None:
        first, second = (
            [query, *(f"{100 * each.recall[k]:.1f}" for k in KS), f"{each.mrr:.3f}"]
            for query, each in zip(("doc", "code"), both, strict=True)
        )
        table.add_row(name, *first, *training, style=style)
        table.add_row("", *second, style=style)

    add(UNTRAINED, found(runners[0].points[0]), style="dim")
    add(OVERLAP, overlap, style="dim")
    for runner in runners:
        if runner.diverged:
            table.add_row(runner.name, "diverged", style="dim")
            continue
        speed = f"{runner.seconds / runner.steps * 1e3:,.0f}", f"{runner.steps:,}"
        bias = "" if runner.bias is None else f"{runner.bias:.1f}"
        add(
            runner.name,
            found(runner.points[-1]),
            (*speed, f"{runner.loss:.3f}", f"{runner.scale:.1f}", bias),
        )
    return table


def write_curves(
    path: Path, runners: Sequence[Runner], overlap: Both, options: TowersOptions, candidates: int
) -> None:
    """One panel per direction: recall@1 against training time, a line per loss."""
    figure = Figure(figsize=(11, 4.6), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.08))
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    untrained = found(runners[0].points[0])
    for side, (axes, query) in enumerate(zip(panels, QUERIES, strict=True)):
        for runner, colour in zip(runners, COLOURS, strict=False):
            times = [point.seconds for point in runner.points[1:]]
            recall = [found(point)[side].recall[1] for point in runner.points[1:]]
            name = f"{runner.name}, {runner.steps:,} steps"
            axes.plot(times, recall, "o-", color=colour, label=name, markersize=3, linewidth=1.6)
        for name, both, style in ((OVERLAP, overlap, "--"), (UNTRAINED, untrained, ":")):
            value = both[side].recall[1]
            axes.axhline(value, color=COLOURS[-1], linestyle=style, linewidth=1.2, label=name)
        axes.set_title(f"by {query}", loc="left", fontsize=10, fontweight="bold")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.grid(color="#e8e8e8")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("recall@1")
    panels[0].legend(frameon=False, fontsize=9)
    figure.supxlabel("seconds of training", fontsize=10)
    figure.suptitle(
        f"docstrings and code of {candidates:,} held-out functions find each other; "
        f"{options.batch:,} pairs per step, {options.dim} features, float32"
    )
    figure.savefig(path, dpi=150)


def amount(options: TowersOptions) -> str:
    if options.steps is not None:
        return f"{options.steps:,} steps"
    return f"{options.seconds:g} s"
