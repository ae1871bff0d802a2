"""Two towers that learn to find a function's code by its docstring, with either pairwise loss.

    x = docs(docstrings)                          # (N, D), rows of length 1
    w = codes(functions)                          # (N, D), rows of length 1
    lossops.sigmoid_pairwise_loss(x, w, t, b)     # the logits t x wᵀ + b (N, N) never exist
    lossops.softmax_pairwise_loss(x, w, t)

Every loss gets towers with the same first weights, and the same batches in the same order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossops
from lossops_bench.towers_data import Bags, Pairs

__all__ = [
    "KS",
    "LOSSES",
    "Point",
    "Retrieval",
    "Runner",
    "TowersOptions",
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
    dim: int = 128  # D
    hidden: int = 512
    batch: int = 2048  # N
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


class Tower(nn.Module):
    """Bags of words to features (N, D) of length 1: the mean of embeddings, one hidden layer."""

    def __init__(self, options: TowersOptions) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(options.words, options.dim, mode="mean")
        self.layers = nn.Sequential(
            nn.Linear(options.dim, options.hidden),
            nn.GELU(),
            nn.Linear(options.hidden, options.dim),
        )

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return F.normalize(self.layers(self.embedding(ids, offsets)), dim=-1)


class Texts:
    """Bags of words as tensors."""

    def __init__(self, bags: Bags) -> None:
        self.ids = torch.from_numpy(bags.ids).long()  # (T,)
        self.starts = torch.from_numpy(bags.starts)  # (P + 1,)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The ids of the texts ``rows`` (N,), one after the other, and where each begins (N,)."""
        first = self.starts[rows]
        lengths = self.starts[rows + 1] - first
        offsets = lengths.cumsum(0) - lengths
        shift = (first - offsets).repeat_interleave(lengths)
        return self.ids[torch.arange(len(shift)) + shift], offsets

    def rows(self) -> Tensor:
        """The text that each id is in, (T,)."""
        return torch.arange(len(self)).repeat_interleave(self.starts.diff())

    def counts(self, words: int) -> Tensor:
        """How often each word is in each text, (P, words)."""
        table = torch.zeros(len(self), words)
        return table.index_put_((self.rows(), self.ids), torch.ones(()), accumulate=True)


@dataclass
class Runner:
    """One loss in training: its towers, and the points so far."""

    name: str
    docs: Tower
    codes: Tower
    loss_of: PairLoss
    batches: Iterator[Tensor]
    optimizer: torch.optim.Optimizer
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
        loss = self.loss_of(self.docs(*docs.take(rows)), self.codes(*codes.take(rows)))
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
        scores = self.docs(*docs.take(every)) @ self.codes(*codes.take(every)).T  # (P, P)
        found = retrieval(scores), retrieval(scores.T)
        self.points.append(
            Point(self.seconds, self.steps, self.loss, self.scale, self.bias, *found)
        )


def retrieval(scores: Tensor) -> Retrieval:
    """Judge scores (P, P) of queries in rows, whose partners are on the diagonal.

    A candidate with the same score stands before the partner, and NaN before everything: towers
    that map all texts to one point find nothing.
    """
    partner = scores.diagonal().unsqueeze(1)
    ranks = scores.shape[1] - (scores < partner).sum(1)  # (P,), 1 for the best
    recall = {k: (ranks <= k).double().mean().item() for k in KS}
    return Retrieval(recall, (1 / ranks.double()).mean().item())


def word_overlap(held_out: Pairs, train: Pairs, words: int) -> tuple[Retrieval, Retrieval]:
    """What common words find without any training, docstring → code and code → docstring.

    The cosine of log(1 + count) · idf, with the idf of the words in the code of ``train``.
    """
    seen = Texts(train.codes)
    once = (seen.rows() * words + seen.ids).unique() % words  # each word of a text once
    idf = ((1 + len(seen)) / (1 + once.bincount(minlength=words))).log()  # (words,)
    idf[0] = 0  # two unknown words need not be the same
    docs, codes = (
        F.normalize(Texts(side).counts(words).log1p() * idf)  # (P, words)
        for side in (held_out.docs, held_out.codes)
    )
    scores = docs @ codes.T
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
    docs, codes, loss_of = Tower(options), Tower(options), LOSSES[name]()
    embeddings = [docs.embedding.weight, codes.embedding.weight]
    layers = [*docs.layers.parameters(), *codes.layers.parameters()]
    groups = [
        {"params": embeddings, "lr": options.embedding_lr, "weight_decay": 0.0},
        {"params": layers, "lr": options.lr},
        {"params": [*loss_of.parameters()], "lr": options.scale_lr, "weight_decay": 0.0},
    ]
    return Runner(
        name,
        docs,
        codes,
        loss_of,
        batches(pairs, options.batch, options.seed),
        torch.optim.AdamW(groups, fused=True),
    )


def train_in_turns(
    runners: Sequence[Runner],
    train: Pairs,
    held_out: Pairs,
    options: TowersOptions,
    on_step: Callable[[Runner], None] = lambda runner: None,
) -> None:
    """Train all, each up to the next evaluation; a loss that is not finite ends its runner.

    Args:
        runners: as `start` made them.
        train: the pairs to train on.
        held_out: the pairs to retrieve.
        options: the sizes.
        on_step: hears after each step which runner took it, on nobody's time.
    """
    docs, codes = Texts(train.docs), Texts(train.codes)
    answers = Texts(held_out.docs), Texts(held_out.codes)
    for runner in runners:
        runner.evaluate(*answers)  # untrained
    for until in options.shares():
        for runner in runners:
            if runner.share(options) >= until:  # one long step led past this one and the one before
                continue
            while runner.share(options) < until and not runner.diverged:
                runner.step(docs, codes)
                on_step(runner)
            if not runner.diverged:
                runner.evaluate(*answers)
