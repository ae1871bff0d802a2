"""`lossops-bench identities`: an identity classifier trained with Partial FC, at several rates.

    identity k → latent u_k → a noisy picture of it → backbone → features → PartialFC

Pictures are made up: A tanh(B (u_k + σ n)) of a latent u_k ~ N(0, I) with fresh noise n, so that no
picture is seen twice and held-out ones are drawn alike. Every rate trains the same backbone from
the same start on the same batches; what differs is how many classes a step sees. After each part
of the steps the state is written, and a run that was stopped goes on from there.

Held out are new pictures of the identities trained on, found by their class centre, and pictures
of strangers, identities that training never saw, found by another picture of each: the second is
how face recognition is judged, and needs the backbone alone.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table
from torch import Tensor, nn
from typer import Option

import lossops
from lossops_bench.demo import progress_bar
from lossops_bench.race_report import COLOURS
from lossops_bench.report import plain_table

__all__ = ["Identities", "Options", "Run", "identities_command", "train"]

EVALUATIONS = 10
HELD_OUT = 20_000
"""Pictures, and strangers at most: a standard error of 0.3 points."""


@dataclass(frozen=True)
class Options:
    """The task and how it is trained; a checkpoint of others is not continued."""

    classes: int = 100_000
    dim: int = 64
    latent: int = 32
    noise: float = 0.5
    batch: int = 512
    steps: int = 2000
    lr: float = 0.1
    scale: float = 32.0
    margin: float = 0.2
    seed: int = 0


class Identities:
    """Pictures of made-up identities, as many as are asked for."""

    def __init__(self, options: Options) -> None:
        self.options = options
        draw = torch.Generator().manual_seed(options.seed)
        size = options.latent
        self.latents = torch.randn(options.classes, size, generator=draw)
        self.inside = torch.randn(2 * size, size, generator=draw) / size**0.5
        self.outside = torch.randn(2 * size, 2 * size, generator=draw) / (2 * size) ** 0.5
        self.new_latents = torch.randn(min(HELD_OUT, options.classes), size, generator=draw)

    def pictures(self, count: int, number: int) -> tuple[Tensor, Tensor]:
        """Batch ``number``: pictures (N, 2·latent) and who they are of (N,)."""
        draw = self._draw(number + 1)
        ids = torch.randint(self.options.classes, (count,), generator=draw)
        return self._taken(self.latents[ids], draw), ids

    def strangers(self) -> tuple[Tensor, Tensor]:
        """Two pictures of each of as many identities as training never sees."""
        draw = self._draw(-1)
        return self._taken(self.new_latents, draw), self._taken(self.new_latents, draw)

    def _draw(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.options.seed * 1_000_003 + number)

    def _taken(self, latents: Tensor, draw: torch.Generator) -> Tensor:
        noise = torch.randn(latents.shape, generator=draw)
        seen = latents + self.options.noise * noise
        return torch.tanh(seen @ self.inside.T) @ self.outside.T


class Point(NamedTuple):
    """What a run has reached: shares of held-out pictures, and of strangers, that are found."""

    step: int
    seconds: float
    held_out: float
    strangers: float


@dataclass
class Run:
    """One rate: its model, and what it has reached."""

    rate: float
    options: Options
    seconds: float = 0.0
    step: int = 0
    loss: float = float("nan")
    points: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        o = self.options
        torch.manual_seed(o.seed)
        self.body = nn.Sequential(
            nn.Linear(2 * o.latent, 4 * o.dim), nn.ReLU(), nn.Linear(4 * o.dim, o.dim)
        )
        self.head = lossops.PartialFC(
            o.dim, o.classes, sample_rate=self.rate, margin=lossops.CosFace(o.scale, o.margin),
            sparse=True, seed=o.seed,
        )  # fmt: skip
        self.optimizers = [
            torch.optim.AdamW(self.body.parameters(), 2e-3),
            lossops.optim.RowSGD(self.head.parameters(), o.lr, 0.9),
        ]
        self.schedules = [
            torch.optim.lr_scheduler.CosineAnnealingLR(each, o.steps) for each in self.optimizers
        ]

    def train_step(self, x: Tensor, y: Tensor) -> None:
        """One step on a batch."""
        start = time.perf_counter()
        for each in self.optimizers:
            each.zero_grad()
        loss = self.head(self.body(x), y)
        loss.backward()
        for each in (*self.optimizers, *self.schedules):
            each.step()
        self.loss = loss.item()
        self.seconds += time.perf_counter() - start
        self.step += 1

    @torch.no_grad()
    def evaluate(self, data: Identities) -> None:
        """How many pictures are nearest to their own centre, and to the other of a stranger."""
        x, y = data.pictures(HELD_OUT, -1)
        known = [self.head.topk(self.body(part), 1).indices[:, 0] for part in x.split(1000)]
        gallery, probes = (F.normalize(self.body(each)) for each in data.strangers())
        new = [(part @ gallery.T).argmax(1) for part in probes.split(1000)]
        shares = [
            (torch.cat(found) == right).float().mean().item()
            for found, right in ((known, y), (new, torch.arange(len(probes))))
        ]
        self.points.append(Point(self.step, self.seconds, *shares))

    def save(self, path: Path) -> None:
        """Everything a run needs to go on, readable with ``weights_only=True``."""
        parts = (self.body, self.head, *self.optimizers, *self.schedules)
        state: dict[str, Any] = {"options": asdict(self.options), "rate": self.rate}
        state |= {"parts": [part.state_dict() for part in parts]}
        points = [tuple(point) for point in self.points]
        state |= {"seconds": self.seconds, "step": self.step, "loss": self.loss, "points": points}
        torch.save(state, path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint, where there is one of the same options."""
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["options"] != asdict(self.options) or state["rate"] != self.rate:
            return
        parts = (self.body, self.head, *self.optimizers, *self.schedules)
        for part, saved in zip(parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self.seconds, self.step, self.loss = state["seconds"], state["step"], state["loss"]
        self.points = [Point(*point) for point in state["points"]]


def train(
    run: Run,
    data: Identities,
    checkpoint: Path | None = None,
    on_step: Callable[[Run], None] = lambda run: None,
) -> None:
    """Train to the end, from the checkpoint where there is one.

    Args:
        run: the model.
        data: its pictures.
        checkpoint: file to resume from, written at every evaluation.
        on_step: hears of every step.
    """
    if checkpoint is not None:
        run.resume(checkpoint)
    steps, batch = run.options.steps, run.options.batch
    while run.step < steps:
        run.train_step(*data.pictures(batch, run.step))
        on_step(run)
        if run.step * EVALUATIONS // steps > (run.step - 1) * EVALUATIONS // steps:
            run.evaluate(data)
            if checkpoint is not None:
                run.save(checkpoint)


def identities_command(
    classes: Annotated[int, Option(min=8, help="Identities V.")] = Options.classes,
    rates: Annotated[str, Option(help="Sample rates, with commas between.")] = "1,0.3,0.1,0.03",
    dim: Annotated[int, Option(min=2, help="Features D.")] = Options.dim,
    batch: Annotated[int, Option(min=1, help="Pictures in a step.")] = Options.batch,
    steps: Annotated[int, Option(min=EVALUATIONS, help="Of every rate.")] = Options.steps,
    noise: Annotated[float, Option(help="Of a picture, beside latents of size 1.")] = Options.noise,
    lr: Annotated[float, Option(help="Of the centres, at the start.")] = Options.lr,
    seed: Annotated[int, Option(help="Of identities, pictures and weights.")] = 0,
    out: Annotated[Path, Option(help="Folder of curves, table and checkpoints.")] = Path(
        "identities-results"
    ),
) -> None:
    """Train an identity classifier with Partial FC; several sample rates side by side."""
    try:
        wanted = [float(rate) for rate in rates.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--rates must be numbers in (0, 1], got {rates!r}") from None
    if not all(0 < rate <= 1 for rate in wanted):
        raise typer.BadParameter(f"--rates must be in (0, 1], got {rates}")
    options = Options(
        classes=classes, dim=dim, batch=batch, steps=steps, noise=noise, lr=lr, seed=seed
    )
    console = Console(highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    data, runs = Identities(options), []
    with progress_bar(console, TextColumn("{task.fields[note]}")) as bar:
        for rate in wanted:
            task = bar.add_task(f"rate {rate:g}", total=steps, note="")

            def on_step(run: Run, task: Any = task) -> None:
                reached = f", held out {run.points[-1].held_out:.1%}" if run.points else ""
                bar.update(task, completed=run.step, note=f"loss {run.loss:.3f}{reached}")

            runs.append(Run(rate, options))
            train(runs[-1], data, out / f"rate-{rate:g}.pt", on_step)
            on_step(runs[-1])
    write_points(out / "identities.csv", runs)
    write_curves(out / "identities.png", runs)
    console.print(identities_table(runs))


def identities_table(runs: Sequence[Run]) -> Table:
    """Accuracy at the end, and what a step took."""
    options = runs[0].options
    table = plain_table(
        f"{options.classes:,} identities, {options.dim} features, {options.steps:,} steps of "
        f"{options.batch}: held-out pictures found by centre, strangers by another picture"
    )
    for heading in ("sample rate", "held out", "strangers", "ms/step"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        each, end = f"{run.seconds / run.step * 1e3:,.0f}", run.points[-1]
        table.add_row(f"{run.rate:g}", f"{end.held_out:.2%}", f"{end.strangers:.2%}", each)
    return table


def write_points(path: Path, runs: Sequence[Run]) -> None:
    """One line per rate and evaluation."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rate", *Point._fields])
        writer.writerows((run.rate, *point) for run in runs for point in run.points)


def write_curves(path: Path, runs: Sequence[Run]) -> None:
    """Both accuracies by steps, and that of held-out pictures by time; a line per rate."""
    figure = Figure(figsize=(13, 4), layout=ConstrainedLayoutEngine(w_pad=0.1))
    panels = (
        ("step", "strangers", "identities that training never saw"),
        ("step", "held_out", "new pictures of those it saw"),
        ("seconds", "held_out", "the same, by time"),
    )
    for axes, (across, up, title) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        for run, colour in zip(runs, COLOURS * len(runs), strict=False):
            x, y = ([getattr(point, each) for point in run.points] for each in (across, up))
            axes.plot(x, y, "o-", color=colour, label=f"{run.rate:g}", markersize=3, linewidth=1.6)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("steps" if across == "step" else "seconds of training")
        axes.grid(color="#e8e8e8")
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    figure.axes[0].set_ylabel("pictures that are found")
    figure.axes[0].legend(title="sample rate", frameon=False)
    options = runs[0].options
    figure.suptitle(f"Partial FC, {options.classes:,} identities, the same backbone and batches")
    figure.savefig(path, dpi=150)
