"""Whether near and far gradients train: the demo's model from one seed, each way, step by step.

    dense               the exact gradient
    dense, two sweeps   the same gradient rounded in another order: how far two exact runs drift
    near/far            near_threshold="auto"
    dropping            entries of dz below 2⁻¹² of their row set to 0, as others do

Batches and first weights are the same. On held-out text: the loss of all words, and of those in the
rarest tenth of the vocabulary, each predicted from the words before it.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import lossops
from lossops.near_far import DEFAULT_THRESHOLD
from lossops_bench.demo_data import Corpus
from lossops_bench.demo_train import HeadLoss, LanguageModel, TrainOptions, batches

__all__ = [
    "WAYS",
    "Point",
    "dropping_cross_entropy",
    "read_points",
    "train_way",
    "write_curves",
    "write_points",
]

EVAL_TOKENS = 16384
RARE_POSITIONS = 512


class _Dropping(torch.autograd.Function):
    """Mean cross-entropy whose gradient lacks the entries of dz below the threshold."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        log_p = F.linear(x, w).float().log_softmax(1)  # (N, V)
        rows = torch.arange(len(y))
        loss = -log_p[rows, y].mean()
        p = log_p.exp_()
        p[rows, y] -= 1
        p.masked_fill_(p.abs() <= DEFAULT_THRESHOLD, 0.0)
        dz = (p / len(y)).to(x.dtype)
        ctx.save_for_backward(dz @ w, dz.T @ x)
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        dx, dw = ctx.saved_tensors
        return dx * g.to(dx.dtype), dw * g.to(dw.dtype), None


def dropping_cross_entropy(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with the small entries of dz dropped, targets kept; stores all logits."""
    half = torch.is_autocast_enabled("cpu")
    if half:
        x, w = x.bfloat16(), w.bfloat16()
    with torch.autocast("cpu", enabled=False):
        return _Dropping.apply(x, w, y)  # type: ignore[no-any-return]


def rounded_otherwise(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with the exact gradient, its sums in another order."""
    options = lossops.LinearLossOptions(schedule="two_sweeps")
    return lossops.linear_cross_entropy(x, w, y, options=options)


def near_far_cross_entropy(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with near and far gradients."""
    return lossops.linear_cross_entropy(x, w, y, near_threshold="auto")


WAYS: dict[str, HeadLoss] = {
    "dense": lossops.linear_cross_entropy,
    "dense, two sweeps": rounded_otherwise,
    "near/far": near_far_cross_entropy,
    "dropping": dropping_cross_entropy,
}


@dataclass(frozen=True)
class Point:
    """What held-out text says after some steps."""

    way: str
    step: int
    seconds: float  # of training
    train_loss: float  # mean since the last point
    loss: float  # nats per word
    rare_loss: float  # of words in the rarest tenth of the vocabulary


def rare_windows(text: Corpus, options: TrainOptions) -> tuple[Tensor, Tensor]:
    """Windows (S, T) of held-out text before words of the rarest tenth, and these words (S,)."""
    counts = np.bincount(text.train, minlength=options.classes)
    rare = np.zeros(options.classes, bool)
    rare[np.argsort(counts, kind="stable")[: options.classes // 10]] = True
    at = np.flatnonzero(rare[text.held_out])
    at = at[at >= options.context][:RARE_POSITIONS]
    held_out = torch.from_numpy(text.held_out).long()
    windows = torch.from_numpy(at)[:, None] + torch.arange(-options.context, 0)
    return held_out[windows], held_out[torch.from_numpy(at)]


@torch.no_grad()
def evaluate(
    model: LanguageModel, text: Corpus, rare: tuple[Tensor, Tensor], options: TrainOptions
) -> tuple[float, float]:
    """Loss on the first held-out words, and on the rare ones."""
    count = min(EVAL_TOKENS, len(text.held_out) - 1) // options.context * options.context
    held_out = torch.from_numpy(text.held_out[: count + 1]).long()
    tokens = held_out[:-1].view(-1, options.context)
    x = torch.cat([model(part) for part in tokens.split(16)])
    loss = lossops.linear_cross_entropy(x, model.head, held_out[1:]).item()
    last = [model(part).view(len(part), -1, options.dim)[:, -1] for part in rare[0].split(16)]
    rare_loss = lossops.linear_cross_entropy(torch.cat(last), model.head, rare[1]).item()
    return loss, rare_loss


def train_way(
    way: str,
    text: Corpus,
    options: TrainOptions,
    steps: int,
    every: int,
    half: bool,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[Point]:
    """Train with one kind of gradient and look at held-out text now and then.

    Args:
        way: a key of `WAYS`.
        text: what to train on.
        options: sizes, seed.
        steps: how many.
        every: steps between two looks.
        half: bfloat16 products under autocast.
        on_step: hears the step and its loss.
    """
    torch.manual_seed(options.seed)
    model = LanguageModel(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, fused=True)
    stream, rare = torch.from_numpy(text.train), rare_windows(text, options)
    points: list[Point] = []
    seconds, since = 0.0, []
    for step, (tokens, targets) in enumerate(batches(stream, options), start=1):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, step / options.warmup_steps)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = WAYS[way](model(tokens), model.head, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        since.append(loss.item())
        seconds += time.perf_counter() - started
        on_step(step, since[-1])
        if step % every == 0 or step == steps:
            mean = sum(since) / len(since)
            points.append(Point(way, step, seconds, mean, *evaluate(model, text, rare, options)))
            since = []
        if step == steps:
            break
    return points


def write_points(path: Path, points: Sequence[Point]) -> None:
    """One line a point."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Point.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)


def read_points(path: Path) -> list[Point]:
    """What `write_points` wrote."""
    with path.open(newline="") as file:
        return [
            Point(row.pop("way"), int(row.pop("step")), **{k: float(v) for k, v in row.items()})
            for row in csv.DictReader(file)
        ]


COLOURS = {
    "dense": "#6b747b",
    "dense, two sweeps": "#b5bcc2",
    "near/far": "#0b7a75",
    "dropping": "#b8322a",
}


def write_curves(path: Path, points: Sequence[Point]) -> None:
    """Held-out loss by steps, of all words and of rare ones."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, field, title in zip(
        panels, ("loss", "rare_loss"), ("all words", "rarest tenth of the vocabulary"), strict=True
    ):
        for way, colour in COLOURS.items():
            own = [p for p in points if p.way == way]
            panel.plot(
                [p.step for p in own], [getattr(p, field) for p in own], label=way, color=colour,
                linestyle="--" if way == "near/far" else "-", linewidth=2,
            )  # fmt: skip
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlabel("step")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out loss, nats")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
