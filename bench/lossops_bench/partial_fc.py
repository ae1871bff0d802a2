"""`lossops-bench partial-fc`: a training step of a classifier over very many classes.

    x (N, D), y (N,) → margin softmax over cosines → backward to x and the centres → SGD, momentum

Features and labels are new at every step. Rivals take turns, round after round; the memory of each
is that of one step in a process of its own, over its centres and their momentum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table
from torch import Tensor, nn
from typer import Option

import lossops
from lossops_bench.demo import progress_bar
from lossops_bench.figures import Figures, Row, append_rows
from lossops_bench.machine import describe_machine, free_bytes, versions
from lossops_bench.measure import seconds
from lossops_bench.memory import Prepared, peak_extra
from lossops_bench.report import plain_table
from lossops_bench.rivals import first_line

__all__ = ["TRAINERS", "Work", "measure_steps", "partial_fc_command"]

MARGIN = lossops.CosFace(64.0, 0.4)
LR, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
PATIENCE = 900.0
"""Seconds that the process which measures memory may take."""


@dataclass(frozen=True)
class Work:
    """What every rival does."""

    classes: int
    dim: int
    rate: float
    batch: int
    rounds: int
    threads: int
    seed: int = 0

    @property
    def held(self) -> int:
        """Bytes of centres and momentum."""
        return 2 * 4 * self.classes * self.dim


class Trainer:
    """Centres with their optimizer."""

    def __init__(self, work: Work) -> None:
        torch.manual_seed(work.seed)
        self.work = work
        self.draw = torch.Generator().manual_seed(work.seed)
        self.make()

    def make(self) -> None:
        """The centres (V, D), and who updates them."""
        self.weight = nn.Parameter(torch.empty(self.work.classes, self.work.dim).normal_(std=0.01))
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            [self.weight], LR, MOMENTUM, weight_decay=DECAY
        )

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss of a batch."""
        raise NotImplementedError

    def step(self) -> float:
        """One training step on a new batch."""
        x = torch.randn(self.work.batch, self.work.dim, generator=self.draw).requires_grad_()
        y = torch.randint(self.work.classes, (self.work.batch,), generator=self.draw)
        loss = self.loss(x, y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Partial(Trainer):
    """lossops.PartialFC with lossops.optim.RowSGD."""

    def make(self) -> None:
        self.head = lossops.PartialFC(
            self.work.dim, self.work.classes, sample_rate=self.work.rate, margin=MARGIN
        )
        self.optimizer = lossops.optim.RowSGD(self.head.parameters(), LR, MOMENTUM, DECAY)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = self.head(x, y)
        return found


def margin_loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """CosFace in plain PyTorch."""
    z = F.linear(F.normalize(x), F.normalize(w))
    z[torch.arange(len(y)), y] -= MARGIN.margin
    return F.cross_entropy(z * MARGIN.scale, y)


class Plain(Trainer):
    """All classes in plain PyTorch."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return margin_loss(x, self.weight, y)


class PlainSampled(Trainer):
    """A sample in plain PyTorch as commonly written: weight[ids], whose gradient is dense."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        chance = torch.rand(self.work.classes)
        chance[y] = 2.0
        size = max(int(self.work.rate * self.work.classes), len(y))
        ids = chance.topk(size).indices.sort().values
        return margin_loss(x, self.weight[ids], torch.searchsorted(ids, y))


TRAINERS: dict[str, type[Trainer]] = {
    "lossops": Partial,
    "plain": Plain,
    "plain-sampled": PlainSampled,
}


@dataclass(frozen=True)
class StepSetup:
    """Prepares one step of a rival; travels to a fresh process by pickle."""

    name: str
    work: Work

    def __call__(self) -> Prepared:
        torch.set_num_threads(self.work.threads)
        trainer = TRAINERS[self.name](self.work)
        trainer.step()
        return partial(_no_outputs, trainer.step), []


def _no_outputs(step: Callable[[], object]) -> dict[str, Tensor]:
    step()
    return {}


def partial_fc_command(
    classes: Annotated[int, Option(min=8, help="V.")] = 1_000_000,
    dim: Annotated[int, Option(min=1, help="Features D.")] = 256,
    sample_rate: Annotated[float, Option(help="Part of the classes in a sample.")] = 0.1,
    batch: Annotated[int, Option(min=1, help="Rows N.")] = 512,
    rivals: Annotated[str, Option(help=f"Among {', '.join(TRAINERS)}.")] = "",
    repeats: Annotated[int, Option(min=1, help="Rounds, of one step each.")] = 5,
    threads: Annotated[int | None, Option(min=1, help="Default: PyTorch's choice.")] = None,
    memory: Annotated[bool, Option(help="Measure peak memory, in fresh processes.")] = True,
    json: Annotated[Path | None, Option(help="Append the rows as JSON lines.")] = None,
) -> None:
    """Time a training step over very many classes: sample, loss, gradients, update."""
    names = [name.strip() for name in rivals.split(",")] if rivals else list(TRAINERS)
    if unknown := [name for name in names if name not in TRAINERS]:
        raise typer.BadParameter(
            f"--rivals must be among {', '.join(TRAINERS)}; got {', '.join(unknown)}"
        )
    if threads:
        torch.set_num_threads(threads)
    work = Work(classes, dim, sample_rate, batch, repeats, torch.get_num_threads())
    console = Console(highlight=False)
    with progress_bar(console, TextColumn("{task.fields[note]}")) as bar:
        total = len(names) * (1 + memory + repeats)
        task = bar.add_task("partial-fc", total=total, note="")
        found = measure_steps(
            names, work, memory, lambda note: bar.update(task, advance=1, note=note)
        )
        bar.update(task, completed=total, note="done")
    console.print(steps_table(found, work))
    for figures in found:
        if figures.status != "ok":
            console.print(f"{figures.name}: {figures.status}: {figures.reason}", style="dim")
    if json:
        append_rows(step_rows(found, work), json)


def measure_steps(
    names: Sequence[str],
    work: Work,
    memory: bool = True,
    on_step: Callable[[str], None] = lambda note: None,
) -> list[Figures]:
    """Memory first, in processes of their own; then the steps in turns.

    Args:
        names: the rivals.
        work: what they do.
        memory: whether to measure it.
        on_step: hears what begins.
    """
    figures = [Figures(name) for name in names]
    for mine in figures if memory else ():
        on_step(f"{mine.name}: memory")
        _attempt(mine, partial(_measure_memory, mine, work))
    running: list[tuple[Figures, Trainer]] = []
    for mine in figures:
        on_step(f"{mine.name}: the first step")
        need, free = work.held + (mine.extra_bytes or 0), free_bytes("cpu")
        if mine.status == "ok" and need > free:
            mine.reject(
                "skipped",
                f"it needs {need / 1e9:.1f} GB beside the others, and {free / 1e9:.1f} GB are free",
            )
        if mine.status == "ok":
            _attempt(mine, lambda: running.append((mine, _started(mine.name, work))))  # noqa: B023
    for index in range(work.rounds):
        for mine, trainer in running:
            on_step(f"{mine.name}: round {index + 1} of {work.rounds}")
            _attempt(mine, lambda: mine.seconds.append(seconds(trainer.step, "cpu")))  # noqa: B023
    return figures


def _measure_memory(mine: Figures, work: Work) -> None:
    reading = peak_extra(StepSetup(mine.name, work), PATIENCE)
    mine.extra_bytes, mine.memory_method = reading.extra_bytes, reading.method


def _started(name: str, work: Work) -> Trainer:
    trainer = TRAINERS[name](work)
    trainer.step()
    return trainer


def _attempt(mine: Figures, call: Callable[[], object]) -> None:
    try:
        call()
    except Exception as error:  # whatever a rival raises is a reason, not our end
        mine.reject("skipped", first_line(error))


def steps_table(figures: Sequence[Figures], work: Work) -> Table:
    """Those that ran, beside plain PyTorch over all classes, or the first of them without it."""
    ran = [each for each in figures if each.status == "ok" and each.median]
    unit = min(ran, key=lambda each: each.name != "plain", default=None)
    title = (
        f"one step: N={work.batch} D={work.dim} V={work.classes}, sample rate {work.rate:g}, "
        f"float32; centres and momentum {work.held / 1e9:.2f} GB"
    )
    table = plain_table(title)
    table.add_column("rival", no_wrap=True)
    name = unit.name if unit else ""
    for heading in ("ms/step", "±", f"× {name}", "extra, MiB", f"× {name}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in ran:
        assert unit is not None
        assert each.median is not None
        assert unit.median is not None
        extra = of_unit = ""
        if each.extra_bytes is not None:
            extra = f"{each.extra_bytes / 2**20:,.0f}"
            of_unit = f"{each.extra_bytes / unit.extra_bytes:.3f}" if unit.extra_bytes else ""
        table.add_row(
            each.name, f"{each.median * 1e3:,.1f}", f"{each.spread:.0%}",
            f"{each.median / unit.median:.3f}", extra, of_unit,
        )  # fmt: skip
    return table


def step_rows(figures: Sequence[Figures], work: Work) -> list[Row]:
    """One flat dictionary per rival, each complete in itself."""
    setting: dict[str, Any] = {
        "case": "partial_fc",
        "shape": [work.batch, work.dim, work.classes],
        "sample_rate": work.rate,
        "dtype": "float32",
        "seed": work.seed,
        "held_bytes": work.held,
        "versions": versions(),
        "machine": describe_machine("cpu", work.threads),
    }
    return [
        {
            "rival": each.name,
            "status": each.status,
            "reason": each.reason,
            "seconds": each.median,
            "rounds": each.seconds,
            "extra_bytes": each.extra_bytes,
            "memory_method": each.memory_method,
        }
        | setting
        for each in figures
    ]
