"""`lossops-bench kernels`: what the GPU kernels compile to; `lossops-bench tune`: their tiles."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any

import torch
import typer


def kernels_command(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_90, gfx942, ...; may be repeated; default all.")
    ] = None,
    match: Annotated[str, typer.Option(help="Only kernels with this in their names.")] = "",
    rivals: Annotated[bool, typer.Option(help="Those of other packages, too.")] = False,
    write: Annotated[
        bool, typer.Option(help="Write the tables of the READMEs and the budgets.")
    ] = False,
    cuda: Annotated[bool, typer.Option(help="Those of csrc/cuda, as they were built.")] = False,
) -> None:
    """Compile the GPU kernels as they are launched, without a GPU, and show what came of it."""
    _needs_triton("kernels")
    if cuda:
        _cuda(match, write)
        return
    from lossops_bench.kernels import model, report
    from lossops_bench.kernels.devices import DEVICES
    from lossops_bench.kernels.launches import cases

    architectures = arch or list(report.ARCHITECTURES)
    for name in architectures:
        if name not in DEVICES:
            raise typer.BadParameter(f"--arch must be among {', '.join(DEVICES)}; got {name!r}")
    if write and (arch or match):
        raise typer.BadParameter("--write takes all kernels on all architectures")
    names = [name for name in cases() if match in name]
    ours = _shown(names, architectures)
    if write:
        report.write_budgets(ours)
        report.write_table("kernels", report.table(ours))
        report.write_table("model", model.table(ours))
    if rivals:
        from lossops_bench.kernels.rivals import missing
        from lossops_bench.kernels.rivals import rivals as cases_of_others

        if missing():
            typer.echo(f"--rivals needs {', '.join(missing())}", err=True)
            raise typer.Exit(1)
        names = [name for name in cases_of_others() if match in name]
        theirs = _shown(names, architectures, fresh=True)
        if write:
            report.write_table("rivals", report.table(theirs))


def _cuda(match: str, write: bool) -> None:
    """What nvcc made of csrc/cuda."""
    from lossops_bench.kernels import cubins, report

    library = cubins.library()
    if library is None:
        typer.echo("lossops-bench kernels --cuda needs lossops._cuda: make build", err=True)
        raise typer.Exit(1)
    found = cubins.rows(library)
    for row in found:
        if match in row.case:
            _show(row)
    if write:
        report.write_budgets(found, cubins.BUDGETS)
        report.write_table("kernels", cubins.table(found), cubins.README)


def tune_command(
    write: Annotated[
        bool, typer.Option(help="Rewrite kernels/lossops_triton/configurations.py.")
    ] = True,
) -> None:
    """Time tiles of the fused kernel on this GPU, and keep the fastest."""
    _needs_triton("tune")
    if not torch.cuda.is_available():
        typer.echo(
            "lossops-bench tune times kernels on a GPU, and torch finds none here.", err=True
        )
        raise typer.Exit(1)
    from lossops_bench.kernels.tune import tune_this_gpu

    tune_this_gpu(write)


def _needs_triton(command: str) -> None:
    if importlib.util.find_spec("triton") is None:
        typer.echo(f"lossops-bench {command} needs Triton: pip install triton", err=True)
        raise typer.Exit(1)


def _shown(names: list[str], architectures: list[str], fresh: bool = False) -> list:
    """Print the rows as they come, and give them all."""
    from lossops_bench.kernels.report import rows_of

    rows = []
    for row in rows_of(names, architectures, fresh):
        _show(row)
        rows.append(row)
    return rows


def _show(row: Any) -> None:
    from lossops_bench.kernels.report import cell

    facts = row.facts
    kinds = ", ".join(f"{n}x {kind}" for kind, n in facts.matrix.items())
    typer.echo(
        f"{row.case:32} {facts.architecture:7} {cell(facts):28} {facts.shared:6} B shared, "
        f"{row.functions:.3f} MUFU, {facts.wide_loads}/{facts.loads} wide loads, "
        f"{facts.atomics} atomics, {facts.instructions} instructions {kinds}"
    )
