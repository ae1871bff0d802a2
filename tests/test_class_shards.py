"""Classes spread over processes: the same loss, gradients, samples and predictions as in one.

One group of processes per world size runs every case, on loopback through gloo.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import from_ranks
from test_catalogue import Case
from torch import Tensor, nn

import lossops
from lossops import ArcFace, CosFace, PartialFC, optim
from lossops.samplers import sample_keeping
from lossops.shards import shards_of
from lossops_bench.dense import DENSE

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


RATES = {"sampled": 0.5, "crowded": 0.05}  # crowded: fewer classes than rows of all ranks


def sampled(name: str, w: Tensor, x: Tensor, y: Tensor, group: Any) -> Any:
    """One step on a sample: what each rank drew, and what came out."""
    head = make(w, group, sample_rate=RATES[name], margin=MARGINS["cosface"], seed=7)
    head.step = 3
    found = gradients(head, x, y)
    assert head.weight.grad is not None
    return [head.weight.grad.coalesce().indices()[0] + head.shards.first, *found]


def refused(rank: int, w: Tensor, x: Tensor, y: Tensor, group: Any) -> str:
    """What each rank raises where the last one's labels do not fit."""
    if dist.get_world_size() > 1:
        with pytest.raises(ValueError, match=r"ranks for 1 classes, 1 on each, .*; use fewer"):
            PartialFC(D, 1, class_group=group)
    head = make(w, group)
    if rank == dist.get_world_size() - 1:
        y = torch.full_like(y, V)
    try:
        head(x, y)
    except (IndexError, RuntimeError) as error:
        return type(error).__name__
    return ""


def exchanges(w: Tensor, x: Tensor, y: Tensor, group: Any) -> list[list[str]]:
    """The collective calls of a forward in chunks of two rows, and of its backward."""
    calls: list[str] = []

    def noted(name: str) -> Any:
        call = getattr(dist, name)
        return lambda *args, **options: (calls.append(name), call(*args, **options))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_reduce", "broadcast", "reduce_scatter_tensor"):
            patch.setattr(dist, name, noted(name))
        loss = make(w, group, **CHUNKS)(x.clone().requires_grad_(), y)
        forward, calls[:] = list(calls), []
        loss.backward()
    return [forward, calls]


def clipped(head: PartialFC, x: Tensor, y: Tensor) -> list[Tensor]:
    """The norm of all gradients, and what is left of those of a parameter that all ranks have."""
    head(x, y).backward()
    shared = nn.Parameter(torch.ones(3, dtype=x.dtype))
    shared.grad = torch.full_like(shared, 2.0)
    norm = optim.clip_grad_norm_([shared, *head.parameters()], 0.1)
    assert head.weight.grad is not None
    return [norm, shared.grad, head.weight.grad.to_dense()]


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


ROW_OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: optim.RowSGD(parameters, 0.3, 0.9, 0.01),
    "adamw": lambda parameters: optim.RowAdamW(parameters, 0.1),
}


def overflowing(
    rank: int, make_optimizer: Any, w: Tensor, x: Tensor, y: Tensor, group: Any
) -> dict[str, list[Any]]:
    """Backbone, centres and scale after each of three steps; one rank overflows in the second."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    torch.manual_seed(1)
    body: Any = nn.parallel.DistributedDataParallel(nn.Linear(D, D, dtype=x.dtype))
    head = make(w, group, sample_rate=0.5)
    optimizers = [torch.optim.SGD(body.parameters(), 0.1), make_optimizer(head.parameters())]
    scaler = ShardedGradScaler("cpu", init_scale=8.0, process_group=group)
    found: dict[str, list[Any]] = {"body": [], "centres": [], "scale": []}
    for step in range(3):
        for o in optimizers:
            o.zero_grad()
        scaler.scale(head(body(x), y)).backward()
        assert head.weight.grad is not None
        assert head.weight.grad.is_sparse
        if step == 1 and rank == dist.get_world_size() - 1:
            head.weight.grad._values()[0, :2] = torch.tensor([torch.inf, torch.nan])
        for o in optimizers:
            scaler.unscale_(o)
        optim.clip_grad_norm_([*body.parameters(), *head.parameters()], 1.0)
        for o in optimizers:
            scaler.step(o)
        scaler.update()
        found["body"].append(body.module.weight.detach().clone())
        found["centres"].append(head.weight.detach().clone())
        found["scale"].append(scaler.get_scale())
    return found


# Any split of the classes: even, one class on a rank, most of them on another.
SPLITS = {1: [V], 2: [4, 9], 3: [5, 1, 7], 4: [2, 3, 1, 7]}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum", "softcap": 3.0},
    "rows": {"reduction": "none", "lse_square_scale": 0.1},
    "smoothing": {"label_smoothing": 0.2, "lse_square_scale": 0.1},
    "outputs": {"outputs": ("logsumexp", "log_prob", "entropy", "argmax", "correct")},
    "two sweeps": {"options": lossops.LinearLossOptions(schedule="two_sweeps")},
    "chunks": {"options": lossops.LinearLossOptions(chunk_rows=2)},
    "weights": {"weight": torch.linspace(0.2, 3.0, V, dtype=torch.float64)},
    "weights, rows": {"weight": torch.linspace(0.2, 3.0, V), "reduction": "none"},
    "weights, smoothing": {
        "weight": torch.linspace(0.2, 3.0, V, dtype=torch.float64), "label_smoothing": 0.2,
        "options": lossops.LinearLossOptions(chunk_rows=4),
    },
    "weights, smoothing, two sweeps": {
        "weight": torch.linspace(0.2, 3.0, V, dtype=torch.float64), "label_smoothing": 0.2,
        "options": lossops.LinearLossOptions(schedule="two_sweeps"),
    },
    "probabilities": {},
    "probabilities, rows": {"reduction": "none", "softcap": 3.0},
    "probabilities, chunks": {"options": lossops.LinearLossOptions(chunk_rows=2)},
    "probabilities, weights, smoothing": {
        "weight": torch.linspace(0.2, 3.0, V, dtype=torch.float64), "label_smoothing": 0.2,
        "lse_square_scale": 0.1, "options": lossops.LinearLossOptions(chunk_rows=2),
    },
    "probabilities, smoothing, two sweeps": {
        "label_smoothing": 0.2, "options": lossops.LinearLossOptions(schedule="two_sweeps"),
    },
    "probabilities, outputs": {"outputs": ("logsumexp", "entropy", "argmax")},
}  # fmt: skip


def vocabulary(
    name: str, x: Tensor, w: Tensor, y: Tensor, part: slice, group: Any = None
) -> list[Tensor]:
    """linear_cross_entropy of all classes from some of them: results and gradients."""
    if name.startswith("probabilities"):  # whose sums are not 1
        y = torch.linspace(0.0, 1.0, len(x) * V, dtype=x.dtype).reshape(len(x), V)[:, part]
    b = torch.linspace(-1, 1, V, dtype=w.dtype)
    leaves = [x, w[part], b[part], torch.tensor(1.3, dtype=w.dtype)]
    leaves = [t.clone().requires_grad_() for t in leaves]
    weights = torch.linspace(0.5, 2.0, len(x), dtype=x.dtype)
    options = {n: o[part] if n == "weight" else o for n, o in HEADS[name].items()}
    found = lossops.linear_cross_entropy(
        leaves[0], leaves[1], y, linear_bias=leaves[2], logit_scale=leaves[3],
        sample_weight=weights, class_group=group, **options,
    )  # fmt: skip
    values = [t for t in found if t is not None] if isinstance(found, tuple) else [found]
    return with_gradients(values, leaves)


def with_gradients(values: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Results, and the gradients of a sum in which each value has a weight of its own."""
    smooth = [t for t in values if t.requires_grad]
    total = sum((t * torch.linspace(1, 2, t.numel()).reshape(t.shape)).sum() for t in smooth)
    return [*(t.detach() for t in values), *torch.autograd.grad(total, leaves)]


def focal(s: lossops.RowStatistics, gamma: Tensor | None = None) -> Tensor:
    return -((2.0 if gamma is None else gamma) * s.log_1mp).exp() * s.log_p


def several(s: lossops.RowStatistics) -> Tensor:
    return -torch.where(s.target > -torch.inf, s.log_p, 0.0).sum(1)


def everything(s: lossops.RowStatistics) -> Tensor:
    found = s.lse + s.entropy + s.variance + s.max - s.runner_up + s.lse_at(2) + s.lse_up_to(0.5)
    return found + s.softplus + s.stable_sum + s.sum + s.moment + s.weighted_sum - s.target


EVERY = (
    "lse", "entropy", "variance", "max", "runner_up", "lse@2", "lse<0.5", "softplus",
    "stable_sum", "sum", "sumsq", "weighted_sum",
)  # fmt: skip
CHUNKS = {"options": lossops.LinearLossOptions(chunk_rows=2)}
OF_CLASSES = ("weight", "class_vector")
VECTOR = torch.linspace(-1.0, 2.0, V, dtype=torch.float64)
FUNCTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "focal": (focal, {"softcap": 3.0}),
    "chunks": (focal, {"weight": torch.linspace(0.2, 3.0, V), **CHUNKS}),
    "rows": (focal, {"weight": torch.linspace(0.2, 3.0, V), "reduction": "none"}),
    "learned": (focal, {"parameters": True, **CHUNKS}),
    "learned, rows": (focal, {"parameters": True, "reduction": "none"}),
    "several": (several, {"reduction": "sum", **CHUNKS}),
    "everything": (everything, {"names": EVERY, "class_vector": VECTOR, **CHUNKS}),
    "at once": (everything, {"names": EVERY, "class_vector": VECTOR, "rowwise": False}),
    "no target": (lambda s: s.lse - s.sum, {"names": ("lse", "sum")}),
}  # fmt: skip


def function_of_statistics(
    name: str, x: Tensor, w: Tensor, y: Tensor, part: slice, group: Any = None
) -> list[Tensor]:
    """linear_loss of all classes from some of them: results and gradients, dw the last."""
    function, given = FUNCTIONS[name]
    options = {n: o[part] if n in OF_CLASSES else o for n, o in given.items()}
    leaves = [t.clone().requires_grad_() for t in (x, w[part])]
    gamma = torch.linspace(1.0, 2.0, len(x), dtype=x.dtype, requires_grad=True)
    scale = torch.tensor(1.3, dtype=x.dtype, requires_grad=True)
    if options.pop("parameters", False):
        options |= {"parameters": [scale], "row_inputs": {"gamma": gamma}}
        leaves = [gamma, scale, *leaves]
    target: Tensor | None = y
    if name == "several":
        target = torch.stack([y.clamp_min(-1), (5 * y + 3) % V, torch.full_like(y, -1)], 1)
    if name == "no target":
        target = None

    def loss(s: lossops.RowStatistics, **rows: Tensor) -> Tensor:
        return function(s, **rows) * (scale if "parameters" in options else 1.0)

    found = lossops.linear_loss(*leaves[-2:], target, loss, class_group=group, **options)
    return with_gradients([found], leaves)


def all_statistics(x: Tensor, w: Tensor, y: Tensor, part: slice, group: Any = None) -> list[Tensor]:
    """linear_statistics where many classes have equal logits, here and on other ranks."""
    w = w[torch.arange(V) % 4].round()
    leaves = [t.clone().requires_grad_() for t in (x.round(), w[part])]
    teacher = torch.linspace(0.0, 1.0, len(x) * V, dtype=x.dtype).reshape(len(x), V).softmax(1)
    stats = lossops.linear_statistics(
        leaves[0].unsqueeze(1), leaves[1], y.unsqueeze(1), names=("max", "runner_up", "entropy",
        "teacher", "weighted_sum"), teacher=teacher[:, part].unsqueeze(1),
        class_vector=VECTOR[part], class_group=group,
    )  # fmt: skip
    named = [stats.argmax, stats.runner_up_index, stats.logsumexp, stats.teacher]
    named += [stats.weighted_sum, stats.max, stats.runner_up, torch.tensor(stats.num_classes)]
    assert stats.logsumexp.shape == (len(x), 1)
    # Equal logits share the gradient of a largest one among them in no agreed way.
    return [t.detach() for t in named] + with_gradients(named[2:5], leaves)[3:]


def log_probabilities(x: Tensor, w: Tensor, y: Tensor, group: Any = None) -> list[Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    found = lossops.linear_log_prob(x, w, y, entropy=True, class_group=group)
    (found[0] + 0.3 * found[1]).sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    return [*(t.detach() for t in found), x.grad, w.grad]


BY_CLASS = ("log_prior",)
RECIPES = [n for n, r in lossops.catalogue.RECIPES.items() if "class_group" in r.head]


def recipe(name: str, split: list[int], rank: int, group: Any = None) -> list[Tensor]:
    """A loss of the catalogue from the classes of one rank: value and gradients."""
    case = Case(name, classes=sum(split), rows=None if DENSE[name].lead != (11,) else 6)
    mine = slice(sum(split[:rank]), sum(split[: rank + 1]))
    case.extras = {n: t[mine] if n in BY_CLASS else t for n, t in case.extras.items()}
    x, w = case.leaves
    leaves = [t.clone().requires_grad_() for t in (x, w[mine])]
    loss = case.ours(*leaves, class_group=group)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def without_a_merge(split: list[int], rank: int, group: Any) -> str:
    """What is said of a statistic that shards of the classes cannot have."""
    try:
        recipe("dual_focal", split, rank, group)
    except ValueError as error:
        return str(error)
    return ""


def dtensors(x: Tensor, w: Tensor, y: Tensor) -> list[Tensor]:
    """The same with w, b and x as DTensors; what other layouts say."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    leaves = [distribute_tensor(x, mesh, [Replicate()])]
    leaves += [distribute_tensor(t, mesh, [Shard(0)]) for t in (w, VECTOR)]
    leaves = [t.detach().requires_grad_() for t in leaves]
    loss = lossops.linear_cross_entropy(*leaves[:2], y, linear_bias=leaves[2])
    loss.backward()
    for layout in (Shard(1), Replicate()):
        with pytest.raises(ValueError, match="must be sharded by class over a mesh of one dim"):
            lossops.linear_cross_entropy(x, distribute_tensor(w, mesh, [layout]), y)
    with pytest.raises(ValueError, match="input as a DTensor must be replicated"):
        lossops.linear_cross_entropy(distribute_tensor(x, mesh, [Shard(1)]), leaves[1], y)
    return [loss.detach(), *(t.grad.full_tensor() for t in leaves)]  # type: ignore[union-attr]


def unfit(w: Tensor, x: Tensor, y: Tensor, group: Any) -> list[str]:
    """What each rank raises where the last one's weight does not fit, or nobody's does."""
    last = dist.get_rank() == dist.get_world_size() - 1
    raised = []
    for call in (
        lambda: lossops.linear_cross_entropy(x, w[:, 1:] if last else w, y, class_group=group),
        lambda: lossops.linear_loss(
            x, w, y, focal, class_group=group, weight=torch.ones(V + 1 if last else len(w))
        ),
        lambda: lossops.linear_statistics(
            x, w, y, class_group=group, class_vector=torch.ones(V + 1 if last else len(w))
        ),
        lambda: lossops.linear_statistics(
            x,
            w,
            y,
            names=("teacher",),
            class_group=group,
            teacher=torch.ones(len(x), V + 1 if last else len(w)),
        ),
        lambda: lossops.linear_cross_entropy(
            x, w, torch.ones(len(x), V + 1 if last else len(w)), class_group=group
        ),
        lambda: lossops.linear_cross_entropy(
            x, w, torch.ones(len(x), len(w), requires_grad=last), class_group=group
        ),
        lambda: lossops.linear_cross_entropy(x, w, y.double(), class_group=group),
        lambda: lossops.linear_loss(x, w, y, focal, near_threshold="auto", class_group=group),
        lambda: lossops.linear_cross_entropy(x, w, y + 99, class_group=group),
        lambda: lossops.linear_loss(x, w, y + 99, focal, class_group=group),
        lambda: lossops.linear_statistics(x, w, y + 99, class_group=group),
    ):
        try:
            call()
        except (IndexError, ValueError, RuntimeError) as error:
            raised.append(type(error).__name__)
    return raised


def folder_of_all(rank: int) -> str:
    """A new folder, the same one on every rank."""
    paths = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(paths)
    return paths[0]


def in_files(rank: int, w: Tensor, x: Tensor, y: Tensor, group: Any) -> dict[str, Any]:
    """Centres after each of two runs, in files of one folder and in memory; who is refused."""
    folder = Path(folder_of_all(rank))
    shards = shards_of(V, group)

    def run(path: Path | None, start: Tensor | None, saved: Any) -> tuple[Tensor, Any]:
        file = None if path is None else path / "centres"
        head = PartialFC(D, V, class_group=group, weight_file=file, dtype=w.dtype)
        optimizer = optim.RowSGD(head.parameters(), 0.3, 0.9, state_dir=path)
        if start is not None:
            head.load_state_dict({"weight": start}, strict=False)
        if saved is not None:
            optimizer.load_state_dict(saved)
        for _ in range(3):
            optimizer.zero_grad()
            head(x, y).backward()
            optimizer.step()
        return head.weight.detach().clone(), copy.deepcopy(optimizer.state_dict())

    found: dict[str, Any] = {}
    for name, path in (("files", folder), ("memory", None)):
        first, state = run(path, w[shards.first : shards.end], None)
        found[name] = [first, run(path, None if path else first, state)[0]]
    alone = nn.Parameter(w.clone())  # in no group that lossops knows of
    alone.grad = torch.ones_like(alone)
    optimizer = optim.RowSGD([alone], 0.3, 0.9, state_dir=folder)
    for turn in range(len(shards.counts)):
        if rank == turn:
            try:
                optimizer.step()
            except ValueError as error:
                found["told"] = str(error)
        dist.barrier()
    return found


def checkpointed(rank: int, w: Tensor, x: Tensor, y: Tensor, group: Any) -> Any:
    """Trained on all ranks, saved, loaded on one rank less, and gone on with there and here."""
    import torch.distributed.checkpoint as dcp

    size = dist.get_world_size()
    path = folder_of_all(rank)

    def make_pair(group: Any, weight: Tensor) -> tuple[PartialFC, optim.RowSGD]:
        head = make(weight, group, sample_rate=0.4, seed=3)
        return head, optim.RowSGD(head.parameters(), 0.3, 0.9, 0.01, "exact")

    def go(head: PartialFC, optimizer: optim.RowSGD, steps: int) -> list[Tensor]:
        for _ in range(steps):
            optimizer.zero_grad()
            head(x, y).backward()
            optimizer.step()
        state = optimizer.row_state(head.weight)
        return [t.detach().clone() for t in (head.weight, *state.values())]

    head, optimizer = make_pair(group, w)
    saved = go(head, optimizer, 5)
    # DCP itself complains of nothing but a warning where there is one rank.
    dcp.save({"head": lossops.ShardedState(head, optimizer)}, checkpoint_id=path)
    here = go(head, optimizer, 3)
    again, other = make_pair(group, torch.zeros_like(w))
    dcp.load({"head": lossops.ShardedState(again, other)}, checkpoint_id=path)
    assert all(torch.equal(a, b) for a, b in zip(go(again, other, 3), here, strict=True))
    fewer = dist.new_group(list(range(max(1, size - 1))))
    loaded = None
    if rank < max(1, size - 1):
        third, last = make_pair(fewer, torch.zeros_like(w))
        dcp.load(
            {"head": lossops.ShardedState(third, last)}, checkpoint_id=path,
            process_group=fewer,
        )  # fmt: skip
        assert third.step == 5
        state = last.row_state(third.weight)
        loaded = [t.detach().clone() for t in (third.weight, *state.values())]
        assert torch.equal(last.steps(third.weight), optimizer.steps(head.weight)[:5])
        assert all(t.isfinite().all() for t in go(third, last, 2))
    dist.barrier()
    return saved, loaded


def grown(rank: int, w: Tensor, x: Tensor, y: Tensor, group: Any) -> list[Any]:
    """Trained and saved by one rank less, with moments and a learned scale; loaded by all."""
    import torch.distributed.checkpoint as dcp

    path, those = folder_of_all(rank), list(range(max(1, dist.get_world_size() - 1)))
    fewer = dist.new_group(those)

    def make_pair(some: Any, weight: Tensor) -> tuple[PartialFC, optim.RowAdamW]:
        head = make(weight, some, sample_rate=0.4, learn_scale=True)
        return head, optim.RowAdamW([head.weight], 0.1)

    def all_of(head: PartialFC, optimizer: optim.RowAdamW) -> list[Any]:
        state = optimizer.row_state(head.weight)
        rows = [t.detach().clone() for t in (head.weight, *state.values())]
        assert head.log_scale is not None
        return [rows, head.log_scale.item(), head.step]

    saved = None
    if rank in those:
        head, optimizer = make_pair(fewer, w)
        for _ in range(3):
            head(x, y).backward()
            optimizer.step()
        assert head.log_scale is not None
        head.log_scale.data.fill_(1.5)
        saved = all_of(head, optimizer)
        state = {"head": lossops.ShardedState(head, optimizer)}
        dcp.save(state, checkpoint_id=path, process_group=fewer)
    dist.barrier()
    again, other = make_pair(group, torch.zeros_like(w))
    dcp.load({"head": lossops.ShardedState(again, other)}, checkpoint_id=path)
    return [saved, all_of(again, other)]


def work(rank: int, rows: list[int]) -> dict[str, Any]:
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
    for name in RATES:
        found[name] = sampled(name, w, x[part], y[part], group)
    found["trained"] = train(make(w, group), x[part], y[part], ddp=True)
    found["clipped"] = clipped(make(w, group, sparse=True), x[part], y[part])
    for name, make_optimizer in ROW_OPTIMIZERS.items():
        found[f"overflow-{name}"] = overflowing(rank, make_optimizer, w, x[part], y[part], group)
    found["topk"] = tuple(make(w, group).topk(x, 20))
    found["exchanges"] = exchanges(w, x[part], y[part], group)
    found["half"] = gradients(make(w.bfloat16(), group, margin=MARGINS["cosface"]),
                              x[part].bfloat16(), y[part])  # fmt: skip
    found["empty"] = gradients(make(w, group, sample_rate=0.5), x[:0], y[:0])
    found["refused"] = refused(rank, w, x[part], y[part], group)
    learned = make(w, group, learn_scale=True, margin=MARGINS["cosface"])
    learned(x[part], y[part]).backward()
    assert learned.log_scale is not None
    found["scale"] = learned.log_scale.grad
    split = SPLITS[len(rows)]
    mine = slice(sum(split[:rank]), sum(split[: rank + 1]))
    for name in HEADS:
        found[f"head-{name}"] = vocabulary(name, x, w, y, mine, group)
    for name in FUNCTIONS:
        found[f"function-{name}"] = function_of_statistics(name, x, w, y, mine, group)
    for name in RECIPES:
        if name != "dual_focal":
            found[f"recipe-{name}"] = recipe(name, split, rank, group)
    found["unmerged"] = without_a_merge(split, rank, group)
    found["statistics"] = all_statistics(x, w, y, mine, group)
    found["log_prob"] = log_probabilities(x, w[mine], y, group)
    found["dtensor"] = dtensors(x, w, y)
    found["files"] = in_files(rank, w, x[part], y[part], group)
    found["checkpoint"] = checkpointed(rank, w, x[part], y[part], group)
    found["grown"] = grown(rank, w, x[part], y[part], group)
    found["unfit"] = unfit(w[mine], x, y, group)
    return found


@pytest.fixture(scope="module", params=ROWS, ids="world{}".format)
def world(request: pytest.FixtureRequest) -> tuple[list[int], list[dict[str, Any]]]:
    """Rows of each rank, and what each rank found."""
    rows = ROWS[request.param]
    return rows, from_ranks(work, rows)


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


@pytest.mark.parametrize("name", RATES)
def test_a_sample_of_each_shard(world: World, name: str) -> None:
    rows, ranks = world
    x, w, y = batch(rows)
    ids = torch.cat([rank[name][0] for rank in ranks])
    assert set(y[y >= 0].tolist()) <= set(ids.tolist())
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    cosines = F.normalize(x, dim=1) @ F.normalize(w, dim=1).T
    kept = torch.zeros(V, dtype=torch.bool).index_fill(0, ids, True)
    own = torch.zeros_like(cosines, dtype=torch.bool).scatter(1, y.clamp_min(0)[:, None], True)
    z = 8.0 * torch.where(own, cosines - 0.3, cosines).masked_fill(~kept, -torch.inf)
    loss = F.cross_entropy(torch.where(y[:, None] < 0, 0.0, z), y)
    expected = [loss.detach(), *torch.autograd.grad(loss, (x, w))]
    held(rows, [rank[name][1:] for rank in ranks], expected)


@pytest.mark.parametrize("name", RATES)
def test_a_shard_draws_the_same_whatever_the_others_are(world: World, name: str) -> None:
    # A draw is a function of seed, step and the shard's first class. There are as many as rows of
    # all ranks, whose targets may be anywhere, where these are more than the rate asks for.
    from lossops.reference_sampling import stream_key

    rows, ranks = world
    _, _, y = batch(rows)
    share = -(-V // len(rows))
    for r, rank in enumerate(ranks):
        first, count = r * share, min(share, V - r * share)
        local = torch.where((y >= first) & (y < first + count), y - first, -1)
        size = min(count, max(len(y), int(RATES[name] * count)))
        expected = sample_keeping(local, count, size, stream_key(7, 3, first)) + first
        assert torch.equal(rank[name][0], expected)


def test_ddp_beside_the_head_trains_as_one_process(world: World) -> None:
    rows, ranks = world
    x, w, y = batch(rows)
    # DDP means over ranks the gradients of each rank's part of the loss of all.
    body, centres = train(make(w), x, y, ddp=False)
    for rank in ranks:
        torch.testing.assert_close(rank["trained"][0], body, rtol=1e-8, atol=1e-11)
    found = torch.cat([rank["trained"][1] for rank in ranks])
    torch.testing.assert_close(found, centres, rtol=1e-8, atol=1e-11)


def test_gradients_are_clipped_by_the_norm_of_all_ranks(world: World) -> None:
    rows, ranks = world
    x, w, y = batch(rows)
    norm, shared, centres = clipped(make(w), x, y)
    for rank in ranks:
        torch.testing.assert_close(rank["clipped"][:2], [norm, shared])
        assert torch.equal(rank["clipped"][1], ranks[0]["clipped"][1])
    torch.testing.assert_close(torch.cat([rank["clipped"][2] for rank in ranks]), centres)


@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
def test_what_overflows_on_one_rank_all_ranks_skip(world: World, name: str) -> None:
    _, ranks = world
    key = f"overflow-{name}"
    for found in (rank[key] for rank in ranks):
        assert found["scale"] == [8.0, 4.0, 4.0]
        for before, skipped, after in (found["body"], found["centres"]):
            assert torch.equal(before, skipped)  # the joint norm is NaN: the backbone has zeros
            assert after.isfinite().all()
            assert not torch.equal(skipped, after)
        assert torch.equal(torch.stack(found["body"]), torch.stack(ranks[0][key]["body"]))


def test_one_exchange_for_each_chunk(world: World) -> None:
    # Numbers of rows, features, labels; then the statistics of two of the rows that count each.
    rows, ranks = world
    chunks = -(-(sum(rows) - 1) // 2)
    for rank in ranks:
        assert rank["exchanges"] == [["all_gather"] * (3 + chunks), ["all_reduce"]]


def test_sharded_in_half_precision(world: World) -> None:
    rows, ranks = world
    x, w, y = batch(rows, torch.bfloat16)
    loss, dx, dw = gradients(make(w, margin=MARGINS["cosface"]), x, y)
    found = [rank["half"] for rank in ranks]
    for other, *_ in found:
        assert other.dtype == torch.float32
        torch.testing.assert_close(other, loss)
    once = {"rtol": 2.0**-6, "atol": 2.0**-9}  # a few roundings, to the ranks times the gradient
    torch.testing.assert_close(torch.cat([f[1] for f in found]) / len(rows), dx, **once)
    torch.testing.assert_close(torch.cat([f[2] for f in found]), dw, **once)


def test_a_batch_without_rows_on_any_rank(world: World) -> None:
    _, ranks = world
    for loss, dx, dw in (rank["empty"] for rank in ranks):
        assert loss == 0
        assert dx.shape == (0, D)
        assert not dw.any()


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


@pytest.mark.parametrize("name", HEADS)
def test_a_vocabulary_over_ranks_is_whole(world: World, name: str) -> None:
    rows, ranks = world
    x, w, y = batch(rows)
    *values, dx, dw, db, dscale = vocabulary(name, x, w, y, slice(None))
    found = [rank[f"head-{name}"] for rank in ranks]
    for *others, dx_rank, _, _, dscale_rank in found:
        for other, value in zip(others, values, strict=True):
            torch.testing.assert_close(other, value)
        for other, own in zip(others, found[0], strict=False):
            assert torch.equal(other, own), "every rank has the same bits"
        torch.testing.assert_close(dx_rank, dx, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(dscale_rank, dscale, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat([f[-3] for f in found]), dw, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat([f[-2] for f in found]), db, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*FUNCTIONS, "statistics"])
def test_functions_of_statistics_over_ranks_are_whole(world: World, name: str) -> None:
    rows, ranks = world
    x, w, y = batch(rows)
    if name == "statistics":
        *values, dw = all_statistics(x, w, y, slice(None))
        found = [rank[name] for rank in ranks]
    else:
        *values, dw = function_of_statistics(name, x, w, y, slice(None))
        found = [rank[f"function-{name}"] for rank in ranks]
    for *others, _ in found:
        for other, value in zip(others, values, strict=True):
            torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-12)
        for other, own in zip(others, found[0], strict=False):
            assert torch.equal(other, own), "every rank has the same bits"
    torch.testing.assert_close(torch.cat([f[-1] for f in found]), dw, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in RECIPES if n != "dual_focal"])
def test_catalogue_over_ranks(world: World, name: str) -> None:
    _, ranks = world
    *values, dw = recipe(name, [V], 0)
    for rank in ranks:
        torch.testing.assert_close(rank[f"recipe-{name}"][:-1], values, rtol=1e-9, atol=1e-12)
    found = torch.cat([rank[f"recipe-{name}"][-1] for rank in ranks])
    torch.testing.assert_close(found, dw, rtol=1e-9, atol=1e-12)


def test_a_loss_that_shards_cannot_have_says_so(world: World) -> None:
    rows, ranks = world
    for rank in ranks:
        assert ("'below_target' cannot be merged" in rank["unmerged"]) == (len(rows) > 1)


def test_log_probabilities_over_ranks(world: World) -> None:
    rows, ranks = world
    x, w, y = batch(rows)
    *values, dw = log_probabilities(x, w, y)
    for rank in ranks:
        for found, value in zip(rank["log_prob"][:3], values, strict=True):
            torch.testing.assert_close(found, value)
    torch.testing.assert_close(torch.cat([rank["log_prob"][3] for rank in ranks]), dw)


def test_dtensors_sharded_by_class(world: World) -> None:
    rows, ranks = world
    x, w, y = batch(rows)
    leaves = [t.clone().requires_grad_() for t in (x, w, VECTOR)]
    loss = lossops.linear_cross_entropy(*leaves[:2], y, linear_bias=leaves[2])
    expected = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    for rank in ranks:
        for found, value in zip(rank["dtensor"], expected, strict=True):
            torch.testing.assert_close(found, value)


def test_arguments_that_do_not_fit_all_ranks(world: World) -> None:
    _, ranks = world
    rest = ["ValueError"] * 2 + ["IndexError"] * 3
    for rank in ranks[:-1]:
        assert rank["unfit"] == ["RuntimeError"] * 6 + rest
    assert ranks[-1]["unfit"] == ["ValueError"] * 6 + rest


def test_ranks_do_not_share_files(world: World) -> None:
    _, ranks = world
    for r, rank in enumerate(ranks):
        files = rank["files"]
        for filed, plain in zip(files["files"], files["memory"], strict=True):
            assert torch.equal(filed, plain)
        if r:
            assert "0.momentum_buffer must have one owner at a time" in files["told"]
        else:
            assert "told" not in files


def test_a_checkpoint_loads_on_another_number_of_ranks(world: World) -> None:
    _, ranks = world
    saved = zip(*(rank["checkpoint"][0] for rank in ranks), strict=True)
    loaded = zip(
        *(r["checkpoint"][1] for r in ranks if r["checkpoint"][1] is not None), strict=True
    )
    for before, after in zip(saved, loaded, strict=True):
        assert torch.equal(torch.cat(before), torch.cat(after))
        assert len(torch.cat(after)) == V


def test_a_checkpoint_loads_on_more_ranks(world: World) -> None:
    _, ranks = world
    before = [rank["grown"][0] for rank in ranks if rank["grown"][0] is not None]
    after = [rank["grown"][1] for rank in ranks]
    assert len(before) == max(1, len(ranks) - 1)
    for saved, loaded in zip(*(zip(*(r[0] for r in some), strict=True) for some in (before, after)),
                             strict=True):  # fmt: skip
        assert torch.equal(torch.cat(saved), torch.cat(loaded))
    for _, scale, step in after:
        assert (scale, step) == (1.5, 3)


def dying(rank: int, folder: str) -> None:
    """Rank 1 ends without a word; rank 0 notes what it is told."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=10)
    )
    x, w, y = batch([6])
    head = make(w, dist.group.WORLD)
    head(x, y).backward()
    if rank == 1:
        os._exit(0)
    try:
        head(x, y)
    except RuntimeError as error:
        Path(folder, "told").write_text(str(error), encoding="utf-8")
    os._exit(0)


def test_a_rank_that_dies_ends_the_others_with_a_message(tmp_path: Path) -> None:
    context = mp.start_processes(dying, (str(tmp_path),), 2, join=False, start_method="forkserver")
    assert context is not None
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline and any(p.is_alive() for p in context.processes):
        time.sleep(0.1)
    alive = [p for p in context.processes if p.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, "a rank waited for the dead one past its timeout"
    assert (tmp_path / "told").read_text(encoding="utf-8")
