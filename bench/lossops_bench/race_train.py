"""A feed-forward language model over n-grams, trained with several heads in turns.

    x = body(words before)                                       # (N, D)
    head.loss(x, word).backward(); head.step(); optimizer.step()
    head.top(x, 100)                                             # on held-out text, now and then

Every head gets a body of its own with the same first weights, and the same batches in the same
order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lossops_bench.contenders import Contender, Head
from lossops_bench.demo_data import Ids
from lossops_bench.demo_train import windows

__all__ = ["KS", "Body", "Entry", "Point", "RaceOptions", "Runner", "race"]

KS = (1, 5, 10, 50, 100)
LOGITS = 2**24
"""Logits that an evaluation stores at most: 64 MiB."""


@dataclass(frozen=True)
class RaceOptions:
    """Sizes of the model and of its training, the same for every head."""

    classes: int  # V
    dim: int = 256  # D
    batch: int = 200  # N
    context: int = 8
    embedding: int = 128
    hidden: int = 512
    body_lr: float = 1e-3  # of Adam, whose steps do not depend on the scale of a head's loss
    seed: int = 0
    seconds: float = 600.0
    evaluations: int = 12
    sample: int = 2000  # held-out positions

    def times(self) -> list[float]:
        """When to evaluate: the first after a 64th of the time, each later by the same factor."""
        last = max(1, self.evaluations - 1)
        return [self.seconds * 64 ** (i / last - 1) for i in range(last)] + [self.seconds]


@dataclass(frozen=True)
class Entry:
    """A head with its learning rate, under the name it was given."""

    name: str
    head: Contender
    lr: float


@dataclass(frozen=True)
class Point:
    """What one evaluation found."""

    seconds: float  # of training
    step: int
    errors: dict[int, float]  # k: the share of positions whose word is not among the best k


class Body(nn.Module):
    """Ids (N, context) to features (N, D): embeddings side by side, and one hidden layer."""

    def __init__(self, options: RaceOptions) -> None:
        super().__init__()
        # A gradient of the words that were read, or its size would be most of the work of a step.
        self.embedding = nn.Embedding(options.classes, options.embedding, sparse=True)
        self.layers = nn.Sequential(
            nn.Linear(options.context * options.embedding, options.hidden),
            nn.ReLU(),
            nn.Linear(options.hidden, options.dim),
        )

    def forward(self, words: Tensor) -> Tensor:
        features: Tensor = self.layers(self.embedding(words).flatten(1))
        return features


@dataclass
class Runner:
    """One head in the race: its state, and the points so far."""

    entry: Entry
    body: Body
    head: Head
    windows: Iterator[Tensor]
    optimizers: Sequence[torch.optim.Optimizer]
    seconds: float = 0.0
    steps: int = 0
    loss: float = math.nan
    points: list[Point] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        return self.steps > 0 and not math.isfinite(self.loss)

    def train_until(
        self, seconds: float, on_step: Callable[[Runner], None] = lambda runner: None
    ) -> None:
        """Take steps until so much time is spent in all; a loss that is not finite ends it."""
        while self.seconds < seconds and not self.diverged:
            started = time.perf_counter()
            text = next(self.windows)  # (N, context + 1)
            loss = self.head.loss(self.body(text[:, :-1]), text[:, -1])
            loss.backward()
            self.head.step()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.loss = loss.item()
            self.steps += 1
            self.seconds += time.perf_counter() - started
            on_step(self)

    @torch.no_grad()
    def evaluate(self, text: Tensor, classes: int) -> None:
        """Note the errors on windows (S, context + 1) of held-out text."""
        most = min(max(KS), classes)
        chunks = text.split(max(1, LOGITS // classes))
        top = torch.cat([self.head.top(self.body(t[:, :-1]), most) for t in chunks])  # (S, most)
        hits = top == text[:, -1:]
        errors = {k: 1 - hits[:, :k].any(1).double().mean().item() for k in KS}
        self.points.append(Point(self.seconds, self.steps, errors))


def race(
    entries: Sequence[Entry],
    train: Ids,
    held_out: Ids,
    options: RaceOptions,
    on_step: Callable[[Runner], None] = lambda runner: None,
) -> list[Runner]:
    """Train all heads in turns, evaluating each at the times of ``options``.

    Args:
        entries: the heads.
        train: the ids (T,) to train on.
        held_out: the ids (T',) from which the positions to evaluate are drawn.
        options: the sizes.
        on_step: hears after each step which head took it, on nobody's time.
    """
    length = options.context + 1
    stream, rest = torch.from_numpy(train), torch.from_numpy(held_out)
    sample = next(windows(rest, options.sample, length, options.seed))  # (S, context + 1)
    runners = [start(entry, stream, options) for entry in entries]
    for until in options.times():
        for runner in runners:
            if runner.seconds >= until:  # one long step led past this time and the one before
                continue
            runner.train_until(until, on_step)
            if not runner.diverged:
                runner.evaluate(sample, options.classes)
    return runners


def start(entry: Entry, stream: Tensor, options: RaceOptions) -> Runner:
    """A body and a head with the first weights of the seed, before the first batch."""
    torch.manual_seed(options.seed)
    body = Body(options)
    return Runner(
        entry,
        body,
        entry.head.make(options.dim, options.classes, entry.lr),
        windows(stream, options.batch, options.context + 1, options.seed),
        (
            torch.optim.SparseAdam(body.embedding.parameters(), lr=options.body_lr),
            torch.optim.Adam(body.layers.parameters(), lr=options.body_lr, fused=True),
        ),
    )
