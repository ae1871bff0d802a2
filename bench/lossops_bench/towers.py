"""`lossops-bench towers`: find a function's code by its docstring, learnt with a pairwise loss.

    files → towers_data → pairs → towers_train, the losses in turns → points → towers_report

The pairs come from what is installed here: the Python sources of the standard library and of this
environment's packages. What is retrieved are the pairs of files that nobody trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import TextColumn
from typer import Option

from lossops_bench.demo import progress_bar
from lossops_bench.demo_data import python_sources, text_files
from lossops_bench.towers_data import PairSet, build_pairs
from lossops_bench.towers_report import towers_table, write_curves, write_points
from lossops_bench.towers_train import (
    LOSSES,
    Runner,
    Sides,
    Texts,
    TowersOptions,
    rarity,
    start,
    train_in_turns,
    word_overlap,
)

__all__ = ["towers_command"]


def towers_command(
    corpus: Annotated[
        list[Path] | None,
        Option(help="Python file or folder, repeatable; default: what is installed here."),
    ] = None,
    loss: Annotated[
        list[str] | None, Option(help=f"Repeatable; default: {', '.join(LOSSES)}.")
    ] = None,
    seconds: Annotated[float, Option(min=0.1, help="Training time with each loss.")] = 60.0,
    steps: Annotated[int | None, Option(min=1, help="Steps with each loss, not seconds.")] = None,
    batch: Annotated[int, Option(min=2, help="Pairs N per step.")] = 2048,
    dim: Annotated[int, Option(min=2, help="Features D.")] = 256,
    vocab: Annotated[int, Option(min=2, help="The most frequent words.")] = 32768,
    held_out: Annotated[int, Option(min=10, help="Pairs to retrieve.")] = 1000,
    evaluations: Annotated[int, Option(min=2, help="Points on each curve.")] = 12,
    max_pairs: Annotated[
        int, Option(min=1, help="More are sampled, file by file, down to this many.")
    ] = 60_000,
    seed: Annotated[int, Option(help="Of the sample, the weights and the batches.")] = 0,
    threads: Annotated[int | None, Option(min=1, help="Default: PyTorch's choice.")] = None,
    out: Annotated[Path, Option(help="Folder for the plot and the CSV.")] = Path("towers-results"),
    smoke: Annotated[bool, Option("--smoke", help="Seconds instead of minutes: a test.")] = False,
) -> None:
    """Train two towers to find code by docstrings, with the sigmoid and with the softmax loss."""
    names = [*dict.fromkeys(loss or LOSSES)]
    for name in names:
        if name not in LOSSES:
            raise typer.BadParameter(f"--loss must be one of {', '.join(LOSSES)}; got {name!r}")
    if smoke:
        seconds, max_pairs, evaluations = min(seconds, 0.5), min(max_pairs, 1000), 3
        batch, vocab, held_out = min(batch, 256), min(vocab, 2048), min(held_out, 200)
    if threads:
        torch.set_num_threads(threads)
    console = Console(highlight=False)
    try:
        pairs = load_pairs(corpus or [], max_pairs, held_out, vocab, seed, console)
        options = TowersOptions(
            words=len(pairs.vocabulary),
            dim=dim,
            batch=batch,
            seed=seed,
            seconds=seconds,
            steps=steps,
            evaluations=evaluations,
        )
        runners = [start(name, len(pairs.train), options) for name in names]
    except (OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from error
    idf = rarity(pairs.train.codes, options.words)
    seen, new = (
        (Texts(side.docs, idf), Texts(side.codes, idf)) for side in (pairs.train, pairs.held_out)
    )
    train(runners, seen, new, options, console)
    overlap = word_overlap(*new, options.words)
    out.mkdir(parents=True, exist_ok=True)
    write_points(out / "towers.csv", runners)
    write_curves(out / "towers.png", runners, overlap, options, len(pairs.held_out))
    console.print(towers_table(runners, overlap, options, len(pairs.held_out)))


def load_pairs(
    paths: list[Path], max_pairs: int, held_out: int, vocab: int, seed: int, console: Console
) -> PairSet:
    """Read and encode the pairs behind a progress bar, and say what was read."""
    files = [p for p in text_files(paths) if p.suffix == ".py"] if paths else python_sources()
    with progress_bar(console, TextColumn("{task.fields[note]}")) as bar:
        task = bar.add_task("pairs", total=len(files), note="")

        def on_file(files: int, pairs: int) -> None:
            bar.update(task, completed=files, note=f"{pairs:,} pairs in {files:,} files")

        pairs = build_pairs(
            files,
            max_pairs=max_pairs,
            held_out=held_out,
            max_words=vocab,
            seed=seed,
            progress=on_file,
        )
        bar.update(task, total=pairs.files, completed=pairs.files)
    source = ", ".join(map(str, paths)) or "the Python sources installed here"
    sampled = f" sampled down to {max_pairs:,} pairs (--max-pairs)" if pairs.capped else ""
    codes = pairs.train.codes
    console.print(
        f"{pairs.files:,} files from {source}{sampled}: {len(pairs.train):,} functions with their "
        f"docstrings to train on, {len(pairs.held_out):,} of other files to retrieve; "
        f"{len(codes.ids) / len(codes):.0f} words of code on average, a vocabulary of "
        f"{len(pairs.vocabulary):,}."
    )
    return pairs


def train(
    runners: list[Runner], seen: Sides, new: Sides, options: TowersOptions, console: Console
) -> None:
    """Train behind one progress bar per loss."""
    with progress_bar(console, TextColumn("{task.fields[note]}")) as bar:
        tasks = {each.name: bar.add_task(each.name, total=1.0, note="") for each in runners}

        def on_step(runner: Runner) -> None:
            rate = runner.steps * options.batch / runner.seconds
            note = f"loss {runner.loss:.3f}  {rate:,.0f} pairs/s  t {runner.scale:.1f}"
            bar.update(tasks[runner.name], completed=runner.share(options), note=note)

        train_in_turns(runners, seen, new, options, on_step)
