"""What the demo measured: the table on the screen, the CSV and the plot."""

from __future__ import annotations

import csv
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.table import Table

from lossops_bench.demo_train import Step, TrainOptions, optimizer_bytes

MIB = 2**20


@dataclass
class Run:
    """The steps of one head, as its process reported them."""

    head: str
    steps: list[Step] = field(default_factory=list)
    perplexity: float | None = None

    @property
    def step_seconds(self) -> float:
        """The median time of a step without the first, which allocates the optimizer's state."""
        return statistics.median(step.seconds for step in self.steps[1:] or self.steps)

    @property
    def extra_mib(self) -> float:
        """Peak memory beyond what was resident before the first step."""
        return max(step.extra_bytes for step in self.steps) / MIB


def largest_difference(ours: Run, plain: Run) -> float:
    """The largest difference of the two losses over the steps that both took; NaN if one is NaN."""
    pairs = zip(ours.steps, plain.steps, strict=False)
    return float(np.max([abs(a.loss - b.loss) for a, b in pairs]))


def summary(ours: Run, plain: Run, options: TrainOptions) -> Table:
    """The two runs side by side; the loss at the last step that both took."""
    tokens, state = options.batch_tokens, optimizer_bytes(options) / MIB
    common = min(len(ours.steps), len(plain.steps))
    ours_loss, plain_loss = ours.steps[common - 1].loss, plain.steps[common - 1].loss
    # Name, format, both values, and whether their ratio says anything.
    rows: tuple[tuple[str, str, float, float, bool], ...] = (
        ("time per step, s", ".3f", ours.step_seconds, plain.step_seconds, True),
        ("tokens/s", ",.0f", tokens / ours.step_seconds, tokens / plain.step_seconds, True),
        ("extra peak memory, MiB", ",.0f", ours.extra_mib, plain.extra_mib, True),
        ("  AdamW's state in it", ",.0f", state, state, False),
        (f"loss at step {common}", ".6f", ours_loss, plain_loss, False),
        ("steps", "d", len(ours.steps), len(plain.steps), False),
    )
    table = Table("the same training steps", ours.head, plain.head, "ratio")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, spec, a, b, ratio in rows:
        table.add_row(name, format(a, spec), format(b, spec), f"{b / a:.2f}" if ratio else "")
    return table


def write_csv(path: Path, *runs: Run) -> None:
    """One line per run and step."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "step", "loss", "seconds", "extra_peak_bytes"])
        for run in runs:
            for s in run.steps:
                writer.writerow([run.head, s.index, s.loss, s.seconds, s.extra_bytes])


def write_plot(path: Path, ours: Run, plain: Run, options: TrainOptions) -> None:
    """Loss against step for both, and bars of the time per step and of the peak memory."""
    # Imported here because it is slow, and the training processes import this module too.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    colours = {ours.head: "#1f6f8b", plain.head: "#e07a3f"}
    names, fill = list(colours), list(colours.values())
    figure = Figure(figsize=(12, 4.5), layout=ConstrainedLayoutEngine(wspace=0.06, h_pad=0.12))
    loss, seconds, memory = figure.subplots(1, 3, width_ratios=[2.4, 1, 1])
    # The curves coincide: a broad line, and a thin dashed one on top of it.
    for run, width, style in ((ours, 4.5, "-"), (plain, 1.6, "--")):
        steps, losses = [s.index for s in run.steps], [s.loss for s in run.steps]
        loss.plot(steps, losses, style, label=run.head, color=colours[run.head], linewidth=width)
    difference = largest_difference(ours, plain)
    loss.legend(title=f"largest difference {difference:.0e}", frameon=False, alignment="left")
    loss.set_title("training loss, nats per word")
    loss.set_xlabel("step")
    loss.xaxis.get_major_locator().set_params(integer=True)
    loss.grid(axis="y", color="#e8e8e8")
    for axis, title, spec, a, b in (
        (seconds, "time per step, s", ".2f", ours.step_seconds, plain.step_seconds),
        (memory, "extra peak memory, MiB", ",.0f", ours.extra_mib, plain.extra_mib),
    ):
        drawn = axis.bar(names, [a, b], color=fill, width=0.62)
        axis.bar_label(drawn, [format(a, spec), format(b, spec)], padding=3)
        axis.set_title(title)
        axis.set_ylim(0, 1.12 * max(a, b))
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="x", length=0)
    state = optimizer_bytes(options) / MIB
    same = memory.bar(names, state, color="#d5d5d5", width=0.62)
    memory.bar_label(same, ["AdamW's state"] * 2, label_type="center", fontsize=8)
    for axis in (loss, seconds, memory):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"word-level language model, {options.classes:,} classes × {options.dim} features, "
        f"{options.batch_tokens:,} tokens per step, float32"
    )
    figure.savefig(path, dpi=150)
