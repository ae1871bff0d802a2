"""Losses over pairs whose rows are spread over processes: the same loss, the same gradients.

One group of processes per world size runs every case, on loopback through gloo; the parent holds
what they return against one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import from_ranks
from torch import Tensor, nn

import lossops
from lossops import distributed

D = 6
# Rows (and columns) of each rank: one rank; even; ragged; one with nothing, as a last batch has.
WORLDS = {1: [5], 2: [4, 7], 3: [3, 3, 3], 4: [2, 5, 0, 3]}
Case = Callable[..., Tensor]


def batch(rows: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    n = sum(rows)
    x, w = (F.normalize(torch.randn(n, D, generator=draw, dtype=torch.float64)) for _ in range(2))
    return x.to(dtype), w.to(dtype)


def groups(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n) % 4 - 1, torch.arange(n) % 3 - 1


def sigmoid(x: Tensor, w: Tensor, t: Tensor, b: Tensor, part: slice, **options: Any) -> Tensor:
    return lossops.sigmoid_pairwise_loss(x, w, t, b, **options)


def sigmoid_weighted(x: Tensor, w: Tensor, t: Tensor, b: Tensor, part: slice, **o: Any) -> Tensor:
    weights = torch.linspace(0.5, 2.0, o.pop("total"), dtype=x.dtype)[part]
    return lossops.sigmoid_pairwise_loss(x, w, t, b, weights=weights, **o)


def sigmoid_groups(x: Tensor, w: Tensor, t: Tensor, b: Tensor, part: slice, **o: Any) -> Tensor:
    rows, columns = groups(o.pop("total"))
    return lossops.sigmoid_pairwise_loss(x, w, t, b, positives=(rows[part], columns[part]), **o)


def sigmoid_sum(x: Tensor, w: Tensor, t: Tensor, b: Tensor, part: slice, **o: Any) -> Tensor:
    return lossops.sigmoid_pairwise_loss(x, w, t, b, reduction="sum", **o)


def softmax(x: Tensor, w: Tensor, t: Tensor, b: Tensor, part: slice, **options: Any) -> Tensor:
    return lossops.softmax_pairwise_loss(x, w, t, **options)


def softmax_options(x: Tensor, w: Tensor, t: Tensor, b: Tensor, part: slice, **o: Any) -> Tensor:
    weights = torch.linspace(0.5, 2.0, o.pop("total"), dtype=x.dtype)[part]
    return lossops.softmax_pairwise_loss(
        x, w, t, weights=weights, margin=0.1, label_smoothing=0.1, **o
    )


def softmax_groups(x: Tensor, w: Tensor, t: Tensor, b: Tensor, part: slice, **o: Any) -> Tensor:
    rows, columns = groups(o.pop("total"))
    same = torch.arange(len(rows)) // 2
    return lossops.softmax_pairwise_loss(
        x, w, t, positives=(rows[part], columns[part]), exclude=(same[part], same[part]), **o
    )


def softmax_rows(x: Tensor, w: Tensor, t: Tensor, b: Tensor, part: slice, **options: Any) -> Tensor:
    return lossops.softmax_pairwise_loss(x, w, t, direction="rows", **options)


WITH_TOTAL = (sigmoid_weighted, sigmoid_groups, softmax_options, softmax_groups)
BOTH_WAYS = (sigmoid, sigmoid_weighted, sigmoid_groups, sigmoid_sum, softmax, softmax_options)
CASES: dict[str, tuple[Case, str]] = {
    f"{case.__name__}-{exchange}": (case, exchange)
    for exchange in ("ring", "gather")
    for case in (*BOTH_WAYS, *((softmax_groups, softmax_rows) if exchange == "gather" else ()))
}


def run(case: Case, x: Tensor, w: Tensor, part: slice, total: int, **options: Any) -> list[Tensor]:
    """Loss and gradients of x, w, t and b on this rank's part."""
    leaves = [x[part], w[part], torch.tensor(7.0).to(x.dtype), torch.tensor(-3.0).to(x.dtype)]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    more = {"total": total} if case in WITH_TOTAL else {}
    loss = case(*leaves, part, **more, **options)
    (3 * loss).backward(retain_graph=True)
    once = [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in leaves]
    (3 * loss).backward()
    for t, g in zip(leaves, once, strict=True):
        assert t.grad is None or torch.equal(t.grad, 2 * g), "a second backward"
    with torch.no_grad():
        assert torch.equal(case(*leaves, part, **more, **options), loss)
    return [loss.detach(), *once]


def two_towers(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict({
        "image": nn.Linear(D, 4, dtype=torch.float64),
        "text": nn.Linear(D, 4, dtype=torch.float64),
        "loss": lossops.SigmoidPairwiseLoss(learnable=True).double(),
    })  # fmt: skip


class Towers(nn.Module):
    """A two-tower model whose loss spans the ranks, as DDP wraps it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.parts = two_towers()
        self.options = options

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        image = F.normalize(self.parts["image"](x), dim=1)
        text = F.normalize(self.parts["text"](w), dim=1)
        loss: Tensor = self.parts["loss"](image, text, **self.options)
        return loss


def refused(rank: int, x: Tensor, w: Tensor, group: Any) -> list[str]:
    """What each rank raises where the last one's positives do not fit."""
    last = rank == dist.get_world_size() - 1
    wrong = torch.full((len(x), 1), 99 if last else 0)
    short = (torch.zeros(len(x)).long(), torch.zeros(len(w) + last).long())
    raised = []
    for positives in (wrong, short):
        for exchange in ("ring", "gather"):
            try:
                lossops.sigmoid_pairwise_loss(
                    x, w, 7.0, positives=positives, batch_group=group, exchange=exchange
                )
            except (IndexError, ValueError, RuntimeError) as error:
                raised.append(type(error).__name__)
    return raised


def strangers(rows: int, x: Tensor, w: Tensor, group: Any) -> list[float]:
    """Losses where a rank's features want no gradients unless it has some."""
    found = []
    for loss in (lossops.sigmoid_pairwise_loss, lossops.softmax_pairwise_loss):
        for exchange in ("ring", "gather"):
            leaves = [t.detach().clone().requires_grad_(rows > 0) for t in (x, w)]
            value = loss(*leaves, 7.0, batch_group=group, exchange=exchange)
            value.backward()
            found.append(value.item())
    overflow = lossops.sigmoid_pairwise_loss(x, w, 1.0, torch.inf, batch_group=group)
    return [*found, overflow.item()]


def work(rank: int, rows: list[int]) -> dict[str, Any]:
    distributed.PIECE = 2  # several pieces, the last one ragged
    x, w = batch(rows)
    part = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    found: dict[str, Any] = {}
    group = dist.group.WORLD
    for name, (case, exchange) in CASES.items():
        found[name] = run(case, x, w, part, sum(rows), batch_group=group, exchange=exchange)
    for exchange in ("ring", "gather"):
        model = nn.parallel.DistributedDataParallel(Towers(batch_group=group, exchange=exchange))
        model(x[part], w[part]).backward()
        found[f"ddp-{exchange}"] = [p.grad for p in model.parameters()]
    halves = [t[part].bfloat16().requires_grad_() for t in (x, w)]
    loss = lossops.sigmoid_pairwise_loss(*halves, 7.0, -3.0, batch_group=group)
    assert loss.dtype == torch.float32
    loss.backward()
    found["bf16"] = [loss.detach(), *(t.grad for t in halves)]
    found["refused"] = refused(rank, x[part], w[part], group)
    found["strangers"] = strangers(rows[rank], x[part], w[part], group)
    return found


@pytest.fixture(scope="module", params=WORLDS, ids="world{}".format)
def world(request: pytest.FixtureRequest) -> tuple[list[int], list[dict[str, Any]]]:
    """Rows of each rank, and what each rank found."""
    rows = WORLDS[request.param]
    return rows, from_ranks(work, rows)


@pytest.mark.parametrize("name", CASES)
def test_spread_is_whole(world: tuple[list[int], list[dict[str, Any]]], name: str) -> None:
    rows, ranks = world
    x, w = batch(rows)
    case, _ = CASES[name]
    loss, dx, dw, dt, db = run(case, x, w, slice(None), sum(rows))
    found = [rank[name] for rank in ranks]
    for other in found:
        torch.testing.assert_close(other[0], loss)  # every rank knows the whole loss
    size = len(rows)
    # DDP's mean over the ranks is the gradient: what a rank holds is `size` times its part.
    torch.testing.assert_close(torch.cat([f[1] for f in found]) / size, dx)
    torch.testing.assert_close(torch.cat([f[2] for f in found]) / size, dw)
    torch.testing.assert_close(sum(f[3] for f in found) / size, dt)
    torch.testing.assert_close(sum(f[4] for f in found) / size, db)


@pytest.mark.parametrize("exchange", ["ring", "gather"])
def test_ddp_gives_the_gradients_of_one_process(
    world: tuple[list[int], list[dict[str, Any]]], exchange: str
) -> None:
    rows, ranks = world
    model = Towers()
    model(*batch(rows)).backward()
    for rank in ranks:
        for found, p in zip(rank[f"ddp-{exchange}"], model.parameters(), strict=True):
            torch.testing.assert_close(found, p.grad)


def test_what_one_rank_refuses_all_refuse(world: tuple[list[int], list[dict[str, Any]]]) -> None:
    _, ranks = world
    for rank in ranks[:-1]:
        assert rank["refused"] == ["RuntimeError"] * 4
    assert ranks[-1]["refused"] == ["IndexError"] * 2 + ["ValueError"] * 2


def test_a_rank_with_nothing_takes_part(world: tuple[list[int], list[dict[str, Any]]]) -> None:
    _, ranks = world
    for rank in ranks:
        assert rank["strangers"] == ranks[0]["strangers"]
        assert rank["strangers"][-1] == torch.inf


def test_half_precision_travels_in_float32(
    world: tuple[list[int], list[dict[str, Any]]],
) -> None:
    rows, ranks = world
    halves = [t.bfloat16().requires_grad_() for t in batch(rows)]
    loss = lossops.sigmoid_pairwise_loss(*halves, 7.0, -3.0)
    loss.backward()
    found = [rank["bf16"] for rank in ranks]
    torch.testing.assert_close(found[0][0], loss.detach())
    for i, leaf in enumerate(halves, 1):
        assert leaf.grad is not None
        spread = torch.cat([f[i] for f in found]).float() / len(rows)
        # Both round once to bfloat16, from float32 sums that differ in their last digits.
        torch.testing.assert_close(spread, leaf.grad.float(), rtol=2**-7, atol=1e-6)
