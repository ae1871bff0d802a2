"""`lossops-bench demo`: train a word-level language model on real text, with and without lossops.

    text → demo_data → ids ─┬→ demo_train with lossops, for --seconds ──────────────┬→ demo_report
                            └→ the same steps with plain PyTorch, for half of that ─┘

Each run has a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from typer import Option

from lossops_bench.demo_data import Corpus, build_corpus, python_sources, text_files
from lossops_bench.demo_report import (
    MIB,
    Run,
    largest_difference,
    summary,
    write_csv,
    write_plot,
)
from lossops_bench.demo_train import OURS, PLAIN, Step, TrainOptions, worker

# How far the two losses of a step may lie apart. Rounding makes it 1e-6 at the first step, and 400
# steps of a small model left it there; at twice the learning rate training amplified it to 3e-4.
TOLERANCE = 1e-4


def demo_command(
    corpus: Annotated[
        list[Path] | None,
        Option(help="Text file or folder, repeatable; default: this environment's Python sources."),
    ] = None,
    out: Annotated[Path, Option(help="Folder for the plot and the CSV.")] = Path("demo-results"),
    seconds: Annotated[
        float, Option(min=0.1, help="Training time with lossops; plain PyTorch gets half of it.")
    ] = 120.0,
    steps: Annotated[int | None, Option(min=1, help="At most this many steps.")] = None,
    vocab: Annotated[int, Option(min=2, help="Classes V: the most frequent words.")] = 65536,
    dim: Annotated[int, Option(min=1, help="Features D.")] = 256,
    layers: Annotated[int, Option(min=1, help="Transformer layers.")] = 3,
    batch_tokens: Annotated[int, Option(min=1, help="Rows N of the head per step.")] = 2048,
    max_tokens: Annotated[
        int, Option(help="A larger corpus is sampled, file by file, down to this many tokens.")
    ] = 12_000_000,
    seed: Annotated[int, Option(help="Of the sample, the weights and the batches.")] = 0,
    threads: Annotated[int | None, Option(min=1, help="Default: PyTorch's choice.")] = None,
    tied: Annotated[bool, Option("--tied", help="Embedding and head share a weight.")] = False,
    smoke: Annotated[bool, Option("--smoke", help="Seconds instead of minutes: a test.")] = False,
) -> None:
    """Train a language model on real text with lossops, then the same steps with plain PyTorch."""
    if smoke:
        seconds, steps, max_tokens = min(seconds, 4), min(steps or 8, 8), min(max_tokens, 200_000)
        vocab, dim, layers = min(vocab, 2048), min(dim, 64), min(layers, 1)
        batch_tokens = min(batch_tokens, 256)
    console = Console(highlight=False)
    try:
        text = load_corpus(corpus or [], vocab, max_tokens, seed, console)
        options = TrainOptions(
            classes=len(text.vocabulary),
            dim=dim,
            layers=layers,
            context=min(128, batch_tokens),
            batch_tokens=batch_tokens,
            seed=seed,
            tied=tied,
            threads=threads,
        )
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            np.save(folder / "train.npy", text.train)
            np.save(folder / "held_out.npy", text.held_out)
            ours = run_head(OURS, folder, options, steps, seconds, console)
            plain = run_head(PLAIN, folder, options, len(ours.steps), seconds / 2, console)
    except (OSError, RuntimeError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from error
    out.mkdir(parents=True, exist_ok=True)
    write_plot(out / "demo.png", ours, plain, options)
    write_csv(out / "demo.csv", ours, plain)
    if not show(ours, plain, text, options, console):
        raise typer.Exit(1)


def show(ours: Run, plain: Run, text: Corpus, options: TrainOptions, console: Console) -> bool:
    """Print what came out, and return whether the losses agree."""
    console.print(summary(ours, plain, options))
    console.print(
        f"held-out perplexity after {len(ours.steps)} steps with lossops: {ours.perplexity:,.1f} "
        f"(word frequencies alone: {text.unigram_perplexity():,.1f})"
    )
    difference = largest_difference(ours, plain)
    agree = difference <= TOLERANCE  # False for NaN
    console.print(
        f"largest difference of the losses over {len(plain.steps)} common steps: {difference:.1e}; "
        f"tolerance {TOLERANCE:g}: they {'agree' if agree else 'DISAGREE'}"
    )
    return agree


def load_corpus(
    paths: list[Path], classes: int, max_tokens: int, seed: int, console: Console
) -> Corpus:
    """Read and encode the text behind a progress bar, and say what was read."""
    files = text_files(paths) if paths else python_sources()
    with progress_bar(console, TextColumn("{task.completed:,.0f} tokens")) as bar:
        task = bar.add_task("reading", total=max_tokens)
        text = build_corpus(
            files,
            classes=classes,
            max_tokens=max_tokens,
            seed=seed,
            progress=lambda tokens: bar.update(task, completed=tokens),
        )
        bar.update(task, total=len(text.train) + len(text.held_out))
    source = ", ".join(map(str, paths)) or "this environment's Python sources"
    sampled = f" sampled down to {max_tokens:,} tokens (--max-tokens)" if text.capped else ""
    console.print(
        f"{text.files:,} files from {source}{sampled}: {len(text.train):,} tokens to train on, "
        f"{len(text.held_out):,} held out; {text.distinct:,} distinct words, {text.coverage():.1%} "
        f"of the text covered by a vocabulary of {len(text.vocabulary):,}."
    )
    return text


def run_head(
    head: str,
    folder: Path,
    options: TrainOptions,
    steps: int | None,
    seconds: float,
    console: Console,
) -> Run:
    """Train with ``head`` in a process of its own behind a progress bar.

    Raises:
        RuntimeError: if that process died.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's memory
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=worker, args=(sender, head, folder, options, steps, seconds), daemon=True
    )
    process.start()
    sender.close()  # the worker's copy is now the last: its death ends the pipe
    run = Run(head)
    spent = 0.0
    with progress_bar(console, TextColumn("{task.fields[note]}")) as bar:
        task = bar.add_task(head, total=1.0, note="starting")
        try:
            while isinstance(message := receiver.recv(), Step):
                run.steps.append(message)
                spent += message.seconds
                done = max(spent / seconds, message.index / steps if steps else 0.0)
                note = (
                    f"step {message.index}  loss {message.loss:.3f}  "
                    f"{options.batch_tokens / message.seconds:,.0f} tokens/s  "
                    f"peak +{message.extra_bytes / MIB:,.0f} MiB"
                )
                bar.update(task, completed=done, note=note)
            run.perplexity = message
            bar.update(task, completed=1.0)
        except EOFError:
            process.join()
            raise RuntimeError(
                f"the {head} run died with exit code {process.exitcode} after {len(run.steps)} "
                "steps; its own error stands above. -9 is most often a lack of memory: lower "
                "--batch-tokens or --vocab"
            ) from None
    process.join()
    return run


def progress_bar(console: Console, details: ProgressColumn) -> Progress:
    """A bar that fits in 80 columns, with ``details`` after it."""
    name = TextColumn("{task.description:13}")
    return Progress(name, BarColumn(bar_width=12), TimeElapsedColumn(), details, console=console)


if __name__ == "__main__":
    typer.run(demo_command)
