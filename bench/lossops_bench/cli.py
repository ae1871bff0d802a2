"""The command line: `lossops-bench list | run | heads | partial-fc | demo | race | ...`."""

import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from lossops_bench.case import Case, Problem, Rival
from lossops_bench.cases import CASES, CATALOGUE
from lossops_bench.figures import Row, append_rows, rows
from lossops_bench.inputs import tiny
from lossops_bench.plot import save_plot
from lossops_bench.report import (
    case_table,
    catalogue_table,
    footnotes,
    results_table,
    shapes_table,
)
from lossops_bench.runner import Settings, run, steps
from lossops_bench.shapes import SHAPES, Shape, parse_shape

__all__ = ["build_app"]


class Dtype(StrEnum):
    """The dtypes of inputs, as typed on the command line."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Mode(StrEnum):
    """What is timed: the loss with its gradients, or the loss alone without any."""

    training = "training"
    forward = "forward"


class Commands(TyperGroup):
    """`run near_far` and `run partial_fc` are commands too: N, D, V alone do not shape them."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:
        if args[0] == "run" and args[1:2] in (["near_far"], ["partial_fc"]):
            args = [args[1].replace("_", "-"), *args[2:]]
        return super().resolve_command(ctx, args)


def build_app() -> typer.Typer:
    """The commands; those that have a file of their own are imported from there."""
    from lossops_bench.demo import demo_command
    from lossops_bench.heads import heads_command
    from lossops_bench.identities import identities_command
    from lossops_bench.kernels.check import gpu_check_command
    from lossops_bench.kernels.command import kernels_command, tune_command
    from lossops_bench.near_far import near_far_command
    from lossops_bench.partial_fc import partial_fc_command
    from lossops_bench.race import race_command
    from lossops_bench.ring import ring_command
    from lossops_bench.towers import towers_command

    app = typer.Typer(
        cls=Commands,
        help="Benchmarks of lossops beside PyTorch: time in GEMM-equivalents, memory, error.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command("list")(list_command)
    app.command("run")(run_command)
    app.command("heads")(heads_command)
    app.command("partial-fc")(partial_fc_command)
    app.command("identities")(identities_command)
    app.command("near-far")(near_far_command)
    app.command("demo")(demo_command)
    app.command("race")(race_command)
    app.command("towers")(towers_command)
    app.command("ring")(ring_command)
    app.command("kernels")(kernels_command)
    app.command("tune")(tune_command)
    app.command("gpu-check")(gpu_check_command)
    return app


def list_command() -> None:
    """Show the cases with their rivals, and the shapes that have a name."""
    console = _console()
    problem = tiny(Problem(SHAPES["small"], torch.bfloat16))
    for case in CASES.values():
        console.print(case_table(case, problem))
    console.print("catalogue, or one of its losses:", ", ".join(CATALOGUE), "\n")
    console.print(shapes_table(SHAPES.values()))


def run_command(
    case: Annotated[
        str,
        typer.Argument(
            help="One of those that `list` shows; catalogue for all of it; near_far, partial_fc "
            "with the options of these commands."
        ),
    ],
    shape: Annotated[
        list[str] | None, typer.Option(help="N,D,V or NAME or NAME:N; may be repeated.")
    ] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="May be repeated.")] = None,
    mode: Annotated[Mode, typer.Option(help="Loss and gradients, or loss only.")] = Mode.training,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rivals: Annotated[str, typer.Option(help="Names, with commas between; default all.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of timing.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="0 takes every core.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, in fresh processes.")] = True,
    patience: Annotated[float, typer.Option(help="Seconds that a rival may take.")] = 300.0,
    json: Annotated[Path | None, typer.Option(help="Append the rows as JSON lines.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture, e.g. PNG.")] = None,
) -> None:
    """Measure the rivals of a case, side by side."""
    chosen = [_case(name) for name in (CATALOGUE if case == "catalogue" else [case])]
    competing = {one.name: _rivals(one, rivals) for one in chosen}
    _check_device(device)
    problems = [
        Problem(
            one,
            getattr(torch, kind.value),
            mode.value,
            device,
            threads or os.cpu_count() or 1,
            seed,
        )
        for one in map(_shape, shape or ["small"])
        for kind in dtype or [Dtype.float32]
    ]
    settings = Settings(repeats=repeats, memory=memory, patience=patience)
    console = _console()
    done: list[list[Row]] = []
    for problem in problems:
        for one in chosen:
            done.append(_run(one, problem, competing[one.name], settings, console))
            if json:
                append_rows(done[-1], json)
            if len(chosen) == 1:
                console.print(results_table(done[-1]), footnotes(done[-1]), "")
        if len(chosen) > 1:
            console.print(catalogue_table(done[-len(chosen) :]), footnotes(done[-1]), "")
    if plot:
        save_plot(done, plot)


def _run(
    case: Case, problem: Problem, rivals: Sequence[Rival], settings: Settings, console: Console
) -> list[Row]:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("inputs", total=steps(case, problem, rivals, settings))

        def on_step(doing: str) -> None:
            progress.update(task, advance=1, description=f"{problem.shape}: {doing}")

        return rows(run(case, problem, rivals, settings, on_step))


def _case(name: str) -> Case:
    if name in CATALOGUE:
        return CATALOGUE[name]()
    if name not in CASES:
        known = ", ".join([*CASES, "catalogue"])
        raise typer.BadParameter(f"CASE must be one of {known}, or catalogue/LOSS; got {name!r}")
    return CASES[name]


def _shape(text: str) -> Shape:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _rivals(case: Case, names: str) -> list[Rival]:
    try:
        return [case.rival(name.strip()) for name in names.split(",")] if names else [*case.rivals]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _check_device(device: str) -> None:
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise typer.BadParameter(
            f"--device must be cpu, or cuda where torch has a GPU; got {device!r}"
        )


def _console() -> Console:
    """As wide as the terminal; a file gets lines long enough for the widest table."""
    return Console(width=None if sys.stdout.isatty() else 130)
