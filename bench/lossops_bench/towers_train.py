"""Two towers that learn to find a function's code by its docstring, with either pairwise loss.

    x, w = towers(docstrings, codes)              # (N, D) each, rows of length 1
    lossops.sigmoid_pairwise_loss(x, w, t, b)     # the logits t x wᵀ + b (N, N) never exist
    lossops.softmax_pairwise_loss(x, w, t)

Every loss gets towers with the same first weights, and the same batches in the same order with the
same words dropped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossops
from lossops_bench.towers_data import Bags

__all__ = [
    "KS",
    "LOSSES",
    "Point",
    "Retrieval",
    "Runner",
    "Sides",
    "Texts",
    "TowersOptions",
    "rarity",
    "retrieval",
    "start",
    "train_in_turns",
    "word_overlap",
]

KS = (1, 5, 10)
LARGEST_SCALE = 100.0
"""Of the softmax loss, as in CLIP."""


@dataclass(frozen=True)
class TowersOptions:
    """Sizes of the model and of its training, the same for every loss."""

    words: int  # of the vocabulary
    dim: int = 256  # D
    hidden: int = 512
    batch: int = 2048  # N
    dropout: float = 0.5  # of words; without, the held-out recall fell again after five passes
    lr: float = 1e-3  # of the layers
    embedding_lr: float = 5e-3  # of the words, most of which are rare
    scale_lr: float = 1e-2  # of log t and b, which have far to go in few steps
    seed: int = 0
    seconds: float = 60.0
    steps: int | None = None  # instead of seconds
    evaluations: int = 12

    def shares(self) -> list[float]:
        """When to evaluate, as shares of the training: the first at a 64th, then by one factor."""
        last = max(1, self.evaluations - 1)
        return [64 ** (i / last - 1) for i in range(last)] + [1.0]


@dataclass(frozen=True)
class Retrieval:
    """How well the queries of one side find their partners among all candidates of the other."""

    recall: dict[int, float]  # k: the share of queries whose partner is among the best k
    mrr: float  # mean of 1 / rank


@dataclass(frozen=True)
class Point:
    """What one evaluation found."""

    seconds: float  # of training
    step: int
    loss: float  # of the last batch; NaN before the first
    scale: float
    bias: float | None
    by_doc: Retrieval  # docstring → code
    by_code: Retrieval  # code → docstring


class SigmoidLoss(nn.Module):
    """Each docstring with each code is a question of its own: Σ softplus(-y (t x·w + b)) / N.

    It starts from few pairs belonging together (b = -10), as in SigLIP.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return lossops.sigmoid_pairwise_loss(x, w, self.log_scale.exp(), self.bias)

    def clamp(self) -> None:
        """Nothing bounds the scale of this loss."""


class SoftmaxLoss(nn.Module):
    """Which of the batch's codes belongs to this docstring, and the other way round (InfoNCE)."""

    bias = None

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return lossops.softmax_pairwise_loss(x, w, self.log_scale.exp())

    @torch.no_grad()
    def clamp(self) -> None:
        self.log_scale.clamp_(max=math.log(LARGEST_SCALE))


PairLoss = SigmoidLoss | SoftmaxLoss
LOSSES: dict[str, Callable[[], PairLoss]] = {"sigmoid": SigmoidLoss, "softmax": SoftmaxLoss}


class Towers(nn.Module):
    """Bags of words to features (N, D) of length 1, of docstrings and of code.

    A sum of words' vectors, which both sides share, and a hidden layer of each side beside it. The
    vectors are random and the layers zero at first: what finds a partner then is a common word.
    """

    def __init__(self, options: TowersOptions) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(options.words, options.dim, mode="sum")
        # Small, or the steps of AdamW, all of one size, would take long to move them.
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.docs, self.codes = layers(options), layers(options)

    def forward(self, docs: Chosen, codes: Chosen) -> tuple[Tensor, Tensor]:
        features = []
        for (ids, offsets, weights), side in ((docs, self.docs), (codes, self.codes)):
            h = self.embedding(ids, offsets, per_sample_weights=weights)  # (N, D)
            features.append(F.normalize(h + side(h), dim=-1))
        return features[0], features[1]


def layers(options: TowersOptions) -> nn.Sequential:
    """One hidden layer (N, D) → (N, D), zero at first."""
    last = nn.Linear(options.hidden, options.dim)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(nn.Linear(options.dim, options.hidden), nn.GELU(), last)


class Texts:
    """Bags of words as tensors: the distinct words of each text, weighted by log(1 + count) · idf.

    The weights of a text are a vector of length 1.
    """

    def __init__(self, bags: Bags, idf: Tensor) -> None:
        rows, self.ids, counts = distinct(bags, len(idf))
        weights = counts.log1p() * idf[self.ids]  # (T,)
        squares = torch.zeros(len(bags)).index_add_(0, rows, weights.square())
        self.weights = weights / squares.sqrt().clamp(min=1e-6)[rows]
        lengths = rows.bincount(minlength=len(bags))
        self.starts = F.pad(lengths.cumsum(0), (1, 0))  # (P + 1,)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def take(self, rows: Tensor) -> Chosen:
        """The words of the texts ``rows`` (N,), one text after the other."""
        first = self.starts[rows]
        lengths = self.starts[rows + 1] - first
        offsets = lengths.cumsum(0) - lengths
        shift = (first - offsets).repeat_interleave(lengths)
        places = torch.arange(len(shift)) + shift
        return Chosen(self.ids[places], offsets, self.weights[places])

    def table(self, words: int) -> Tensor:
        """All weights, (P, words)."""
        rows = torch.arange(len(self)).repeat_interleave(self.starts.diff())
        return torch.zeros(len(self), words).index_put_((rows, self.ids), self.weights)


class Chosen(NamedTuple):
    """Some texts, as `EmbeddingBag` takes them."""

    ids: Tensor  # (T,)
    offsets: Tensor  # (N,), where each text begins
    weights: Tensor  # (T,)

    def some(self, dropout: float, generator: torch.Generator) -> Chosen:
        """Without a random part of the words; lengths do not matter to what follows."""
        kept = torch.rand(self.weights.shape, generator=generator) >= dropout
        return self._replace(weights=self.weights * kept)


def distinct(bags: Bags, words: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which text and which word, each pair once in the order of the texts, and how often, (T,)."""
    starts = torch.from_numpy(bags.starts)
    rows = torch.arange(len(bags)).repeat_interleave(starts.diff())
    once, counts = (rows * words + torch.from_numpy(bags.ids)).unique(return_counts=True)
    return once // words, once % words, counts


def rarity(bags: Bags, words: int) -> Tensor:
    """The idf of each word (words,): log((1 + texts) / (1 + texts with the word))."""
    _, ids, _ = distinct(bags, words)
    idf = ((1 + len(bags)) / (1 + ids.bincount(minlength=words))).log()
    idf[0] = 0  # two unknown words need not be the same
    return idf


@dataclass
class Runner:
    """One loss in training: its towers, and the points so far."""

    name: str
    towers: Towers
    loss_of: PairLoss
    batches: Iterator[Tensor]
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # of the words that are dropped
    dropout: float
    seconds: float = 0.0
    steps: int = 0
    loss: float = math.nan
    points: list[Point] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        return self.steps > 0 and not math.isfinite(self.loss)

    @property
    def scale(self) -> float:
        return self.loss_of.log_scale.exp().item()

    @property
    def bias(self) -> float | None:
        return None if self.loss_of.bias is None else self.loss_of.bias.item()

    def share(self, options: TowersOptions) -> float:
        """How much of the training is done, 1 at its end."""
        if options.steps is not None:
            return self.steps / options.steps
        return self.seconds / options.seconds

    def step(self, docs: Texts, codes: Texts) -> None:
        """One batch; its time counts from the choice of the pairs to the new weights."""
        started = time.perf_counter()
        rows = next(self.batches)  # (N,)
        some = (side.take(rows).some(self.dropout, self.generator) for side in (docs, codes))
        loss = self.loss_of(*self.towers(*some))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss_of.clamp()
        self.loss = loss.item()
        self.steps += 1
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def evaluate(self, docs: Texts, codes: Texts) -> None:
        """Note how well the held-out pairs find each other."""
        every = torch.arange(len(docs))
        x, w = self.towers(docs.take(every), codes.take(every))  # (P, D)
        found = retrieval(x @ w.T), retrieval(w @ x.T)
        self.points.append(
            Point(self.seconds, self.steps, self.loss, self.scale, self.bias, *found)
        )


Sides = tuple[Texts, Texts]
"""Docstrings, and the code of each."""


def retrieval(scores: Tensor) -> Retrieval:
    """Judge scores (P, P) of queries in rows, whose partners are on the diagonal.

    A candidate with the same score stands before the partner, and NaN before everything: towers
    that map all texts to one point find nothing.
    """
    partner = scores.diagonal().unsqueeze(1)
    ranks = scores.shape[1] - (scores < partner).sum(1)  # (P,), 1 for the best
    recall = {k: (ranks <= k).double().mean().item() for k in KS}
    return Retrieval(recall, (1 / ranks.double()).mean().item())


def word_overlap(docs: Texts, codes: Texts, words: int) -> tuple[Retrieval, Retrieval]:
    """What common words find without any training, docstring → code and code → docstring."""
    scores = docs.table(words) @ codes.table(words).T  # (P, P), cosines
    return retrieval(scores), retrieval(scores.T)


def batches(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless batches (N,) of pair numbers, each pair at most once in a pass over all."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // batch * batch].split(batch)


def start(name: str, pairs: int, options: TowersOptions) -> Runner:
    """Towers with the first weights of the seed, before the first batch.

    Raises:
        ValueError: if there are fewer ``pairs`` to train on than in a batch.
    """
    if pairs < options.batch:
        raise ValueError(
            f"--batch must be at most the number of pairs to train on, {pairs}, got {options.batch}"
        )
    torch.manual_seed(options.seed)
    towers, loss_of = Towers(options), LOSSES[name]()
    hidden = [*towers.docs.parameters(), *towers.codes.parameters()]
    groups = [
        {"params": [towers.embedding.weight], "lr": options.embedding_lr, "weight_decay": 0.0},
        {"params": hidden, "lr": options.lr},
        {"params": [*loss_of.parameters()], "lr": options.scale_lr, "weight_decay": 0.0},
    ]
    return Runner(
        name,
        towers,
        loss_of,
        batches(pairs, options.batch, options.seed),
        torch.optim.AdamW(groups, fused=True),
        torch.Generator().manual_seed(options.seed),
        options.dropout,
    )


def train_in_turns(
    runners: Sequence[Runner],
    train: Sides,
    held_out: Sides,
    options: TowersOptions,
    on_step: Callable[[Runner], None] = lambda runner: None,
) -> None:
    """Train all, each up to the next evaluation; a loss that is not finite ends its runner.

    Args:
        runners: as `start` made them.
        train: docstrings and codes to train on.
        held_out: docstrings and codes to retrieve.
        options: the sizes.
        on_step: hears after each step which runner took it, on nobody's time.
    """
    for runner in runners:
        runner.evaluate(*held_out)  # untrained
    for until in options.shares():
        for runner in runners:
            if runner.share(options) >= until:  # one long step led past this one and the one before
                continue
            while runner.share(options) < until and not runner.diverged:
                runner.step(*train)
                on_step(runner)
            if not runner.diverged:
                runner.evaluate(*held_out)
