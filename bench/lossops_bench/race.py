"""`lossops-bench race`: the same language model with different heads, by time on the clock.

    text → demo_data → ids → race_train, the heads in turns → points → race_report

Only training counts as time: batches, forward, backward and the steps of body and head.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import TextColumn
from typer import Option

from lossops_bench.contenders import contender
from lossops_bench.demo import load_corpus, progress_bar
from lossops_bench.race_report import race_table, write_curves, write_points
from lossops_bench.race_train import Entry, RaceOptions, Runner, race

__all__ = ["parse_entry", "race_command"]

HEADS = (
    "factored-z",
    "factored-z-sharp",
    "softmax",
    "softmax-lossops",
    "adaptive",
    "sampled",
    "gram-z",
)


def race_command(
    corpus: Annotated[
        list[Path] | None,
        Option(help="Text file or folder, repeatable; default: this environment's Python sources."),
    ] = None,
    head: Annotated[
        list[str] | None, Option(help=f"NAME or NAME:LR, repeatable; default: {', '.join(HEADS)}.")
    ] = None,
    seconds: Annotated[float, Option(min=0.1, help="Training time of each head.")] = 600.0,
    vocab: Annotated[int, Option(min=8, help="Classes V: the most frequent words.")] = 65536,
    dim: Annotated[int, Option(min=4, help="Features D.")] = 256,
    batch: Annotated[int, Option(min=1, help="Rows N per step.")] = 200,
    context: Annotated[int, Option(min=1, max=64, help="Words before the one to predict.")] = 8,
    evaluations: Annotated[int, Option(min=2, help="Points on each curve.")] = 12,
    max_tokens: Annotated[
        int, Option(help="A larger corpus is sampled, file by file, down to this many tokens.")
    ] = 12_000_000,
    seed: Annotated[int, Option(help="Of the sample, the weights and the batches.")] = 0,
    threads: Annotated[int | None, Option(min=1, help="Default: PyTorch's choice.")] = None,
    out: Annotated[Path, Option(help="Folder for the plot and the CSV.")] = Path("race-results"),
    smoke: Annotated[bool, Option("--smoke", help="Seconds instead of minutes: a test.")] = False,
) -> None:
    """Train a language model with each head, and plot its held-out errors against time."""
    try:
        entries = [parse_entry(text) for text in head or HEADS]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if smoke:
        seconds, max_tokens, evaluations = min(seconds, 0.5), min(max_tokens, 200_000), 3
        vocab, dim = min(vocab, 2048), min(dim, 64)
    if threads:
        torch.set_num_threads(threads)
    console = Console(highlight=False)
    try:
        text = load_corpus(corpus or [], vocab, max_tokens, seed, console)
    except (OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from error
    options = RaceOptions(
        classes=len(text.vocabulary),
        dim=dim,
        batch=batch,
        context=context,
        seed=seed,
        seconds=seconds,
        evaluations=evaluations,
    )
    with progress_bar(console, TextColumn("{task.fields[note]}")) as bar:
        task = bar.add_task("race", total=seconds * len(entries), note="making the heads")
        spent: dict[str, float] = {}

        def on_step(runner: Runner) -> None:
            spent[runner.entry.name] = runner.seconds
            note = f"{runner.entry.name}: step {runner.steps}, loss {runner.loss:.3f}"
            bar.update(task, completed=sum(spent.values()), note=note)

        runners = race(entries, text.train, text.held_out, options, on_step)
    out.mkdir(parents=True, exist_ok=True)
    write_points(out / "race.csv", runners)
    write_curves(out / "race.png", runners, options)
    console.print(race_table(runners, options))


def parse_entry(text: str) -> Entry:
    """Read ``NAME`` or ``NAME:LR``.

    Raises:
        ValueError: if there is no such head, or its learning rate is not a positive number.
    """
    name, _, lr = text.partition(":")
    each = contender(name)
    try:
        rate = float(lr) if lr else each.lr
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ValueError(f"--head must be NAME or NAME:LR with a positive LR, got {text!r}")
    return Entry(text, each, rate)
