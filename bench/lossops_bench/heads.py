"""`lossops-bench heads`: one training step of the output layer alone, head beside head.

    x (N, D), y (N,) → loss → backward to x → SGD of the weight

The targets follow Zipf's law and are new at every step, so that no head lives on rows of its weight
that an earlier step left in the cache. Heads take turns, round after round, each a share of its
steps; a slow one takes as few as fit into its seconds.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table
from torch import Tensor
from typer import Option

from lossops_bench.contenders import Contender, Head, contender
from lossops_bench.demo import progress_bar
from lossops_bench.figures import Figures, Row, append_rows
from lossops_bench.inputs import log_uniform
from lossops_bench.machine import describe_machine, free_bytes, versions
from lossops_bench.measure import seconds
from lossops_bench.report import plain_table
from lossops_bench.rivals import first_line
from lossops_bench.shapes import Shape

__all__ = ["heads_command", "measure_heads"]

RIVALS = (
    "factored-z",
    "factored-mse",
    "softmax",
    "adaptive",
    "sampled",
    "softmax-lossops",
    "gram-z",
)
ROUNDS = 5
LEAST_STEPS = 3
POOL = 16
"""Batches of features; only their targets are new at every step."""
TINY = 64
"""Classes of a first problem, which nobody times."""
LEARNING_RATE = 0.01
"""Small: nothing can be learnt from noise, and a head that diverges takes other paths."""


@dataclass(frozen=True)
class Work:
    """What every head does, how often."""

    shape: Shape
    steps: int
    patience: float
    """Seconds that all steps of one head may take."""
    seed: int = 0


@dataclass
class HeadFigures(Figures):
    """`seconds` are the mean times of a step in each round."""

    steps: int = 0
    spent: float = 0.0
    """Seconds of all these steps."""
    made: float | None = None
    """Seconds to make the head, with its first weight."""
    first: float | None = None
    """Seconds of its first step, which is not among `steps`."""

    @property
    def mean(self) -> float:
        """Seconds of a step: what a head does only now and then counts."""
        return self.spent / self.steps


@dataclass
class Entrant:
    """A head with its inputs, at its next step."""

    head: Head
    features: Sequence[Tensor]  # POOL of (N, D)
    targets: Tensor  # (steps + 2, N)
    figures: HeadFigures
    done: int = 0
    loss: float = math.nan

    def step(self) -> None:
        x = self.features[self.done % len(self.features)].detach().requires_grad_()
        loss = self.head.loss(x, self.targets[self.done])
        loss.backward()
        self.head.step()
        self.loss = loss.item()
        self.done += 1

    def run(self, count: int) -> None:
        for _ in range(count):
            self.step()


def heads_command(
    classes: Annotated[int, Option(min=8, help="V.")] = 793_471,
    dim: Annotated[int, Option(min=4, help="Features D.")] = 512,
    batch: Annotated[int, Option(min=1, help="Rows N.")] = 200,
    steps: Annotated[int, Option(min=LEAST_STEPS, help="Steps of a fast head.")] = 2000,
    rivals: Annotated[
        str, Option(help=f"Names, with commas between; default: {', '.join(RIVALS)}.")
    ] = "",
    seconds: Annotated[float, Option(help="Of one head; 3 steps in any case.")] = 60.0,
    seed: Annotated[int, Option(help="Of weights and inputs.")] = 0,
    threads: Annotated[int | None, Option(min=1, help="Default: PyTorch's choice.")] = None,
    json: Annotated[Path | None, Option(help="Append the rows as JSON lines.")] = None,
) -> None:
    """Time one training step of the output layer alone: loss, backward to its input, SGD."""
    try:
        names = rivals.split(",") if rivals else RIVALS
        competing = [contender(name.strip()) for name in names]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if threads:
        torch.set_num_threads(threads)
    console = Console(highlight=False)
    work = Work(Shape(batch, dim, classes), steps, seconds, seed)
    with progress_bar(console, TextColumn("{task.fields[note]}")) as bar:
        task = bar.add_task("heads", total=len(competing) * (1 + ROUNDS), note="")
        found = measure_heads(competing, work, lambda note: bar.update(task, advance=1, note=note))
        bar.update(task, completed=len(competing) * (1 + ROUNDS), note="done")
    console.print(heads_table(found, work))
    for figures in found:
        if figures.status != "ok":
            console.print(f"{figures.name}: {figures.status}: {figures.reason}", style="dim")
    if json:
        append_rows(head_rows(found, work), json)


def measure_heads(
    competing: Sequence[Contender],
    work: Work,
    on_step: Callable[[str], None] = lambda note: None,
) -> list[HeadFigures]:
    """Make the heads, as far as memory allows, and time their steps in turns.

    Args:
        competing: the heads.
        work: what they do.
        on_step: hears what begins: once per head, and once per head and round.
    """
    figures = [HeadFigures(each.name) for each in competing]
    running: list[Entrant] = []
    reserve = 0  # for the step of any head made so far
    for each, mine in zip(competing, figures, strict=True):
        on_step(f"{each.name}: the first step")
        held, passing = each.bytes(work.shape.rows, work.shape.features, work.shape.classes)
        need, free = held + max(reserve, passing), free_bytes("cpu")
        if need > free:
            gigabytes = f"{need / 1e9:.1f} GB beside the others, and {max(0, free) / 1e9:.1f} GB"
            mine.reject("skipped", f"it needs about {gigabytes} are free")
            continue
        try:
            running.append(prepared(each, work, mine))
        except Exception as error:  # whatever a rival raises is a reason, not our end
            mine.reject("skipped", first_line(error))
        else:
            reserve = max(reserve, passing)
    gc.collect()
    for index in range(ROUNDS):
        for entrant in running:
            on_step(f"round {index + 1} of {ROUNDS}: {entrant.figures.name}")
            if entrant.figures.status == "ok":
                run_round(entrant, index)
    return figures


def prepared(each: Contender, work: Work, figures: HeadFigures) -> Entrant:
    """Make a head, take its first step, and find how many more it has time for."""
    tiny = replace(work.shape, classes=min(TINY, work.shape.classes))
    entrant(each, replace(work, shape=tiny), figures).step()  # wakes what libraries load late
    mine = entrant(each, work, figures)
    figures.first = seconds(mine.step, "cpu")
    second = seconds(mine.step, "cpu")  # the first allocates, and says little of the others
    figures.steps = max(LEAST_STEPS, min(work.steps, int(work.patience / second)))
    return mine


def entrant(each: Contender, work: Work, figures: HeadFigures) -> Entrant:
    """A new head with its inputs."""
    n, d, v = work.shape.rows, work.shape.features, work.shape.classes
    made: list[Head] = []
    torch.manual_seed(work.seed)
    figures.made = seconds(lambda: made.append(each.make(d, v, LEARNING_RATE)), "cpu")
    draw = torch.Generator().manual_seed(work.seed)
    features = [torch.randn(n, d, generator=draw) for _ in range(POOL)]
    return Entrant(made[0], features, log_uniform((work.steps + 2, n), v, draw), figures)


def run_round(entrant: Entrant, index: int) -> None:
    """A round's share of the steps; of very few steps, some rounds get none."""
    mine = entrant.figures
    count = mine.steps * (index + 1) // ROUNDS - mine.steps * index // ROUNDS
    if not count:
        return
    try:
        spent = seconds(lambda: entrant.run(count), "cpu")
    except Exception as error:
        mine.reject("skipped", first_line(error))
        return
    mine.seconds.append(spent / count)
    mine.spent += spent
    if not math.isfinite(entrant.loss):
        mine.reject("wrong", f"its loss became {entrant.loss}")


def heads_table(figures: Sequence[HeadFigures], work: Work) -> Table:
    """Those that ran, beside `factored-z`, or the first of them if it did not run."""
    ran = [each for each in figures if each.status == "ok"]
    unit = min(ran, key=lambda each: each.name != "factored-z", default=None)
    shape = work.shape
    title = f"one step of the head: N={shape.rows} D={shape.features} V={shape.classes}, float32"
    table = plain_table(title)
    table.add_column("head", no_wrap=True)
    ratio = f"× {unit.name}" if unit else "×"
    for heading in ("ms/step", "±", "steps", ratio, "make, s", "first step, s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in ran:
        table.add_row(
            each.name,
            f"{each.mean * 1e3:,.2f}",
            f"{each.spread:.0%}",
            f"{each.steps:,}",
            f"{each.mean / unit.mean:.2f}" if unit else "",
            f"{each.made:.2f}",
            f"{each.first:.3f}",
        )
    return table


def head_rows(figures: Sequence[HeadFigures], work: Work) -> list[Row]:
    """One flat dictionary per head, each complete in itself."""
    shape = work.shape
    setting: dict[str, Any] = {
        "case": "heads",
        "shape": [shape.rows, shape.features, shape.classes],
        "dtype": "float32",
        "seed": work.seed,
        "versions": versions(),
        "machine": describe_machine("cpu", torch.get_num_threads()),
    }
    return [
        {
            "rival": each.name,
            "status": each.status,
            "reason": each.reason,
            "seconds": each.mean if each.status == "ok" else None,
            "rounds": each.seconds,
            "steps": each.steps,
            "make_seconds": each.made,
            "first_step_seconds": each.first,
        }
        | setting
        for each in figures
    ]
