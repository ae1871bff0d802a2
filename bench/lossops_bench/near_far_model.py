"""The head that near and far is measured on: one of a language model trained on real text.

    text → demo_data → ids → demo_train's model under autocast, for --minutes → held-out text
    → hidden states x (N, D), head w (V, D), words y (N,), counts (V,): one file

Random logits have no peaks, so nothing about near and far can be measured on them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lossops
from lossops_bench.demo_data import Corpus
from lossops_bench.demo_train import LanguageModel, TrainOptions, batches

__all__ = ["TrainedHead", "load_head", "train_head"]

ROWS = 8192  # hidden states that are kept
SAVE_EVERY = 300.0  # seconds


@dataclass(frozen=True)
class TrainedHead:
    """A trained head with hidden states of held-out text."""

    x: Tensor  # (N, D) float32
    w: Tensor  # (V, D) float32
    target: Tensor  # (N,) int64
    counts: Tensor  # (V,) int64: how often training text has each word
    loss: float  # mean cross-entropy of these rows, nats
    steps: int
    minutes: float  # of training


def train_head(
    text: Corpus,
    options: TrainOptions,
    path: Path,
    minutes: float,
    on_step: Callable[[int, float, float], None] = lambda step, loss, minutes: None,
) -> TrainedHead:
    """Train for so many minutes and write the head to ``path``, now and then and at the end.

    Args:
        text: what to train on.
        options: sizes; the learning rate falls to a tenth along a cosine of the time.
        path: the file.
        minutes: how long.
        on_step: hears the step, its loss and the minutes so far.
    """
    torch.manual_seed(options.seed)
    model = LanguageModel(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, fused=True)
    stream = torch.from_numpy(text.train)
    started = saved = time.perf_counter()
    for step, (tokens, targets) in enumerate(batches(stream, options), start=1):
        now = time.perf_counter()
        done = (now - started) / (60 * minutes)
        if done >= 1:
            break
        falling = 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, step / options.warmup_steps) * falling
        # bfloat16 products: twice to four times the steps where the processor has them.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = lossops.linear_cross_entropy(model(tokens), model.head, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(step, loss.item(), 60**-1 * (time.perf_counter() - started))
        if now - saved > SAVE_EVERY:
            _save(model, text, options, path, step, (now - started) / 60)
            saved = now
    return _save(model, text, options, path, step - 1, minutes)


@torch.no_grad()
def _save(
    model: LanguageModel, text: Corpus, options: TrainOptions, path: Path, steps: int, spent: float
) -> TrainedHead:
    count = min(ROWS, len(text.held_out) - 1) // options.context * options.context
    held_out = torch.from_numpy(text.held_out[: count + 1]).long()
    tokens = held_out[:-1].view(-1, options.context)  # (windows, T)
    x = torch.cat([model(part) for part in tokens.split(8)])  # (N, D)
    target = held_out[1:]
    loss = lossops.linear_cross_entropy(x, model.head, target).item()
    counts = torch.from_numpy(np.bincount(text.train, minlength=options.classes))
    head = TrainedHead(x, model.head.detach(), target, counts, loss, steps, spent)
    torch.save(head.__dict__, path)
    return head


def load_head(path: Path) -> TrainedHead:
    """Read what `train_head` wrote."""
    return TrainedHead(**torch.load(path, weights_only=True))
