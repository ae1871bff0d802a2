"""`lossops-bench ring`: a pairwise loss over several processes beside one with the same batch.

    Configuration → fresh processes of one thread each → ring_work → a Part of each rank → Measured

One thread each, so that processor seconds compare: with fewer cores than processes, those of the
clock do not. "plain" is PyTorch alone, which gathers all features and stores its logits: (N, N) in
one process, (N/P, N) in each of P. The table says s/step on the clock, CPU s of all processes per
step, MiB of peak extra memory in the process with the most, each with its ratio to one process, and
how far loss and gradients lie from those of one process.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.multiprocessing as mp
import typer
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table
from torch import Tensor
from typer import Option

from lossops_bench.cli import Dtype
from lossops_bench.demo import progress_bar
from lossops_bench.figures import Row, append_rows
from lossops_bench.machine import describe_machine, free_bytes, versions
from lossops_bench.report import bytes_text, plain_table
from lossops_bench.ring_work import Configuration, Part, Work, worker

__all__ = ["Measured", "ring_command", "run"]

PLAIN_LOGITS = 6
"""How often plain PyTorch holds the logits, about: values, what is made of them, gradients."""
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2.0**-6,
    torch.float16: 2.0**-9,
}
"""What roundings of a result and of the ranks' parts of it may change of the largest entry."""


class LossName(StrEnum):
    """The losses, as typed on the command line."""

    sigmoid = "sigmoid"
    softmax = "softmax"


class Exchange(StrEnum):
    """How lossops brings the other ranks' features here, as typed on the command line."""

    ring = "ring"
    gather = "gather"


@dataclass
class Measured:
    """What the processes of one configuration found together."""

    of: Configuration
    failure: str = ""  # why there is nothing else
    seconds: list[float] = field(default_factory=list)  # of the clock, one per step
    cpu_seconds: float = 0.0  # of all processes, per step
    extra_bytes: int = 0  # of the process with the most
    memory_method: str = ""
    results: dict[str, Tensor] = field(default_factory=dict)  # loss, gradients of x, w, t, b
    loss_error: float | None = None  # beside one process of lossops
    gradient_error: float | None = None

    def compare(self, one: Measured) -> None:
        """Errors relative to the largest entry in one process; of the gradients the worst."""
        errors = {}
        for name, expected in one.results.items():
            off = (self.results[name] - expected).abs().max()
            errors[name] = (off / expected.abs().max()).item() if off else 0.0
        self.loss_error = errors.pop("loss")
        self.gradient_error = torch.tensor([*errors.values()]).max().item()  # NaN stays NaN

    def sound(self, tolerance: float) -> bool:
        """Whether it ran, and came to what one process came to; False for NaN."""
        errors = [each for each in (self.loss_error, self.gradient_error) if each is not None]
        return not self.failure and all(each <= tolerance for each in errors)


def ring_command(
    processes: Annotated[int, Option(min=2, help="P.")] = 4,
    batch: Annotated[int, Option(min=2, help="Pairs N of all processes together.")] = 8192,
    dim: Annotated[int, Option(min=1, help="Features D.")] = 256,
    loss: Annotated[LossName, Option(help="Of all N² pairs.")] = LossName.sigmoid,
    exchange: Annotated[
        list[Exchange] | None, Option(help="May be repeated; default: both.")
    ] = None,
    dtype: Annotated[Dtype, Option(help="Of the features.")] = Dtype.float32,
    repeats: Annotated[int, Option(min=1, help="Timed steps.")] = 5,
    plain: Annotated[bool, Option(help="Plain PyTorch too, with its logits.")] = True,
    timeout: Annotated[float, Option(min=1, help="Seconds of one configuration.")] = 300.0,
    seed: Annotated[int, Option(help="Of the features.")] = 0,
    json: Annotated[Path | None, Option(help="Append the rows as JSON lines.")] = None,
) -> None:
    """Measure a pairwise loss whose batch is spread over processes, beside one process."""
    if batch % processes:
        raise typer.BadParameter(
            f"--batch must be a multiple of {processes} processes; got {batch}"
        )
    work = Work(loss.value, batch, dim, getattr(torch, dtype.value), repeats, seed)
    exchanges = dict.fromkeys(each.value for each in exchange or Exchange)
    configurations = [Configuration(1), *(Configuration(processes, each) for each in exchanges)]
    if plain:
        configurations += [Configuration(1, plain=True), Configuration(processes, "gather", True)]
    console = Console(highlight=False)
    found: list[Measured] = []
    with progress_bar(console, TextColumn("{task.fields[note]}")) as bar:
        task = bar.add_task("ring", total=len(configurations), note="")
        for configuration in configurations:
            bar.update(task, note=str(configuration))
            found.append(run(configuration, work, timeout))
            bar.update(task, advance=1)
        bar.update(task, note="done")
    one, *others = found
    for each in others:
        if not one.failure and not each.failure:
            each.compare(one)
    console.print(ring_table(found, work))
    for each in found:
        if each.failure:
            console.print(f"{each.of}: {each.failure}", style="dim", markup=False)
    if json:
        append_rows(ring_rows(found, work), json)
    tolerance = TOLERANCE[work.dtype]
    wrong = [str(each.of) for each in found if not each.of.plain and not each.sound(tolerance)]
    if wrong:
        names = "; ".join(wrong)
        console.print(f"failed, or not as in one process (±{tolerance:.0e}): {names}", style="red")
        raise typer.Exit(1)


def run(configuration: Configuration, work: Work, timeout: float) -> Measured:
    """Measure one configuration in processes of its own; what goes wrong is its `failure`."""
    need = PLAIN_LOGITS * work.batch**2 * work.dtype.itemsize if configuration.plain else 0
    free = free_bytes("cpu")
    if need > free:
        sizes = f"about {bytes_text(need)} of logits, and {bytes_text(max(0, free))} are free"
        return Measured(configuration, f"skipped: it needs {sizes}; lower --batch")
    with tempfile.TemporaryDirectory() as folder, one_thread_each():
        try:
            join(configuration, work, folder, timeout)
        except (RuntimeError, mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            return Measured(configuration, str(error).strip().splitlines()[-1])
        ranks = range(configuration.processes)
        parts = [Part(**torch.load(Path(folder) / f"{rank}.pt")) for rank in ranks]
    return together(configuration, parts)


def join(configuration: Configuration, work: Work, folder: str, timeout: float) -> None:
    """Start the processes and wait for all.

    Raises:
        ProcessExitedException, ProcessRaisedException: one of them died; the others are ended.
        RuntimeError: they took too long, and are killed.
    """
    arguments = (configuration, work, folder, timeout)
    context = mp.spawn(worker, arguments, nprocs=configuration.processes, join=False)
    deadline = time.monotonic() + timeout
    while not context.join(timeout=max(0.0, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            for process in context.processes:
                process.kill()
                process.join()
            raise RuntimeError(f"took more than {timeout:g} s: lower --batch or raise --timeout")


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Processes started meanwhile have libraries that make no threads."""
    name = "OMP_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def together(configuration: Configuration, parts: Sequence[Part]) -> Measured:
    """The ranks as one, each with the gradients of its rows times the number of ranks."""
    repeats = len(parts[0].seconds)
    results = {}
    for name in parts[0].results:
        each = [part.results[name].double() for part in parts]
        results[name] = torch.cat(each) / len(parts) if each[0].dim() else torch.stack(each).mean()
    return Measured(
        configuration,
        seconds=[max(step) for step in zip(*(part.seconds for part in parts), strict=True)],
        cpu_seconds=sum(part.cpu_seconds for part in parts) / repeats,
        extra_bytes=max(part.extra_bytes for part in parts),
        memory_method=parts[0].memory_method,
        results=results,
    )


def ring_table(found: Sequence[Measured], work: Work) -> Table:
    """A row for each that ran; the ratios are to the first, one process of lossops."""
    one = found[0]
    shape = f"N={work.batch:,} D={work.dim} {str(work.dtype).removeprefix('torch.')}"
    table = plain_table(f"{work.loss} loss of all pairs and its gradients, {shape}")
    table.add_column("", no_wrap=True)
    for heading in ("P", "s/step", "×", "CPU s", "×", "MiB", "×", "Δ loss", "Δ grad"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in found:
        if each.failure:
            continue
        table.add_row(
            f"{each.of.name} {each.of.exchange}",
            str(each.of.processes),
            f"{median(each.seconds):.3f}",
            ratio(median(each.seconds), median(one.seconds or [0.0])),
            f"{each.cpu_seconds:.3f}",
            ratio(each.cpu_seconds, one.cpu_seconds),
            f"{each.extra_bytes / 2**20:,.1f}",
            ratio(each.extra_bytes, one.extra_bytes),
            *("" if e is None else f"{e:.0e}" for e in (each.loss_error, each.gradient_error)),
        )
    return table


def ratio(value: float, unit: float) -> str:
    return f"{value / unit:.2f}" if unit else ""


def ring_rows(found: Sequence[Measured], work: Work) -> list[Row]:
    """One flat dictionary per configuration, each complete in itself."""
    setting: dict[str, Any] = {
        "case": "ring",
        "loss": work.loss,
        "shape": [work.batch, work.dim],
        "dtype": str(work.dtype).removeprefix("torch."),
        "seed": work.seed,
        "versions": versions(),
        "machine": describe_machine("cpu", 1),
    }
    return [
        {
            "rival": each.of.name,
            "processes": each.of.processes,
            "exchange": each.of.exchange,
            "failure": each.failure,
            "seconds": median(each.seconds) if each.seconds else None,
            "rounds": each.seconds,
            "cpu_seconds": each.cpu_seconds,
            "extra_bytes": each.extra_bytes,
            "memory_method": each.memory_method,
            "loss_error": each.loss_error,
            "gradient_error": each.gradient_error,
        }
        | setting
        for each in found
    ]
