"""Classes spread over processes: the same loss, gradients, samples and predictions as in one.

One group of processes per world size runs every case, on loopback through gloo.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import lossops
from lossops import ArcFace, CosFace, PartialFC, optim
from lossops.samplers import sample_keeping

PRELOADED = ["torch", "torch._dynamo", "torch.nn.parallel.distributed", "pytest", "lossops"]
TIMEOUT = 60  # seconds, for a group and for each of its exchanges
V, D = 13, 5  # 13, 7 + 6, 5 + 5 + 3 and 4 + 4 + 4 + 1 classes
ROWS = {1: [6], 2: [4, 7], 3: [3, 0, 5], 4: [2, 5, 1, 3]}
MARGINS = {
    "cosface": CosFace(8.0, 0.3),
    "arcface": ArcFace(8.0, 0.4),
    "filter": CosFace(8.0, 0.3, filter_above=0.1),
}


def batch(rows: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(sum(rows), D, generator=draw, dtype=torch.float64)
    w = torch.randn(V, D, generator=draw, dtype=torch.float64)
    y = torch.randint(V, (sum(rows),), generator=draw)
    y[1] = -100
    return x.to(dtype), w.to(dtype), y


def make(w: Tensor, group: Any = None, **options: Any) -> PartialFC:
    head = PartialFC(D, V, class_group=group, dtype=w.dtype, **options)
    with torch.no_grad():
        head.weight.copy_(w[head.shards.first : head.shards.end])
    return head


def gradients(head: PartialFC, x: Tensor, y: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    loss = head(x, y)
    loss.backward()
    assert x.grad is not None
    assert head.weight.grad is not None
    return [loss.detach(), x.grad, head.weight.grad.to_dense()]


def sampled(rank: int, rows: list[int], w: Tensor, x: Tensor, y: Tensor, group: Any) -> Any:
    """One step on a sample: what each rank drew, and what came out."""
    head = make(w, group, sample_rate=0.5, margin=MARGINS["cosface"], seed=7)
    head.step = 3
    found = gradients(head, x, y)
    assert head.weight.grad is not None
    return [head.weight.grad.coalesce().indices()[0] + head.shards.first, *found]


def refused(rank: int, w: Tensor, x: Tensor, y: Tensor, group: Any) -> str:
    """What each rank raises where the last one's labels do not fit."""
    head = make(w, group)
    if rank == dist.get_world_size() - 1:
        y = torch.full_like(y, V)
    try:
        head(x, y)
    except (IndexError, RuntimeError) as error:
        return type(error).__name__
    return ""


def train(head: PartialFC, x: Tensor, y: Tensor, ddp: bool) -> list[Tensor]:
    """Some steps of a backbone beside the head; its weights."""
    torch.manual_seed(1)
    body: Any = nn.Linear(D, D, dtype=x.dtype)
    wrapped = nn.parallel.DistributedDataParallel(body) if ddp else body
    optimizers = [
        torch.optim.SGD(body.parameters(), 0.1),
        optim.RowSGD(head.parameters(), 0.3, 0.9, 0.01, "exact"),
    ]
    for _ in range(4):
        for o in optimizers:
            o.zero_grad()
        head(wrapped(x), y).backward()
        for o in optimizers:
            o.step()
    optimizers[1].refresh()
    return [body.weight.detach(), head.weight.detach()]


def work(rank: int, rows: list[int], folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", len(rows))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=len(rows), timeout=timedelta(seconds=TIMEOUT)
    )
    group = dist.group.WORLD
    x, w, y = batch(rows)
    part = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    found: dict[str, Any] = {}
    for name, margin in MARGINS.items():
        for schedule in ("one_sweep", "two_sweeps"):
            options = lossops.LinearLossOptions(
                schedule=schedule, chunk_rows=2 if schedule == "one_sweep" else None
            )
            head = make(w, group, margin=margin, options=options)
            found[f"{name}-{schedule}"] = gradients(head, x[part], y[part])
    found["sampled"] = sampled(rank, rows, w, x[part], y[part], group)
    found["trained"] = train(make(w, group), x[part], y[part], ddp=True)
    found["topk"] = tuple(make(w, group).topk(x, 20))
    found["refused"] = refused(rank, w, x[part], y[part], group)
    learned = make(w, group, learn_scale=True, margin=MARGINS["cosface"])
    learned(x[part], y[part]).backward()
    assert learned.log_scale is not None
    found["scale"] = learned.log_scale.grad
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=ROWS, ids="world{}".format)
def world(request: pytest.FixtureRequest) -> tuple[list[int], list[dict[str, Any]]]:
    """Rows of each rank, and what each rank found."""
    rows = ROWS[request.param]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        context = mp.start_processes(
            work, (rows, folder), len(rows), join=False, start_method="forkserver"
        )
        assert context is not None
        ended = context.join(timeout=TIMEOUT)
        while not ended and any(p.is_alive() for p in context.processes):
            ended = context.join(timeout=TIMEOUT)
            if not ended and all(p.is_alive() for p in context.processes):
                for process in context.processes:
                    process.kill()
                pytest.fail(f"{len(rows)} processes did not end within {2 * TIMEOUT} s")
        return rows, [torch.load(Path(folder, f"{r}.pt")) for r in range(len(rows))]


World = tuple[list[int], list[dict[str, Any]]]


def held(rows: list[int], found: list[list[Tensor]], expected: list[Tensor]) -> None:
    """Loss on every rank, features' gradients times the ranks, centres' gradients as they are."""
    for loss, *_ in found:
        torch.testing.assert_close(loss, expected[0])
    dx = torch.cat([f[1] for f in found]) / len(rows)
    torch.testing.assert_close(dx, expected[1], rtol=1e-9, atol=1e-12)
    dw = torch.cat([f[2] for f in found])
    torch.testing.assert_close(dw, expected[2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", ["one_sweep", "two_sweeps"])
@pytest.mark.parametrize("name", MARGINS)
def test_sharded_is_whole(world: World, name: str, schedule: str) -> None:
    rows, ranks = world
    x, w, y = batch(rows)
    expected = gradients(make(w, margin=MARGINS[name]), x, y)
    held(rows, [rank[f"{name}-{schedule}"] for rank in ranks], expected)


def test_a_sample_of_each_shard(world: World) -> None:
    rows, ranks = world
    x, w, y = batch(rows)
    ids = torch.cat([rank["sampled"][0] for rank in ranks])
    assert set(y[y >= 0].tolist()) <= set(ids.tolist())
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    cosines = F.normalize(x, dim=1) @ F.normalize(w, dim=1).T
    kept = torch.zeros(V, dtype=torch.bool).index_fill(0, ids, True)
    own = torch.zeros_like(cosines, dtype=torch.bool).scatter(1, y.clamp_min(0)[:, None], True)
    z = 8.0 * torch.where(own, cosines - 0.3, cosines).masked_fill(~kept, -torch.inf)
    loss = F.cross_entropy(torch.where(y[:, None] < 0, 0.0, z), y)
    expected = [loss.detach(), *torch.autograd.grad(loss, (x, w))]
    held(rows, [rank["sampled"][1:] for rank in ranks], expected)


def test_a_shard_draws_the_same_whatever_the_others_are(world: World) -> None:
    # A draw is a function of seed, step and the shard's first class.
    from lossops.reference_sampling import stream_key

    rows, ranks = world
    _, _, y = batch(rows)
    share = -(-V // len(rows))
    for r, rank in enumerate(ranks):
        first, count = r * share, min(share, V - r * share)
        local = torch.where((y >= first) & (y < first + count), y - first, -1)
        size = min(count, max(1, len(y), count // 2))
        expected = sample_keeping(local, count, size, stream_key(7, 3, first)) + first
        assert torch.equal(rank["sampled"][0], expected)


def test_ddp_beside_the_head_trains_as_one_process(world: World) -> None:
    rows, ranks = world
    x, w, y = batch(rows)
    # DDP means over ranks the gradients of each rank's part of the loss of all.
    body, centres = train(make(w), x, y, ddp=False)
    for rank in ranks:
        torch.testing.assert_close(rank["trained"][0], body, rtol=1e-8, atol=1e-11)
    found = torch.cat([rank["trained"][1] for rank in ranks])
    torch.testing.assert_close(found, centres, rtol=1e-8, atol=1e-11)


def test_predictions_of_all_shards(world: World) -> None:
    rows, ranks = world
    x, w, _ = batch(rows)
    values, indices = make(w).topk(x, 20)
    assert indices.shape[1] == V
    for rank in ranks:
        torch.testing.assert_close(rank["topk"][0], values)
        assert torch.equal(rank["topk"][1], indices)


def test_what_one_rank_refuses_all_refuse(world: World) -> None:
    _, ranks = world
    assert [rank["refused"] for rank in ranks[:-1]] == ["RuntimeError"] * (len(ranks) - 1)
    assert ranks[-1]["refused"] == "IndexError"


def test_a_learned_scale_has_its_gradient_on_every_rank(world: World) -> None:
    rows, ranks = world
    x, w, y = batch(rows)
    head = make(w, learn_scale=True, margin=MARGINS["cosface"])
    head(x, y).backward()
    assert head.log_scale is not None
    for rank in ranks:
        torch.testing.assert_close(rank["scale"], head.log_scale.grad, rtol=1e-5, atol=1e-7)
