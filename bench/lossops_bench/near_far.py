"""`lossops-bench near-far`: near and far gradients on a trained head, beside the exact ones.

    near_far_model → x, w, y of a language model ┬→ time and errors of each way, this file
                                                 ├→ near_far_frontier: error against cost
                                                 └→ near_far_training: does it train?

Every way takes its turn in each round, the product of one GEMM-equivalent among them. Errors are
against float64 on the same numbers. On random logits, which have no peaks, it must step aside.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table
from torch import Tensor
from typer import Option

import lossops
from lossops_bench.case import Problem
from lossops_bench.demo import load_corpus, progress_bar
from lossops_bench.demo_data import Corpus
from lossops_bench.demo_train import TrainOptions
from lossops_bench.machine import describe_machine, versions
from lossops_bench.measure import product_ways, seconds
from lossops_bench.memory import Prepared, peak_extra
from lossops_bench.near_far_frontier import frontier, write_frontier
from lossops_bench.near_far_model import TrainedHead, load_head, train_head
from lossops_bench.near_far_training import (
    WAYS,
    Point,
    dropping_cross_entropy,
    train_way,
    write_curves,
    write_points,
)
from lossops_bench.report import plain_table
from lossops_bench.shapes import parse_shape

__all__ = ["near_far_command"]

TWO = lossops.LinearLossOptions(schedule="two_sweeps")
PATIENCE = 600.0


class Kind(StrEnum):
    """The dtypes of x and w, as typed on the command line."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def loss_of(way: str, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The mean loss of one of the ways."""
    if way == "dropping":
        return dropping_cross_entropy(x, w, y)
    return lossops.linear_cross_entropy(
        x,
        w,
        y,
        near_threshold="auto" if "near" in way else None,
        options=TWO if "two sweeps" in way else None,
    )


STEPS = ("dense", "near/far", "dropping", "dense, two sweeps", "near/far, two sweeps")
RANDOM = ("dense", "near/far", "dense, two sweeps", "near/far, two sweeps")


@dataclass
class Result:
    """One way on one problem."""

    problem: str  # "trained float32"
    way: str
    seconds: list[float] = field(default_factory=list)
    units: list[float] = field(default_factory=list)
    of_dense: list[float] = field(default_factory=list)
    error_dx: float = 0.0
    error_dw: float = 0.0
    error_class: float = 0.0
    extra_bytes: int | None = None


@dataclass(frozen=True)
class Setup:
    """Prepares one step; travels to the fresh process that measures its memory."""

    path: Path
    rows: int
    dtype: str
    way: str

    def __call__(self) -> Prepared:
        x, w, y = inputs(load_head(self.path), self.rows, self.dtype)
        small = [t[:64].detach().requires_grad_() for t in (x, w)]
        step(self.way, small[0], small[1], y[:64].remainder(64))
        return partial(step, self.way, x, w, y), [x, w, y]


def inputs(head: TrainedHead, rows: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves of the head in some dtype."""
    kind = getattr(torch, dtype)
    x, w = head.x[:rows].to(kind), head.w.to(kind)
    return x.requires_grad_(), w.requires_grad_(), head.target[:rows]


def step(way: str, x: Tensor, w: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Loss and gradients."""
    dx, dw = torch.autograd.grad(loss_of(way, x, w, y), (x, w))
    return {"dx": dx, "dw": dw}


def measure(
    head: TrainedHead,
    path: Path,
    rows: int,
    dtype: str,
    repeats: int,
    memory: bool,
    on_step: Callable[[str], None],
) -> list[Result]:
    """Time and errors on the trained head and on random logits of its size.

    Args:
        head: the trained one.
        path: where it lies, for fresh processes.
        rows: N.
        dtype: of x and w.
        repeats: rounds.
        memory: whether to measure the peak memory of each way.
        on_step: hears what begins.
    """
    found: list[Result] = []
    for kind, ways in (("trained", STEPS), ("random", RANDOM)):
        x, w, y = inputs(head, rows, dtype)
        if kind == "random":
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(x.shape, generator=generator).to(x.dtype).requires_grad_()
            spread = head.w.std() * torch.randn(w.shape, generator=generator)
            w = spread.to(w.dtype).requires_grad_()
        results = [Result(f"{kind} {dtype}", way) for way in ways]
        on_step(f"{kind} {dtype}: float64")
        wide = [t.detach().double().requires_grad_() for t in (x, w)]
        true = step("dense", wide[0], wide[1], y)
        for result in results:
            on_step(f"{kind} {dtype}: {result.way}")
            note_errors(result, step(result.way, x, w, y), true)
            if memory and kind == "trained":
                reading = peak_extra(Setup(path, rows, dtype, result.way), PATIENCE)
                result.extra_bytes = reading.extra_bytes
        del true, wide
        shape = parse_shape(f"{rows},{x.shape[1]},{w.shape[0]}")
        problem = Problem(shape, x.dtype, threads=torch.get_num_threads())
        units = product_ways("x", "w", problem, {"x": x, "w": w})
        for index in range(repeats):
            on_step(f"{kind} {dtype}: round {index + 1} of {repeats}")
            unit = min(seconds(prepare(), "cpu") for prepare in units.values())
            times = {r.way: seconds(partial(step, r.way, x, w, y), "cpu") for r in results}
            for result in results:
                spent = times[result.way]
                result.seconds.append(spent)
                result.units.append(spent / unit)
                same = "dense, two sweeps" if "two" in result.way else "dense"
                result.of_dense.append(spent / times[same])
        found += results
    return found


def note_errors(result: Result, found: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    """Of dx and dw relative to their norms; of the median class relative to its own row of dw."""
    off = {name: found[name].double() - true[name] for name in true}
    result.error_dx = float(off["dx"].norm() / true["dx"].norm())
    result.error_dw = float(off["dw"].norm() / true["dw"].norm())
    result.error_class = float((off["dw"].norm(dim=1) / true["dw"].norm(dim=1)).nanmedian())


def results_table(results: Sequence[Result], title: str) -> Table:
    """The medians of the rounds."""
    table = plain_table(title)
    table.add_column("", no_wrap=True)
    headings = ("ms", "× GEMM", "× dense", "error dx", "error dw", "median class", "extra, MiB")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for r in results:
        extra = "" if r.extra_bytes is None else f"{r.extra_bytes / 2**20:,.0f}"
        table.add_row(
            f"{r.problem}: {r.way}", f"{median(r.seconds) * 1e3:,.0f}", f"{median(r.units):.2f}",
            f"{median(r.of_dense):.2f}", f"{r.error_dx:.2%}", f"{r.error_dw:.2%}",
            f"{r.error_class:.1%}", extra,
        )  # fmt: skip
    return table


def near_far_command(
    out: Annotated[Path, Option(help="Folder for the head, plots and CSVs.")] = Path(
        "near-far-results"
    ),
    minutes: Annotated[float, Option(help="Training of the head, if it is not there yet.")] = 20.0,
    rows: Annotated[int, Option(min=128, help="Rows N.")] = 4096,
    dim: Annotated[int, Option(min=16, help="Features D of the head.")] = 1024,
    vocab: Annotated[int, Option(min=64, help="Classes V.")] = 65536,
    dtype: Annotated[
        list[Kind] | None, Option(help="May be repeated. Default: each of them.")
    ] = None,
    repeats: Annotated[int, Option(min=1, help="Rounds.")] = 5,
    memory: Annotated[bool, Option(help="Measure peak memory, in fresh processes.")] = True,
    plot: Annotated[bool, Option(help="Draw error against cost, from the definition.")] = True,
    steps: Annotated[int, Option(help="Also train the demo's model each way; 2000.")] = 0,
    max_tokens: Annotated[int, Option(help="Tokens of the corpus at most.")] = 12_000_000,
    threads: Annotated[int | None, Option(min=1, help="Default: PyTorch's choice.")] = None,
    smoke: Annotated[bool, Option("--smoke", help="Seconds instead of minutes: a test.")] = False,
) -> None:
    """Near and far gradients on a trained head: time, error, the frontier, and training curves."""
    if smoke:
        minutes, rows, dim, vocab, repeats, max_tokens = 0.05, 256, 64, 3000, 1, 200_000
        dtype, memory, steps = [Kind.float32], False, min(steps, 2)
    if threads:
        torch.set_num_threads(threads)
    console = Console(highlight=False, width=130)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "head.pt"
    text: Corpus | None = None
    if not path.exists() or steps:
        text = load_corpus([], vocab, max_tokens, 0, console)
    if not path.exists():
        assert text is not None
        options = TrainOptions(
            len(text.vocabulary), dim, 2, batch_tokens=1024, learning_rate=6e-4, warmup_steps=50
        )
        with progress_bar(console, TextColumn("{task.fields[note]}")) as bar:
            task = bar.add_task("head", total=minutes, note="")
            train_head(
                text, options, path, minutes,
                lambda step, loss, done: bar.update(
                    task, completed=done, note=f"step {step}  loss {loss:.3f}"
                ),
            )  # fmt: skip
    head = load_head(path)
    console.print(
        f"head: {head.steps} steps, {head.minutes:.0f} minutes, loss {head.loss:.2f} on "
        f"{len(head.x)} held-out words"
    )
    results: list[Result] = []
    with progress_bar(console, TextColumn("{task.fields[note]}")) as bar:
        kinds = [kind.value for kind in dtype or Kind]
        total = len(kinds) * (2 + len(STEPS) + len(RANDOM) + 2 * repeats)
        task = bar.add_task("near-far", total=total, note="")
        for kind in kinds:
            results += measure(
                head, path, rows, kind, repeats, memory,
                lambda note: bar.update(task, advance=1, note=note),
            )  # fmt: skip
        bar.update(task, completed=total, note="done")
    console.print(results_table(results, f"N={rows} D={head.w.shape[1]} V={len(head.w)}"))
    setting = {"versions": versions(), "machine": describe_machine("cpu", torch.get_num_threads())}
    with (out / "near-far.json").open("w") as file:
        json.dump([asdict(r) | setting for r in results], file, indent=1)
    if plot:
        with progress_bar(console, TextColumn("{task.fields[note]}")) as bar:
            task = bar.add_task("frontier", total=1.0, note="")
            points = frontier(
                head,
                min(rows, 1024),
                lambda done, note: bar.update(task, completed=done, note=note),
            )
        write_frontier(out, points)
    if steps and text is not None:
        compare_training(text, steps, out, console, smoke)


def compare_training(text: Corpus, steps: int, out: Path, console: Console, smoke: bool) -> None:
    """Train the demo's model each way, and say where it ends."""
    options = TrainOptions(
        len(text.vocabulary), 64 if smoke else 256, batch_tokens=512, warmup_steps=50
    )
    points: list[Point] = []
    with progress_bar(console, TextColumn("{task.fields[note]}")) as bar:
        for way in WAYS:
            task = bar.add_task(way, total=steps, note="")
            points += train_way(
                way, text, options, steps, max(1, steps // 8), half=True,
                on_step=lambda step, loss, task=task: bar.update(  # type: ignore[misc]
                    task, completed=step, note=f"loss {loss:.3f}"
                ),
            )  # fmt: skip
    write_points(out / "training.csv", points)
    write_curves(out / "training.png", points)
    table = plain_table(f"held-out loss after {steps} steps")
    for heading in ("", "all words", "rarest tenth of the vocabulary", "s of training"):
        table.add_column(heading)
    for p in points:
        if p.step == steps:
            table.add_row(p.way, f"{p.loss:.4f}", f"{p.rare_loss:.4f}", f"{p.seconds:.0f}")
    console.print(table)
