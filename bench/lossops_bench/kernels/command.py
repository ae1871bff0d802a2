"""`lossops-bench kernels`: the report of what the GPU kernels compile to."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer


def kernels_command(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_90, gfx942, ...; may be repeated; default all.")
    ] = None,
    match: Annotated[str, typer.Option(help="Only kernels with this in their names.")] = "",
    rivals: Annotated[bool, typer.Option(help="Those of other packages, too.")] = False,
    write: Annotated[
        bool, typer.Option(help="Write kernels/README.md and the budgets of tests/compiled.")
    ] = False,
) -> None:
    """Compile the GPU kernels as they are launched, without a GPU, and show what came of it."""
    if importlib.util.find_spec("triton") is None:
        typer.echo("lossops-bench kernels needs Triton; install with: pip install triton", err=True)
        raise typer.Exit(1)
    from lossops_bench.kernels import report
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
    if rivals:
        from lossops_bench.kernels.rivals import rivals as those_of_others

        theirs = _shown([name for name in those_of_others() if match in name], architectures)
        if write:
            report.write_table("rivals", report.table(theirs))


def _shown(names: list[str], architectures: list[str]) -> list:
    from lossops_bench.kernels.report import cell, rows_of

    rows = []
    for row in rows_of(names, architectures):
        facts = row.facts
        kinds = ", ".join(f"{n}x {kind}" for kind, n in facts.matrix.items())
        typer.echo(
            f"{row.case:32} {facts.architecture:7} {cell(facts):28} {facts.shared:6} B shared, "
            f"{row.functions:.3f} MUFU, {facts.wide_loads}/{facts.loads} wide loads, "
            f"{facts.atomics} atomics, {facts.instructions} instructions {kinds}"
        )
        rows.append(row)
    return rows
