"""What the race measured: the table on the screen, the CSV and the curves."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter
from rich.table import Table

from lossops_bench.race_train import KS, RaceOptions, Runner
from lossops_bench.report import plain_table

COLOURS = ("#0b7a75", "#e07a3f", "#8a4f9e", "#4a6fa5", "#b8322a", "#7a7a3a", "#6b747b")


def write_points(path: Path, runners: Sequence[Runner]) -> None:
    """One line per head, evaluation and k."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["head", "seconds", "step", "k", "error"])
        for runner in runners:
            for point in runner.points:
                for k, error in point.errors.items():
                    writer.writerow([runner.entry.name, point.seconds, point.step, k, error])


def race_table(runners: Sequence[Runner], options: RaceOptions) -> Table:
    """Steps, time per step and the errors at the end of each head; the lowest of each k is bold."""
    sizes = f"V={options.classes:,} D={options.dim} N={options.batch}"
    table = plain_table(f"{sizes}: held-out top-k error after {options.seconds:g} s of training")
    table.add_column("head", no_wrap=True)
    for heading in ("lr", "ms/step", "steps", *(f"k={k}" for k in KS)):
        table.add_column(heading, justify="right", no_wrap=True)
    ended = [runner.points[-1].errors for runner in runners if not runner.diverged]
    for runner in runners:
        row = [
            runner.entry.name,
            f"{runner.entry.lr:g}",
            f"{runner.seconds / runner.steps * 1e3:,.1f}",
            f"{runner.steps:,}",
        ]
        if runner.diverged:
            table.add_row(*row, "diverged", style="dim")
            continue
        for k, error in runner.points[-1].errors.items():
            best = error == min(errors[k] for errors in ended)
            row.append(f"[bold]{error:.1%}[/]" if best else f"{error:.1%}")
        table.add_row(*row)
    return table


def write_curves(path: Path, runners: Sequence[Runner], options: RaceOptions) -> None:
    """One panel per k: error against training time, a line per head; the last panel names them."""
    figure = Figure(figsize=(12, 7), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.08))
    panels = figure.subplots(2, (len(KS) + 2) // 2, sharex=True).flat
    for k, axes in zip(KS, panels, strict=False):
        for runner, colour in zip(runners, COLOURS * len(runners), strict=False):
            times = [point.seconds for point in runner.points]
            errors = [point.errors[k] for point in runner.points]
            name = f"{runner.entry.name}, {runner.steps:,} steps"
            axes.plot(times, errors, "o-", color=colour, label=name, markersize=3, linewidth=1.6)
        axes.set_title(f"top-{k} error", loc="left", fontsize=10, fontweight="bold")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelbottom=True)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.grid(color="#e8e8e8")
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    for axes in figure.axes[len(KS) :]:
        axes.axis("off")
    figure.axes[-1].legend(handles, names, loc="center", frameon=False)
    figure.supxlabel("seconds of training", fontsize=10)
    figure.suptitle(
        f"word-level language model, {options.classes:,} classes × {options.dim} features, "
        f"{options.batch} words per step, float32"
    )
    figure.savefig(path, dpi=150)
