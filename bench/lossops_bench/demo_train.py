"""A small causal transformer with a large-vocabulary head: how lossops is used in a training loop.

    x = model(tokens)                                            # (N, D)
    loss = lossops.linear_cross_entropy(x, model.head, targets)  # the logits (N, V) never exist

The same loop runs with plain PyTorch: the entry of ``HEADS`` is the only difference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossops
from lossops_bench.memory import best_meter

HeadLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_linear_cross_entropy(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """What a training script does without this package: all logits (N, V), then the loss."""
    return F.cross_entropy(F.linear(x, w), y)


OURS, PLAIN = "lossops", "plain PyTorch"
HEADS: dict[str, HeadLoss] = {
    OURS: lossops.linear_cross_entropy,
    PLAIN: plain_linear_cross_entropy,
}


@dataclass(frozen=True)
class TrainOptions:
    """Sizes of the model and of its training; batches and initial weights follow from ``seed``."""

    classes: int  # V
    dim: int = 256  # D
    layers: int = 3
    context: int = 128  # tokens a prediction can look back on
    batch_tokens: int = 2048  # N
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    seed: int = 0
    tied: bool = False  # embedding and head share a weight
    threads: int | None = None  # None leaves PyTorch's choice

    def __post_init__(self) -> None:
        if self.dim > 64 and self.dim % 64:
            raise ValueError(
                f"--dim must be at most 64 or a multiple of 64, one attention head, got {self.dim}"
            )
        if self.batch_tokens % self.context:
            raise ValueError(
                f"--batch-tokens must be at most {self.context} or a multiple of it, "
                f"got {self.batch_tokens}"
            )


class Block(nn.Module):
    """Pre-norm causal attention and a feed-forward layer, both residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = max(1, dim // 64)
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.mix = nn.Linear(dim, dim, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, h: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(h)).unflatten(-1, (3 * self.heads, -1))  # (B, T, 3 heads, D/heads)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)  # (B, heads, T, D/heads)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.mix(attention.transpose(1, 2).flatten(2))
        return h + self.feed_forward(h)


class LanguageModel(nn.Module):
    """Tokens (B, T) to the head's input (N, D), N = B T; of the head it has only the weight."""

    def __init__(self, options: TrainOptions) -> None:
        super().__init__()
        self.embedding = nn.Embedding(options.classes, options.dim)
        nn.init.normal_(self.embedding.weight, std=options.dim**-0.5)
        self.position = nn.Parameter(torch.randn(options.context, options.dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(options.dim) for _ in range(options.layers)))
        self.norm = nn.LayerNorm(options.dim)
        self.head = self.embedding.weight  # (V, D)
        if not options.tied:
            self.head = nn.Parameter(torch.randn(options.classes, options.dim) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        # The head it may be tied to wants small weights, the blocks want entries near 1; and AdamW,
        # whose steps know no scale, then moves the words fast: 0.4 nats lower after 50 steps.
        h = self.embedding(tokens) * self.embedding.embedding_dim**0.5  # (B, T, D)
        h = h + self.position[: tokens.shape[1]]
        return self.norm(self.blocks(h)).flatten(0, 1)


@dataclass(frozen=True)
class Step:
    """What one training step reports."""

    index: int
    loss: float
    seconds: float
    extra_bytes: int  # peak memory so far beyond what was resident before the first step


def windows(stream: Tensor, count: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless batches (count, length) of random windows of ``stream``."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length)
    while True:
        starts = torch.randint(len(stream) - length + 1, (count, 1), generator=generator)
        yield stream[starts + offsets].long()


def batches(stream: Tensor, options: TrainOptions) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows of ``stream``: tokens (B, T) and the token after each, (N,)."""
    count = options.batch_tokens // options.context
    for text in windows(stream, count, options.context + 1, options.seed):  # (B, T + 1)
        yield text[:, :-1], text[:, 1:].flatten()


def train(
    model: LanguageModel,
    head_loss: HeadLoss,
    stream: Tensor,
    options: TrainOptions,
    *,
    steps: int | None,
    seconds: float,
) -> Iterator[Step]:
    """Train until ``steps`` or ``seconds`` are over, whichever comes first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, fused=True)
    warmup = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1 / options.warmup_steps, total_iters=options.warmup_steps
    )
    meter = best_meter()
    started = time.perf_counter()
    for index, (tokens, targets) in enumerate(batches(stream, options), start=1):
        step_started = time.perf_counter()
        loss = head_loss(model(tokens), model.head, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        now = time.perf_counter()
        yield Step(index, loss.item(), now - step_started, meter.extra())
        if index == steps or now - started >= seconds:
            return


@torch.no_grad()
def perplexity(
    model: LanguageModel, stream: Tensor, options: TrainOptions, max_tokens: int = 16384
) -> float:
    """exp of the mean loss over the first tokens of ``stream``; the last batch may be smaller."""
    count = min(len(stream) - 1, max_tokens) // options.context * options.context
    tokens = stream[:count].long().view(-1, options.context)  # (windows, T)
    targets = stream[1 : count + 1].long().view(-1, options.context)  # (windows, T)
    windows = options.batch_tokens // options.context
    total = 0.0
    for text, following in zip(tokens.split(windows), targets.split(windows), strict=True):
        x = model(text)  # (N, D)
        loss = lossops.linear_cross_entropy(x, model.head, following.flatten(), reduction="sum")
        total += loss.item()
    return math.exp(total / count)


def worker(
    connection: Connection,
    head: str,
    folder: Path,
    options: TrainOptions,
    steps: int | None,
    seconds: float,
) -> None:
    """One run in its own process: send a Step per step, then the held-out perplexity or None."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    stream = torch.from_numpy(np.load(folder / "train.npy"))  # (T,)
    held_out = torch.from_numpy(np.load(folder / "held_out.npy"))  # (T',)
    model = LanguageModel(options)
    for step in train(model, HEADS[head], stream, options, steps=steps, seconds=seconds):
        connection.send(step)
    connection.send(perplexity(model, held_out, options) if head == OURS else None)


def optimizer_bytes(options: TrainOptions) -> int:
    """The size of AdamW's state, two moments per parameter, whatever the head."""
    with torch.device("meta"):
        return sum(2 * 4 * p.numel() for p in LanguageModel(options).parameters())
